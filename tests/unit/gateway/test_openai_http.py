"""OpenAI's API, asked by OpenAI's own client."""

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from manylora_gateway.config import LimitsConfig
from manylora_gateway.engine import (
    Delta,
    Grammar,
    JsonObject,
    JsonSchema,
    OneOf,
    Regex,
    Sampling,
)
from manylora_gateway.generation import Started
from manylora_gateway.openai_http.replies import Replies
from manylora_registry import Registry, Version
from tests.unit.gateway.conftest import Publish, Start
from tests.unit.gateway.fake_engine import IMPOSSIBLE, scores
from tests.unit.gateway.in_process import BASE_NAME, OTHER_BASE, RunningGateway
from tests.unit.gateway.test_observing import scraped, until

ASK: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(gateway: RunningGateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{gateway.http}/v1", api_key="none", max_retries=0, timeout=60
    ) as made:
        yield made


def words(text: str | None) -> set[str]:
    return set((text or "").split())


async def test_the_model_is_an_adapter_reference(
    client: AsyncOpenAI, served: dict[str, Version]
) -> None:
    for model, name in {"red": "red", "green@production": "green", "red@1": "red"}.items():
        answer = await client.chat.completions.create(model=model, messages=ASK)
        assert words(answer.choices[0].message.content) == {served[name].engine_name}
        assert answer.model == f"{name}@1", "the reply names the version that made it"
        assert answer.system_fingerprint == served[name].digest
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 4)


@pytest.mark.parametrize("model", ["", BASE_NAME])
async def test_the_base_goes_by_its_name_or_by_none(client: AsyncOpenAI, model: str) -> None:
    answer = await client.chat.completions.create(model=model, messages=ASK)
    assert words(answer.choices[0].message.content) == {"base"}
    assert answer.model == BASE_NAME


async def test_the_synchronous_client_is_answered_too(gateway: RunningGateway) -> None:
    def ask() -> tuple[str | None, str]:
        with OpenAI(base_url=f"{gateway.http}/v1", api_key="none") as client:
            whole = client.chat.completions.create(model="red", messages=ASK)
            stream = client.completions.create(model="red", prompt="hi", stream=True)
            return whole.choices[0].message.content, "".join(c.choices[0].text for c in stream)

    whole, streamed = await asyncio.to_thread(ask)
    assert whole == streamed


