"""`manylora adapters` as an operator meets it."""

import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from manylora_cli.main import app
from tests.unit.client.scripted import ScriptedServer, version

Serve = Callable[..., ScriptedServer]


def test_each_alias_tells_what_it_serves_and_why_it_does_not_serve_what_waits(serve: Serve) -> None:
    shown = CliRunner().invoke(app, ["adapters", "--server", serve({}).target])

    assert shown.exit_code == 0
    assert [line.split("\t") for line in shown.stdout.splitlines()] == [
        ["adapter", "latest", "alias", "serving", "pending", "reason"],
        [
            *("spelling", "2", "production", "1", "2"),
            "rank 64 is above the engine's maximum of 16",
        ],
        ["spelling", "2", "staging", "", "", ""],
    ]


def test_json_has_whole_digests(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_SERVER", serve({}).target)

    shown = CliRunner().invoke(app, ["adapters", "--json"])

    (spelling,) = json.loads(shown.stdout)
    production, staging = spelling["aliases"]
    assert production["serving"]["digest"] == version("spelling", 1).digest
    assert production["pending"]["digest"] == version("spelling", 2).digest
    assert (staging["serving"], staging["pending"]) == (None, None)
