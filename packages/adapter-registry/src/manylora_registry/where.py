"""The filter of `manylora registry list --where`, from text to a condition.

    expression := all ("or" all)*
    all        := one ("and" one)*
    one        := "not" one | "(" expression ")" | FIELD OPERATOR VALUE
    OPERATOR   := "=" | "!=" | "<" | "<=" | ">" | ">=" | "~"

FIELD is `tag.KEY`, `lineage.KEY`, `metric.KEY`, `name`, `number`, `digest`, `base`, `rank`, `size`,
`created`, `yanked`, `alias`, `parent` or `file`, the digest of a file it consists of. `~` matches
with `*` and `?`. VALUE is a word, or in quotes. A version without the tag or the metric fulfils no
comparison with it, `!=` neither.
"""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from manylora_registry.errors import QueryError
from manylora_registry.reference import NUMBER
from manylora_registry.rows import microseconds
from manylora_registry.schema import (
    adapters,
    aliases,
    version_blobs,
    version_labels,
    version_metrics,
    version_parents,
    versions,
)

Condition = sa.ColumnElement[bool]
LONGEST = 4096
DEEPEST = 32
_TOKEN = re.compile(
    r"""\s*(?:(?P<paren>[()])|(?P<operator>!=|<=|>=|[=<>~])"""
    r"""|(?P<quoted>"[^"]*"|'[^']*')|(?P<word>[^\s()=<>~!"']+))"""
)
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_TEXTS: dict[str, sa.ColumnElement[Any]] = {
    "name": adapters.c.name,
    "digest": versions.c.digest,
    "base": versions.c.base_fingerprint,
}
_NUMBERS: dict[str, sa.ColumnElement[Any]] = {
    "number": versions.c.number,
    "rank": versions.c.rank,
    "size": versions.c.size,
}
_OTHERS = ("created", "yanked", "alias", "parent", "file")
FIELDS = ("tag.KEY", "metric.KEY", "lineage.KEY", *_TEXTS, *_NUMBERS, *_OTHERS)


def parse_where(text: str, dialect: str) -> Condition:
    """The condition on `versions` joined with `adapters` that a filter means.

    Args:
        text: the filter; an empty one is fulfilled by every version.
        dialect: name of SQLAlchemy's dialect, as databases match patterns differently.

    Raises:
        QueryError: it cannot be read; names the character where.
    """
    if not text.strip():
        return sa.true()
    if len(text) > LONGEST:
        raise QueryError(f"the filter is longer than {LONGEST} characters")
    parser = _Parser(text, dialect)
    condition = parser.expression()
    parser.expect_end()
    return condition


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


class _Parser:
    """Reads by recursive descent; one method for each rule of the grammar."""

    def __init__(self, text: str, dialect: str) -> None:
        self._text = text
        self._dialect = dialect
        self._tokens = _tokens(text)
        self._next = 0
        self._depth = 0

    def expression(self) -> Condition:
        parts = [self._all()]
        while self._word("or"):
            parts.append(self._all())
        return sa.or_(*parts) if len(parts) > 1 else parts[0]

    def expect_end(self) -> None:
        if self._next < len(self._tokens):
            raise self._wrong("expected 'and', 'or' or the end")

    def _all(self) -> Condition:
        parts = [self._one()]
        while self._word("and"):
            parts.append(self._one())
        return sa.and_(*parts) if len(parts) > 1 else parts[0]

    def _one(self) -> Condition:
        self._depth += 1
        if self._depth > DEEPEST:
            raise self._wrong(f"nested deeper than {DEEPEST}")
        if self._word("not"):
            condition = sa.not_(self._one())
        elif self._takes("paren", "("):
            condition = self.expression()
            if not self._takes("paren", ")"):
                raise self._wrong("expected ')'")
        else:
            condition = self._comparison()
        self._depth -= 1
        return condition

    def _comparison(self) -> Condition:
        start = self._next
        field = self._take("word", "a field such as tag.lang or metric.f1")
        sign = self._take("operator", "one of = != < <= > >= ~")
        at = self._next
        value = self._value()
        try:
            return _compare(field, sign, value, self._dialect)
        except _UnknownFieldError:
            self._next = start
            raise self._wrong(f"no field is called that; there are {', '.join(FIELDS)}") from None
        except ValueError as error:
            self._next = at
            raise self._wrong(str(error)) from None

    def _value(self) -> str:
        if self._peek() and self._tokens[self._next].kind == "quoted":
            return self._take("quoted", "")[1:-1]
        return self._take("word", "a value")

    def _take(self, kind: str, what: str) -> str:
        if not self._peek() or self._tokens[self._next].kind != kind:
            raise self._wrong(f"expected {what}")
        self._next += 1
        return self._tokens[self._next - 1].text

    def _takes(self, kind: str, text: str) -> bool:
        found = self._peek() and self._tokens[self._next] == _Token(
            kind, text, self._tokens[self._next].at
        )
        self._next += found
        return found

    def _word(self, text: str) -> bool:
        return self._takes("word", text)

    def _peek(self) -> bool:
        return self._next < len(self._tokens)

    def _wrong(self, what: str) -> QueryError:
        at = self._tokens[self._next].at if self._peek() else len(self._text)
        return _wrong(self._text, at, what)


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    end = len(text.rstrip())
    position = 0
    while position < end:
        found = _TOKEN.match(text, position)
        if found is None or found.lastgroup is None:
            at = position + len(text[position:]) - len(text[position:].lstrip())
            raise _wrong(text, at, "a quote is not closed" if text[at] in "\"'" else "not expected")
        tokens.append(_Token(found.lastgroup, found[found.lastgroup], found.start(found.lastgroup)))
        position = found.end()
    return tokens


