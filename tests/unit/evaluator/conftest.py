"""A scripted gateway and suites on disk."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.unit.client.scripted import Script, ScriptedServer


@pytest.fixture
def serve() -> Iterator[Callable[[Script], ScriptedServer]]:
    """Starts scripted servers and closes them at the end."""
    servers: list[ScriptedServer] = []

    def start(script: Script) -> ScriptedServer:
        servers.append(ScriptedServer(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def write_suite(tmp_path: Path) -> Callable[..., Path]:
    """Writes a suite of one task `spelling` with the given (prompt, expected) rows."""

    def write(
        rows: Sequence[tuple[str, str]],
        scorers: str = "[exact_match]",
        name: str = "small",
        concurrency: int = 4,
    ) -> Path:
        lines = (
            json.dumps({"messages": [{"role": "user", "content": prompt}], "expected": expected})
            for prompt, expected in rows
        )
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        path = tmp_path / "suite.yaml"
        path.write_text(
            f"name: {name}\nconcurrency: {concurrency}\ntasks:\n"
            "  - {name: spelling, adapter: spelling, rows: rows.jsonl, max_tokens: 24, "
            f"scorers: {scorers}}}\n"
        )
        return path

    return write
