"""The HTML page: whole, self-contained, and safe whatever a model writes."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from manylora_evaluator import evaluate
from manylora_evaluator.report import SHOWN_ROWS, render
from tests.unit.client.scripted import Answer, ScriptedServer

Serve = Callable[..., ScriptedServer]
WriteSuite = Callable[..., Path]

HOSTILE = (
    '</pre><script>alert(1)</script><img src="http://evil.example/x" onerror=alert(1)>{{ 7*7 }}'
)


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page_of(serve: Serve, write_suite: WriteSuite) -> Callable[..., Page]:
    """The page of a suite, all of whose rows are answered with one text."""

    def make(rows: list[tuple[str, str]], answer: str, **suite: str) -> Page:
        result = evaluate(write_suite(rows, **suite), serve(lambda _: Answer(answer)).target)
        return Page(render(result))

    return make


def test_what_models_and_rows_say_is_shown_and_never_run(page_of: Callable[..., Page]) -> None:
    page = page_of([(HOSTILE, HOSTILE)], HOSTILE, name=f"'{HOSTILE}'")

    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "link", "object"}
    assert not [tag for tag, attributes in page.tags if any(a.startswith("on") for a in attributes)]
    assert page.text.count(HOSTILE) >= 4, "prompt, expected and both outputs are there as text"


def test_the_page_loads_nothing(page_of: Callable[..., Page]) -> None:
    page = page_of([("a", "b")], "b")

    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), tag
    assert not re.search(r"@import|url\(", page.text)
    policies = [attributes.get("content") for tag, attributes in page.tags if tag == "meta"]
    assert "default-src 'none'; style-src 'unsafe-inline'" in policies


def test_scores_intervals_versions_and_outputs_are_all_on_it(page_of: Callable[..., Page]) -> None:
    page = page_of([("one", "yes"), ("two", "no")], "yes")

    assert "50.0 %" in page.text
    assert "[0\N{EN DASH}100]" in page.text
    assert "spelling · v1" in page.text
    assert "sha256:" in page.text
    assert "held-out rows" in page.text
    chart = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert [svg["aria-label"] for svg in chart] == [
        "Scores of spelling with 95 % confidence intervals"
    ]
    bars = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert [float(bar["width"] or 0) for bar in bars] == [150, 150], "half of 300 each"
    marks = [a["class"] for tag, a in page.tags if tag == "div" and a.get("class")]
    assert (marks.count("right"), marks.count("wrong")) == (2, 2)


def test_a_long_task_is_cut_and_says_so(page_of: Callable[..., Page]) -> None:
    page = page_of([(f"row {n}.", "x") for n in range(SHOWN_ROWS + 5)], "x")

    assert f"row {SHOWN_ROWS - 1}." in page.text
    assert f"row {SHOWN_ROWS}." not in page.text
    assert f"The first {SHOWN_ROWS} of {SHOWN_ROWS + 5} rows" in page.text