async def test_a_chat_streams_as_it_answers(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="red", messages=ASK, stream=True, n=2, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert [choice.delta.role for choice in chunks[0].choices] == ["assistant"] * 2
    whole = await client.chat.completions.create(model="red", messages=ASK, n=2)
    for index in range(2):
        deltas = [c for chunk in chunks for c in chunk.choices if c.index == index]
        text = "".join(choice.delta.content or "" for choice in deltas)
        assert text == whole.choices[index].message.content
        assert [choice.finish_reason for choice in deltas if choice.finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_stream_ends_with_done(gateway: RunningGateway) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        body = {"model": "red", "prompt": "hi", "stream": True}
        reply = await http.post(f"{gateway.http}/v1/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, end, nothing = reply.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] for event in events)


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_are_answered_in_their_order(
    client: AsyncOpenAI, gateway: RunningGateway, stream: bool
) -> None:
    options: dict[str, Any] = {"model": "red", "prompt": ["a", "bc"], "n": 2, "stream": stream}
    answer: Any = await client.completions.create(**options)
    if stream:
        texts: dict[int, str] = {}
        async for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
        assert sorted(texts) == [0, 1, 2, 3]
    else:
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == 3
    assert sorted(map(len, gateway.engine.prompts[-2:])) == [1, 2]


@pytest.mark.parametrize(("prompt", "ids"), [([7, 8], [7, 8]), ([[7, 8]], [7, 8])])
async def test_token_ids_are_passed_on(
    client: AsyncOpenAI, gateway: RunningGateway, prompt: Any, ids: list[int]
) -> None:
    await client.completions.create(model="", prompt=prompt)
    assert gateway.engine.prompts[-1] == ids


async def test_every_parameter_reaches_the_engine(
    client: AsyncOpenAI, gateway: RunningGateway
) -> None:
    await client.chat.completions.create(
        model="",
        messages=ASK,
        max_completion_tokens=3,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1,
        n=2,
        seed=-1,
        stop=["END", "STOP"],
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 5, "min_p": 0.125, "repetition_penalty": 1.5, "ignore_eos": True},
    )
    assert gateway.engine.samplings[-1] == Sampling(
        max_tokens=3,
        temperature=0.5,
        top_p=0.25,
        top_k=5,
        min_p=0.125,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        n=2,
        seed=2**64 - 1,
        stop=("END", "STOP"),
        ignore_eos=True,
        logprobs=2,
    )


async def test_what_is_left_out_is_openais_default(
    client: AsyncOpenAI, gateway: RunningGateway
) -> None:
    await client.chat.completions.create(model="", messages=ASK, stop="END")
    assert gateway.engine.samplings[-1] == Sampling(max_tokens=4, temperature=1.0, stop=("END",))


SCHEMA = {"type": "object", "properties": {"a": {"type": "null"}}}


@pytest.mark.parametrize(
    ("asked", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, JsonObject()),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            JsonSchema(json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"regex": "a+"}}, Regex("a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, OneOf(("a", "b"))),
        ({"structured_outputs": {"grammar": "start: A"}}, Grammar("start: A")),
        ({"structured_outputs": {"json": SCHEMA}}, JsonSchema(json.dumps(SCHEMA))),
    ],
)
async def test_the_form_of_an_answer(
    client: AsyncOpenAI, gateway: RunningGateway, asked: dict[str, Any], constraint: object
) -> None:
    await client.chat.completions.create(model="", messages=ASK, extra_body=asked)
    assert gateway.engine.samplings[-1].constraint == constraint


async def test_content_in_parts_is_one_text(client: AsyncOpenAI, gateway: RunningGateway) -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    messages: Any = [
        {"role": "developer", "content": "Brief."},
        {"role": "user", "content": parts},
    ]
    await client.chat.completions.create(model="", messages=messages)
    # The fake tokenizer counts the characters of each turn.
    assert gateway.engine.prompts[-1] == [len("Brief."), len("two parts")]


async def test_log_probabilities_have_their_tokens(client: AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="red", messages=ASK, logprobs=True, top_logprobs=2, max_tokens=2
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 2
    entry = logprobs.content[0]
    assert entry.logprob == pytest.approx(-0.6931, abs=1e-3)
    assert [other.token for other in entry.top_logprobs] == [entry.token, "w1"]
    assert entry.bytes == list(entry.token.encode())

    text = await client.completions.create(model="red", prompt="hi", logprobs=1, max_tokens=2)
    told = text.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert "".join(told.tokens) == text.choices[0].text
    assert told.text_offset == [0, len(told.tokens[0])]


def test_offsets_of_a_stream_are_of_its_tokens_where_text_is_held_back() -> None:
    sampling = Sampling(max_tokens=3, logprobs=1)
    words = ("The ", "end", ".")
    # The engine holds back what may be the beginning of a stop string.
    texts = ("", "The ", "end.")
    chunks = Replies("text", "tiny", "one", 1).stream(1, include_usage=False)
    parts = list(chunks.of(0, Started("one", None)))
    for index, (text, word) in enumerate(zip(texts, words, strict=True)):
        parts += chunks.of(0, Delta(text, (index,), (scores(index, word, sampling),)))
    events = [json.loads(part.removeprefix(b"data: ")) for part in parts]
    offsets = [event["choices"][0]["logprobs"]["text_offset"] for event in events]
    assert offsets == [[0], [4], [7]]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_candidate_the_form_forbids_has_a_number(
    client: AsyncOpenAI, gateway: RunningGateway, stream: bool
) -> None:
    """It has no probability at all, and JSON no infinity."""
    gateway.engine.impossible = True
    options: Any = {"model": "red", "max_tokens": 1, "stream": stream}
    chat: Any = await client.chat.completions.create(
        messages=ASK, logprobs=True, top_logprobs=2, **options
    )
    text: Any = await client.completions.create(prompt="hi", logprobs=2, **options)
    choices = [
        [choice async for chunk in answer for choice in chunk.choices if choice.logprobs]
        if stream
        else answer.choices
        for answer in (chat, text)
    ]
    top = choices[0][0].logprobs.content[0].top_logprobs
    assert [other.logprob for other in top][1:] == [-9999.0]
    assert list(choices[1][0].logprobs.top_logprobs[0].values())[1:] == [-9999.0]


async def test_models_are_the_base_and_what_is_served(
    client: AsyncOpenAI, registry: Registry, published: Publish
) -> None:
    published("red", 5)
    registry.set_alias("red", "canary", 2)
    published("unused", 6)
    models = [model.id async for model in client.models.list()]
    assert set(models) == {BASE_NAME, "green", "red", "red@canary", "unused@1"}
    for name in models:
        assert (await client.models.retrieve(name)).id == name
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nobody")


async def test_a_model_that_cannot_be_served_is_not_listed(
    client: AsyncOpenAI, registry: Registry, published: Publish
) -> None:
    published("unused", 5)
    registry.yank("unused@1")
    published("foreign", 6, base=OTHER_BASE)
    models = [model.id async for model in client.models.list()]
    assert set(models) == {BASE_NAME, "green", "red"}


WRONG: dict[str, dict[str, Any]] = {
    "messages": {"messages": []},
    "messages[0].role": {"messages": [{"role": "wizard", "content": "hi"}]},
    "messages[0].content": {"messages": [{"role": "user", "content": 3}]},
    "messages[0].content[0].type": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]
    },
    "messages[0].name": {"messages": [{"role": "user", "content": "hi", "name": "me"}]},
    "max_tokens": {"max_tokens": 0},
    "max_completion_tokens": {"max_completion_tokens": 10**6},
    "temperature": {"temperature": 2.5},
    "top_p": {"top_p": 0},
    "n": {"n": 99},
    "stop": {"stop": ["x"] * 17},
    "stop[0]": {"stop": [""]},
    "seed": {"seed": "one"},
    "stream": {"stream": "yes"},
    "top_logprobs": {"top_logprobs": 3},
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "logit_bias": {"logit_bias": {"5": 3}},
    "reasoning_effort": {"reasoning_effort": "high"},
    "stream_options.speed": {"stream_options": {"speed": 3}},
    "response_format": {"response_format": {"type": "yaml"}},
    "response_format.json_schema": {"response_format": {"type": "json_schema"}},
    "response_format.json_schema.schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}
    },
    "structured_outputs": {"structured_outputs": {}},
    "structured_outputs.regex": {"structured_outputs": {"regex": ""}},
    "model": {"model": "../../etc/passwd"},
}


