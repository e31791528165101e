"""Whole evaluations against a scripted gateway."""

import io
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from rich.console import Console

import manylora.inference.v1.inference_pb2 as pb
from manylora_client import DeadlineExceededError, NotFoundError, UnreachableError
from manylora_evaluator import (
    EvaluationFailedError,
    EvaluationResult,
    ResultsError,
    RowsError,
    UnknownTaskError,
    evaluate,
)
from manylora_evaluator.results import Version
from manylora_evaluator.table import table
from tests.unit.client.scripted import (
    Answer,
    Failure,
    Reply,
    ScriptedServer,
    vacant_address,
    version,
)

Serve = Callable[..., ScriptedServer]
WriteSuite = Callable[..., Path]

ROWS = [("recieve", "receive"), ("beleive", "believe"), ("wierd", "weird"), ("teh", "the")]


def adapter_knows_all_but_the_last(request: pb.GenerateRequest) -> Reply:
    """The bare base repeats the prompt; the adapter corrects it, save for `teh`."""
    prompt = request.chat.messages[-1].content
    if not request.adapter or prompt == "teh":
        return Answer(prompt)
    return Answer(dict(ROWS)[prompt], version=3)


def test_the_adapter_is_scored_beside_the_bare_base(serve: Serve, write_suite: WriteSuite) -> None:
    result = evaluate(write_suite(ROWS), serve(adapter_knows_all_but_the_last).target)

    assert result.score("spelling", "", "exact_match").mean == 0
    assert result.score("spelling", "spelling", "exact_match").mean == 0.75
    (task,) = result.tasks
    assert [row.outputs[0].text for row in task.rows] == ["recieve", "beleive", "wierd", "teh"]
    assert [row.outputs[1].text for row in task.rows] == ["receive", "believe", "weird", "teh"]
    assert [row.expected for row in task.rows] == [expected for _, expected in ROWS]
    assert [column.completion_tokens for column in task.columns] == [4, 4]


