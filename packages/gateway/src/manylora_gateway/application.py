"""The engine replicas as a Ray Serve application.

A gateway deploys it itself, or finds it in a cluster that others run: a Serve config (`serve
deploy`, or KubeRay's RayService) names `manylora_gateway.application:engines`, and the gateway's
`ray_application` names what came of that.

    applications:
      - name: manylora
        route_prefix: null
        import_path: manylora_gateway.application:engines
        args: {config: /etc/manylora/gateway.yaml}
        deployments:
          - name: engine
            autoscaling_config: {min_replicas: 2, max_replicas: 8, target_ongoing_requests: 16}
"""

# Ray's handles are typed by the deployment's class at run time only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import tempfile
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from manylora_gateway.config import GatewayConfig
from manylora_gateway.replica import EngineReplica, MakeEngine, vllm_engine
from manylora_gateway.worker import Servable
from manylora_registry import Cache, identify_base
from manylora_registry.config import ConfigModel, load_config

ENGINE = "engine"
"""The deployment, as `deployments` of a Serve config names it."""
ROUTER: Any = "manylora_gateway.router:AdapterRouter"
"""Typed wrongly by Serve."""
SHORTEST_SHUTDOWN_S = 10.0
GIB = 1 << 30


class Arguments(ConfigModel):
    """`args` of the application in a Serve config."""

    config: Path
    """The gateway's file. It, and all it names, lies at the same path on every node."""


def engines(args: Arguments) -> Application:
    """What a Serve config imports; vLLM is the engine."""
    return application(args, vllm_engine)


def application(args: Arguments, make_engine: MakeEngine) -> Application:
    """The engine replicas of the gateway's file that `args` names.

    Raises:
        ConfigError: the file has mistakes.
        BaseError: `base` is not a base model.
    """
    config = load_config(args.config, GatewayConfig)
    config = config.relative_to(args.config.resolve().parent)
    servable = Servable(identify_base(config.base).fingerprint, config.engine.max_rank)
    # Of the node a replica is on; its own, as nobody else says when it may go.
    directory = config.cache or Path(tempfile.gettempdir()) / "manylora-adapters"
    return engine_replicas(config, servable, adapter_cache(config, directory), make_engine)


def adapter_cache(config: GatewayConfig, directory: Path) -> Cache:
    """Where replicas keep verified copies of versions: in `directory`, as much as is configured."""
    return Cache(directory, round(config.cache_gib * GIB))


def engine_replicas(
    config: GatewayConfig, servable: Servable, cache: Cache, make_engine: MakeEngine
) -> Application:
    """The deployment, bound; within a Ray cluster, which says whether there are GPUs."""
    gpus = config.engine.gpus
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= config.engine.replicas else 0
    deployment: Any = serve.deployment(EngineReplica)
    deployment = deployment.options(
        name=ENGINE,
        num_replicas=config.engine.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        # The pool seats and queues; Serve only spreads.
        max_ongoing_requests=config.limits.max_requests + config.limits.max_batch,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        max_constructor_retry_count=1,
        health_check_period_s=2.0,
        graceful_shutdown_wait_loop_s=0.1,
        # One that goes because fewer are needed has answers under way.
        graceful_shutdown_timeout_s=max(SHORTEST_SHUTDOWN_S, config.drain_s),
    )
    return deployment.bind(config, servable, cache, gpus, make_engine)
