"""Training with several workers, which Ray Train starts, places and starts again.

Inside a worker the loop is the one that runs without Ray; what it has to show and what a person
decides travel through one small actor.
"""

# ray and torch are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false, reportUnknownArgumentType=false

import logging
import os
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

# Train v2 is chosen before ray.train is imported.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
# The user's own lines say what happens; these would repeat each worker's start and placement.
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")

import ray
import ray.train
import ray.train.torch

from manylora_registry.base import identify_base
from manylora_trainer.desk import Desk
from manylora_trainer.errors import TrainerError, WorkersLostError
from manylora_trainer.interruption import Signals
from manylora_trainer.progress import Progress
from manylora_trainer.recipe import Recipe
from manylora_trainer.result import RunResult
from manylora_trainer.run_directory import RunDirectory, open_run

if TYPE_CHECKING:
    from manylora_trainer.loop import Judge

SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class _Job:
    """What every worker is told; pickled."""

    recipe: Recipe
    path: Path
    how_to_resume: str
    judge: "Judge | None"
    date: datetime | None
    desk: Any
    """Handle of the `Desk`."""


def train_on_workers(
    recipe: Recipe,
    path: Path,
    *,
    resume: bool,
    watch: Progress,
    how_to_resume: str,
    allow_changes: Sequence[str] = (),
    judge: "Judge | None" = None,
    date: datetime | None = None,
) -> RunResult:
    """Trains a recipe with the workers it asks for; as `train_run` without them.

    Raises:
        WorkersLostError: workers ended more often than they may be started again.
        TrainerError: whatever the loop raises in a worker.
    """
    settings = recipe.workers
    # Let go again for the worker that writes into it.
    open_run(
        path, recipe, identify_base(recipe.base), resume=resume, allow_changes=allow_changes
    ).close()
    own_cluster = not ray.is_initialized()
    if own_cluster:
        _connect(settings.address, settings.count, settings.cpus)
    try:
        use_gpu = settings.gpu == "yes" or (
            settings.gpu == "auto" and ray.cluster_resources().get("GPU", 0) >= settings.count
        )
        # Its place costs nothing, so that it never waits for a core behind the workers.
        desk: Any = ray.remote(num_cpus=0)(Desk).remote()
        trainer = ray.train.torch.TorchTrainer(
            _work,
            train_loop_config={
                "job": _Job(recipe, path.absolute(), how_to_resume, judge, date, desk)
            },
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.count,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": settings.cpus} | ({"GPU": 1} if use_gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name=path.name,
                storage_path=str(RunDirectory(path.absolute()).ray),
                failure_config=ray.train.FailureConfig(max_failures=settings.max_restarts),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )
        watch.say(f"{settings.count} workers on Ray, {'a GPU each' if use_gpu else 'CPU'}")
        needed, there = settings.count * settings.cpus, ray.cluster_resources().get("CPU", 0)
        if needed > there:
            watch.say(f"the cluster has {there:g} of {needed:g} cores: waiting for it to grow")
        failure = _follow(trainer, desk, watch)
        outcome = cast("RunResult | TrainerError | None", ray.get(desk.outcome.remote()))
    finally:
        # What Ray keeps of a run; ours has all it needs in its checkpoints. First, as Ray ends
        # this process where it is shut down under a run that goes on.
        shutil.rmtree(RunDirectory(path).ray, ignore_errors=True)
        if own_cluster:
            ray.shutdown()
    if isinstance(outcome, TrainerError):
        raise outcome
    if outcome is None:
        raise WorkersLostError(
            f"the workers were lost {settings.max_restarts + 1} times, the last time because: "
            f"{_last_line(failure)}; what was trained up to the last checkpoint is kept, go on "
            f"with: {how_to_resume}"
        ) from failure
    return outcome


def _connect(address: str | None, workers: int, cpus: float) -> None:
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    # Ray starts workers at nice 15: whatever else the machine does would come first.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # It gives up on its own first process after 30 s, which a busy machine may take.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
    # A terminal that closes tells all its processes, and so do systemd and `timeout`. Ray's have
    # what is blocked from this one, as Ray itself sees to with SIGINT; else they would be gone
    # before a checkpoint is written. Where Ray itself ends them by SIGTERM it goes on to SIGKILL.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTERM})
    try:
        ray.init(
            # As many as asked for: cores are the machine's to share out, and a laptop has few.
            num_cpus=max(os.cpu_count() or 1, int(-(-workers * cpus // 1))),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(trainer: Any, desk: Any, watch: Progress) -> BaseException | None:
    """Shows what the workers tell until Ray is done with them; gives Ray's error, if any."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            failures.append(error)

    # Ray replaces the handler of SIGINT if fit() runs in the main thread.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    with Signals() as interruption:
        thread.start()
        told = False
        while thread.is_alive():
            thread.join(SECONDS_BETWEEN_LOOKS)
            if (asked := interruption.signal) is not None and not told:
                ray.get(desk.stop.remote(asked))
                told = True
            _show(desk, watch)
    return failures[0] if failures else None


def _show(desk: Any, watch: Progress) -> None:
    for name, arguments in ray.get(desk.heard.remote()):
        getattr(watch, name)(*arguments)


def _work(config: Mapping[str, Any]) -> None:
    """One worker."""
    from manylora_trainer.loop import nobody, train_run
    from manylora_trainer.workers import ProcessGroup

    job = cast("_Job", config["job"])
    if cast("RunResult | TrainerError | None", ray.get(job.desk.outcome.remote())) is not None:
        # The run ended in a stated error, and Ray started the workers again all the same.
        return
    workers = ProcessGroup(sharded=job.recipe.workers.sharding == "fsdp")
    first = workers.rank == 0
    try:
        result = train_run(
            job.recipe,
            job.path,
            # The driver has opened the run already.
            resume=True,
            watch=_Teller(job.desk, tells=first),
            how_to_resume=job.how_to_resume,
            judge=job.judge or nobody,
            date=job.date,
            workers=workers,
            interruption=_Asked(job.desk, asks=first),
            device=ray.train.torch.get_device(),
        )
    except TrainerError as error:
        ray.get(job.desk.end.remote(error))
        # Neighbours that wait for this worker fail now, and see why at the desk.
        workers.leave()
        return
    except Exception:
        if cast("RunResult | TrainerError | None", ray.get(job.desk.outcome.remote())) is not None:
            return
        raise
    if first:
        ray.get(job.desk.end.remote(result))


class _Asked:
    """Whether the person at the driver asked the run to end."""

    def __init__(self, desk: Any, *, asks: bool) -> None:
        self._desk = desk
        self._asks = asks

    @property
    def signal(self) -> str | None:
        """Name of the signal that came to the driver."""
        return ray.get(self._desk.signal.remote()) if self._asks else None


class _Teller:
    """Watch of the first worker: the driver shows what it is told. The others' goes nowhere."""

    def __init__(self, desk: Any, *, tells: bool) -> None:
        self._desk = desk
        self._tells = tells

    def say(self, text: str) -> None:
        self._tell("say", text)

    def start(self, steps: Mapping[str, int], done: int) -> None:
        self._tell("start", steps, done)

    def step(self, step: int, losses: Mapping[str, float], tokens_per_s: float) -> None:
        self._tell("step", step, losses, tokens_per_s)

    def validated(self, name: str, loss: float) -> None:
        self._tell("validated", name, loss)

    def _tell(self, name: str, *arguments: Any) -> None:
        if self._tells:
            self._desk.tell.remote(name, arguments)


def _last_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() if error is not None else []
    return lines[-1].strip() if lines else "Ray gives no reason"
