"""What a caller may rely on, held by both clients against a real gRPC server."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import grpc
import numpy as np
import pytest

import manylora.inference.v1.inference_pb2 as pb
from manylora_client import (
    AdapterVersion,
    CancelledCallError,
    ClosedError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    Generation,
    Input,
    InternalError,
    InvalidArgumentError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    Request,
    ResourceExhaustedError,
    StatusError,
    Timing,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from tests.unit.client.conftest import AnyClient
from tests.unit.client.scripted import Answer, Failure, ScriptedServer, version

Serve = Callable[..., ScriptedServer]
Connect = Callable[..., AnyClient]

TWO_WORDS = Answer("two words", finish_reason=pb.FINISH_REASON_LENGTH)


def test_generate_returns_all_there_is_to_know(serve: Serve, connect: Connect) -> None:
    client = connect(serve({"spelling@staging": TWO_WORDS}).target)

    answer = client.generate("recieve", "spelling@staging", logprobs=2)

    assert answer.text == "two words"
    assert answer.token_ids == (0, 1)
    assert answer.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)
    assert answer.adapter == AdapterVersion("spelling", 1, version("spelling", 1).digest)
    assert answer.request_id == "request-1"
    assert [entry.chosen.token_id for entry in answer.logprobs] == [0, 1]
    assert [candidate.logprob for candidate in answer.logprobs[0].top] == [-0.25, -1.25]


def test_the_bare_base_has_no_version(serve: Serve, connect: Connect) -> None:
    client = connect(serve({"": TWO_WORDS}).target)

    assert client.generate("recieve").adapter is None
    with client.stream("recieve") as stream:
        assert stream.adapter is None


def test_a_finish_reason_of_a_newer_server_is_unknown(serve: Serve, connect: Connect) -> None:
    client = connect(serve({"": Answer(finish_reason=pb.FINISH_REASON_UNSPECIFIED)}).target)

    assert client.generate("recieve").finish_reason == "unknown"


def test_every_option_reaches_the_server(serve: Serve, connect: Connect) -> None:
    server = serve({"a@2": Answer()})
    client = connect(server.target)

    client.generate(
        "x",
        "a@2",
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        presence_penalty=-1,
        frequency_penalty=2,
        repetition_penalty=1.25,
        n=2,
        seed=2**63,
        stop=["\n", "END"],
        ignore_eos=True,
        logprobs=0,
        regex="[a-z]+",
    )

    assert server.service.received == [
        pb.GenerateRequest(
            adapter="a@2",
            text="x",
            sampling=pb.Sampling(
                max_tokens=7,
                temperature=0.5,
                top_p=0.9,
                top_k=3,
                min_p=0.1,
                presence_penalty=-1,
                frequency_penalty=2,
                repetition_penalty=1.25,
                n=2,
                seed=2**63,
                stop=["\n", "END"],
                ignore_eos=True,
                logprobs=0,
                structured_output=pb.StructuredOutput(regex="[a-z]+"),
            ),
        )
    ]


@pytest.mark.parametrize(
    ("option", "sent"),
    [
        ({"json_schema": {"type": "null"}}, pb.StructuredOutput(json_schema='{"type": "null"}')),
        ({"json_schema": "{}"}, pb.StructuredOutput(json_schema="{}")),
        ({"json_object": True}, pb.StructuredOutput(json_object=pb.JsonObject())),
        ({"choice": ["a", "b"]}, pb.StructuredOutput(choice=pb.Alternatives(values=["a", "b"]))),
        ({"grammar": "start: A"}, pb.StructuredOutput(grammar="start: A")),
    ],
)
def test_each_form_of_an_answer_can_be_asked_for(
    option: dict[str, Any], sent: pb.StructuredOutput, serve: Serve, connect: Connect
) -> None:
    server = serve({"": Answer()})

    connect(server.target).generate("x", **option)

    assert server.service.received[0].sampling.structured_output == sent


def test_several_choices_stream_and_return_alike(serve: Serve, connect: Connect) -> None:
    client = connect(serve({"a": Answer("one two")}).target)

    whole = client.generate("x", "a", n=2, temperature=1.0)

    assert [choice.text for choice in whole.choices] == ["one two 0", "one two 1"]
    assert (whole.text, whole.usage.completion_tokens) == ("one two 0", 6)
    assert client.stream("x", "a", n=2, temperature=1.0).result() == whole


def test_the_timing_is_told(serve: Serve, connect: Connect) -> None:
    client = connect(serve({"": Answer()}).target)

    assert client.generate("x").timing == Timing(0.25, 0.5, 1.0, 2.0)
    assert client.stream("x").result().timing == Timing(0.25, 0.5, 1.0, 2.0)


def test_the_token_and_the_requests_name_go_with_the_call(serve: Serve, connect: Connect) -> None:
    server = serve({"": Answer()})
    client = connect(server.target, token="secret")

    client.generate("x", request_id="mine")
    client.stream("x", request_id="mine").result()
    client.batch([Request("x")])

    assert [call["authorization"] for call in server.service.metadata] == ["Bearer secret"] * 3
    assert [call.get("x-request-id") for call in server.service.metadata] == ["mine", "mine", None]
    with pytest.raises(InvalidInputError):
        client.generate("x", request_id="new\nline")
    with pytest.raises(InvalidInputError):
        connect(server.target, token="sécret")


def test_what_the_caller_leaves_out_is_left_to_the_gateway(serve: Serve, connect: Connect) -> None:
    server = serve({"": Answer()})

    connect(server.target).generate("x")

    assert server.service.received == [pb.GenerateRequest(text="x", sampling=pb.Sampling())]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("plain", pb.GenerateRequest(text="plain")),
        ("", pb.GenerateRequest(text="")),
        ([1, 2, 3], pb.GenerateRequest(tokens=pb.Tokens(ids=[1, 2, 3]))),
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            pb.GenerateRequest(
                chat=pb.Chat(
                    messages=[
                        pb.Message(role="system", content="Be brief."),
                        pb.Message(role="user", content="Hi"),
                    ]
                )
            ),
        ),
    ],
)
def test_text_chat_and_tokens_are_sent_as_such(
    given: Input, sent: pb.GenerateRequest, serve: Serve, connect: Connect
) -> None:
    server = serve({"": Answer()})

    connect(server.target).generate(given)

    (received,) = server.service.received
    assert received.WhichOneof("input") == sent.WhichOneof("input")
    received.ClearField("sampling")
    assert received == sent


@pytest.mark.parametrize(
    ("given", "options", "complaint"),
    [
        ([], {}, "the input is empty"),
        ([1, "two"], {}, "the input must be text"),
        ([{"role": "user"}], {}, "'role' and 'content'"),
        ([{"role": "user", "content": 3}], {}, "both text"),
        (cast("Input", [{"role": "user", "content": None}]), {}, "both text"),
        (cast("Input", (token for token in [1, 2])), {}, "the input must be text"),
        (cast("Input", np.array([1, 2])), {}, "the input must be text"),
        ([-1], {}, "cannot be sent"),
        ("x", {"max_tokens": -1}, "cannot be sent"),
        ("x", {"temperature": "warm"}, "cannot be sent"),
        ("x", {"regex": "a", "grammar": "b"}, "give only one of regex, grammar"),
        ("x", {"choice": "abc"}, r"choice must be a list of strings"),
        (cast("Input", b"abc"), {}, "input is bytes"),
        ("x", {"timeout": 0}, "timeout must be a positive number of seconds, not 0"),
        ("x", {"timeout": float("nan")}, "positive number"),
        ("x", {"timeout": "soon"}, "positive number of seconds, not 'soon'"),
        ("x", {"stop": "END"}, r"stop must be a list of strings, e\.g\. \['END'\]"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_it_is(
    given: Input,
    options: dict[str, Any],
    complaint: str,
    serve: Serve,
    connect: Connect,
) -> None:
    server = serve({"": Answer()})
    client = connect(server.target)

    with pytest.raises(InvalidInputError, match=complaint):
        client.generate(given, **options)
    with pytest.raises(InvalidInputError, match=complaint):
        client.stream(given, **options)
    assert server.service.received == []


def test_an_option_that_does_not_exist_is_refused(serve: Serve, connect: Connect) -> None:
    with pytest.raises(TypeError, match="max_token"):
        connect(serve({"": Answer()}).target).generate("x", max_token=3)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgumentError),
        (grpc.StatusCode.FAILED_PRECONDITION, FailedPreconditionError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhaustedError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
        (grpc.StatusCode.CANCELLED, CancelledCallError),
        (grpc.StatusCode.UNAUTHENTICATED, UnauthenticatedError),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDeniedError),
        (grpc.StatusCode.DATA_LOSS, DataLossError),
        (grpc.StatusCode.UNIMPLEMENTED, UnimplementedError),
        (grpc.StatusCode.INTERNAL, InternalError),
        (grpc.StatusCode.ABORTED, StatusError),
    ],
)
def test_each_status_has_its_error_however_the_call_is_made(
    code: grpc.StatusCode, error: type[StatusError], serve: Serve, connect: Connect
) -> None:
    client = connect(serve({"a": Failure(code, "why it failed", "SOME_REASON")}).target)

    with pytest.raises(StatusError) as unary:
        client.generate("x", "a")
    with pytest.raises(StatusError) as streamed:
        client.stream("x", "a").result()
    (batched,) = client.batch([Request("x", "a")])

    for raised in (unary.value, streamed.value, batched):
        assert type(raised) is error
        assert isinstance(raised, StatusError)
        assert (raised.code, raised.reason, str(raised)) == (
            code.name,
            "SOME_REASON",
            "why it failed",
        )


def test_an_error_tells_every_refused_field_and_when_to_come_back_in_one_line(
    serve: Serve, connect: Connect
) -> None:
    failure = Failure(
        grpc.StatusCode.INVALID_ARGUMENT,
        "2 fields are wrong\n",
        violations={"sampling.top_p": "must be at most 1", "chat": "has no\nmessages"},
        retry_after=1.5,
    )
    client = connect(serve({"": failure}).target)

    with pytest.raises(InvalidArgumentError) as raised:
        client.generate("x")

    assert set(raised.value.violations) == {
        FieldViolation("sampling.top_p", "must be at most 1"),
        FieldViolation("chat", "has no\nmessages"),
    }
    assert raised.value.retry_after == 1.5
    assert str(raised.value) == (
        "2 fields are wrong; sampling.top_p: must be at most 1; chat: has no messages "
        "(try again in 1.5 s)"
    )


def test_a_field_that_the_message_names_is_told_once(serve: Serve, connect: Connect) -> None:
    """As the gateway does it, whose message is for clients that read no details."""
    message = "requests: must not be empty"
    failure = Failure(
        grpc.StatusCode.INVALID_ARGUMENT, message, violations={"requests": "must not be empty"}
    )

    with pytest.raises(InvalidArgumentError) as raised:
        connect(serve({"": failure}).target).generate("x")

    assert str(raised.value) == message
    assert [violation.field for violation in raised.value.violations] == ["requests"]


def test_the_deadline_holds_and_names_the_server(serve: Serve, connect: Connect) -> None:
    server = serve({"slow": Answer(hold_after=0)})
    client = connect(server.target, timeout=0.2)

    for call in (
        lambda: client.generate("x", "slow"),
        lambda: client.generate("x", "slow", timeout=0.1),
        lambda: client.stream("x", "slow").result(),
    ):
        begun = time.monotonic()
        with pytest.raises(DeadlineExceededError, match=server.target):
            call()
        assert time.monotonic() - begun < 60
    # On a machine that stands still, a deadline passes before the server has the call.
    seconds = 0.2
    while not server.service.received:
        seconds *= 2
        with pytest.raises(DeadlineExceededError):
            client.generate("x", "slow", timeout=seconds)
    assert server.service.cancelled.wait(60)


def test_a_call_may_have_longer_than_the_client_grants(serve: Serve, connect: Connect) -> None:
    client = connect(serve({"slow": Answer(hold_after=0)}).target, timeout=0.1)

    begun = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        client.generate("x", "slow", timeout=1.0)
    assert time.monotonic() - begun > 0.9


@pytest.mark.parametrize("timeout", [float("inf"), 1e18])
def test_no_deadline_is_too_far_away(timeout: float, serve: Serve, connect: Connect) -> None:
    client = connect(serve({"": Answer("here")}).target, timeout=0.001)

    assert client.generate("x", timeout=timeout).text == "here"


def test_a_stream_brings_started_then_deltas_then_finished(serve: Serve, connect: Connect) -> None:
    client = connect(serve({"a": Answer("one two three")}).target)

    with client.stream("x", "a") as stream:
        assert stream.adapter == AdapterVersion("a", 1, version("a", 1).digest)
        assert stream.started.request_id == "request-1"
        assert stream.finished is None
        assert [delta.text for delta in stream] == ["one", " two", " three"]
        assert stream.finished is not None
        assert stream.finished.finish_reason == "stop"


def test_the_first_event_is_there_before_the_first_token(serve: Serve, connect: Connect) -> None:
    client = connect(serve({"a": Answer("one two", hold_after=1)}).target)

    with client.stream("x", "a") as stream:
        assert stream.adapter is not None
        assert next(stream).text == "one"


def test_a_stream_adds_up_to_what_generate_returns(serve: Serve, connect: Connect) -> None:
    client = connect(serve({"a": Answer("one two three")}).target)

    streamed = client.stream("x", "a", logprobs=2).result()

    assert streamed == client.generate("x", "a", logprobs=2)


def test_closing_a_stream_early_cancels_the_call(serve: Serve, connect: Connect) -> None:
    server = serve({"a": Answer("one two three", hold_after=1)})
    client = connect(server.target)

    with client.stream("x", "a") as stream:
        assert next(stream).text == "one"

    assert server.service.cancelled.wait(60)
    assert list(stream) == []
    with pytest.raises(ProtocolError, match="closed before its last event"):
        stream.result()


def test_forgetting_a_stream_cancels_the_call(serve: Serve, connect: Connect) -> None:
    server = serve({"a": Answer("one two three", hold_after=1)})
    client = connect(server.target)

    for delta in client.stream("x", "a"):
        assert delta.text == "one"
        break
    client.count_tokens("lets an event loop run")

    assert server.service.cancelled.wait(60)


def test_a_closed_stream_never_starts(serve: Serve, connect: Connect) -> None:
    stream = connect(serve({"a": Answer(hold_after=0)}).target).stream("x", "a")
    stream.close()

    with pytest.raises(ClosedError), stream:
        pass


def test_an_error_in_the_middle_of_a_stream_comes_after_its_deltas(
    serve: Serve, connect: Connect
) -> None:
    lost = Failure(grpc.StatusCode.UNAVAILABLE, "replica lost", retry_after=0.0, after=2)
    server = serve({"a": lost})
    stream = connect(server.target, retries=3).stream("x", "a")

    assert [next(stream).text, next(stream).text] == ["word", " word"]
    with pytest.raises(UnavailableError, match="replica lost"):
        next(stream)
    assert len(server.service.received) == 1, "a stream that has begun is never repeated"


def test_a_stream_cut_short_is_never_taken_for_a_whole_one(serve: Serve, connect: Connect) -> None:
    stream = connect(serve({"a": Answer("one two three", drop_after=2)}).target).stream("x", "a")

    assert [next(stream).text, next(stream).text] == ["one", " two"]
    with pytest.raises(ProtocolError, match="without its last event"):
        next(stream)


def test_a_batch_comes_back_in_order_with_each_error_in_its_place(
    serve: Serve, connect: Connect
) -> None:
    full = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", "QUEUE_FULL", retry_after=2.0)
    client = connect(serve({"": Answer("base"), "a": Answer("adapter"), "b": full}).target)

    first, second, third, fourth = client.batch(
        [Request("x"), Request("x", "a"), Request("x", "b"), Request("x", "c")]
    )

    assert isinstance(first, Generation)
    assert isinstance(second, Generation)
    assert [first.text, second.text] == ["base", "adapter"]
    assert isinstance(third, ResourceExhaustedError)
    assert (third.reason, third.retry_after) == ("QUEUE_FULL", 2.0)
    assert isinstance(fourth, NotFoundError)
    assert client.batch([]) == []


def test_a_batch_with_an_answer_missing_is_an_error(serve: Serve, connect: Connect) -> None:
    client = connect(serve({"": Answer(), "a": Answer(drop_after=0)}).target)

    with pytest.raises(ProtocolError, match="left 1 requests of the batch unanswered"):
        client.batch([Request("x"), Request("x", "a")])


def test_count_tokens(serve: Serve, connect: Connect) -> None:
    client = connect(serve({}).target)

    assert client.count_tokens("three small words") == 3
    assert client.count_tokens([{"role": "user", "content": "two words"}]) == 2
    with pytest.raises(InvalidInputError, match="token ids need no counting"):
        client.count_tokens([1, 2])


def test_list_adapters_tells_what_is_served_and_what_waits(serve: Serve, connect: Connect) -> None:
    (spelling,) = connect(serve({}).target).list_adapters()

    first = AdapterVersion("spelling", 1, version("spelling", 1).digest)
    second = replace(first, number=2, digest=version("spelling", 2).digest)
    assert (spelling.name, spelling.latest) == ("spelling", second)
    production, staging = spelling.aliases
    assert (production.alias, production.serving, production.pending) == (
        "production",
        first,
        second,
    )
    assert "rank 64" in production.pending_error
    assert (staging.serving, staging.pending) == (None, None)


def test_a_message_may_be_larger_than_grpc_would_allow(serve: Serve, connect: Connect) -> None:
    server = serve({"": Answer("x" * 5 * 2**20)})

    assert len(connect(server.target).generate("x").text) == 5 * 2**20
    with pytest.raises(ResourceExhaustedError):
        connect(server.target, max_message_bytes=2**20).generate("x")
    received = len(server.service.received)
    with pytest.raises(ResourceExhaustedError):
        connect(server.target, max_message_bytes=2**20).generate("x" * 2**21)
    assert len(server.service.received) == received, "it is not even sent"
