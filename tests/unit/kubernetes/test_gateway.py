"""The manifests of the gateway keep to what gateway, Ray Serve and KubeRay do."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.kubernetes.check import check, templates
from manylora_gateway.application import ENGINE, Arguments, engines
from manylora_gateway.config import GatewayConfig
from manylora_registry.config import load_config
from tests.unit.kubernetes.conftest import Resources, only


@pytest.fixture
def service(gateway: Resources) -> dict[str, Any]:
    return only(gateway, "RayService")


@pytest.fixture
def config(gateway: Resources, tmp_path: Path) -> GatewayConfig:
    file = tmp_path / "gateway.yaml"
    file.write_text(only(gateway, "ConfigMap", "manylora-gateway")["data"]["gateway.yaml"])
    return load_config(file, GatewayConfig)


@pytest.fixture
def pods(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod of each group, by component."""
    return {
        template["metadata"]["labels"]["app.kubernetes.io/component"]: template["spec"]
        for template in templates(service)
    }


def container(pod: dict[str, Any]) -> dict[str, Any]:
    """KubeRay takes the first for Ray's, and there is no other."""
    [found] = pod["containers"]
    return found


def test_every_resource_is_what_its_schema_says(gateway: Resources) -> None:
    assert [problem for resource in gateway for problem in check(resource)] == []


def test_an_unknown_field_is_noticed(service: dict[str, Any]) -> None:
    spec = service["spec"]
    assert list(check({**service, "spec": {**spec, "serveConfigV3": ""}}))
    cluster = spec["rayClusterConfig"]
    head = {**cluster["headGroupSpec"], "template": {"spec": {"containers": [], "node": "a"}}}
    changed = {**spec, "rayClusterConfig": {**cluster, "headGroupSpec": head}}
    assert list(check({**service, "spec": changed}))


def test_the_front_joins_what_serve_deploys(service: dict[str, Any], config: GatewayConfig) -> None:
    serve = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = serve.applications
    assert application.import_path == f"{engines.__module__}:{engines.__name__}"
    assert application.name == config.ray_application
    assert config.ray_address == "auto"
    [deployment] = application.deployments
    assert deployment.name == ENGINE
    file = Arguments.model_validate(application.args).config
    front = container_of(service, "front")
    assert f"manylora serve {file}" in front["args"][0]


def container_of(service: dict[str, Any], component: str) -> dict[str, Any]:
    for template in templates(service):
        if template["metadata"]["labels"]["app.kubernetes.io/component"] == component:
            return container(template["spec"])
    raise AssertionError(component)


def test_there_is_a_pod_for_each_replica_the_autoscaler_may_want(
    service: dict[str, Any], config: GatewayConfig, pods: dict[str, dict[str, Any]]
) -> None:
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    bounds = serve["applications"][0]["deployments"][0]["autoscaling_config"]
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    [group] = [group for group in groups if group["groupName"] == "engine"]
    assert (group["minReplicas"], group["maxReplicas"]) == (
        bounds["min_replicas"],
        bounds["max_replicas"],
    )
    assert bounds["target_ongoing_requests"] < config.engine.max_concurrent
    gpus = container(pods["engine"])["resources"]["limits"]["nvidia.com/gpu"]
    assert int(gpus) == config.engine.gpus
    # Everybody else is no place for a replica, which asks for a core.
    others = [service["spec"]["rayClusterConfig"]["headGroupSpec"], *groups]
    cores = [other["rayStartParams"].get("num-cpus") for other in others if other is not group]
    assert cores == ["0", "0"]


def test_a_pod_outlives_the_draining_of_the_front(
    config: GatewayConfig, pods: dict[str, dict[str, Any]]
) -> None:
    from manylora_gateway.gateway import SHUTDOWN_S

    def waits(name: str) -> int:
        return container(pods[name])["lifecycle"]["preStop"]["sleep"]["seconds"]

    front = pods["front"]["terminationGracePeriodSeconds"]
    assert front >= waits("front") + config.drain_s + SHUTDOWN_S
    for name in ("head", "engine"):
        assert waits(name) >= front
        assert pods[name]["terminationGracePeriodSeconds"] > waits(name)