def _wrong(text: str, at: int, what: str) -> QueryError:
    here = f"before {text[at : at + 20]!r}" if text[at:].strip() else "at its end"
    return QueryError(f"the filter is wrong at character {at + 1}, {here}: {what}")


class _UnknownFieldError(Exception):
    """A field that no version has."""


def _compare(field: str, sign: str, value: str, dialect: str) -> Condition:
    """One comparison; a ValueError says what is wrong with `value` or `sign`."""
    kind, dot, key = field.partition(".")
    if dot and key and kind == "metric":
        table = version_metrics
        found = _number(table.c.value, sign, value)
        return versions.c.id.in_(sa.select(table.c.version_id).where(table.c.key == key, found))
    if dot and key and kind in ("tag", "lineage"):
        table = version_labels
        found = _matches(table.c.value, sign, value, dialect)
        return versions.c.id.in_(
            sa.select(table.c.version_id).where(table.c.kind == kind, table.c.key == key, found)
        )
    if field in _TEXTS:
        return _matches(_TEXTS[field], sign, value, dialect)
    if field in _NUMBERS:
        return _number(_NUMBERS[field], sign, value)
    match field:
        case "created":
            return _ordered(sign, "a date")(versions.c.created_at, _date(value))
        case "yanked":
            if sign != "=" or value not in ("true", "false"):
                raise ValueError("write yanked=true or yanked=false")
            missing = versions.c.yanked_at.is_(None)
            return missing if value == "false" else sa.not_(missing)
        case "alias":
            found = _matches(aliases.c.alias, sign, value, dialect)
            return versions.c.id.in_(sa.select(aliases.c.version_id).where(found))
        case "file":
            found = _matches(version_blobs.c.digest, sign, value, dialect)
            return versions.c.id.in_(sa.select(version_blobs.c.version_id).where(found))
        case "parent":
            return versions.c.id.in_(_children(sign, value))
        case _:
            raise _UnknownFieldError(field)


def _children(sign: str, value: str) -> sa.Select[Any]:
    name, at, number = value.partition("@")
    if sign != "=" or not at or not NUMBER.fullmatch(number):
        raise ValueError("write parent=NAME@NUMBER")
    parent, owner = versions.alias(), adapters.alias()
    return (
        sa.select(version_parents.c.version_id)
        .join(parent, parent.c.id == version_parents.c.parent_id)
        .join(owner, owner.c.id == parent.c.adapter_id)
        .where(owner.c.name == name, parent.c.number == sa.literal(int(number), sa.BigInteger))
    )


def _matches(column: sa.ColumnElement[Any], sign: str, value: str, dialect: str) -> Condition:
    if sign != "~":
        return _OPERATORS[sign](column, value)
    if dialect == "sqlite":
        # Of GLOB's signs only * and ? are ours.
        return column.op("GLOB", is_comparison=True)(value.replace("[", "[[]"))
    pattern = re.sub(r"([\\%_])", r"\\\1", value).replace("*", "%").replace("?", "_")
    return column.like(pattern, escape="\\")


def _number(column: sa.ColumnElement[Any], sign: str, value: str) -> Condition:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("expected a number")
    return _ordered(sign, "a number")(column, sa.literal(number, sa.Float))


def _ordered(sign: str, what: str) -> Callable[[Any, Any], Any]:
    if sign not in _OPERATORS:
        raise ValueError(f"{what} matches no pattern")
    return _OPERATORS[sign]


def _date(value: str) -> int:
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("expected a date or time such as 2026-01-31 or 2026-01-31T12:00") from None
    return microseconds(at if at.tzinfo else at.replace(tzinfo=UTC))
