"""Paths in a suite: relative ones start at the directory of its YAML file."""

from pathlib import Path
from typing import Annotated, TypeAlias, cast

from pydantic import AfterValidator, ValidationInfo


def _beside_the_suite(path: Path, info: ValidationInfo) -> Path:
    context = cast("dict[str, Path]", info.context or {})
    return context.get("directory", Path()) / path.expanduser()


SuitePath: TypeAlias = Annotated[Path, AfterValidator(_beside_the_suite)]
"""A path, made absolute from where the suite lies."""
