"""Which linear layers of a base an adapter is attached to. Read from the weights' shapes alone."""

from collections.abc import Mapping, Sequence

from manylora_registry.base import BaseModelIdentity
from manylora_trainer.errors import UnfitTaskError
from manylora_trainer.recipe import Task

Shapes = Mapping[str, tuple[int, int]]
"""(out, in) of linear layers, by module name."""


def linears_of(identity: BaseModelIdentity) -> Shapes:
    """Every linear layer of a base's blocks, sorted by name.

    Blocks are numbered; what stands beside them is embeddings and the head, whatever its name.
    """
    linears: dict[str, tuple[int, int]] = {}
    for name, shape in sorted(identity.tensors.items()):
        module, _, kind = name.rpartition(".")
        in_block = any(part.isdigit() for part in module.split("."))
        if in_block and kind == "weight" and len(shape) == 2:
            linears[module] = (shape[0], shape[1])
    return linears


def targets_of(task: Task, linears: Shapes) -> Shapes:
    """The linear layers that a task's adapter changes.

    Names are matched as PEFT does: a whole module path, or its end from a dot on.

    Raises:
        UnfitTaskError: a name matches nothing; an engine would load such an adapter and
            change nothing.
    """
    wanted = task.lora.target_modules
    if wanted == "all-linear":
        return linears
    unmatched = [name for name in wanted if not any(_matches(module, name) for module in linears)]
    if unmatched:
        known = ", ".join(last_names(linears))
        raise UnfitTaskError(
            task.name,
            f"the base has no linear layer named {', '.join(unmatched)}; it has {known}",
        )
    return {
        module: shape
        for module, shape in linears.items()
        if any(_matches(module, name) for name in wanted)
    }


def last_names(modules: Mapping[str, object] | Sequence[str]) -> list[str]:
    """The distinct last parts of module names, sorted: what an adapter's config lists."""
    return sorted({module.rpartition(".")[2] for module in modules})


def trainable_parameters(shapes: Shapes, rank: int) -> int:
    """Weights of an adapter of this rank over these layers."""
    return sum(rank * (out + into) for out, into in shapes.values())


def _matches(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
