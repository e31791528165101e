"""The HTML page: whole, self-contained, and safe whatever a model writes."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from manylora_evaluator import evaluate
from manylora_evaluator.report import SHOWN_CHARACTERS, SHOWN_ROWS, render
from tests.unit.client.scripted import Answer, ScriptedServer
from tests.unit.evaluator.scripted_judge import ScriptedJudge, verdict

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
        self.script = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and not self.script:
            self.script = data
        else:
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
    assert not names & {"img", "iframe", "link", "object"}
    assert [tag for tag, _ in page.tags].count("script") == 1, "ours"
    assert not [tag for tag, attributes in page.tags if any(a.startswith("on") for a in attributes)]
    assert page.text.count(HOSTILE) >= 4, "prompt, expected and both outputs are there as text"


def test_controls_are_shown_as_signs(page_of: Callable[..., Page]) -> None:
    text = "a\0b\x1b[31mc\x7f\td\ne\x9bf"
    page = page_of([(text, text)], text)

    assert (
        page.text.count("a\N{SYMBOL FOR NULL}b\N{SYMBOL FOR ESCAPE}[31mc\u2421\td\ne\ufffdf") >= 4
    )
    assert not set(page.text) & {"\0", "\x1b", "\x7f", "\x9b"}


def test_controls_in_the_values_of_slices_are_signs_too(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    """The page's filter compares them, and browsers read a NUL otherwise here than there."""
    suite = write_suite([("a", "b")])
    suite.write_text(suite.read_text().replace("max_tokens", "slices: [kind], max_tokens"))
    row = {
        "messages": [{"role": "user", "content": "a"}],
        "expected": "b",
        "row": {"kind": "\0\x1b"},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))

    html = render(evaluate(suite, serve(lambda _: Answer("b")).target))

    assert html.count("kind: \N{SYMBOL FOR NULL}\N{SYMBOL FOR ESCAPE}") == 3
    assert not set(html) & {"\0", "\x1b"}


def test_the_page_loads_nothing(page_of: Callable[..., Page]) -> None:
    page = page_of([("a", "b")], "b")

    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), tag
    assert not re.search(r"@import|url\(", page.text)
    policies = [attributes.get("content") for tag, attributes in page.tags if tag == "meta"]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policies[-1] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    assert "fetch" not in page.script


def test_scores_intervals_versions_and_outputs_are_all_on_it(page_of: Callable[..., Page]) -> None:
    page = page_of([("one", "yes"), ("two", "no")], "yes")

    assert "50.0 %" in page.text
    assert "[9\N{EN DASH}91]" in page.text, "one of two"
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


def test_gates_slices_labels_and_judges_are_on_it(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    rows = [(str(number), "yes" if number % 3 else "no") for number in range(30)]
    path = write_suite(
        rows,
        scorers="[{kind: classification, labels: ['yes', 'no']}, exact_match, "
        "{kind: judge, by: j, criteria: {kind: is friendly}}]",
    )
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    labelled = (
        line | {"row": {"parity": int(line["messages"][0]["content"]) % 2}} for line in lines
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labelled))
    text = path.read_text().replace(
        "max_tokens",
        "slices: [parity], thresholds: [{score: exact_match, at_least: 0.9}], max_tokens",
    )
    with ScriptedJudge(lambda _: verdict("too curt", kind=False)) as judge:
        path.write_text(f"{text}judges: {{j: {{kind: openai, url: '{judge.url}', model: m}}}}\n")
        result = evaluate(
            path,
            serve(lambda request: Answer("no" if "bad" in request.adapter else "yes")).target,
            ["bad"],
            baseline="spelling",
        )

    page = Page(render(result))

    for words in (
        "is stopped",
        "exact_match 0.333 is below 0.900",
        "too few rows",
        "parity: 1",
        "macro",
        "Lines: expected; columns: answered.",
        "How far the judge agrees",
        "too curt",
    ):
        assert words in page.text, words
    moves = [
        attributes["data-change"] for tag, attributes in page.tags if "data-change" in attributes
    ]
    assert (moves.count("worse"), moves.count("better")) == (20, 10)
    slices = {
        attributes["data-slices"] for tag, attributes in page.tags if "data-slices" in attributes
    }
    assert slices == {"parity: 0", "parity: 1"}


def test_rows_that_got_worse_are_the_last_to_be_left_out(
    serve: Serve, write_suite: WriteSuite
) -> None:
    rows = [(f"row {n}.", "yes" if n < SHOWN_ROWS else "no") for n in range(SHOWN_ROWS + 5)]
    target = serve(lambda request: Answer("yes" if request.adapter else "no")).target

    page = Page(render(evaluate(write_suite(rows), target)))

    assert f"row {SHOWN_ROWS + 4}." in page.text, "the base was right there"
    assert f"row {SHOWN_ROWS - 1}." not in page.text


def test_a_long_text_is_cut(page_of: Callable[..., Page]) -> None:
    page = page_of([("a", "b")], "x" * (SHOWN_CHARACTERS + 1) + "end")

    assert "x [cut]" in page.text
    assert "xend" not in page.text


def test_a_long_task_is_cut_and_says_so(page_of: Callable[..., Page]) -> None:
    page = page_of([(f"row {n}.", "x") for n in range(SHOWN_ROWS + 5)], "x")

    assert f"row {SHOWN_ROWS - 1}." in page.text
    assert f"row {SHOWN_ROWS}." not in page.text
    assert f"{SHOWN_ROWS} of {SHOWN_ROWS + 5} rows" in page.text