def test_only_what_a_gate_needs_is_asked(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    server = serve(adapter_knows_all_but_the_last)

    result = evaluate(
        write_suite(ROWS), server.target, ["spelling@3"], only=True, token="operators"
    )
    assert {each["authorization"] for each in server.service.metadata} == {"Bearer operators"}
    beside = evaluate(
        write_suite(ROWS),
        server.target,
        ["spelling@3"],
        tmp_path / "out",
        baseline="spelling@2",
        only=True,
    )

    assert [column.adapter for column in result.tasks[0].columns] == ["", "spelling@3"]
    assert [column.adapter for column in beside.tasks[0].columns] == ["spelling@2", "spelling@3"]
    assert result.gates == ()
    assert [gate.comparison is not None for gate in beside.gates] == [True]
    shown = io.StringIO()
    Console(file=shown, width=100).print(table(beside))
    assert "adapters beside spelling@2 · v3" in shown.getvalue()
    page = (tmp_path / "out/report.html").read_text()
    assert '<th class="number">spelling@2 · v3</th>' in page


def test_base_and_adapter_are_asked_the_very_same(serve: Serve, write_suite: WriteSuite) -> None:
    server = serve(adapter_knows_all_but_the_last)

    evaluate(write_suite(ROWS), server.target)

    asked: dict[bool, list[bytes]] = {True: [], False: []}
    for request in server.service.received:
        asked[request.adapter == ""].append(request.chat.SerializeToString())
        assert request.sampling.temperature == 0
    assert sorted(asked[True]) == sorted(asked[False])


def test_an_alias_is_resolved_once_and_the_version_recorded(
    serve: Serve, write_suite: WriteSuite
) -> None:
    server = serve(lambda _: Answer("receive", version=7))

    result = evaluate(write_suite(ROWS), server.target, ["spelling@staging"])

    digest = version("spelling", 7).digest
    base, own, staging = result.tasks[0].columns
    assert base.version is None
    assert own.version == staging.version == Version("spelling", 7, digest)
    rows = [
        request.adapter for request in server.service.received if request.sampling.max_tokens > 1
    ]
    assert set(rows) == {"", f"spelling@{digest}"}


def test_each_reference_is_asked_once_whoever_names_it(
    serve: Serve, write_suite: WriteSuite
) -> None:
    target = serve(adapter_knows_all_but_the_last).target

    result = evaluate(write_suite(ROWS), target, ["spelling", "spelling@2", "spelling@2"])

    assert [column.adapter for column in result.tasks[0].columns] == ["", "spelling", "spelling@2"]


def test_failed_requests_are_counted_scored_as_wrong_and_fail_the_run(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    def adapter_fails_on_one(request: pb.GenerateRequest) -> Reply:
        # The first request of a column is asked for a single token and answered.
        if request.sampling.max_tokens > 1 and request.adapter and "wierd" in str(request.chat):
            return Failure(grpc.StatusCode.INTERNAL, "incident 123")
        return Answer(dict(ROWS)[request.chat.messages[-1].content])

    out = tmp_path / "out"
    with pytest.raises(
        EvaluationFailedError, match=r"^1 of 8 requests failed.*incident 123$"
    ) as raised:
        evaluate(write_suite(ROWS), serve(adapter_fails_on_one).target, out=out)

    result = raised.value.result
    base, adapter = result.tasks[0].columns
    assert (base.failures, adapter.failures, adapter.requests) == (0, 1, 4)
    assert adapter.scores["exact_match"].mean == 0.75
    assert result.tasks[0].rows[2].outputs[1].error == "incident 123"
    assert "1 of 8 requests failed" in (out / "report.html").read_text()
    assert EvaluationResult.from_json((out / "results.json").read_text()) == result


def test_an_unknown_adapter_ends_the_run_before_any_row(
    serve: Serve, write_suite: WriteSuite
) -> None:
    server = serve({"": Answer(), "spelling": Answer()})

    with pytest.raises(NotFoundError, match="no adapter 'speling'"):
        evaluate(write_suite(ROWS), server.target, ["speling"])

    asked = [(request.adapter, request.sampling.max_tokens) for request in server.service.received]
    assert asked == [("", 1), ("spelling", 1), ("speling", 1)]


def test_an_adapter_that_is_not_loaded_in_time_is_named(
    serve: Serve, write_suite: WriteSuite
) -> None:
    server = serve({"": Answer(), "spelling": Answer(hold_after=0)})
    suite = write_suite(ROWS)
    # The bare base answers within it, on whatever machine.
    suite.write_text(f"timeout: 5\n{suite.read_text()}")

    with pytest.raises(DeadlineExceededError, match=f"^spelling: {server.target} did not answer"):
        evaluate(suite, server.target)


def test_a_server_that_is_away_is_named(write_suite: WriteSuite) -> None:
    with vacant_address() as address, pytest.raises(UnreachableError, match=address):
        evaluate(write_suite(ROWS), address)


def test_nothing_is_asked_when_a_row_is_malformed(serve: Serve, write_suite: WriteSuite) -> None:
    server = serve({"": Answer()})

    with pytest.raises(RowsError, match="line 1"):
        evaluate(write_suite(ROWS, scorers="[json_field_f1]"), server.target)

    assert server.service.received == []


def test_as_many_requests_are_under_way_as_the_suite_says(
    serve: Serve, write_suite: WriteSuite
) -> None:
    # The server answers rows in threes only, so fewer at a time would never be answered.
    server = serve(lambda request: Answer(together=1 if request.sampling.max_tokens == 1 else 3))

    evaluate(write_suite(ROWS * 3, concurrency=3), server.target)

    assert server.service.most_in_flight == 3
    assert len(server.service.received) == 2 * (1 + 12)


def test_a_limit_and_a_choice_of_tasks(serve: Serve, write_suite: WriteSuite) -> None:
    target = serve(adapter_knows_all_but_the_last).target

    result = evaluate(write_suite(ROWS), target, limit=2, tasks=["spelling"])

    assert len(result.tasks[0].rows) == 2
    with pytest.raises(UnknownTaskError, match="no task poetry; it has spelling"):
        evaluate(write_suite(ROWS), target, tasks=["poetry"])


def test_results_survive_json(serve: Serve, write_suite: WriteSuite) -> None:
    result = evaluate(
        write_suite(ROWS, scorers="[exact_match, rouge_l]"),
        serve(adapter_knows_all_but_the_last).target,
    )

    text = result.to_json()
    assert EvaluationResult.from_json(text) == result
    for other, said in (
        ("{}", "suite: Field required; evaluate again"),
        (text.replace('"hits": 1.0', '"hits": NaN'), "expected value at line"),
        ("", "EOF while parsing"),
    ):
        with pytest.raises(ResultsError, match=said):
            EvaluationResult.from_json(other)


def test_a_score_that_is_not_there_says_what_is(serve: Serve, write_suite: WriteSuite) -> None:
    result = evaluate(write_suite(ROWS), serve(adapter_knows_all_but_the_last).target)

    with pytest.raises(ResultsError, match="there are spelling/bare base/exact_match, spelling/"):
        result.score("spelling", "other", "exact_match")


def test_progress_and_table_tell_each_column(serve: Serve, write_suite: WriteSuite) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=100, force_terminal=True, color_system=None)

    result = evaluate(
        write_suite(ROWS), serve(adapter_knows_all_but_the_last).target, console=console
    )
    console.print(table(result))

    narrow = io.StringIO()
    Console(file=narrow, width=50).print(table(result))
    assert "+75.0" in narrow.getvalue(), "names are folded before a figure is cut"
    text = shown.getvalue()
    assert "spelling · bare base" in text
    assert "4/4" in text
    assert "spelling · v3" in text
    assert "75.0" in text
    assert "+75.0" in text
    assert "held-out rows" in text
