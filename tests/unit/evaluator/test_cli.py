"""`manylora evaluate` as a user meets it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc

import manylora.inference.v1.inference_pb2 as pb
from tests.unit.client.scripted import Answer, Failure, Reply, ScriptedServer
from tests.unit.evaluator.scripted_judge import ScriptedJudge, Status

Serve = Callable[..., ScriptedServer]
WriteSuite = Callable[..., Path]


def manylora(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "manylora_cli", *map(str, arguments)],
        # Wide, so that no message is folded where the length of a path puts that.
        env={**os.environ, "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_it_prints_the_table_and_writes_the_report(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    target = serve(lambda request: Answer("yes" if request.adapter else "no")).target
    out = tmp_path / "out"

    done = manylora(
        "evaluate",
        write_suite([("a", "yes")]),
        "--server",
        target,
        "--out",
        out,
        "--adapter",
        "b@2",
    )

    assert done.returncode == 0, done.stderr
    assert "held-out rows" in done.stdout
    assert "100.0" in done.stdout
    assert "b@2 · v1" in done.stdout
    assert (out / "report.html").is_file()
    assert (out / "results.json").is_file()


def test_a_judge_with_a_wrong_key_is_one_line(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    suite, out = (
        write_suite([("a", "yes")], scorers="[{kind: judge, by: j, criteria: {right: is right}}]"),
        tmp_path / "out",
    )
    with ScriptedJudge(lambda _: Status(401)) as judge:
        suite.write_text(
            f"{suite.read_text()}judges: {{j: {{kind: openai, url: {judge.url}, model: m}}}}\n"
        )
        done = manylora(
            "evaluate", suite, "--server", serve(lambda _: Answer()).target, "--out", out
        )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"manylora: the judge {judge.url}/chat/completions m answers nothing: HTTP 401: "
        f'{{"error": "scripted"}}; the answers to judge are kept in {out}: the same command with '
        "--resume goes on"
    )
    assert sorted(path.name for path in out.iterdir()) == ["answers.jsonl", "verdicts"]


def test_a_pipe_gets_every_figure_and_name_whole(serve: Serve, write_suite: WriteSuite) -> None:
    target = serve(lambda request: Answer("yes" if request.adapter else "no")).target
    name = "a_score_with_a_name_as_long_as_people_give_them_when_nobody_counts_letters"
    suite = write_suite([("a", "yes")], scorers=f"[{{kind: exact_match, name: {name}}}]")

    done = manylora("evaluate", suite, "--server", target)

    (line,) = (line for line in done.stdout.splitlines() if name in line)
    assert line.split() == [name, "0.0", "(0", "to", "79)", "100.0", "(21", "to", "100)", "+100.0"]


def test_json_is_all_there_is_on_standard_output(serve: Serve, write_suite: WriteSuite) -> None:
    suite = write_suite([("a", "yes"), ("b", "yes")])
    target = serve(lambda _: Answer("yes")).target

    done = manylora("evaluate", suite, "--server", target, "--limit", "1", "--json")

    (task,) = json.loads(done.stdout)["tasks"]
    assert [(column["adapter"], column["requests"]) for column in task["columns"]] == [
        ("", 1),
        ("spelling", 1),
    ]
    assert task["columns"][1]["version"]["number"] == 1
    assert task["columns"][1]["scores"]["exact_match"]["mean"] == 1


def test_failed_requests_exit_1_with_the_table_and_one_line(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    def fail(request: pb.GenerateRequest) -> Reply:
        warm_up = request.sampling.max_tokens == 1
        return Answer() if warm_up else Failure(grpc.StatusCode.INTERNAL, "incident 123")

    asked = ("evaluate", write_suite([("a", "yes")]), "--server", serve(fail).target)
    done, kept = manylora(*asked), manylora(*asked, "--out", tmp_path / "out")

    assert done.returncode == kept.returncode == 1
    assert "2 failed" in done.stdout
    assert "manylora: 2 of 2 requests failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert "--resume" not in done.stderr, "nothing is kept"
    assert "the same command with --resume asks what failed again" in kept.stderr


def test_a_missing_server_exits_1_with_one_line(serve: Serve, write_suite: WriteSuite) -> None:
    server = serve({})
    server.close()

    done = manylora("evaluate", write_suite([("a", "yes")]), "--server", server.target)

    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("manylora: no manylora server answers")
    assert "Traceback" not in done.stderr


def test_a_closed_gate_exits_1_with_its_reasons(serve: Serve, write_suite: WriteSuite) -> None:
    suite = write_suite([(str(number), "yes") for number in range(30)])
    target = serve(
        lambda request: Answer("no" if request.adapter.startswith("bad") else "yes")
    ).target

    done = manylora(
        *("evaluate", suite, "--server", target, "--json"),
        *("--adapter", "bad@1", "--baseline", "spelling"),
    )

    assert done.returncode == 1
    assert "manylora: the gate is closed to bad@1: spelling: exact_match is worse" in done.stderr
    (gate,) = json.loads(done.stdout)["gates"]
    assert (gate["candidate"], gate["passed"]) == ("bad@1", False)
    assert gate["comparison"]["verdict"] == "worse"


def test_what_cannot_be_recorded_is_told_before_anything_is_asked(
    serve: Serve, write_suite: WriteSuite, tmp_path: Path
) -> None:
    server = serve(lambda _: Answer())

    def refused(name: str) -> str:
        suite = write_suite([("a", "b")], name=name)
        more = ("--server", server.target, "--record", "--registry", tmp_path / "nowhere")
        done = manylora("evaluate", suite, *more)
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr

    assert "nowhere is not a registry" in refused("small")
    assert "'小さい' cannot name a record" in refused("小さい")
    assert server.service.received == []


def test_a_part_of_a_suite_is_not_recorded_as_the_suite(
    write_suite: WriteSuite, tmp_path: Path
) -> None:
    suite = write_suite([("a", "b")])
    rows, scorers = "rows: rows.jsonl", "scorers: [exact_match]"
    for name, adapter in (("hard", "spelling@2"), ("other", "dates")):
        more = f"  - {{name: {name}, adapter: {adapter}, {rows}, {scorers}}}\n"
        suite.write_text(suite.read_text() + more)
    kept = ("evaluate", suite, "--record", "--registry", tmp_path / "nowhere")

    assert "leave out --limit" in manylora(*kept, "--limit", "1").stderr
    part = manylora(*kept, "--task", "spelling")
    assert part.returncode == 2
    assert "add --task hard" in " ".join(part.stderr.split())
    named = manylora(*kept, "--task", "other", "--adapter", "spelling@3")
    assert "--task spelling --task hard" in " ".join(named.stderr.split())
    assert "is not a registry" in manylora(*kept, "--task", "other").stderr


def test_a_registry_without_record_is_wrong_usage(write_suite: WriteSuite, tmp_path: Path) -> None:
    done = manylora("evaluate", write_suite([("a", "b")]), "--registry", tmp_path)

    assert done.returncode == 2
    assert "--registry is where --record keeps results" in done.stderr
