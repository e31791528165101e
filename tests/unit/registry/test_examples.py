"""The Python of the documentation runs as it stands there."""

import re
from pathlib import Path

import pytest

from manylora_registry import Registry
from tests.unit.registry.conftest import AdapterMaker

DOCS = Path(__file__).parents[3] / "docs"


def script(page: str) -> str:
    """The one block of Python of a page."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    return block


def test_what_the_pages_do_with_a_registry_can_be_done(
    make_adapter: AdapterMaker,
    base_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "machine"))
    adapter = make_adapter(config={"base_model_name_or_path": None})
    names = {"directory": adapter, "base": base_directory}

    exec(script("registry.md"), names)

    with Registry.open("registry") as registry:
        version = registry.resolve("spelling@production")
        assert version.number == 1
        cache = tmp_path / "cache"
        exec(
            script("registry-operations.md"),
            {"registry": registry, "version": version, "cache": cache},
        )
    assert [path.parent for path in cache.glob("*/adapter_model.safetensors")] == [
        cache / version.digest.removeprefix("sha256:")
    ]
