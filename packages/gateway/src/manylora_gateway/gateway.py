"""One gateway from its first process to its last: start, serve, drain, stop."""

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Set
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from manylora_gateway import cluster, tracing
from manylora_gateway.admission import Admission
from manylora_gateway.application import adapter_cache
from manylora_gateway.config import GatewayConfig
from manylora_gateway.deltas import DeltaReceiver
from manylora_gateway.fleet import Fleet
from manylora_gateway.front import Front
from manylora_gateway.inference import Inference
from manylora_gateway.limits import Limits
from manylora_gateway.metrics import Metrics
from manylora_gateway.operations import Operations
from manylora_gateway.processes import end_marked
from manylora_gateway.replica import MakeEngine
from manylora_gateway.replicas import Replicas
from manylora_gateway.rollouts import Rollouts
from manylora_gateway.routes import Routes
from manylora_gateway.scratch import remove
from manylora_gateway.signals import on_signals
from manylora_gateway.swaps import Swaps
from manylora_gateway.worker import Servable
from manylora_registry import Registry

SHUTDOWN_S = 20.0
"""Ray's own way out gets this long."""
STILL_STARTING_S = 15.0

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


async def run(
    config: GatewayConfig,
    registry: Registry,
    servable: Servable,
    scratch: Path,
    make_engine: MakeEngine,
    out: TextIO,
) -> bool:
    """Serves until SIGINT, SIGTERM or SIGHUP, then drains; a second signal ends it at once.

    Ray's own files go below `scratch`, the ready line to `out`. Says False where a signal came
    before it served.

    Raises:
        StartError: a port is taken or the engine did not start.
    """
    stop = asyncio.Event()
    _listen_for_signals(stop, scratch)
    metrics = Metrics(config.metrics.max_versions)
    front = Front.configured(config, metrics)
    await front.answer_probes()
    addresses = dict(front.addresses)
    if config.listen.metrics is not None:
        host, port = metrics.serve(config.listen.metrics)
        addresses["metrics"] = f"{host}:{port}"
    async with _cluster(config, servable, scratch, stop, make_engine) as replicas:
        if replicas is None:
            return False
        tracing.configure(config.tracing, "manylora-gateway")
        rollouts = Rollouts(config.state)
        routes = Routes(registry, servable, rollouts, config.follow.max_stale_s)
        swaps = Swaps(registry, routes, replicas, config.follow, metrics)
        admission = Admission(config.limits)
        warm = config.engine.slots
        fleet = Fleet(replicas, routes, admission, metrics, front.announce, warm)
        inference = Inference(registry, routes, replicas, admission, metrics)
        operations = Operations(
            routes, replicas, rollouts, admission, fleet, metrics, config.drain_s
        )
        logger.info("loading the adapters that are served now")

        async def load() -> None:
            await swaps.begin(warm)
            await operations.begin()
            await fleet.begin()

        loading = asyncio.ensure_future(load())
        if not await _unless(stop, loading):
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await operations.close()
            await fleet.close()
            await swaps.close()
            return False
        await loading
        limits = Limits(config.limits, config.engine.max_context)
        await front.start(inference, operations, limits, config.base_name)
        _tell(out, "ready", *(f"{name}={at}" for name, at in addresses.items()))
        await stop.wait()
        logger.info("draining; running requests have %g s", config.drain_s)
        if left := await operations.drain(config.drain_s):
            logger.warning("%d requests still running after %g s are cut off", left, config.drain_s)
            admission.answering.end()
        await inference.shadows.close()
        await operations.close()
        await fleet.close()
        await swaps.close()
        await front.stop()
        await tracing.end()
    logger.info("stopped")
    return True


@asynccontextmanager
async def _cluster(
    config: GatewayConfig,
    servable: Servable,
    scratch: Path,
    stop: asyncio.Event,
    make_engine: MakeEngine,
) -> AsyncGenerator[Replicas | None, None]:
    """The replicas, up while the context lasts; None where `stop` came first.

    Raises:
        StartError: they did not start.
    """
    cache = adapter_cache(config, config.cache or scratch / "adapters")
    ray_files = scratch / "ray"
    if (application := config.ray_application) is None:
        replicas = config.engine.replicas
        logger.info("starting %d engine replica(s) of %s", replicas, config.base.name)
    else:
        logger.info("waiting for the engine replicas of %s", application)

    def start() -> tuple[Any, str]:
        cluster.start_ray(config, ray_files)
        loop.call_soon_threadsafe(_listen_for_signals, stop, scratch)
        if application is None:
            handle = cluster.deploy(config, servable, cache, ray_files, make_engine)
        else:
            handle = cluster.attach(application)
        return handle, cluster.reachable_host(config)

    loop = asyncio.get_running_loop()
    starting = asyncio.ensure_future(_in_thread(start))
    if not await _unless(stop, starting):
        # Whoever shuts Ray down under a start makes Serve begin another Ray; the caller ends
        # the processes instead.
        starting.cancel()
        yield None
        return
    receiver = DeltaReceiver()
    try:
        handle, host = await starting
        yield cluster.RayReplicas(handle, receiver, await receiver.start(host))
    finally:
        await receiver.close()
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                await _in_thread(lambda: cluster.stop(config))
        except Exception as error:
            logger.debug("Ray did not shut down by itself: %s", error)


async def _unless(stop: asyncio.Event, work: asyncio.Future[Any]) -> bool:
    """Waits until `work` has ended, however; False where `stop` came first and it goes on."""
    stopping = asyncio.ensure_future(stop.wait())
    first: Set[asyncio.Future[Any]] = set()
    while not first:
        first, _ = await asyncio.wait(
            (work, stopping), timeout=STILL_STARTING_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not first:
            logger.info("still starting")
    stopping.cancel()
    return work.done()


async def _in_thread(work: Callable[[], Result]) -> Result:
    """Runs `work` in a thread that lasts as long as the process and does not keep it alive.

    The kernel ends Ray's processes with the thread that started them, so that one must stay.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Result] = loop.create_future()

    def settle(settled: concurrent.futures.Future[Result]) -> None:
        if result.cancelled():
            return
        if (error := settled.exception()) is not None:
            result.set_exception(error)
        else:
            result.set_result(settled.result())

    def run() -> None:
        settled: concurrent.futures.Future[Result] = concurrent.futures.Future()
        try:
            settled.set_result(work())
        except BaseException as error:
            settled.set_exception(error)
        # The loop is closed where nobody waits for the result any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, settled)
        threading.Event().wait()

    threading.Thread(target=run, daemon=True).start()
    return await result


def _tell(out: TextIO, *words: str) -> None:
    """Prints a line on stdout, if anybody reads it: a supervisor may have closed it."""
    try:
        print(*words, file=out, flush=True)
    except OSError as error:
        logger.warning("stdout cannot be written: %s", error)


def _listen_for_signals(stop: asyncio.Event, scratch: Path) -> None:
    """SIGINT, SIGTERM and SIGHUP set `stop`; another one ends everything at once.

    SIGHUP, a terminal that closes, stays ignored where it is, e.g. under `nohup`.

    Called again once Ray runs, which puts handlers of its own in their place.
    """

    def on_signal() -> None:
        if stop.is_set():
            logger.warning("ended by a second signal")
            remove(scratch)
            end_marked(grace_s=0)
            # They may have written meanwhile.
            remove(scratch)
            os._exit(1)
        stop.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    on_signals(numbers, on_signal)