async def test_a_wrong_parameter_is_named(gateway: RunningGateway) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        for field, change in WRONG.items():
            body = {"model": "red", "messages": ASK, **change}
            reply = await http.post(f"{gateway.http}/v1/chat/completions", json=body)
            error = reply.json()["error"]
            assert (reply.status_code, error["type"]) == (400, "invalid_request_error"), error
            assert error["param"] == field, error
            assert field in error["message"]


@pytest.mark.parametrize(
    ("endpoint", "asked", "field"),
    [
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "hi \ud83d"}]},
            "messages[0].content",
        ),
        ("chat/completions", {"messages": ASK, "stop": ["END", "\ud83d"]}, "stop[1]"),
        ("completions", {"prompt": ["hi", "\ud83d"]}, "prompt"),
    ],
)
async def test_half_of_a_character_is_the_clients_mistake(
    gateway: RunningGateway, endpoint: str, asked: dict[str, Any], field: str
) -> None:
    """As clients send it whose language counts UTF-16, from text that they cut."""
    async with httpx.AsyncClient(timeout=60) as http:
        body = json.dumps({"model": "red", **asked})
        reply = await http.post(f"{gateway.http}/v1/{endpoint}", content=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == field
    assert "surrogate" in reply.json()["error"]["message"]


@pytest.mark.parametrize("more", [{}, {"max_tokens": 3}])
async def test_no_tokens_at_all_are_not_the_default(
    client: AsyncOpenAI, more: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="red", messages=ASK, max_completion_tokens=0, **more
        )
    assert caught.value.param == "max_completion_tokens"


async def test_a_token_below_the_vocabulary_is_named(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="red", prompt=[3, -1])
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"messages": ["hi"]}, "messages[0]: must be an object"),
        ({"messages": ASK, "stream_options": 3}, "stream_options: must be an object"),
        ({"messages": ASK, "response_format": {}}, "its type must be text, json_object or"),
        ({"messages": ASK, "response_format": {"type": "xml"}}, "its type must be text, json_"),
        ({"messages": 5}, "messages: must be an array"),
        ({"messages": ASK, "stop": 5}, "stop: must be a string or an array of strings"),
        ({"messages": ASK, "stop": [5]}, "stop[0]: must be a string"),
        ({"messages": ASK, "max_tokens": 1.5}, "max_tokens: must be an integer"),
        ({"messages": ASK, "temperature": "hot"}, "temperature: must be a number"),
        ({"messages": ASK, "stream": "yes"}, "stream: must be true or false"),
        ({"messages": ASK, "structured_outputs": {"json": 5}}, ".json: must be an object or a"),
        ({"messages": [{"role": "user", "content": 5}]}, "content: must be a string or an array"),
    ],
)
async def test_a_wrong_form_is_told_in_words_of_json(
    gateway: RunningGateway, asked: dict[str, Any], message: str
) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        body = {"model": "red", **asked}
        reply = await http.post(f"{gateway.http}/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("endpoint", "asked", "message"),
    [
        ("chat/completions", {"messages": [3] * 100_000}, "messages[0]: must be an object"),
        ("completions", {"prompt": [None] * 100_000}, "prompt[0]: "),
        ("completions", {f"p{i}": 1 for i in range(50_000)}, "has 50000 members"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": 3}] * 50_000}]},
            "messages[0].content[0]",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "wizard", "content": ""}] * 20_000},
            "messages[0].role: must be",
        ),
    ],
    ids=["messages", "prompts", "parameters", "parts", "roles"],
)
async def test_mistakes_beyond_count_hold_nobody_up(
    gateway: RunningGateway, endpoint: str, asked: dict[str, Any], message: str
) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        reply = await http.post(f"{gateway.http}/v1/{endpoint}", json=asked)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]
    assert len(reply.content) < 4096


