"""What the command says of itself, and how it fails."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from manylora_cli.main import app


def verbs(command: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every verb with its path, groups left out."""
    inner: dict[str, object] | None = getattr(command, "commands", None)
    if inner is None:
        yield path, command
    for name, entry in (inner or {}).items():
        yield from verbs(entry, (*path, name))


VERBS = dict(verbs(get_command(app)))
GROUPS = {path[:length] for path in VERBS for length in range(len(path))}


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_every_verb_and_every_option_says_what_it_does(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"], terminal_width=90)

    assert shown.exit_code == 0
    assert "\\b" not in shown.output
    options = [line for line in shown.output.split("\n") if line.strip().startswith("--")]
    assert not [line for line in options if "<str>" in line], "it does not say what it takes"
    for parameter in getattr(VERBS[path], "params", ()):
        assert getattr(parameter, "help", None), f"{parameter.name} has no word of help"


@pytest.mark.parametrize("path", sorted(GROUPS), ids=" ".join)
def test_the_list_of_verbs_cuts_no_sentence_off(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"], terminal_width=80).output

    _, _, listed = shown.partition("Commands:\n")
    assert listed
    assert [line for line in listed.splitlines() if line.endswith("...")] == []


def test_the_command_knows_its_version() -> None:
    shown = CliRunner().invoke(app, ["--version"])

    assert (shown.exit_code, shown.output) == (0, f"manylora {version('manylora')}\n")


def test_the_command_ends_with_its_result_and_sweeps_up_nothing() -> None:
    # Handlers run in reverse: this one is behind all that the command registers.
    program = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 1000))\n"
        "from manylora_cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"manylora {version('manylora')}\nTrue\n"


def test_examples_keep_their_lines() -> None:
    shown = CliRunner().invoke(app, ["registry", "list", "--help"], terminal_width=90).output

    assert (
        "  manylora registry list --where 'name~spell* and not yanked=true' --limit 20\n" in shown
    )


def test_what_the_machine_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    run = "from manylora_cli import main\nmain.app = lambda: open('page')\nmain.main()"

    done = subprocess.run(
        [sys.executable, "-c", run], capture_output=True, text=True, cwd=tmp_path, check=False
    )

    assert (done.returncode, done.stderr) == (1, "manylora: page: Is a directory\n")
