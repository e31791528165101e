"""The resources of KubeRay and of the Prometheus Operator, as far as the manifests use them.

No package carries the schemas of these, so here are their fields by name, unknown ones refused;
what a pod may be is left to Kubernetes' own schema. A manifest that uses a further field adds it
here, after a look at the API reference of KubeRay 1.5.1 or of `monitoring.coreos.com/v1`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?$")]
Duration = Annotated[str, Field(pattern=r"^([0-9]+(ms|s|m|h|d))+$")]
Template = dict[str, Any]
"""A PodTemplateSpec."""


class Resource(BaseModel):
    """A mapping whose keys are all known and whose values are what they should be already."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Resource):
    """What ours say of themselves."""

    name: str
    namespace: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class AuthOptions(Resource):
    """Whether Ray asks for a token, which KubeRay makes and hands to its pods."""

    mode: Literal["token", "disabled"]


class AutoscalerOptions(Resource):
    """Of the autoscaler's container in the head pod."""

    idleTimeoutSeconds: Annotated[int, Field(ge=0)] | None = None  # noqa: N815
    resources: dict[str, dict[str, str]] = {}
    securityContext: dict[str, Any] = {}  # noqa: N815
    volumeMounts: list[dict[str, Any]] = []  # noqa: N815


class HeadGroup(Resource):
    """The pod that runs Ray's control plane."""

    rayStartParams: dict[str, str]  # noqa: N815
    template: Template


class WorkerGroup(Resource):
    """Pods of one kind."""

    groupName: str  # noqa: N815
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]  # noqa: N815
    maxReplicas: Annotated[int, Field(ge=1)]  # noqa: N815
    rayStartParams: dict[str, str]  # noqa: N815
    template: Template


class RayCluster(Resource):
    """A RayClusterSpec."""

    rayVersion: str  # noqa: N815
    authOptions: AuthOptions  # noqa: N815
    enableInTreeAutoscaling: bool = False  # noqa: N815
    autoscalerOptions: AutoscalerOptions | None = None  # noqa: N815
    headGroupSpec: HeadGroup  # noqa: N815
    workerGroupSpecs: list[WorkerGroup]  # noqa: N815


class UpgradeStrategy(Resource):
    """How a changed cluster takes the place of another."""

    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class RayServiceSpec(Resource):
    """Of a RayService."""

    upgradeStrategy: UpgradeStrategy  # noqa: N815
    rayClusterDeletionDelaySeconds: Annotated[int, Field(ge=0)]  # noqa: N815
    serveConfigV2: str  # noqa: N815
    rayClusterConfig: RayCluster  # noqa: N815


class RayService(Resource):
    """A Ray cluster with Serve applications."""

    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


class RayJobSpec(Resource):
    """Of a RayJob."""

    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]  # noqa: N815
    entrypoint: str
    backoffLimit: Annotated[int, Field(ge=0)]  # noqa: N815
    shutdownAfterJobFinishes: bool  # noqa: N815
    ttlSecondsAfterFinished: Annotated[int, Field(ge=0)]  # noqa: N815
    rayClusterSpec: RayCluster  # noqa: N815


class RayJob(Resource):
    """A Ray cluster for the time of one command."""

    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class Requirement(Resource):
    """Of labels."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = []


class Selector(Resource):
    """A LabelSelector."""

    matchLabels: dict[str, str] = {}  # noqa: N815
    matchExpressions: list[Requirement] = []  # noqa: N815


class Endpoint(Resource):
    """What of a pod is scraped."""

    port: Port
    interval: Duration
    path: str = "/metrics"


class PodMonitorSpec(Resource):
    """Of a PodMonitor."""

    selector: Selector
    podTargetLabels: list[str] = []  # noqa: N815
    podMetricsEndpoints: list[Endpoint]  # noqa: N815


class PodMonitor(Resource):
    """Pods that Prometheus scrapes."""

    apiVersion: Literal["monitoring.coreos.com/v1"]  # noqa: N815
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


class Alert(BaseModel):
    """A rule that alerts; `for` is a word of Python."""

    model_config = ConfigDict(extra="forbid", strict=True)

    alert: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z]+$")]
    expr: str
    for_: Duration | None = Field(default=None, alias="for")
    labels: dict[Literal["severity"], Literal["page", "ticket"]]
    annotations: dict[Literal["summary"], str]


class RuleGroup(Resource):
    """Rules that are evaluated together."""

    name: str
    rules: list[Alert]


class PrometheusRuleSpec(Resource):
    """A rule file."""

    groups: list[RuleGroup]


class PrometheusRule(Resource):
    """A rule file as a resource."""

    apiVersion: Literal["monitoring.coreos.com/v1"]  # noqa: N815
    kind: Literal["PrometheusRule"]
    metadata: Metadata
    spec: PrometheusRuleSpec


OURS: dict[str, type[Resource]] = {
    kind.__name__: kind for kind in (RayService, RayJob, PodMonitor, PrometheusRule)
}
"""By kind."""
