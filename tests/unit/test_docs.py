"""Commands, settings and links in the documentation are ones that there are."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, cast

import pytest
import typer
import yaml
from pydantic import TypeAdapter, ValidationError

from docs import settings
from manylora_cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
MODELS = [model for file, _ in settings.FILES.values() for _, model in settings.sections(file)]
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


def every_verb(command: Any, path: str = "manylora") -> Iterator[tuple[str, Any]]:
    """Each verb by its whole name, groups left out."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
    for name, entry in (inner or {}).items():
        yield from every_verb(entry, f"{path} {name}")


VERBS = dict(every_verb(program()))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_option_is_told_of(verb: str) -> None:
    told = "\n".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    group, _, name = verb.rpartition(" ")
    rows = re.findall(r"^\| (`.*?`) \|", told, re.MULTILINE) if "registry" in group else []

    assert re.search(rf"{verb}\b", told) or any(f"`{name}" in row for row in rows)
    options = {o for p in VERBS[verb].params for o in p.opts if o.startswith("--")} - {"--help"}
    assert {option for option in options if not re.search(rf"{option}\b", told)} == set()


def test_every_variable_is_told_of() -> None:
    told = "\n".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    sources = [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("deploy/**/*.py")]
    known = {v for file in sources for v in re.findall(r"\"(MANYLORA_[A-Z_]+)\"", file.read_text())}
    # What a gateway marks the processes it started with is its own affair.
    known -= {"MANYLORA_GATEWAY_RUN"}

    assert "MANYLORA_REGISTRY" in known
    assert {variable for variable in known if not re.search(rf"\b{variable}\b", told)} == set()


def test_a_wrong_command_is_noticed() -> None:
    assert wrong("manylora regstry list") == "there is no 'regstry'"
    assert wrong("manylora registry list --al") == "it has no --al"
    assert wrong("manylora registry alias spelling production 2 --expect 3") is None


def examples(page: Path) -> Iterator[tuple[str, Any]]:
    """Each key at the top of a YAML block, with its value; a key may stand there several times."""
    for block in re.findall(
        r"^ *```yaml\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL
    ):
        block = block.replace("sha256:…", f"sha256:{0:064}")
        for entry in re.split(r"^(?=\w)", block, flags=re.MULTILINE):
            yield from cast("dict[str, Any]", yaml.safe_load(entry) or {}).items()


def is_setting(key: str, value: Any) -> bool:
    """Whether some section of some file has this key and takes this value."""
    for model in MODELS:
        for name, field in model.model_fields.items():
            if key == (field.alias or name):
                try:
                    taken = TypeAdapter[Any](cast("Any", Annotated)[field.annotation, field])
                    taken.validate_python(value, context={"directory": ROOT})
                except ValidationError:
                    continue
                return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_yaml_example_is_made_of_settings_that_there_are(page: Path) -> None:
    assert [key for key, value in examples(page) if not is_setting(key, value)] == []


def test_a_wrong_setting_is_noticed() -> None:
    assert is_setting("split", {"held_out": 0.2})
    assert not is_setting("split", {"heldout": 0.2})
    assert not is_setting("splits", {"held_out": 0.2})


def test_the_page_of_settings_is_what_the_code_says() -> None:
    assert settings.PAGE.read_text() == settings.page(), "run `make settings`"


def test_every_setting_says_what_it_is() -> None:
    unexplained = [
        f"{model.__name__}.{name}"
        for model in MODELS
        for name, field in model.model_fields.items()
        if not field.description and not (name == "kind" and field.is_required())
    ]
    assert unexplained == []


def test_every_benchmark_says_what_its_figures_mean() -> None:
    told = (ROOT / "benchmarks" / "README.md").read_text()
    named = {name for page in PAGES for name in re.findall(r"NAME=(\w+)", page.read_text())}

    assert {name for name in named if f"## `{name}.py`: " not in told} == set()


def anchors(page: Path) -> set[str]:
    """What a link may name behind a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text())
    dead = [
        f"{file}#{anchor}"
        for file, anchor in links
        if not (target := page.parent / file if file else page).exists()
        or (anchor and anchor not in anchors(target))
    ]
    assert dead == []
