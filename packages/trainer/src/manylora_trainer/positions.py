"""How long an example may be on a base, from its configuration alone."""

# transformers is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig

from manylora_trainer.errors import UnsupportedBaseError
from manylora_trainer.recipe import Recipe


def within_positions(recipe: Recipe, say: Callable[[str], None]) -> Recipe:
    """The recipe with no task's `max_length` above the base's positions.

    With learned positions a longer example has none, with rotary ones no engine takes its like.
    `say` is told of what is lowered.

    Raises:
        UnsupportedBaseError: the base's configuration cannot be read.
    """
    try:
        config: Any = AutoConfig.from_pretrained(recipe.base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedBaseError(
            f"{recipe.base}: its config.json cannot be used: {error}"
        ) from error
    most = most_positions(config)
    if most is None or all(task.max_length <= most for task in recipe.tasks):
        return recipe
    for task in recipe.tasks:
        if task.max_length > most:
            say(f"{task.name}: the base has {most} positions, so max_length is {most}")
    tasks = tuple(
        task.model_copy(update={"max_length": min(task.max_length, most)}) for task in recipe.tasks
    )
    return recipe.model_copy(update={"tasks": tasks})


def most_positions(config: Any) -> int | None:
    """Positions that a base tells apart, those its rotary scaling adds included; None: any."""
    text = config.get_text_config()
    most: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if most is None or not isinstance(rope.get("factor"), int | float):
        return most
    # YaRN and the like name what they stretch, and leave max_position_embeddings before or after.
    stretched = (rope.get("original_max_position_embeddings") or most) * rope["factor"]
    return max(most, int(stretched))
