"""Typed YAML files: frozen models, unknown keys refused, every mistake reported at once.

Recipes, gateway configs and evaluation suites are all read through here, so that a user meets
one form of error whichever file is wrong.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml.constructor import ConstructorError

from manylora_registry.errors import ConfigError, Problem


class ConfigModel(BaseModel):
    """A section of a config file: frozen, unknown keys refused, docstrings under the fields.

    NaN, which keeps every bound, and infinity are refused too.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


Model = TypeVar("Model", bound=ConfigModel)


def load_config(path: Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Reads the YAML file at `path` as a `model`.

    `overrides` are `dotted.path=VALUE` strings, VALUE in YAML; a number in the path indexes a list.

    Raises:
        ConfigError: with every mistake of the file, each with its path and line.
    """
    directory = path.resolve().parent
    try:
        # What is made from here on is recorded with its place, in files that are UTF-8.
        _ = str(directory).encode()
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(path, [Problem("", f"cannot be read: {error.strerror}")]) from error
    except UnicodeEncodeError as error:
        problem = Problem("", "lies in a directory whose name is no UTF-8: rename it")
        raise ConfigError(path, [problem]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(path, [Problem("", f"is no UTF-8: {error}")]) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = _parse(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = None if mark is None else mark.line + 1
        raise ConfigError(path, [Problem("", f"is not YAML: {_why(error)}", line)]) from error
    if not isinstance(data, dict):
        raise ConfigError(path, [Problem("", "must be a mapping of keys to values")])
    problems = list(_twins(node, (), set()))
    overridden = [problem for entry in overrides if (problem := _override(data, entry)) is not None]
    if overridden:
        raise ConfigError(path, [*problems, *overridden])
    replaced = [entry.partition("=")[0].split(".") for entry in overrides]

    def placed(location: tuple[int | str, ...], text: str) -> Problem:
        given = _given(data, location)
        if any(given[: len(keys)] == keys for keys in replaced):
            return Problem(_dotted(location), f"{text} (as overridden)")
        return Problem(_dotted(location), text, _line(node, location))

    try:
        found = model.model_validate(data, context={"directory": directory})
    except ValidationError as error:
        problems += [placed(e["loc"], _say(e["type"], e["msg"])) for e in own_mistakes(error)]
        raise ConfigError(path, problems) from error
    problems += [
        placed(loc, "must be a number, not a truth value")
        for loc in _truths_as_numbers(data, found, ())
    ]
    if problems:
        raise ConfigError(path, problems)
    return found


class _Loader(yaml.SafeLoader):
    """Says where a scalar stands that has the form or the tag of a date or number and is none."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # pyright: ignore[reportUnknownMemberType]
        except ValueError as error:
            raise ConstructorError(None, None, str(error), node.start_mark) from error
        except (KeyError, AttributeError, IndexError) as error:
            # What PyYAML lets through where a tag promises what the text is not.
            text = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
            raise ConstructorError(None, None, text, node.start_mark) from error


def _parse(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError, RecursionError: it says nothing.
    """
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


def _why(error: Exception) -> str:
    """What YAML's parser says, on one line."""
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _twins(
    node: yaml.Node | None, location: tuple[int | str, ...], seen: set[int]
) -> Iterator[Problem]:
    """The keys that stand in a mapping twice: YAML's parser takes the last one in silence."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))  # An alias is the node it names.
    if isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            yield from _twins(entry, (*location, index), seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int | None] = {}
        for key, value in node.value:
            name = str(key.value)
            if name in first:
                problem = f"stands here a second time, after line {first[name]}"
                yield Problem(_dotted((*location, name)), problem, _start(key))
            first[name] = _start(key)
            yield from _twins(value, (*location, name), seen)


def _truths_as_numbers(
    given: Any, found: Any, location: tuple[int | str, ...]
) -> Iterator[tuple[int | str, ...]]:
    """Where a number was made of a bare yes, no, on or off: Python takes True for 1."""
    if given is found:
        # Taken as it is, of whatever depth: YAML can name lists that hold themselves.
        return
    if isinstance(given, bool):
        if isinstance(found, int | float) and not isinstance(found, bool):
            yield location
    elif isinstance(given, list) and isinstance(found, list | tuple):
        entries = cast("list[Any]", given)
        for index, pair in enumerate(zip(entries, cast("Sequence[Any]", found), strict=False)):
            yield from _truths_as_numbers(*pair, (*location, index))
    elif isinstance(given, dict) and isinstance(found, dict | ConfigModel):
        made = cast("dict[Any, Any]", found if isinstance(found, dict) else vars(found))
        for key, value in cast("dict[Any, Any]", given).items():
            yield from _truths_as_numbers(value, made.get(key), (*location, key))


def own_mistakes(error: ValidationError) -> list[Any]:
    """Those in an error, without lists that are too short for the mistakes in their entries."""
    found = error.errors()
    return [
        e
        for e in found
        if e["type"] != "too_short"
        or not any(
            len(o["loc"]) > (depth := len(e["loc"])) and o["loc"][:depth] == e["loc"] for o in found
        )
    ]


def _override(data: Any, entry: str) -> Problem | None:
    """Applies `a.b.0.c=VALUE` to `data` in place; says what is wrong with it, if anything."""
    dotted, equals, value = entry.partition("=")
    if not equals or not dotted:
        return Problem(entry, "an override is written PATH=VALUE")
    *parents, last = dotted.split(".")
    here = data
    for key in parents:
        inside = _items(here)
        if isinstance(inside, list) and key.isdecimal() and int(key) < len(inside):
            here = inside[int(key)]
        elif isinstance(inside, dict):
            here = inside.setdefault(key, {})
        else:
            return Problem(dotted, f"nothing can be set below {key!r}{_entries(inside)}")
    try:
        parsed = _parse(value)
    except (yaml.YAMLError, RecursionError) as error:
        return Problem(dotted, f"the value {value!r} is not YAML: {_why(error)}")
    inside = _items(here)
    if isinstance(inside, dict):
        inside[last] = parsed
    elif isinstance(inside, list) and last.isdecimal() and int(last) < len(inside):
        inside[int(last)] = parsed
    else:
        return Problem(dotted, f"there is no {last!r} to set{_entries(inside)}")
    return None


def _entries(value: dict[str, Any] | list[Any] | None) -> str:
    """How the entries of a list are named, for who gave another name."""
    if not isinstance(value, list) or not value:
        return ""
    return f": entries of a list go by their number, here 0 to {len(value) - 1}"


def _items(value: Any) -> dict[str, Any] | list[Any] | None:
    """`value` itself where something can be set in it."""
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    return cast("list[Any]", value) if isinstance(value, list) else None


def _given(data: Any, location: tuple[int | str, ...]) -> list[str]:
    """The keys of `location` that were given: tags of discriminated unions stand nowhere."""
    keys = list[str]()
    for part in location:
        inside = _items(data)
        if isinstance(inside, dict) and part in inside:
            data = cast("dict[Any, Any]", inside)[part]
        elif isinstance(inside, list) and isinstance(part, int) and part < len(inside):
            data = inside[part]
        else:
            continue
        keys.append(str(part))
    return keys


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)


def _say(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "unknown key"
    if kind == "missing":
        return "is required"
    return message.removeprefix("Value error, ")


def _line(node: yaml.Node | None, location: tuple[int | str, ...]) -> int | None:
    """The line of the deepest part of `location` that stands in the file."""
    line = _start(node)
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                # A tag of a discriminated union is part of the location but not of the file.
                continue
            key, node = found[0]
            line = _start(key)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            if part >= len(node.value):
                break
            node = node.value[part]
            line = _start(node)
    return line


def _start(node: yaml.Node | None) -> int | None:
    """The line a node starts on, from 1."""
    mark = None if node is None else node.start_mark
    return None if mark is None else mark.line + 1
