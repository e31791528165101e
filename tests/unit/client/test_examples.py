"""The Python of the documentation runs as it stands there."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.client.scripted import Answer, ScriptedServer

DOCS = Path(__file__).parents[3] / "docs"
ADDRESS = "127.0.0.1:50051"


@pytest.mark.parametrize("page", ["guide.md", "serving-api.md"])
def test_what_a_page_asks_a_gateway_is_answered(
    page: str, serve: Callable[..., ScriptedServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(lambda _: Answer("receive", version=3))
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    (script,) = [block for block in blocks if ADDRESS in block]

    exec(script.replace(ADDRESS, server.target), {})

    assert "receive spelling@3 (sha256:" in capsys.readouterr().out
    assert len(server.service.received) == script.count("client.")
