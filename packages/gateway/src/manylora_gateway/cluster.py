"""Ray at the rim: starts it, deploys the replicas, and calls them."""

# Ray's handles are typed by the deployment's class at run time only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import asyncio
import logging
import os
import re
import signal
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from manylora_gateway.application import engine_replicas
from manylora_gateway.config import EngineConfig, GatewayConfig
from manylora_gateway.deltas import END_GRACE_S, DeltaReceiver, FrontAddress, Inbox
from manylora_gateway.engine import Delta, Prompt, Sampling
from manylora_gateway.errors import GatewayError, ReplicaLostError, StartError
from manylora_gateway.fair import EVERYBODY, Share
from manylora_gateway.processes import end_marked
from manylora_gateway.refusals import by_our_names
from manylora_gateway.replica import EngineReplica, MakeEngine
from manylora_gateway.replicas import ReplicaState
from manylora_gateway.worker import Servable
from manylora_registry import Cache, Version

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

APPLICATION = "manylora"
OBJECT_STORE_BYTES = 100 << 20
"""Only adapters' names and deltas travel, all of them small."""
STATE_TIMEOUT_S = 5.0
ATTACH_POLL_S = 1.0
GIVEN_UP_GRACE_S = 2.0
SLOW_START = re.compile("timed out during startup|Timed out waiting for file")
DIED = re.compile(r"ActorDiedError|Failed core proc\(s\): .*: -\d")
"""What Serve keeps of a replica that a signal ended, and vLLM of its engine process."""
ENGINE_ERROR = re.compile(r"^\(EngineCore.*\] (\w*(?:Error|Exception): .+)$", re.MULTILINE)


