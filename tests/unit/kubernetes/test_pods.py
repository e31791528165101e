"""What every pod keeps to, of the gateway and of training."""

from typing import Any

import pytest

from deploy.kubernetes.check import templates
from tests.unit.kubernetes.conftest import Resources


@pytest.fixture(params=["staging/gateway", "staging/training", "production/gateway"])
def resources(rendered: dict[str, Resources], request: pytest.FixtureRequest) -> Resources:
    return rendered[request.param]


def pods(resources: Resources) -> list[dict[str, Any]]:
    return [template["spec"] for resource in resources for template in templates(resource)]


def test_no_pod_is_root_or_writes_outside_of_its_volumes(resources: Resources) -> None:
    assert len(pods(resources)) >= 2
    for pod in pods(resources):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"]
            assert not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_every_container_says_what_it_needs_and_how_it_does(resources: Resources) -> None:
    for pod in pods(resources):
        for container in pod["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            memory = container["resources"]["limits"]["memory"]
            assert memory == container["resources"]["requests"]["memory"]
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
            assert ":" in container["image"].rpartition("/")[2], "an image without a tag"


def test_secrets_are_named_and_never_told(resources: Resources) -> None:
    assert not [resource for resource in resources if resource["kind"] == "Secret"]
    for pod in pods(resources):
        for container in pod["containers"]:
            assert {"secretRef": {"name": "manylora-registry"}} in container["envFrom"]
            for variable in container.get("env", []):
                assert not {"TOKEN", "PASSWORD", "SECRET", "KEY"} & set(variable["name"].split("_"))


def test_every_config_map_that_is_named_is_there(resources: Resources) -> None:
    there = {
        resource["metadata"]["name"] for resource in resources if resource["kind"] == "ConfigMap"
    }
    named = {
        source["configMapRef"]["name"]
        for pod in pods(resources)
        for container in pod["containers"]
        for source in container["envFrom"]
        if "configMapRef" in source
    } | {
        volume["configMap"]["name"]
        for pod in pods(resources)
        for volume in pod["volumes"]
        if "configMap" in volume
    }
    assert named == there
