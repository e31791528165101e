"""Every `manylora` command in the documentation is one that there is, with the options it names."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer

from manylora_cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"(?:^|[ /])(manylora [a-z].*)$")


def commands(page: Path) -> Iterator[str]:
    """Lines of code blocks that run `manylora`, without what follows them."""
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if found := COMMAND.search(line.partition("  #")[0]):
                yield found[1]


@cache
def program() -> Any:
    return typer.main.get_command(app)


def lexed(line: str) -> Iterator[str]:
    """Words and operators as a shell has them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return iter(lexer)


def wrong(line: str) -> str | None:
    """What is wrong with a command line."""
    words = list(takewhile(lambda word: word[0] not in "|;&<>", lexed(line)))[1:]
    command = program()
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            return f"there is no {words[0]!r}" if not words[0].startswith("-") else None
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
    known |= {option for parameter in command.params for option in parameter.secondary_opts}
    unknown = {word.partition("=")[0] for word in words if re.match("--?[a-z]", word)} - known
    return f"it has no {', '.join(sorted(unknown))}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_one_that_there_is(page: Path) -> None:
    mistakes = {line: mistake for line in commands(page) if (mistake := wrong(line))}
    assert mistakes == {}


def test_a_wrong_command_is_noticed() -> None:
    assert wrong("manylora regstry list") == "there is no 'regstry'"
    assert wrong("manylora registry list --al") == "it has no --al"
    assert wrong("manylora registry alias spelling production 2 --expect 3") is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_has_its_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
