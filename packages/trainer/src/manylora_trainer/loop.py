"""The training run, top to bottom: load, attach, loop, save."""

# torch and transformers are only partly typed.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import transformers

from manylora_registry.base import identify_base
from manylora_trainer.adapter_files import read_initial, save_adapter
from manylora_trainer.base_model import BaseModel
from manylora_trainer.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from manylora_trainer.dataset import TaskData, load_task
from manylora_trainer.errors import RunInterruptedError
from manylora_trainer.interruption import Interruption
from manylora_trainer.plots import plot_curves
from manylora_trainer.progress import Watch
from manylora_trainer.recipe import Recipe, Task
from manylora_trainer.result import RunResult
from manylora_trainer.run_directory import (
    MetricsFile,
    NoMetrics,
    RunDirectory,
    begin_run,
    end_run,
    has_ended,
    open_run,
    run_result,
    update_run,
)
from manylora_trainer.targets import linears_of, targets_of
from manylora_trainer.tokenization import ChatTokenizer
from manylora_trainer.trainees import StepReport, Trainee, Trainees
from manylora_trainer.workers import Alone, Workers


def train_run(
    recipe: Recipe,
    path: Path,
    *,
    resume: bool,
    watch: Watch,
    how_to_resume: str,
    interruption: Interruption,
    workers: Workers | None = None,
    device: torch.device | None = None,
) -> RunResult:
    """Trains every task of the recipe in one loop; see `manylora_trainer.train`.

    With several workers each of them runs this; the first alone writes into the run directory.
    """
    training = recipe.training
    workers = workers or Alone()
    writes = workers.rank == 0
    identity = identify_base(recipe.base)
    linears = linears_of(identity)
    targets = {task.name: targets_of(task, linears) for task in recipe.tasks}
    initial = {
        task.name: read_initial(task, targets[task.name], identity.fingerprint)
        for task in recipe.tasks
    }
    if writes:
        open_run(path, recipe, identity, resume=resume)
    workers.wait()
    directory = RunDirectory(path)
    if has_ended(directory):
        watch.say(f"{path} has ended already")
        return run_result(directory)

    torch.set_num_threads(training.threads or max(1, (os.cpu_count() or 1) // workers.size))
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = ChatTokenizer(recipe.base)
    data: dict[str, TaskData] = {}
    for task in recipe.tasks:
        data[task.name] = load_task(task, tokenizer, recipe.seed)
        watch.say(_describe(task, data[task.name]))
    threads = torch.get_num_threads()
    run = begin_run(directory, recipe, identity, data, threads) if writes else {}
    checkpoint = load_checkpoint(directory.checkpoints)
    first = 0 if checkpoint is None else checkpoint.step
    last = max(task.steps for task in recipe.tasks)

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
        workers,
    )
    for trainee in trainees:
        if checkpoint is None:
            trainee.go_on_from(initial[trainee.name])
        else:
            trainee.restore(checkpoint.tasks[trainee.name], checkpoint.tensors)
    progress = {trainee.name: trainee.progress for trainee in trainees}
    if writes:
        update_run(directory, run, progress)

    metrics_bytes = 0 if checkpoint is None else checkpoint.metrics_bytes
    with closing(
        MetricsFile(directory.metrics, metrics_bytes) if writes else NoMetrics()
    ) as metrics:
        watch.start({task.name: task.steps for task in recipe.tasks}, first)
        for step in range(first, last):
            reports = trainees.train_step(step)
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
            finished = [t for t in running if t.task.steps == done]
            measured = running if done % training.validate_every == 0 else finished
            for name, loss in trainees.validation_losses([t.name for t in measured]).items():
                metrics.write({"step": done, "task": name, "validation_loss": loss})
                watch.validated(name, loss)
            stop = workers.agreed(interruption.signal)
            for trainee in finished if writes else ():
                # Before the checkpoint that counts it as done, so that no resume misses it.
                trainee.progress.size_bytes = save_adapter(
                    directory.adapters / trainee.name,
                    trainee.adapter.tensors(),
                    trainee.task,
                    trainee.targets,
                    identity.fingerprint,
                    trainee.progress.metrics,
                )
            if writes and (stop or done % training.checkpoint_every == 0):
                tensors = {k: v for trainee in trainees for k, v in trainee.state().items()}
                save_checkpoint(
                    directory.checkpoints,
                    Checkpoint(done, metrics.sync(), progress, tensors),
                    training.keep_checkpoints,
                )
                update_run(directory, run, progress)
            if stop and done < last:
                raise RunInterruptedError(
                    f"stopped by {stop} after step {done} of {last}, and a checkpoint was "
                    f"written; go on with: {how_to_resume}"
                )
    if writes:
        plot_curves(directory.metrics, directory.curves)
        end_run(directory, run, progress)
    workers.wait()
    return run_result(directory)


def _dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    match recipe.training.dtype:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32


def _describe(task: Task, data: TaskData) -> str:
    text = (
        f"{task.name}: {data.rows_read} rows, {len(data.train)} to train on, "
        f"{len(data.validation)} to validate, {len(data.held_out)} held out"
    )
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
