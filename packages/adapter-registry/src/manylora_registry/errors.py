"""Every error the registry states.

RegistryError
├── ConfigError              a YAML file is wrong; carries every problem at once
├── BaseError                a directory is not a usable base model
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class RegistryError(Exception):
    """Base of all; its text is one line a user can act on."""

    reason = "REGISTRY"
    """For google.rpc.ErrorInfo, in UPPER_SNAKE."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a config file."""

    path: str
    """Dotted path of the key, empty for the whole file."""
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self.path}: {self.message}" if self.path else f"{where}{self.message}"


class ConfigError(RegistryError):
    """A config file has mistakes; `problems` holds them all."""

    reason = "CONFIG_INVALID"

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        self.path = path
        self.problems = tuple(problems)
        super().__init__(f"{path}: " + "; ".join(str(problem) for problem in problems))


class BaseError(RegistryError):
    """A directory does not hold a base model this system can use."""

    reason = "BASE_INVALID"
