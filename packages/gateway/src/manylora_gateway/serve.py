"""From a config file to a running gateway, and to nothing left of it."""

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from manylora_gateway.config import GatewayConfig
from manylora_gateway.environment import cluster_environment, raise_file_limit
from manylora_gateway.logs import log_to_stderr
from manylora_gateway.processes import end_marked, mark_descendants
from manylora_gateway.scratch import remove, scratch_directory
from manylora_gateway.worker import Servable
from manylora_registry import Registry, identify_base
from manylora_registry.config import load_config

if TYPE_CHECKING:
    from manylora_gateway.replica import MakeEngine

KILL_GRACE_S = 2.0


def serve(
    config_path: Path, overrides: Sequence[str] = (), make_engine: "MakeEngine | None" = None
) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP, then drains; a second signal ends it at once.

    Prints one `ready grpc=HOST:PORT admin=HOST:PORT http=HOST:PORT` line on stdout once it answers.
    Without `make_engine` the engine is vLLM.

    Raises:
        ConfigError: the file has mistakes.
        BaseError: `base` is not a base model.
        RegistryError: the registry cannot be opened.
        StartError: a port is taken or the engine did not start; nothing is left behind.
    """
    config = load_config(config_path, GatewayConfig, overrides)
    config = config.relative_to(config_path.resolve().parent)
    log_to_stderr(config.log.format, requests=config.log.requests)
    identity = identify_base(config.base)
    servable = Servable(identity.fingerprint, config.engine.max_rank)
    os.environ.update(cluster_environment())
    raise_file_limit()
    mark_descendants()
    with (
        Registry.open(config.registry, create=False) as registry,
        scratch_directory(Path(tempfile.gettempdir())) as scratch,
    ):
        try:
            # gRPC and Ray read the environment when they are imported.
            from manylora_gateway.gateway import run
            from manylora_gateway.replica import vllm_engine

            make_engine = make_engine or vllm_engine
            out = sys.stdout
            # Ray prints what goes wrong in it to whatever stdout is, beside the ready line.
            with redirect_stdout(sys.stderr):
                served = asyncio.run(run(config, registry, servable, scratch, make_engine, out))
        finally:
            remove(scratch)
            end_marked(KILL_GRACE_S)
    if not served:
        # A start was cut off: Ray's own exit would wait for the cluster it was starting.
        sys.stderr.flush()
        os._exit(0)
