"""How long an example may be on a base, from its configuration alone."""

# transformers is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from typing import Any

from transformers import AutoConfig

from manylora_trainer.errors import UnfitTaskError, UnsupportedBaseError
from manylora_trainer.recipe import Recipe


def check_lengths(recipe: Recipe) -> None:
    """Refuses tasks with examples longer than any engine serves the base.

    Raises:
        UnfitTaskError: a task's max_length is beyond the base's positions.
        UnsupportedBaseError: the base's configuration cannot be read.
    """
    try:
        config: Any = AutoConfig.from_pretrained(recipe.base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedBaseError(
            f"{recipe.base}: its config.json cannot be used: {error}"
        ) from error
    most = most_positions(config)
    for task in recipe.tasks:
        if most is not None and task.max_length > most:
            raise UnfitTaskError(
                task.name,
                f"max_length {task.max_length} is more than the {most} positions of the base, "
                "which engines serve at most; lower it to that",
            )


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
