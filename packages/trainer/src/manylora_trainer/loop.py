"""The training run, top to bottom: load, attach, loop, save."""

# torch and transformers are only partly typed.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from manylora_registry.base import identify_base
from manylora_trainer.adapter_files import InitialAdapter, read_initial
from manylora_trainer.base_model import BaseModel
from manylora_trainer.checkpoint import load_checkpoint
from manylora_trainer.dataset import TaskData, load_task, require_validation
from manylora_trainer.durable import stating_storage_faults
from manylora_trainer.errors import (
    DataError,
    InitialAdapterError,
    NoExamplesError,
    RecipeChangedError,
    RunInterruptedError,
)
from manylora_trainer.formats import Rendered
from manylora_trainer.full import BaseWeights
from manylora_trainer.interruption import Interruption
from manylora_trainer.lora import require_linear_layers
from manylora_trainer.memory import Footprint, dtype_of, stating_memory_faults
from manylora_trainer.metrics_file import NoMetrics
from manylora_trainer.positions import within_positions
from manylora_trainer.progress import Watch
from manylora_trainer.recipe import Recipe, Task
from manylora_trainer.repeatable import compute_repeatably
from manylora_trainer.result import RunResult
from manylora_trainer.run_directory import (
    RunDirectory,
    begin_run,
    has_ended,
    now,
    open_run,
    run_result,
)
from manylora_trainer.run_writer import RunWriter
from manylora_trainer.targets import Shapes, linears_of, targets_of
from manylora_trainer.tokenization import ChatTokenizer
from manylora_trainer.trainee import Trainee
from manylora_trainer.trainees import StepReport, Trainees
from manylora_trainer.workers import Alone, Workers

Judge = Callable[[int, Mapping[str, float]], Mapping[str, str]]
"""From a step and the validation losses after it, of adapters with steps ahead of them, to those
that leave the run there, each with the reason."""


def nobody(_step: int, _losses: Mapping[str, float]) -> Mapping[str, str]:
    """The judge that lets everybody go on."""
    return {}


