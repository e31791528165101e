"""Writes docs/settings.md from the models that read the files: `make settings`."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from deploy.stages.gate_settings import Gates
from deploy.stages.settings import StageConfig
from manylora_evaluator.suite import Suite
from manylora_gateway.access import AccessConfig
from manylora_gateway.config import GatewayConfig
from manylora_registry.config import ConfigModel
from manylora_trainer.recipe import Recipe
from manylora_trainer.sweep_settings import Sweep

PAGE = Path(__file__).with_name("settings.md")
FILES: dict[str, tuple[type[ConfigModel], str]] = {
    "Recipe": (
        Recipe,
        "`manylora train RECIPE`; see [training](training.md) and [its data](training-data.md).",
    ),
    "Sweep": (Sweep, "`manylora sweep SWEEP`; see [sweeps](runs-and-sweeps.md#sweeps)."),
    "Gateway": (
        GatewayConfig,
        "`manylora serve CONFIG`; see [the serving API](serving-api.md) and "
        "[its operation](serving-operations.md). Paths are relative to the file.",
    ),
    "Tenants": (
        AccessConfig,
        "What `tenants` of a gateway names; see [who may call](serving-api.md#who-may-call).",
    ),
    "Suite": (Suite, "`manylora evaluate SUITE`; see [evaluation](evaluation.md)."),
    "Stage": (
        StageConfig,
        "`stage.yaml`; see [deployment](deployment.md#stages-are-directories). "
        "Paths are relative to the file.",
    ),
    "Gates": (
        Gates,
        "`gates.yaml`; see [deployment](deployment.md#promote). Paths are relative to the file.",
    ),
}
"""The files people write: what reads each, and what is told of it."""
HEAD = """# Settings

Every key of every file with its default, written from the code by `make settings`. *required*: \
there is no default; *unset*: `null`. Unknown keys are refused, and all mistakes of a file are \
reported at once, each with its path and line.

`--set PATH=VALUE` of `train`, `sweep` and `serve` overrides a key by its dotted path, VALUE in \
YAML, a number for a place in a list: `--set tasks.0.lora.rank=16`. It may be repeated.
"""
"""What the page begins with."""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, (model, where) in FILES.items():
        parts.append(f"## {title}\n\n{where}\n")
        for path, section in sections(model):
            if path:
                parts.append(f"### {path}\n\n{sentence(section.__doc__ or '')}\n")
            parts.append(table(section))
    return "\n".join(parts)


def sections(model: type[ConfigModel]) -> Iterator[tuple[str, type[ConfigModel]]]:
    """Every model of a file with the path that leads to it, each once."""
    seen: set[type[ConfigModel]] = set()

    def below(path: str, model: type[ConfigModel]) -> Iterator[tuple[str, type[ConfigModel]]]:
        if model in seen:
            return
        seen.add(model)
        kind = model.model_fields.get("kind")
        alone = kind is not None and kind.is_required()
        named = f"{path}, `kind: {get_args(kind.annotation)[0]}`" if kind and alone else path
        yield named, model
        for name, field in model.model_fields.items():
            inner = field.alias or name
            for nested in models(field.annotation):
                yield from below(join(path, inner, field.annotation), nested)

    return below("", model)


def join(path: str, name: str, annotation: Any) -> str:
    """The path of a key, with N for a place in a list and NAME for a key of the user's."""
    origin = get_origin(annotation)
    many = {tuple: ".N", list: ".N", dict: ".NAME"}.get(origin, "") if origin else ""
    return f"`{path.strip('`')}{'.' if path else ''}{name}{many}`"


def models(annotation: Any) -> Iterator[type[ConfigModel]]:
    """The models an annotation speaks of."""
    if inspect.isclass(annotation) and issubclass(annotation, ConfigModel):
        yield annotation
    for part in get_args(annotation):
        yield from models(part)


def table(model: type[ConfigModel]) -> str:
    """A model's keys."""
    lines = ["| key | default | what |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        if name == "kind" and field.is_required():
            continue
        said = sentence(field.description or "")
        lines.append(f"| `{field.alias or name}` | {default(field)} | {said}{choices(field)} |")
    return "\n".join(lines) + "\n"


def default(field: FieldInfo) -> str:
    """What holds where the key is not given."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if isinstance(value, ConfigModel):
        return "as below"
    if isinstance(value, frozenset):
        value = sorted(value)
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def choices(field: FieldInfo) -> str:
    """The words a key takes, where it takes some alone."""
    words = [f"`{word}`" for word in literals(field.annotation)]
    return f" ({', '.join(words)})" if len(words) > 1 else ""


def literals(annotation: Any) -> list[Any]:
    """The values of the literals in an annotation."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in literals(part)]


def sentence(docstring: str) -> str:
    """Its first paragraph on one line of a table."""
    first = inspect.cleandoc(docstring).partition("\n\n")[0]
    return " ".join(first.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