@pytest.mark.parametrize(
    ("endpoint", "asked"),
    [
        ("chat/completions", {"messages": [3, 3]}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": 3}] * 2}]}),
        ("completions", {"prompt": [None, None]}),
        ("completions", {"prompt": "a", "stop": [1, 2]}),
    ],
)
async def test_of_a_list_the_first_mistake_is_told(
    gateway: RunningGateway, endpoint: str, asked: dict[str, Any]
) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        reply = await http.post(f"{gateway.http}/v1/{endpoint}", json=asked)
    assert reply.status_code == 400
    assert "[0]" in reply.text
    assert "[1]" not in reply.text


async def test_a_reply_can_be_sent_back_as_a_turn(client: AsyncOpenAI) -> None:
    mine = (await client.chat.completions.create(model="red", messages=ASK)).choices[0].message
    # As OpenAI's and vLLM's servers answer.
    theirs = {"role": "assistant", "content": "x", "refusal": None, "annotations": []}
    theirs |= {"tool_calls": [], "function_call": None, "audio": None}
    messages: Any = [*ASK, mine, *ASK, theirs, *ASK]
    assert (await client.chat.completions.create(model="red", messages=messages)).model == "red@1"
    theirs["tool_calls"] = [{"id": "1"}]
    with pytest.raises(openai.BadRequestError, match="tool_calls"):
        await client.chat.completions.create(model="red", messages=messages)


async def test_parameters_that_change_nothing_are_ignored(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="red",
        messages=ASK,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="y",
        tools=[],
        tool_choice="none",
        logit_bias={},
        extra_body={"suffix": None},
    )
    assert answer.model == "red@1"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b"", "not JSON"),
        (b"[" * 100_000, "too deep"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"response_format": {"minimum": NaN}}', "no NaN"),
        (b'{"prompt": "\xff"}', "byte 12 is not UTF-8"),
    ],
)
async def test_a_body_that_is_no_request(
    gateway: RunningGateway, body: bytes, message: str
) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        reply = await http.post(f"{gateway.http}/v1/completions", content=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize("coding", ["gzip", "deflate", "identity, br"])
async def test_a_compressed_body_is_refused_by_its_header(
    gateway: RunningGateway, coding: str
) -> None:
    body = gzip.compress(b'{"model": "red", "prompt": "hi"}')
    async with httpx.AsyncClient(timeout=60) as http:
        headers = {"content-encoding": coding}
        reply = await http.post(f"{gateway.http}/v1/completions", content=body, headers=headers)
    assert reply.status_code == 415
    assert reply.headers["accept-encoding"] == "identity"
    error = reply.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "content-encoding")
    assert coding in error["message"]


async def test_a_body_beyond_the_limit(served: dict[str, Version], start: Start) -> None:
    async with start(limits=LimitsConfig(max_request_bytes=1024)) as gateway:
        async with httpx.AsyncClient(timeout=60) as http:
            body = {"model": "red", "prompt": "x" * 10_000}
            reply = await http.post(f"{gateway.http}/v1/completions", json=body)
        assert reply.status_code == 413
        assert "1024 bytes" in reply.json()["error"]["message"]


