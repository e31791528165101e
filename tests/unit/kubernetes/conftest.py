"""The overlays as kustomize renders them, each once."""

from typing import Any

import pytest

from deploy.kubernetes.check import HERE, OVERLAYS, render

Resources = list[dict[str, Any]]


@pytest.fixture(scope="session")
def rendered() -> dict[str, Resources]:
    """By overlay, e.g. `staging/gateway`."""
    return {overlay: render(HERE / overlay) for overlay in OVERLAYS}


@pytest.fixture(params=["staging", "production"])
def stage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def gateway(rendered: dict[str, Resources], stage: str) -> Resources:
    return rendered[f"{stage}/gateway"]


@pytest.fixture
def training(rendered: dict[str, Resources], stage: str) -> Resources:
    return rendered[f"{stage}/training"]


def only(resources: Resources, kind: str, name: str = "") -> dict[str, Any]:
    """The one resource of a kind, whose name begins with `name`."""
    [found] = [
        resource
        for resource in resources
        if resource["kind"] == kind and resource["metadata"]["name"].startswith(name)
    ]
    return found
