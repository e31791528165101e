"""What a recipe would train, from a look at its first rows; nothing is written."""

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from manylora_registry.base import identify_base
from manylora_trainer.adapter_files import read_initial
from manylora_trainer.dataset import (
    fitted,
    length_of,
    part_of,
    preparation_of,
    rendered_or_skipped,
    require_validation,
)
from manylora_trainer.errors import NoExamplesError
from manylora_trainer.estimates import (
    MemoryEstimate,
    TimeEstimate,
    Work,
    estimate_memory,
    estimate_time,
)
from manylora_trainer.memory import trained_parameters
from manylora_trainer.positions import within_positions
from manylora_trainer.recipe import Recipe, Task
from manylora_trainer.source_factory import open_source
from manylora_trainer.targets import linears_of, targets_of
from manylora_trainer.tokenization import ChatTokenizer, Example

SAMPLED_ROWS = 1000


@dataclass(frozen=True)
class Segment:
    """A part of a rendered example."""

    text: str
    trained: bool


@dataclass(frozen=True)
class TaskPlan:
    """One task as it would be trained."""

    task: str
    rows_sampled: int
    """Rows looked at: the first of the source."""
    rows_malformed: int
    """Of these, rows that `on_bad_row: skip` passes over."""
    train: int
    """Of these, rows that would train; so with the two below."""
    validation: int
    held_out: int
    tokens_p50: int
    """Half of the examples sampled are no longer than this; so with the two below."""
    tokens_p90: int
    tokens_p99: int
    tokens_max: int
    overlong_dropped: int
    """Examples sampled that are longer than max_length and left out."""
    overlong_truncated: int
    """Examples sampled that are longer than max_length and cut."""
    dropped_share: float
    trained_share: float
    """Of the tokens of the examples kept, those the adapter learns."""
    trainable_parameters: int
    steps: int | None
    """None: the epochs of a source longer than the sample, whose rows a dry run does not count."""
    epochs: float | None
    examples_per_step: float
    tokens_per_step: float
    example: tuple[Segment, ...]
    """The first example as the model sees it."""


@dataclass(frozen=True)
class Plan:
    """What a recipe would do."""

    tasks: tuple[TaskPlan, ...]
    memory: MemoryEstimate
    time: TimeEstimate | None
    """None where the steps of a task are not known."""

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def plan(recipe: Recipe) -> Plan:
    """Checks the recipe against its base, reads some rows of every task and reckons what it needs.

    Raises:
        BaseError, UnsupportedBaseError: the base cannot be read or trained on.
        InitialAdapterError: an adapter to go on from does not fit.
        UnfitTaskError: a task's settings do not go with the base.
        DataError: rows cannot be read or trained on.
    """
    identity = identify_base(recipe.base)
    linears = linears_of(identity)
    recipe = within_positions(recipe, lambda _: None)
    for task in recipe.tasks:
        read_initial(task, targets_of(task, linears), identity.fingerprint)
    parameters = trained_parameters(recipe, identity)
    tokenizer = ChatTokenizer(recipe.base)
    tasks: list[TaskPlan] = []
    work: dict[str, Work] = {}
    for task in recipe.tasks:
        kept, entry = _plan_task(task, parameters[task.name], tokenizer, recipe.seed)
        tasks.append(entry)
        if entry.steps is not None:
            lengths = np.array([len(example) for example in kept])
            work[task.name] = Work(
                entry.steps * entry.tokens_per_step,
                entry.trained_share,
                float((lengths**2).sum() / lengths.sum()),
            )
    memory = estimate_memory(recipe, identity, sum(entry.tokens_per_step for entry in tasks))
    known = len(work) == len(recipe.tasks)
    return Plan(tuple(tasks), memory, estimate_time(recipe, identity, work) if known else None)


def _plan_task(
    task: Task, parameters: int, tokenizer: ChatTokenizer, seed: int
) -> tuple[list[Example], TaskPlan]:
    """The examples sampled, and what they tell."""
    source = open_source(task.source, f"{seed}/{task.name}")
    preparation = preparation_of(task, tokenizer)
    rows = list(itertools.islice(source.rows(), SAMPLED_ROWS + 1))
    is_whole = len(rows) <= SAMPLED_ROWS
    rows = rows[:SAMPLED_ROWS]
    if not rows:
        raise NoExamplesError(f"task {task.name}: {source.name} has no rows")
    counts = {"train": 0, "validation": 0, "held_out": 0}
    malformed = truncated = 0
    kept: list[Example] = []
    items = 0
    lengths: list[int] = []
    for row in rows:
        rendered = rendered_or_skipped(task, preparation, row, malformed)
        if rendered is None:
            malformed += 1
            continue
        part, _ = part_of(rendered, task.split)
        counts[part] += 1
        if part != "train":
            continue
        (item,) = preparation.encode([rendered])
        lengths.append(item.longest)
        if item.longest > task.max_length:
            if (item := fitted(item, task)) is None:
                continue
            truncated += 1
        items += 1
        kept += item.sequences
    if not kept:
        raise NoExamplesError(
            f"task {task.name}: of the first {len(rows)} rows in {source.name} none is left to "
            f"train on ({len(lengths)} are longer than max_length {task.max_length}, {malformed} "
            "malformed, the rest held out)"
        )
    tokens = sum(len(example) for example in kept)
    mean = tokens / items
    per_step = task.batch_tokens / mean if task.batch_tokens else task.examples_per_step
    steps = task.steps
    if is_whole:
        require_validation(task, counts["validation"])
        steps, examples = length_of(task, items, tokens)
        per_step = min(per_step, examples or per_step)
    p50, p90, p99 = (int(np.percentile(lengths, share)) for share in (50, 90, 99))
    dropped = len(lengths) - items
    return kept, TaskPlan(
        task=task.name,
        rows_sampled=len(rows),
        rows_malformed=malformed,
        **counts,
        tokens_p50=p50,
        tokens_p90=p90,
        tokens_p99=p99,
        tokens_max=max(lengths),
        overlong_dropped=dropped,
        overlong_truncated=truncated,
        dropped_share=round(dropped / len(lengths), 4),
        trained_share=round(sum(int(e.trained.sum()) for e in kept) / tokens, 4),
        trainable_parameters=parameters,
        steps=steps,
        epochs=task.epochs,
        examples_per_step=round(per_step, 1),
        tokens_per_step=round(per_step * mean, 1),
        example=_segments(kept[0], tokenizer),
    )


def _segments(example: Example, tokenizer: ChatTokenizer) -> tuple[Segment, ...]:
    """Runs of tokens that train and of tokens that do not, as text."""
    bounds = np.flatnonzero(np.diff(example.trained)) + 1
    edges = [0, *bounds.tolist(), len(example)]
    return tuple(
        Segment(tokenizer.decode(example.tokens[start:end]), bool(example.trained[start]))
        for start, end in itertools.pairwise(edges)
    )
