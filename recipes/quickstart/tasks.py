"""The rows of the quickstart's three tasks, read from installed packages when a run starts.

A recipe names one of these functions as its `python` source; each yields one dict a row.
"""

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from importlib.resources import files
from types import ModuleType
from typing import Any

Row = dict[str, Any]

SUMMARY_CHARACTERS = range(15, 100)
BODY_CHARACTERS = 360
NOT_DOCUMENTATION = frozenset({"conftest", "distutils", "f2py", "testing", "tests", "typing"})


def user_agents() -> Iterator[Row]:
    """Each user-agent string once, with what it says: from the package fake-useragent."""
    seen: set[str] = set()
    with files("fake_useragent").joinpath("data/browsers.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["useragent"] not in seen:
                seen.add(row["useragent"])
                yield {
                    "user_agent": row["useragent"],
                    "browser": row["browser"],
                    "browser_version": row["browser_version"],
                    "os": row["os"],
                    "os_version": row["os_version"],
                    "type": row["type"],
                }


def misspellings() -> Iterator[Row]:
    """Every eighth misspelling that has a single correction: from codespell's dictionary."""
    text = files("codespell_lib").joinpath("data/dictionary.txt").read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines()):
        wrong, _, right = line.partition("->")
        if number % 8 == 0 and right and "," not in right:
            yield {"wrong": wrong, "right": right}


def docstrings() -> Iterator[Row]:
    """Docstring bodies of numpy's public objects with the one-line summary each opens with."""
    seen: set[str] = set()
    for name, text in sorted(_numpy_docstrings()):
        # A ufunc's docstring opens with its signature, on a line of its own.
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", inspect.cleandoc(text))]
        if re.match(r"\w+\(.*\)(\s*->.*)?$", paragraphs[0]):
            del paragraphs[0]
        summary = " ".join(paragraphs[0].split()) if paragraphs else ""
        body = _shorten("\n\n".join(paragraphs[1:]))
        one_line = len(summary) in SUMMARY_CHARACTERS and summary.endswith(".")
        if one_line and len(body) > 80 and summary not in seen:
            seen.add(summary)
            yield {"name": name.rpartition(".")[2], "body": body, "summary": summary}


def _shorten(body: str) -> str:
    """The first lines of `body`, without the underlines of its sections."""
    body = re.sub(r"\n\s*-{3,}", "", body)
    return body if len(body) <= BODY_CHARACTERS else body[:BODY_CHARACTERS].rsplit("\n", 1)[0]


def _numpy_docstrings() -> Iterator[tuple[str, str]]:
    """Qualified name and docstring of public functions, classes and methods, repeats included."""
    for module in _numpy_modules():
        for name, thing in vars(module).items():
            if name.startswith("_") or isinstance(thing, ModuleType) or not callable(thing):
                continue
            if isinstance(thing.__doc__, str):
                yield f"{module.__name__}.{name}", thing.__doc__
            if inspect.isclass(thing):
                for attribute, method in vars(thing).items():
                    doc = getattr(method, "__doc__", None)
                    if not attribute.startswith("_") and callable(method) and isinstance(doc, str):
                        yield f"{module.__name__}.{name}.{attribute}", doc


def _numpy_modules() -> Iterator[ModuleType]:
    import numpy as np

    yield np
    for found in pkgutil.walk_packages(np.__path__, "numpy."):
        if not any(
            part.startswith("_") or part in NOT_DOCUMENTATION for part in found.name.split(".")
        ):
            yield importlib.import_module(found.name)
