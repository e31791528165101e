"""How the verbs print: tables for people and for pipes, paths as the user would type them."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.text import Text


def shown(path: Path) -> str:
    """`path` from the working directory where it lies in it."""
    path = path.absolute()
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def print_table(
    header: Sequence[str], rows: "Sequence[Sequence[str | Text]]", empty: str | None = None
) -> None:
    """A table on a terminal, or the line `empty`; tab-separated with a header in a pipe."""
    if not sys.stdout.isatty():
        for row in (header, *rows):
            print("\t".join(str(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if empty is not None and not rows:
        print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in header:
        table.add_column(title)
    for row in rows:
        # Text, as a name or a reason in brackets is no markup.
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    Console().print(table)


def spoken() -> redirect_stdout[TextIO]:
    """Has what Ray and the user's own functions print go to standard error, where progress goes.

    Standard output is for the result, which machines read.
    """
    return redirect_stdout(sys.stderr)


def print_json(value: Any) -> None:
    """One indented JSON document."""
    import json

    print(json.dumps(value, indent=2, ensure_ascii=lacks_letters(), allow_nan=False))


def lacks_letters() -> bool:
    """Whether standard output cannot show every letter, so that JSON escapes all but ASCII."""
    return (sys.stdout.encoding or "utf-8").lower() != "utf-8"