def train_run(
    recipe: Recipe,
    path: Path,
    *,
    resume: bool,
    watch: Watch,
    how_to_resume: str,
    judge: Judge,
    interruption: Interruption,
    allow_changes: Sequence[str] = (),
    date: datetime | None = None,
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
    recipe = within_positions(recipe, watch.say)
    targets = {task.name: targets_of(task, linears) for task in recipe.tasks}
    earlier = RunDirectory(path).read_run() if resume else None
    initial = _initial_adapters(recipe, targets, identity.fingerprint, earlier)
    directory = RunDirectory(path)
    metrics = NoMetrics()
    if writes:
        with stating_storage_faults(path, how_to_resume):
            metrics = open_run(path, recipe, identity, resume=resume, allow_changes=allow_changes)
    with closing(metrics):
        if workers.size == 1:
            # Of several that were killed; nobody else trains this run.
            shutil.rmtree(directory.ray, ignore_errors=True)
        workers.wait()
        if has_ended(directory):
            watch.say(f"{path} has ended already")
            return run_result(directory)

        torch.set_num_threads(training.threads or max(1, (os.cpu_count() or 1) // workers.size))

        def stop_if_asked() -> None:
            # Of several workers none may leave alone: they agree at the end of a step.
            if workers.size == 1 and interruption.signal:
                raise RunInterruptedError(
                    f"stopped by {interruption.signal} before training began; go on with: "
                    f"{how_to_resume}"
                )

        stop_if_asked()
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        compute_repeatably(device)
        # One date for all of the run, however often it is resumed, and all of a sweep.
        begun = workers.agreed(now() if earlier is None else earlier["started_at"])
        assert begun is not None
        date = date or datetime.fromisoformat(begun)
        tokenizer = ChatTokenizer(recipe.base, date)
        if tokenizer.writes_date:
            watch.say(
                f"the base's chat template writes the date: in this run's prompts {date:%Y-%m-%d} "
                "(UTC), also after a resume; in served ones the day of the request"
            )
        data: dict[str, TaskData[Rendered, Any]] = {}
        for task in recipe.tasks:
            data[task.name] = load_task(
                task, tokenizer, recipe.seed, say=watch.say, ask=stop_if_asked
            )
            watch.say(_describe(task, data[task.name]))
            rows = len(data[task.name].validation)
            require_validation(task, rows, of_sweep=judge is not nobody)
        checkpoint = load_checkpoint(directory.checkpoints, watch.say)
        first = 0 if checkpoint is None else checkpoint.step
        last = max(task.steps for task in data.values())

        watch.say(f"base {recipe.base.name} on {device}, steps {first + 1} to {last}")
        transformers.utils.logging.disable_progress_bar()
        footprint = Footprint.of(recipe, identity, device, (earlier or {}).get("pack_tokens"))
        # Workers whose devices differ must all plan the same step.
        pack_tokens = workers.agreed(footprint.pack_tokens)
        assert pack_tokens is not None
        with stating_memory_faults(pack_tokens, how_to_resume):
            base = BaseModel(
                recipe.base,
                dtype_of(recipe, device),
                device,
                four_bit=training.quantization == "nf4",
            )
        whole = BaseWeights(base.model) if recipe.kind == "full" else None
        if whole is None:
            for task in recipe.tasks:
                require_linear_layers(base.model, task.name, targets[task.name])
        # No sooner: until it has begun, a sweep leaves out the trials that do not fit.
        if writes:
            with stating_storage_faults(path, how_to_resume):
                begin_run(
                    directory,
                    recipe,
                    identity,
                    data,
                    begun,
                    torch.get_num_threads(),
                    pack_tokens,
                    watch.say,
                )
        workers.wait()
        if footprint.recomputes:
            base.recompute_layers()
        trainees = Trainees(
            base,
            [
                Trainee(
                    task,
                    data[task.name],
                    targets[task.name],
                    seed=recipe.seed,
                    device=device,
                    whole=whole,
                )
                for task in recipe.tasks
            ],
            pack_tokens,
            workers,
        )
        for trainee in trainees:
            if checkpoint is not None:
                trainee.restore(checkpoint.tasks[trainee.name], checkpoint.tensors)
                _check_steps(path, trainee, first)
            elif (start := initial.get(trainee.name)) is not None:
                trainee.go_on_from(start.tensors)
            elif trainee.task.lora.init_from is not None:
                raise InitialAdapterError(
                    f"task {trainee.name}: {trainee.task.lora.init_from} is gone, and no "
                    "checkpoint holds its weights yet"
                )
            else:
                trainee.start(base)
        # Only now: PiSSA starts from whole weights.
        workers.share(base.decoder)
        writer = RunWriter(directory, recipe, identity, trainees, metrics, writes=writes)
        if checkpoint is None:
            writer.went_on_from({name: start.digest for name, start in initial.items()})

        with (
            stating_storage_faults(path, how_to_resume),
            stating_memory_faults(pack_tokens, how_to_resume),
            trainees.prepared_ahead(),
        ):
            writer.start(0 if checkpoint is None else checkpoint.metrics_bytes)
            if checkpoint is None and initial:
                # From here on a resume needs none of the adapters that the tasks go on from.
                writer.checkpoint(0)
            watch.start({name: task.steps for name, task in data.items()}, first)
            for step in range(first, last):
                try:
                    reports = trainees.train_step(step)
                except DataError as error:
                    # Nothing was drawn or changed: the steps before it are whole.
                    writer.checkpoint(step)
                    # Where nothing fits the recipe has to change, which no resume takes up.
                    if not isinstance(error, NoExamplesError):
                        watch.say(
                            f"the rows failed; a checkpoint was written after step {step} of "
                            f"{last}. Once they can be read, go on with: {how_to_resume}"
                        )
                    raise
                if not reports:
                    break
                done = step + 1
                taking_part = [trainee for trainee in trainees if trainee.name in reports]
                _report(done, taking_part, reports, writer, watch)
                every = training.validate_every
                _validate(done, trainees, taking_part, every, judge, writer, watch)
                _let_go(done, taking_part, writer, watch)
                stop = workers.agreed(interruption.signal)
                if stop or done % training.checkpoint_every == 0:
                    writer.checkpoint(done)
                if stop and done < last:
                    raise RunInterruptedError(
                        f"stopped by {stop} after step {done} of {last}, and a checkpoint was "
                        f"written; go on with: {how_to_resume}"
                    )
            writer.end()
        workers.wait()
        return run_result(directory)


def _report(
    done: int,
    trainees: Sequence[Trainee],
    reports: Mapping[str, StepReport],
    writer: RunWriter,
    watch: Watch,
) -> None:
    """Tells what a step came to."""
    for trainee in trainees:
        if trainee.progress.stopped is None:
            writer.step(done, trainee, reports[trainee.name])
    speed = next(iter(reports.values())).tokens_per_s
    watch.step(done, {name: report.loss for name, report in reports.items()}, speed)


def _validate(
    done: int,
    trainees: Trainees,
    taking_part: Sequence[Trainee],
    every: int,
    judge: Judge,
    writer: RunWriter,
    watch: Watch,
) -> None:
    """Measures the adapters that are due, and stops those that the judge has leave."""
    running = [trainee for trainee in taking_part if trainee.progress.stopped is None]
    measured = [t for t in running if done % every == 0 or t.data.steps == done]
    losses = trainees.validate(done, [trainee.name for trainee in measured])
    compared: dict[str, float] = {}
    for trainee in measured:
        progress = trainee.progress
        if trainee.name not in losses or progress.stopped is not None:
            continue
        loss = losses[trainee.name]
        writer.note(done, trainee, validation_loss=loss)
        watch.validated(trainee.name, loss)
        if trainee.data.steps > done and not progress.ended_early:
            compared[trainee.name] = loss
    leaving = judge(done, compared)
    for trainee in measured:
        if trainee.name in leaving:
            trainee.progress.stopped = leaving[trainee.name]
        cursor = trainee.progress.cursor
        if cursor.overlong_dropped or cursor.overlong_truncated:
            writer.note(
                done,
                trainee,
                overlong_dropped=cursor.overlong_dropped,
                overlong_truncated=cursor.overlong_truncated,
            )


def _let_go(done: int, trainees: Sequence[Trainee], writer: RunWriter, watch: Watch) -> None:
    """Keeps the weights of those whose last step this was, before a checkpoint counts them done."""
    for trainee in trainees:
        name, progress = trainee.name, trainee.progress
        if progress.stopped is not None:
            trainee.retreat()
            writer.stopped(trainee)
            writer.note(done, trainee, stopped=progress.stopped)
            watch.say(f"{name} stops at {progress.stopped}; the others go on")
        elif progress.ended_early or trainee.data.steps == done:
            if progress.ended_early:
                writer.note(done, trainee, ended=progress.ended_early)
                watch.say(f"{name} ends well at {progress.ended_early}")
            trainee.settle()
            writer.finished(trainee)


def _initial_adapters(
    recipe: Recipe, targets: Mapping[str, Shapes], fingerprint: str, earlier: dict[str, Any] | None
) -> dict[str, InitialAdapter]:
    """The adapters that tasks go on from; a run that is taken up again may do without them."""
    found: dict[str, InitialAdapter] = {}
    for task in recipe.tasks:
        recorded = ((earlier or {}).get("tasks", {}).get(task.name, {})).get("init_from")
        directory = task.lora.init_from
        if recorded and directory is not None and not directory.exists():
            continue
        initial = read_initial(task, targets[task.name], fingerprint)
        if initial is None:
            continue
        if recorded not in (None, initial.digest):
            raise RecipeChangedError(
                f"task {task.name}: init_from {directory} holds other weights than when the run "
                "was started; put those back, remove it, or train into a new --run-dir"
            )
        found[task.name] = initial
    return found


def _check_steps(path: Path, trainee: Trainee, done: int) -> None:
    """A changed number of steps must lie ahead of a task that has not ended."""
    progress, steps = trainee.progress, trainee.data.steps
    if progress.stopped or progress.ended_early:
        return
    if progress.size_bytes is not None:
        if steps > done:
            raise RecipeChangedError(
                f"{path}: {trainee.name} has ended, so more steps cannot be added to it in this run"
            )
    elif steps <= done:
        raise RecipeChangedError(
            f"{path}: {trainee.name} has done {done} steps, so it cannot end at {steps}"
        )


def _describe(task: Task, data: TaskData[Rendered, Any]) -> str:
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
