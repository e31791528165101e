"""How adapters are named: `NAME[@SELECTOR]`.

Names become parts of paths and of engine identifiers, so the alphabet is small and a name cannot
start with a dot: no reference can climb out of a directory.
"""

import re
from dataclasses import dataclass

from manylora_registry.errors import InvalidNameError, InvalidReferenceError

DEFAULT_SELECTOR = "production"
SHORTEST_DIGEST = 12
"""Hexadecimal digits a digest may be shortened to."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NUMBER = re.compile(r"[1-9][0-9]{0,17}")
"""What every database can hold as a number."""
_DIGEST = re.compile(rf"sha256:[0-9a-f]{{{SHORTEST_DIGEST},64}}")


@dataclass(frozen=True)
class AdapterReference:
    """Which version of which adapter is meant, not yet resolved.

        AdapterReference.parse("spelling@3") == AdapterReference("spelling", "3")

    Raises:
        InvalidReferenceError: name or selector are not well formed.
    """

    name: str
    """The adapter."""
    selector: str = DEFAULT_SELECTOR
    """A version number, an alias, or `sha256:` and at least 12 hexadecimal digits."""

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise InvalidReferenceError(
                f"{self.name[:80]!r} is not an adapter name: up to 64 of a-z, 0-9, '.', '_', '-', "
                "beginning with a letter or digit"
            )
        if not (self.number or self.digest or _is_alias(self.selector)):
            raise InvalidReferenceError(
                f"{self.selector[:80]!r} selects no version: give a version number from 1, "
                f"an alias, or sha256: and {SHORTEST_DIGEST} to 64 hexadecimal digits"
            )

    @classmethod
    def parse(cls, text: str) -> "AdapterReference":
        """Reads `NAME[@SELECTOR]`; without a selector it is `@production`.

        Raises:
            InvalidReferenceError: `text` is not such a reference. The empty string is not one:
                it means the bare base, which no registry holds.
        """
        name, at, selector = text.partition("@")
        return cls(name, selector if at else DEFAULT_SELECTOR)

    @property
    def number(self) -> int | None:
        """The version number, if that is what selects."""
        return int(self.selector) if NUMBER.fullmatch(self.selector) else None

    @property
    def digest(self) -> str | None:
        """The digest or the beginning of one, if that is what selects."""
        return self.selector if _DIGEST.fullmatch(self.selector) else None

    @property
    def alias(self) -> str | None:
        """The alias, if that is what selects."""
        return None if self.number or self.digest else self.selector

    def __str__(self) -> str:
        return f"{self.name}@{self.selector}"


def is_name(text: str) -> bool:
    """Whether an adapter or a suite may be called `text`."""
    return bool(_NAME.fullmatch(text))


def check_adapter_name(name: str) -> None:
    """Raises InvalidNameError unless an adapter may be called `name`."""
    if not is_name(name):
        raise InvalidNameError(
            f"{name[:80]!r} cannot name an adapter: use up to 64 of a-z, 0-9, '.', '_', '-', "
            "beginning with a letter or digit"
        )


def check_alias_name(alias: str) -> None:
    """Raises InvalidNameError unless an alias may be called `alias`."""
    if not _is_alias(alias):
        raise InvalidNameError(
            f"{alias[:80]!r} cannot name an alias: use up to 64 of a-z, 0-9, '.', '_', '-', "
            "beginning with a letter or digit, not only digits and not sha256"
        )


def _is_alias(text: str) -> bool:
    return is_name(text) and not text.isdigit() and text != "sha256"
