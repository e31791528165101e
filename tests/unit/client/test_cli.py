"""`manylora generate` as a user meets it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

import manylora.inference.v1.inference_pb2 as pb
from tests.unit.client.scripted import Answer, Failure, ScriptedServer, version

Serve = Callable[..., ScriptedServer]


def manylora(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "manylora_cli", *arguments],
        input=stdin,
        # Wide, so that no message is folded where the length of a path puts that.
        env={**os.environ, "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_two_forms_at_once_are_wrong_usage() -> None:
    done = manylora("generate", "x", "--choice", "a", "--choice", "b", "--regex", "a+")

    assert done.returncode == 2
    assert "give only one of --regex, --choice" in done.stderr


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_the_text_is_on_stdout_and_the_version_on_stderr(stream: list[str], serve: Serve) -> None:
    server = serve({"spelling@staging": Answer("two words", version=4)})

    done = manylora(
        "generate", "recieve", "--adapter", "spelling@staging", "--server", server.target, *stream
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == "two words\n"
    assert done.stderr == (f"spelling@4 ({version('spelling', 4).digest[:19]}) · 2 tokens · stop\n")


def test_text_is_one_user_message_and_every_option_is_sent(serve: Serve) -> None:
    server = serve({"": Answer()})
    options = (
        "--max-tokens 9 --temperature 0.5 --top-p 0.5 --top-k 4 --min-p 0.25 --presence-penalty -1 "
        "--frequency-penalty 1 --repetition-penalty 1.5 --n 2 --seed 3 --stop END --stop STOP "
        "--logprobs 1 --choice yes --choice no --system Brief."
    )

    done = manylora("generate", "Hi", "--server", server.target, *options.split())

    assert done.stderr.startswith("bare base · ")
    assert server.service.received == [
        pb.GenerateRequest(
            chat=pb.Chat(
                messages=[
                    pb.Message(role="system", content="Brief."),
                    pb.Message(role="user", content="Hi"),
                ]
            ),
            sampling=pb.Sampling(
                max_tokens=9,
                temperature=0.5,
                top_p=0.5,
                top_k=4,
                min_p=0.25,
                presence_penalty=-1,
                frequency_penalty=1,
                repetition_penalty=1.5,
                n=2,
                seed=3,
                stop=["END", "STOP"],
                logprobs=1,
                structured_output=pb.StructuredOutput(choice=pb.Alternatives(values=["yes", "no"])),
            ),
        )
    ]


def test_schema_and_grammar_are_read_from_files(serve: Serve, tmp_path: Path) -> None:
    server = serve({"": Answer()})
    (tmp_path / "form").write_text('{"type": "null"}')

    for option in ("--json-schema", "--grammar"):
        manylora("generate", "x", "--server", server.target, option, str(tmp_path / "form"))

    schema, grammar = (asked.sampling.structured_output for asked in server.service.received)
    assert (schema.json_schema, grammar.grammar) == ('{"type": "null"}',) * 2


def test_raw_text_from_stdin_is_sent_as_it_stands(serve: Serve) -> None:
    server = serve({"": Answer()})

    manylora("generate", "-", "--raw", "--server", server.target, stdin="two\nlines\n")

    assert [request.text for request in server.service.received] == ["two\nlines\n"]


def test_json_tells_everything(serve: Serve) -> None:
    ask = ("generate", "x", "--adapter", "a", "--json", "--server")
    target = serve({"a": Answer("two words")}).target

    whole = json.loads(manylora(*ask, target).stdout)
    lines = manylora(*ask, target, "--stream").stdout.splitlines()
    events = [json.loads(line) for line in lines]

    assert (whole["text"], whole["token_ids"]) == ("two words", [0, 1])
    assert (whole["adapter"]["name"], whole["adapter"]["number"]) == ("a", 1)
    assert [event["event"] for event in events] == ["started", "delta", "delta", "finished"]
    assert events[0]["adapter"] == whole["adapter"]
    assert events[-1]["usage"] == whole["usage"]


def test_an_error_is_one_line_and_exit_1(serve: Serve) -> None:
    failure = Failure(
        grpc.StatusCode.INVALID_ARGUMENT,
        "1 field is wrong",
        violations={"sampling.temperature": "must be at most 2"},
    )
    target = serve({"": failure}).target

    for stream in ([], ["--stream"]):
        done = manylora("generate", "x", "--server", target, *stream)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            "manylora: 1 field is wrong; sampling.temperature: must be at most 2\n"
        )


def test_an_error_in_the_middle_leaves_the_text_and_starts_a_new_line(serve: Serve) -> None:
    lost = Failure(grpc.StatusCode.UNAVAILABLE, "replica lost", after=2)

    done = manylora("generate", "x", "--server", serve({"": lost}).target, "--stream")

    assert (done.returncode, done.stdout) == (1, "word word\n")
    assert done.stderr == "manylora: replica lost\n"


def test_interrupting_a_stream_cancels_it(serve: Serve) -> None:
    server = serve({"": Answer("one two", hold_after=1)})
    command = [sys.executable, "-m", "manylora_cli", "generate", "x", "--stream"]
    with subprocess.Popen(
        [*command, "--server", server.target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == "one"
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)

    assert process.returncode == 130
    assert server.service.cancelled.wait(60)


def test_a_system_message_needs_the_chat_template() -> None:
    done = manylora("generate", "x", "--raw", "--system", "Be brief.")

    assert done.returncode == 2
    assert "--raw" in done.stderr


def test_a_token_is_made_and_its_digest_told_apart() -> None:
    made = manylora("token")
    digest = manylora("token", "--hash", stdin=made.stdout)
    assert made.stdout.startswith("ml_")
    assert digest.stdout == made.stderr
    assert digest.stdout.startswith("sha256:")
    assert manylora("token", "--hash", stdin="\n").returncode == 2


@pytest.mark.parametrize("option", ["--json-schema", "--grammar"])
def test_a_file_that_is_no_text_is_wrong_usage(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff\xfe{")

    done = manylora("generate", "hi", option, str(tmp_path / "file"))

    assert done.returncode == 2
    assert "is no UTF-8" in done.stderr
    assert "Traceback" not in done.stderr
