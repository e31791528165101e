"""Which changes of its recipe a run that is taken up again can live with, once they are stated."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

from manylora_trainer.errors import RecipeChangedError

CHANGEABLE = (
    # Its weights and tokenizer cannot: their fingerprint is held to that of the run.
    "base",
    r"training\.(pack_tokens|validate_every|checkpoint_every|keep_checkpoints|threads)",
    r"training\.gradient_checkpointing",
    r"tasks\.\d+\.steps",
    r"tasks\.\d+\.lora\.dropout",
    r"tasks\.\d+\.optimizer\.(?!kind).+",
    r"tasks\.\d+\.early_stopping\..+",
)
"""Everything else decides shapes, data or names that the checkpoints already hold."""


def accept_changes(where: str, before: Any, after: Any, allowed: Sequence[str]) -> list[str]:
    """The dotted paths in which a recipe differs from its run's.

    Args:
        where: names the run in errors.
        before: the recipe that the run was started with, as plain data.
        after: the recipe it should go on with.
        allowed: paths that were stated, each with all that is below it.

    Raises:
        RecipeChangedError: a change was not stated, or cannot be made within a run; every one is
            named.
    """
    paths = [
        path
        for path in _differing(before, after, "")
        # Where a run is computed decides nothing of what it makes.
        if not path.startswith(("run_directory", "workers"))
    ]
    fixed = [path for path in paths if not any(re.fullmatch(p, path) for p in CHANGEABLE)]
    unstated = [path for path in paths if path not in fixed and not _is_stated(path, allowed)]
    said: list[str] = []
    if fixed:
        said.append(
            f"{', '.join(fixed)} cannot change within a run: undo that, or train into a new "
            "--run-dir"
        )
    if unstated:
        stated = " ".join(f"--allow-change {path}" for path in unstated)
        said.append(
            f"{', '.join(unstated)} changed: undo that, or state that it is meant: {stated}"
        )
    if said:
        raise RecipeChangedError(f"{where} was started with another recipe. {'; '.join(said)}")
    return paths


def _is_stated(path: str, allowed: Sequence[str]) -> bool:
    return any(path == entry or path.startswith(f"{entry}.") for entry in allowed)


def _differing(before: Any, after: Any, path: str) -> Iterable[str]:
    if isinstance(before, list) and isinstance(after, list):
        before = dict(enumerate(cast("list[Any]", before)))
        after = dict(enumerate(cast("list[Any]", after)))
    if isinstance(before, dict) and isinstance(after, dict):
        left, right = cast("dict[Any, Any]", before), cast("dict[Any, Any]", after)
        for key in dict.fromkeys([*left, *right]):
            below = f"{path}.{key}" if path else str(key)
            yield from _differing(left.get(key), right.get(key), below)
    elif before != after:
        yield path
