"""How long an example may be on a base, from its configuration alone."""

from collections.abc import Callable
from typing import Any, cast

from manylora_trainer.base_config import text_config_of
from manylora_trainer.recipe import Recipe


def within_positions(recipe: Recipe, say: Callable[[str], None]) -> Recipe:
    """The recipe with no task's `max_length` above the base's positions.

    With learned positions a longer example has none, with rotary ones no engine takes its like.
    `say` is told of what is lowered.

    Raises:
        UnsupportedBaseError: the base's configuration cannot be read.
    """
    most = most_positions(text_config_of(recipe.base))
    if most is None or all(task.max_length <= most for task in recipe.tasks):
        return recipe
    for task in recipe.tasks:
        if task.max_length > most:
            say(f"{task.name}: the base has {most} positions, so max_length is {most}")
    tasks = tuple(
        task.model_copy(update={"max_length": min(task.max_length, most)}) for task in recipe.tasks
    )
    return recipe.model_copy(update={"tasks": tasks})


def most_positions(text: Any) -> int | None:
    """Positions that a base tells apart, those its rotary scaling adds included; None: any."""
    most: int | None = getattr(text, "max_position_embeddings", None)
    rope = _rope_of(text)
    if most is None or not isinstance(rope.get("factor"), int | float):
        return most
    # YaRN and the like name what they stretch, and leave max_position_embeddings before or after.
    stretched: float = (rope.get("original_max_position_embeddings") or most) * rope["factor"]
    return max(most, int(stretched))


def steady_positions(text: Any) -> int | None:
    """Tokens up to which each position is the same whatever stands beside it; None: always."""
    steady: list[int] = []
    ropes = _rope_of(text)
    # Gemma 3 and others have one for each kind of their layers.
    own = cast("list[dict[str, Any]]", [rope for rope in ropes.values() if isinstance(rope, dict)])
    for rope in own or [ropes]:
        match rope.get("rope_type"):
            case "dynamic":
                steady.append(text.max_position_embeddings)
            case "longrope":
                steady.append(rope["original_max_position_embeddings"])
            case _:
                pass
    return min(steady, default=None)


def _rope_of(text: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", getattr(text, "rope_parameters", None) or {})