async def test_each_error_has_its_status(
    client: AsyncOpenAI, gateway: RunningGateway, published: Publish
) -> None:
    version = published("odd", 3)
    gateway.engine.refused.add(version.engine_name)
    for stream in (False, True):
        options: Any = {"messages": ASK, "stream": stream}
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="nobody", **options)
        assert missing.value.code == "adapter_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="odd@1", **options)
        assert refused.value.code == "adapter_load_failed"
        form = {"structured_outputs": {"regex": IMPOSSIBLE.pattern}}
        with pytest.raises(openai.BadRequestError) as held:
            await client.chat.completions.create(model="red", extra_body=form, **options)
        assert held.value.param == "structured_outputs.regex"
    gateway.engine.dead = True
    with pytest.raises(openai.InternalServerError) as lost:
        await client.chat.completions.create(model="red", messages=ASK)
    assert lost.value.status_code == 503
    assert lost.value.response.headers["retry-after"] == "1"


async def test_a_stream_that_breaks_says_so(client: AsyncOpenAI, gateway: RunningGateway) -> None:
    gateway.engine.hold_answers()
    stream = await client.chat.completions.create(model="red", messages=ASK, stream=True)
    gateway.engine.dead = True
    gateway.engine.let_answer()
    with pytest.raises(openai.APIError, match="engine died"):
        async for _ in stream:
            pass


async def test_what_is_not_there_is_said_in_the_same_form(gateway: RunningGateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.http, timeout=60) as http:
        missing = (await http.post("/chat/completions")).json()["error"]["message"]
        assert missing.startswith("Not Found: POST /chat/completions. There are POST /v1/chat/")
        wrong = await http.get("/v1/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json()["error"]["message"].startswith("Method Not Allowed: GET /v1/comp")


async def test_a_path_may_end_with_a_slash(gateway: RunningGateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.http, timeout=60) as http:
        for path in ("/v1/models", "/v1/models/red", "/health"):
            reply = await http.get(f"{path}/")
            assert (reply.status_code, reply.content) == (200, (await http.get(path)).content)
        body = {"model": "red", "messages": ASK}
        assert (await http.post("/v1/chat/completions/", json=body)).json()["model"] == "red@1"


async def test_a_target_may_be_a_whole_url(gateway: RunningGateway) -> None:
    host, _, port = gateway.front.addresses["http"].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for target in (
        "http://somewhere/v1/models/red?x=1",
        "https://somewhere:1/v1/models/red",
        # Whatever its host is called.
        "http://[/v1/models/red",
    ):
        writer.write(f"GET {target} HTTP/1.1\r\nhost: somewhere\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert json.loads(await reader.readexactly(length))["id"] == "red"
    writer.close()


async def test_an_offer_of_http_2_is_passed_over_in_silence(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """Java's client makes it with the first request of each connection."""
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": ""}
    async with httpx.AsyncClient(base_url=gateway.http, timeout=60) as http:
        body = {"model": "red", "messages": ASK}
        reply = await http.post("/v1/chat/completions", json=body, headers=offer)
    assert reply.json()["model"] == "red@1"
    assert "pip install" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_seat(gateway: RunningGateway, stream: bool) -> None:
    gateway.engine.hold_answers()
    async with AsyncOpenAI(base_url=f"{gateway.http}/v1", api_key="none") as leaver:
        options: Any = {"model": "red", "messages": ASK, "stream": stream}
        asking: asyncio.Task[Any] = asyncio.create_task(leaver.chat.completions.create(**options))
        await gateway.engine.until_running(1)
        if stream:
            await (await asking).close()
        else:
            asking.cancel()
        async with asyncio.timeout(60):
            await gateway.engine.until_running(0)


async def test_a_client_that_leaves_within_its_body_is_no_error_of_ours(
    gateway: RunningGateway,
) -> None:
    host, _, port = gateway.front.addresses["http"].rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: 9\r\n\r\n{")
    writer.close()

    def rejected() -> list[str]:
        return re.findall(r'rejections_total{reason="(\w+)"} 1.0', scraped(gateway.metrics))

    await until(lambda: bool(rejected()))
    assert rejected() == ["CANCELLED"]


async def test_a_request_bears_its_clients_name(client: AsyncOpenAI) -> None:
    named = {"x-request-id": "mine-1"}
    answer = await client.chat.completions.create(model="", messages=ASK, extra_headers=named)
    assert answer.id == "chatcmpl-mine-1"
    assert answer._request_id == "mine-1"
    for wrong in ({"model": "nobody", "messages": ASK}, {"model": "", "messages": []}):
        options: Any = {**wrong, "extra_headers": named}
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(**options)
        assert caught.value.request_id == "mine-1"


async def test_health_turns_when_new_requests_are_not_wanted(gateway: RunningGateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.http, timeout=60) as http:
        assert (await http.get("/health")).status_code == 200
        await gateway.front.announce(serving=False)
        assert (await http.get("/health")).status_code == 503
