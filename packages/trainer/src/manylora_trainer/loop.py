"""The training run, top to bottom: load, attach, loop, save."""

# torch and transformers are only partly typed.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

import os
import signal
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers

from manylora_registry.base import identify_base
from manylora_trainer.adapter_files import read_initial, save_adapter
from manylora_trainer.base_model import BaseModel
from manylora_trainer.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from manylora_trainer.dataset import TaskData, load_task
from manylora_trainer.errors import DataError, RunInterruptedError
from manylora_trainer.formats import Rendered
from manylora_trainer.plots import plot_curves
from manylora_trainer.progress import Progress
from manylora_trainer.recipe import Recipe, Task
from manylora_trainer.result import RunResult
from manylora_trainer.run_directory import (
    MetricsFile,
    begin_run,
    end_run,
    ended_result,
    open_run,
    update_run,
)
from manylora_trainer.sampling import prepared_ahead
from manylora_trainer.targets import linears_of, targets_of
from manylora_trainer.tokenization import ChatTokenizer, Example
from manylora_trainer.trainees import StepReport, Trainee, Trainees


def train_run(
    recipe: Recipe, path: Path, *, resume: bool, watch: Progress, how_to_resume: str
) -> RunResult:
    """Trains every task of the recipe in one loop; see `manylora_trainer.train`."""
    training = recipe.training
    identity = identify_base(recipe.base)
    linears = linears_of(identity)
    targets = {task.name: targets_of(task, linears) for task in recipe.tasks}
    initial = {
        task.name: read_initial(task, targets[task.name], identity.fingerprint)
        for task in recipe.tasks
    }
    directory = open_run(path, recipe, identity, resume=resume)
    if (ended := ended_result(directory)) is not None:
        watch.say(f"{path} has ended already")
        return ended

    torch.set_num_threads(training.threads or os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = ChatTokenizer(recipe.base)
    data: dict[str, TaskData[Rendered, Example]] = {}
    for task in recipe.tasks:
        data[task.name] = load_task(task, tokenizer, recipe.seed, say=watch.say)
        watch.say(_describe(task, data[task.name]))
    run = begin_run(directory, recipe, identity, data, torch.get_num_threads())
    checkpoint = load_checkpoint(directory.checkpoints)
    first = 0 if checkpoint is None else checkpoint.step
    last = max(task.steps for task in data.values())

    watch.say(f"base {recipe.base.name} on {device}, steps {first + 1} to {last}")
    transformers.utils.logging.disable_progress_bar()
    base = BaseModel(recipe.base, _dtype(recipe, device), device)
    trainees = Trainees(
        base,
        [
            Trainee(task, data[task.name], targets[task.name], seed=recipe.seed, device=device)
            for task in recipe.tasks
        ],
        training.pack_tokens,
    )
    for trainee in trainees:
        if checkpoint is None:
            trainee.go_on_from(initial[trainee.name])
        else:
            trainee.restore(checkpoint.tasks[trainee.name], checkpoint.tensors)
    progress = {trainee.name: trainee.progress for trainee in trainees}
    update_run(directory, run, progress)

    metrics_bytes = 0 if checkpoint is None else checkpoint.metrics_bytes
    with (
        closing(MetricsFile(directory.metrics, metrics_bytes)) as metrics,
        _signals() as stop,
        prepared_ahead([trainee.stream for trainee in trainees]),
    ):

        def checkpoint_after(steps: int) -> None:
            tensors = {k: v for trainee in trainees for k, v in trainee.state().items()}
            save_checkpoint(
                directory.checkpoints,
                Checkpoint(steps, metrics.sync(), progress, tensors),
                training.keep_checkpoints,
            )
            update_run(directory, run, progress)

        watch.start({name: task.steps for name, task in data.items()}, first)
        for step in range(first, last):
            try:
                reports = trainees.train_step(step)
            except DataError:
                # Nothing was drawn or changed: the steps before it are whole.
                checkpoint_after(step)
                watch.say(
                    f"the rows failed; a checkpoint was written after step {step} of {last}. Once "
                    f"they can be read, go on with: {how_to_resume}"
                )
                raise
            if not reports:
                break
            done = step + 1
            speed = next(iter(reports.values())).tokens_per_s
            for name, report in reports.items():
                if (why := progress[name].stopped) is None:
                    metrics.write(_metrics_line(done, name, report))
                else:
                    metrics.write({"step": done, "task": name, "stopped": why})
                    watch.say(f"{name} stops at {why}; the others go on")
            watch.step(done, {name: report.loss for name, report in reports.items()}, speed)
            running = [t for t in trainees if t.name in reports and t.progress.stopped is None]
            finished = [t for t in running if t.data.steps == done]
            measured = running if done % training.validate_every == 0 else finished
            for name, loss in trainees.validation_losses([t.name for t in measured]).items():
                metrics.write({"step": done, "task": name, "validation_loss": loss})
                watch.validated(name, loss)
            for trainee in measured:
                cursor = trainee.progress.cursor
                if cursor.overlong_dropped or cursor.overlong_truncated:
                    counts = {
                        "overlong_dropped": cursor.overlong_dropped,
                        "overlong_truncated": cursor.overlong_truncated,
                    }
                    metrics.write({"step": done, "task": trainee.name, **counts})
            for trainee in finished:
                # Before the checkpoint that counts it as done, so that no resume misses it.
                trainee.progress.size_bytes = save_adapter(
                    directory.adapters / trainee.name,
                    trainee.adapter.tensors(),
                    trainee.task,
                    trainee.targets,
                    identity.fingerprint,
                    trainee.progress.metrics,
                )
            if stop or done % training.checkpoint_every == 0:
                checkpoint_after(done)
            if stop and done < last:
                raise RunInterruptedError(
                    f"stopped by {stop[0]} after step {done} of {last}, and a checkpoint was "
                    f"written; go on with: {how_to_resume}"
                )
    plot_curves(directory.metrics, directory.curves)
    return end_run(directory, run, progress)


def _dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    match recipe.training.dtype:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32


def _describe(task: Task, data: TaskData[Rendered, Example]) -> str:
    text = (
        f"{task.name}: {data.rows_read} rows, {data.train_rows} to train on, "
        f"{len(data.validation)} to validate, {len(data.held_out)} held out"
    )
    if task.epochs is not None:
        text += f"; {task.epochs:g} epochs are {data.steps} steps"
    if data.rows_skipped:
        text += f"; skipped {data.rows_skipped} malformed"
    if data.overlong_dropped:
        text += f"; dropped {data.overlong_dropped} longer than {task.max_length} tokens"
    if data.overlong_truncated:
        text += f"; cut {data.overlong_truncated} to {task.max_length} tokens"
    return text


def _metrics_line(step: int, name: str, report: StepReport) -> dict[str, Any]:
    return {
        "step": step,
        "task": name,
        "loss": report.loss,
        "tokens": report.tokens,
        "tokens_per_s": round(report.tokens_per_s, 1),
        "grad_norm": report.grad_norm,
        "lr": report.lr,
    }


@contextmanager
def _signals() -> Generator[list[str]]:
    """Notes the first SIGINT or SIGTERM in the list it gives, so that a step can end in peace.

    A second one is handled as if this were not there.
    """
    received: list[str] = []
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        restore()

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:
        # Not the main thread: signals are the caller's business.
        before.clear()
    try:
        yield received
    finally:
        restore()