class RayReplicas:
    """The `Replicas` of production: a Serve deployment.

    Args:
        handle: calls the deployment.
        receiver: where the replicas' deltas arrive.
        address: its address, as replicas reach it.
        state_timeout_s: how long a replica may take to tell its state.
    """

    def __init__(
        self,
        handle: "DeploymentHandle[EngineReplica]",
        receiver: DeltaReceiver,
        address: FrontAddress,
        state_timeout_s: float = STATE_TIMEOUT_S,
    ) -> None:
        self._state_timeout_s = state_timeout_s
        self._handle = handle
        self._receiver = receiver
        self._address = address
        self._calls: set[asyncio.Task[None]] = set()

    async def generate(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: Sampling,
        version: Version | None,
        share: Share = EVERYBODY,
        traceparent: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """Generates on the replica that Serve chooses by `AdapterRouter`."""
        with self._receiver.expect(request_id) as inbox:
            response: Any = self._handle.generate.remote(
                self._address,
                request_id,
                prompt,
                sampling,
                version=version,
                share=share,
                traceparent=traceparent,
            )
            whole = False
            self._watch(response, inbox)
            try:
                while deltas := await inbox.take():
                    for delta in deltas:
                        yield delta
                whole = True
            finally:
                if not whole:
                    response.cancel()

    def _watch(self, response: Any, inbox: Inbox) -> None:
        """Has `inbox` fail as the call does."""

        async def call() -> None:
            with _translated():
                await response

        def ended(task: asyncio.Task[None]) -> None:
            self._calls.discard(task)
            if task.cancelled():
                inbox.fail(ReplicaLostError("The call to the engine replica was cancelled."))
            elif (error := task.exception()) is not None:
                inbox.fail(error)
            else:
                late = ReplicaLostError("The engine replica ended without the end of its answer.")
                asyncio.get_running_loop().call_later(END_GRACE_S, inbox.fail, late)

        task = asyncio.get_running_loop().create_task(call())
        self._calls.add(task)
        task.add_done_callback(ended)

    async def count_tokens(self, prompt: Prompt) -> int:
        """Asks any replica."""
        with _translated():
            return await self._handle.count_tokens.remote(prompt)

    async def prepare(self, version: Version) -> None:
        """Loads on all; a replica that dies meanwhile is replaced by one that loads on demand."""
        await self._everywhere("prepare", version)

    async def pin(self, version: Version) -> None:
        """Pins on all."""
        await self._everywhere("pin", version)

    async def unpin(self, version: Version) -> int:
        """Unpins on all."""
        return sum(await self._everywhere("unpin", version))

    async def retire(self, version: Version) -> int:
        """Unloads from all."""
        return sum(await self._everywhere("retire", version))

    async def states(self) -> list[ReplicaState]:
        """Asks all; one that stands still is left out, as the others answer requests."""
        return await self._everywhere("state", timeout_s=self._state_timeout_s)

    async def _everywhere(
        self, method: str, *arguments: object, timeout_s: float | None = None
    ) -> list[Any]:
        """What every replica that lives answers to `method`.

        Those that do not answer within `timeout_s` are left out.

        Raises:
            GatewayError: the first failure of a living replica, or none of them answers.
        """
        broadcast: Any = self._handle.broadcast(method, *arguments)
        with _translated():
            async with asyncio.timeout(timeout_s):
                # Serve's own `results_async` has the answers of all or of none.
                asked = await broadcast._fetch_replica_results_async()
        answers = await asyncio.gather(
            *(_answer(each, timeout_s) for each in asked), return_exceptions=True
        )
        alive: list[Any] = []
        for answer in answers:
            if answer is None or isinstance(answer, RayActorError):
                continue
            if isinstance(answer, BaseException):
                with _translated():
                    raise answer
            alive.append(answer[0])
        if not alive:
            raise ReplicaLostError("No engine replica answers.")
        return alive


async def _answer(asked: Any, timeout_s: float | None) -> tuple[Any] | None:
    """What one replica answers, None if it does not in time."""
    # Not `asyncio.wait_for`, which before Python 3.12 drops a cancellation that comes as the answer
    # does: a watch so kept would hold up the end.
    within = asyncio.timeout(timeout_s)
    try:
        async with within:
            return (await asked.get_async(),)
    except TimeoutError:
        if within.expired():
            return None
        raise


@contextmanager
def _translated() -> Generator[None, None, None]:
    """Raises what a replica raised as it was, and what befell the replica as ours."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, GatewayError):
            raise cause from None
        raise
    except (RayError, RayServeException, TimeoutError) as error:
        raise ReplicaLostError(f"The engine replica cannot be reached ({_kind(error)}).") from error


def _kind(error: Exception) -> str:
    return type(error).__name__


def start_ray(config: GatewayConfig, scratch: Path) -> None:
    """Starts a private Ray with its files in `scratch`, or joins the configured one.

    Raises:
        StartError: it did not start, or cannot be joined.
    """
    private = config.ray_address is None
    own: dict[str, Any] = {
        "num_cpus": max(os.cpu_count() or 1, config.engine.replicas),
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_temp_dir": str(scratch),
    }
    if private:
        # It gives up on its own first process after 30 s, which a busy machine may take.
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
    # A terminal that closes tells every process of it; Ray's, which inherit this, must outlive the
    # drain. Of SIGINT Ray sees to it itself.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    for last in (False, True):
        try:
            ray.init(
                address="local" if private else config.ray_address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                **(own if private else {}),
            )
            return
        except Exception as error:
            ray.shutdown()
            # Ray gives its own processes 30 s, which a busy machine does not always keep to.
            if last or not SLOW_START.search(str(error)):
                raise StartError(f"Ray did not start: {_last_line(str(error))}") from error
            # It keeps no hold of those it gave up on, which would go on beside the next.
            end_marked(GIVEN_UP_GRACE_S)


def reachable_host(config: GatewayConfig) -> str:
    """Where replicas can reach this process, once Ray runs."""
    return "127.0.0.1" if config.ray_address is None else ray.util.get_node_ip_address()


def deploy(
    config: GatewayConfig, servable: Servable, cache: Cache, scratch: Path, make_engine: MakeEngine
) -> "DeploymentHandle[EngineReplica]":
    """Starts the replicas; returns when all of them are up.

    Verified copies of versions are kept in `cache`; `scratch` is what Ray was started with.

    Raises:
        StartError: an engine did not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if config.ray_address is None:
        _require_gpus(config.engine)
    try:
        serve.start(
            proxy_location=ProxyLocation.Disabled,
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        handle: Any = serve.run(
            engine_replicas(config, servable, cache, make_engine),
            name=APPLICATION,
            route_prefix=None,
        )
    except Exception as error:
        raise StartError(f"The engine did not start: {_cause(error, scratch)}") from error
    return handle


def _require_gpus(engine: EngineConfig) -> None:
    """Sees that a Ray of this machine alone, to which nobody adds nodes, has the GPUs asked for.

    Without them it would wait for ever.

    Raises:
        StartError: it has not.
    """
    needed, there = engine.replicas * (engine.gpus or 0), ray.cluster_resources().get("GPU", 0)
    if needed > there:
        raise StartError(
            f"engine.gpus: {engine.replicas} replica(s) with {engine.gpus} GPU(s) each need "
            f"{needed}; here there are {there:g}"
        )


def attach(application: str) -> "DeploymentHandle[EngineReplica]":
    """Finds the replicas that others deployed; returns when they are up.

    Raises:
        StartError: they failed to start.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    while True:
        found = serve.status().applications.get(application)
        if found is not None and found.status == ApplicationStatus.RUNNING:
            return serve.get_app_handle(application)
        if found is not None and found.status == ApplicationStatus.DEPLOY_FAILED:
            raise StartError(
                f"ray_application: {application!r} failed to deploy: {_last_line(found.message)}"
            )
        time.sleep(ATTACH_POLL_S)


def stop(config: GatewayConfig) -> None:
    """Ends what `config` has of its own: the replicas, and Ray."""
    if not ray.is_initialized():
        # It did not start; asked to delete an application, Serve would start another.
        return
    try:
        if config.ray_application is None:
            serve.delete(APPLICATION)
        if config.ray_address is None:
            serve.shutdown()
    finally:
        ray.shutdown()


def _cause(error: Exception, scratch: Path) -> str:
    """Why an engine did not start, in one line.

    The engine process writes it to the log of the replica's process; the replica knows only that
    it failed, and Serve keeps that as the text of a traceback beside the error it raises.
    """
    logs = sorted(scratch.glob("session_latest/logs/worker-*"))
    found = [cause for log in logs for cause in ENGINE_ERROR.findall(log.read_text("utf-8"))]
    if found:
        return by_our_names(found[-1])
    try:
        deployments = serve.status().applications[APPLICATION].deployments.values()
    except Exception:
        return _last_line(str(error))
    texts = [deployment.message for deployment in deployments if deployment.message]
    told = _last_line(texts[0] if texts else str(error))
    if DIED.search(told):
        return "its process was killed, as where memory runs out, or crashed"
    return told.removeprefix(f"{StartError.__module__}.{StartError.__name__}: ")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it did not say why."
