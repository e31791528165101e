"""What a recipe would train, from a look at its first rows; nothing is written."""

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from manylora_registry.base import identify_base
from manylora_trainer.adapter_files import read_initial
from manylora_trainer.dataset import encode, part_of
from manylora_trainer.errors import NoExamplesError
from manylora_trainer.formats import render
from manylora_trainer.recipe import Recipe, Task
from manylora_trainer.sources import open_source
from manylora_trainer.targets import Shapes, linears_of, targets_of, trainable_parameters
from manylora_trainer.tokenization import ChatTokenizer

SAMPLED_ROWS = 256


@dataclass(frozen=True)
class TaskPlan:
    """One task as it would be trained."""

    task: str
    sampled: int
    """Rows looked at: the first of the source."""
    train: int
    """Of these, rows that would train."""
    tokens_median: int
    tokens_90: int
    """90 of 100 examples are no longer than this."""
    tokens_longest: int
    overlong: int
    """Sampled examples longer than max_length."""
    trained_share: float
    """Of all tokens, those the adapter learns."""
    trainable_parameters: int
    steps: int
    examples: int
    """Examples the run would draw: steps times batch size."""
    prompt: str
    """One rendered example as the model sees it …"""
    completion: str
    """… and the part of it that trains."""


def plan(recipe: Recipe) -> list[TaskPlan]:
    """Checks the recipe against its base and reads some rows of every task.

    Raises:
        BaseError, UnsupportedBaseError: the base cannot be read or trained on.
        InitialAdapterError: an adapter to go on from does not fit.
        DataError: rows cannot be read or trained on.
    """
    identity = identify_base(recipe.base)
    linears = linears_of(identity)
    for task in recipe.tasks:
        read_initial(task, targets_of(task, linears), identity.fingerprint)
    tokenizer = ChatTokenizer(recipe.base)
    return [_plan_task(task, linears, tokenizer) for task in recipe.tasks]


def as_json(plans: list[TaskPlan]) -> list[dict[str, Any]]:
    """The same for machines."""
    return [asdict(entry) for entry in plans]


def _plan_task(task: Task, linears: Shapes, tokenizer: ChatTokenizer) -> TaskPlan:
    targets = targets_of(task, linears)
    source = open_source(task.source)
    rows = itertools.islice(source.rows(), SAMPLED_ROWS)
    rendered = [render(task.format, source.name, row) for row in rows]
    if not rendered:
        raise NoExamplesError(f"task {task.name}: {source.name} has no rows")
    items = encode(rendered, tokenizer, task)
    examples = [example for item in items for example in item.sequences]
    lengths = np.array([len(example) for example in examples])
    trained = sum(int(example.trained.sum()) for example in examples)
    shown = examples[0]
    return TaskPlan(
        task=task.name,
        sampled=len(rendered),
        train=sum(part_of(entry, task.split)[0] == "train" for entry in rendered),
        tokens_median=int(np.percentile(lengths, 50)),
        tokens_90=int(np.percentile(lengths, 90)),
        tokens_longest=int(lengths.max()),
        overlong=int((lengths > task.max_length).sum()),
        trained_share=round(trained / int(lengths.sum()), 4),
        trainable_parameters=trainable_parameters(targets, task.lora.rank),
        steps=task.steps,
        examples=task.steps * task.batch_size,
        prompt=tokenizer.decode(shown.tokens[: shown.prompt_length]),
        completion=tokenizer.decode(shown.tokens[shown.prompt_length :]),
    )
