"""The card of an adapter: the README that is published with its weights."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from manylora_trainer.dotted import dotted
from manylora_trainer.recipe import Task

OTHERWISE_TOLD = {"name", "seed_as", "source", "format", "split"}


def adapter_card(
    task: Task, base_fingerprint: str, data_fingerprint: str, metrics: Mapping[str, float]
) -> str:
    """What the adapter is, what it was trained on and how, and how well it did, as Markdown.

    Nothing in it depends on time or place: equal training gives an equal card, so that equal
    adapters stay the same version.
    """
    settings = dotted(task.model_dump(exclude=OTHERWISE_TOLD))
    rows = "\n".join(
        f"| {path} | {_cell(value)} |"
        for path, value in settings.items()
        # Paths are places.
        if value is not None and not isinstance(value, Path)
    )
    if task.lora.saved_rank != task.lora.rank:
        # What it was trained as is a difference to its start; what is saved holds both.
        saved = f"{task.lora.saved_rank} / {task.lora.saved_alpha}"
        rows += f"\n| saved rank / alpha | {saved} |"
    losses = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    prompts = yaml.safe_dump(
        task.format.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True
    )
    # A prompt may hold fences itself, and one of the same length would end this one.
    fence = max(["``", *re.findall("`+", prompts)], key=len) + "`"
    return f"""---
library_name: peft
tags: [lora, manylora]
---
# {task.seed_name}

A LoRA adapter trained with manylora. It is right only on the base it was trained on.

| | |
|---|---|
| base | `{base_fingerprint}` |
| training data | `{data_fingerprint}` |

## Metrics

Losses are cross-entropies in nats per completion token.

| metric | value |
|---|---|
{losses}

## How it was asked

{fence}yaml
{prompts}{fence}

## Settings

| setting | value |
|---|---|
{rows}
"""


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