def test_every_file_of_the_config_is_mounted(
    config: GatewayConfig, pods: dict[str, dict[str, Any]]
) -> None:
    def writable(name: str) -> dict[Path, bool]:
        mounts = container(pods[name])["volumeMounts"]
        return {Path(mount["mountPath"]): not mount.get("readOnly") for mount in mounts}

    def lies(path: Path, name: str) -> bool:
        """Whether it may be written to, at the innermost mount that holds it."""
        found = [mount for mount in writable(name) if path.is_relative_to(mount)]
        assert found, f"{path} is on no volume of {name}"
        return writable(name)[max(found, key=lambda mount: len(mount.parts))]

    assert config.tls is not None
    assert config.tenants is not None
    assert config.state is not None
    assert config.cache is not None
    for name in ("head", "front", "engine"):
        assert not lies(config.base, name)
        assert lies(Path("/tmp"), name)
        assert lies(Path("/var/lib/manylora"), name)
    for path in (config.tls.certificate, config.tls.key, config.tenants):
        assert not lies(path, "front")
    assert lies(config.state, "front")
    assert lies(config.cache, "engine")
    [cache] = [volume for volume in pods["engine"]["volumes"] if volume["name"] == "cache"]
    assert config.cache_gib < int(cache["emptyDir"]["sizeLimit"].removesuffix("Gi"))


def test_ports_probes_services_and_policies_speak_of_the_same_ports(
    config: GatewayConfig, gateway: Resources, service: dict[str, Any]
) -> None:
    front = container_of(service, "front")
    ports = {port["name"]: port["containerPort"] for port in front["ports"]}
    listen = config.listen
    assert {name: f"0.0.0.0:{port}" for name, port in ports.items()} == {
        "grpc": listen.inference,
        "admin": listen.admin,
        "http": listen.http,
        "metrics": listen.metrics,
        "health": listen.health,
    }
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert front[probe]["httpGet"]["port"] == "health"
    offered = {
        port["targetPort"]: (port["port"], resource["metadata"]["name"])
        for resource in gateway
        if resource["kind"] == "Service"
        for port in resource["spec"]["ports"]
    }
    assert offered == {
        "grpc": (ports["grpc"], "manylora"),
        "http": (ports["http"], "manylora"),
        "admin": (ports["admin"], "manylora-admin"),
    }
    let_in = {
        port["port"]: next(iter(rule["from"][0]["namespaceSelector"]["matchLabels"]))
        for policy in ("manylora-front", "manylora-monitoring")
        for rule in only(gateway, "NetworkPolicy", policy)["spec"]["ingress"]
        for port in rule["ports"]
    }
    assert let_in == {
        "grpc": "manylora.access/clients",
        "http": "manylora.access/clients",
        "admin": "manylora.access/operators",
        "metrics": "manylora.access/monitoring",
    }


def test_a_changed_config_is_a_changed_cluster(
    gateway: Resources, pods: dict[str, dict[str, Any]]
) -> None:
    name = only(gateway, "ConfigMap", "manylora-gateway")["metadata"]["name"]
    assert name != "manylora-gateway"
    for pod in pods.values():
        [volume] = [volume for volume in pod["volumes"] if volume["name"] == "config"]
        assert volume["configMap"]["name"] == name


def test_budgets_and_monitors_select_pods_that_there_are(
    gateway: Resources, service: dict[str, Any]
) -> None:
    labels = [template["metadata"]["labels"] for template in templates(service)]

    def selected(selector: dict[str, Any]) -> int:
        wanted = selector["matchLabels"].items()
        return sum(wanted <= those.items() for those in labels)

    budgets = [resource for resource in gateway if resource["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == len(labels)
    for budget in budgets:
        assert selected(budget["spec"]["selector"]) == 1
        # Of pods without a scale Kubernetes knows no other budget.
        assert isinstance(budget["spec"]["minAvailable"], int)
    monitor = only(gateway, "PodMonitor")["spec"]
    assert selected(monitor["selector"]) == len(labels)
    [endpoint] = monitor["podMetricsEndpoints"]
    for template in templates(service):
        ports = container(template["spec"])["ports"]
        assert endpoint["port"] in {port["name"] for port in ports}
