"""Evaluations that are broken off: nothing answered is lost, and only the rest is asked again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

import manylora.inference.v1.inference_pb2 as pb
from manylora_evaluator import EvaluationFailedError, ReportError, ResultsError, evaluate
from tests.unit.client.scripted import Answer, Failure, Reply, ScriptedServer

Serve = Callable[..., ScriptedServer]
WriteSuite = Callable[..., Path]

ROWS = [(f"q{number}", "yes") for number in range(6)]


class Moody:
    """Answers `yes`; the adapter's last two rows get `trouble` while there is some."""

    def __init__(self, trouble: Reply) -> None:
        self.trouble: Reply | None = trouble
        self.rows: list[tuple[str, str]] = []
        """What was asked: adapter and prompt, without the first request of each column."""

    def __call__(self, request: pb.GenerateRequest) -> Reply:
        prompt = request.chat.messages[-1].content
        if request.sampling.max_tokens == 1:
            return Answer()
        self.rows.append((request.adapter.partition("@")[0], prompt))
        hit = request.adapter and prompt in ("q4", "q5")
        return self.trouble if hit and self.trouble is not None else Answer("yes")


def begin(suite: Path, target: str, out: Path) -> subprocess.Popen[str]:
    """An evaluation that has kept ten answers and waits for the other two."""
    command = [sys.executable, "-m", "manylora_cli", "evaluate", str(suite), "--server", target]
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    kept = out / "answers.jsonl"
    while not (kept.exists() and kept.read_bytes().count(b"\n") == 10):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)
    return process


def test_an_interrupted_evaluation_goes_on_where_it_was(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    script = Moody(Answer(hold_after=0))
    suite, target, out = write_suite(ROWS), serve(script).target, tmp_path / "out"
    process = begin(suite, target, out)

    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)

    assert process.returncode == 130
    assert said.endswith(
        f"manylora: interrupted: answers are kept in {out}; the same command with --resume asks "
        "the others\n"
    )
    script.trouble = None
    script.rows.clear()

    result = evaluate(suite, target, out=out, resume=True)

    assert sorted(script.rows) == [("spelling", "q4"), ("spelling", "q5")]
    assert result.score("spelling", "spelling", "exact_match").mean == 1
    assert [column.completion_tokens for column in result.tasks[0].columns] == [6, 6]
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_evaluation_costs_the_first_no_answer(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path, resume: bool
) -> None:
    script = Moody(Answer(hold_after=0))
    suite, target, out = write_suite(ROWS), serve(script).target, tmp_path / "out"
    first = begin(suite, target, out)
    script.trouble = None
    script.rows.clear()
    kept = (out / "answers.jsonl").read_bytes()

    with pytest.raises(ResultsError, match=f"another evaluation writes into {out}"):
        evaluate(suite, target, out=out, resume=resume)

    assert (script.rows, (out / "answers.jsonl").read_bytes()) == ([], kept)
    first.kill()
    first.communicate(timeout=60)
    evaluate(suite, target, out=out, resume=True)
    assert sorted(script.rows) == [("spelling", "q4"), ("spelling", "q5")]


def test_failed_requests_alone_are_asked_again(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    script = Moody(Failure(grpc.StatusCode.INTERNAL, "incident 1"))
    suite, target = write_suite(ROWS), serve(script).target
    with pytest.raises(EvaluationFailedError, match="2 of 12"):
        evaluate(suite, target, out=tmp_path / "out")
    # A signal or a full disk may have cut the last line off.
    kept = tmp_path / "out" / "answers.jsonl"
    kept.write_bytes(kept.read_bytes()[:-9])
    script.rows.clear()
    with pytest.raises(EvaluationFailedError, match="2 of 12"):
        evaluate(suite, target, out=tmp_path / "out", resume=True)
    assert len(script.rows) == 3
    script.trouble = None
    script.rows.clear()

    result = evaluate(suite, target, out=tmp_path / "out", resume=True)

    assert len(script.rows) == 2
    assert result.failures == 0
    assert result.score("spelling", "spelling", "exact_match").mean == 1


def test_answers_in_any_script_are_kept_whatever_the_locale(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    target = serve(lambda _: Answer("привет")).target
    command = [sys.executable, "-m", "manylora_cli", "evaluate", str(write_suite(ROWS))]

    done = subprocess.run(
        [*command, "--server", target, "--out", str(tmp_path / "out")],
        env=dict(os.environ, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0"),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/results.json").is_file()


def test_a_full_disk_is_told_once_and_costs_no_answer(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "answers.jsonl").symlink_to("/dev/full")

    result = evaluate(write_suite(ROWS), serve(lambda _: Answer("yes")).target, out=out)

    assert result.score("spelling", "spelling", "exact_match").mean == 1
    # gRPC's own thread may have something to say too.
    (told,) = [one.message for one in caplog.records if one.name == "manylora_evaluator.kept"]
    assert told.endswith("answers.jsonl: No space left on device")


def test_without_resume_everything_is_asked(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    script = Moody(Failure(grpc.StatusCode.INTERNAL, "incident 1"))
    suite, target = write_suite(ROWS), serve(script).target

    for _ in range(2):
        with pytest.raises(EvaluationFailedError):
            evaluate(suite, target, out=tmp_path / "out")

    assert len(script.rows) == 24


def test_answers_of_another_version_are_not_taken_for_this_ones(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    script = Moody(Failure(grpc.StatusCode.INTERNAL, "incident 1"))
    suite, out = write_suite(ROWS), tmp_path / "out"
    target = serve(script).target
    with pytest.raises(EvaluationFailedError):
        evaluate(suite, target, out=out)

    moved = serve(lambda request: Answer("no" if request.adapter else "yes", version=2))
    result = evaluate(suite, moved.target, out=out, resume=True)

    assert result.score("spelling", "spelling", "exact_match").mean == 0


def test_a_directory_that_cannot_be_written_is_told_before_anything_is_asked(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    server = serve({"": Answer()})

    with pytest.raises(ResultsError, match=r"rows\.jsonl cannot be written: File exists"):
        evaluate(write_suite(ROWS), server.target, out=tmp_path / "rows.jsonl")

    assert server.service.received == []


def test_results_that_cannot_be_written_are_not_lost(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "report.html").mkdir(parents=True)
    target = serve(lambda _: Answer("yes")).target
    command = [sys.executable, "-m", "manylora_cli", "evaluate", str(write_suite(ROWS))]
    done = subprocess.run(
        [*command, "--json", "--server", target, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"manylora: the report cannot be written into {out}: Is a directory"
    )
    assert json.loads(done.stdout)["tasks"][0]["columns"][1]["scores"]["exact_match"]["mean"] == 1
    with pytest.raises(ReportError) as raised:
        evaluate(write_suite(ROWS), target, out=out)
    assert raised.value.result.requests == 12
    assert (out / "answers.jsonl").exists(), "a second try asks nothing"
