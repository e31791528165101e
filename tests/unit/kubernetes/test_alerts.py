"""Alerts speak of metrics and reasons that there are, and operators are told of each alert."""

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from prometheus_client import generate_latest

from manylora_gateway import errors
from manylora_gateway.metrics import Metrics
from tests.unit.gateway.test_observing import scraped_names

ROOT = Path(__file__).parents[3]
ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/alerts/gateway.yaml").read_text())["spec"]["groups"]
    for rule in group["rules"]
]
KUBELET = {"kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"}
"""As every cluster has them."""
RAY_SOURCES = ("serve/_private/deployment_state.py", "dashboard/modules/reporter/reporter_agent.py")


@pytest.fixture(params=ALERTS, ids=lambda alert: alert["alert"])
def alert(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def test_an_alert_has_its_metrics(alert: dict[str, Any]) -> None:
    own = set(re.findall(r"manylora_[a-z_]+", alert["expr"]))
    assert own <= scraped_names()
    of_ray = set(re.findall(r"ray_([a-z_]+)", alert["expr"]))
    sources = "".join((Path(ray.__path__[0]) / source).read_text() for source in RAY_SOURCES)
    assert all(f'"{name}"' in sources for name in of_ray)
    of_the_kubelet = set(re.findall(r"kubelet_[a-z_]+", alert["expr"]))
    assert of_the_kubelet <= KUBELET
    assert own | of_ray | of_the_kubelet


def test_an_alert_names_reasons_and_codes_that_there_are(alert: dict[str, Any]) -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    known = {
        value
        for kind in kinds
        if issubclass(kind, errors.GatewayError)
        for value in (kind.reason, kind.status)
    }
    named = re.findall(r'(?:reason|code)=~?"([A-Z_|]+)"', alert["expr"])
    assert {word for words in named for word in words.split("|")} <= known


def test_a_counter_is_there_before_what_an_alert_counts_happens(alert: dict[str, Any]) -> None:
    # Prometheus sees no increase where a series begins.
    scrape = generate_latest(Metrics().registry).decode()
    for counter in re.findall(r'manylora_[a-z_]+_total\{\w+="\w+"\}', alert["expr"]):
        assert f"{counter} 0.0\n" in scrape


def test_operators_are_told_of_every_alert_and_of_no_other() -> None:
    told = re.findall(
        r"^### (Manylora\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE
    )
    assert sorted(told) == sorted(alert["alert"] for alert in ALERTS)
