"""Sampling, forms of an answer and OpenAI's API, asked of a real engine."""

import asyncio
import json
import re
from typing import Any

import jsonschema
import pytest
from openai import APIError, AsyncOpenAI, OpenAI

from manylora_client import Client, InvalidArgumentError, SamplingOptions
from tests.e2e.harness import Gateway, wait_until

ASK: Any = [{"role": "user", "content": "Name a colour and a number."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "number": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "number"],
    "additionalProperties": False,
}


def openai(gateway: Gateway) -> OpenAI:
    return OpenAI(base_url=f"http://{gateway.http}/v1", api_key="none", max_retries=0)


def test_openais_client_gets_what_ours_gets(gateway: Gateway) -> None:
    with gateway.client() as client, openai(gateway) as other:
        ours = client.generate(ASK, "green", max_tokens=12, logprobs=2)
        options: Any = {"model": "green", "messages": ASK, "max_tokens": 12, "temperature": 0}
        whole = other.chat.completions.create(**options, logprobs=True, top_logprobs=2)
        chunks = other.chat.completions.create(**options, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole.choices[0].message.content == ours.text == streamed
    assert whole.model == "green@1"
    assert ours.adapter is not None
    assert whole.system_fingerprint == ours.adapter.digest
    assert whole.usage is not None
    assert whole.usage.completion_tokens == ours.usage.completion_tokens
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    told = [entry.token for entry in logprobs.content or ()]
    assert told == [entry.chosen.text for entry in ours.logprobs]


def test_candidates_have_their_text(gateway: Gateway) -> None:
    with gateway.client() as client:
        answer = client.generate(ASK, max_tokens=8, logprobs=1)
    assert "".join(entry.chosen.text for entry in answer.logprobs).startswith(answer.text)


def test_models_are_listed(gateway: Gateway) -> None:
    with openai(gateway) as client:
        assert {"smollm2-135m", "red", "green"} <= {model.id for model in client.models.list()}


def test_an_answer_is_json_by_its_schema(gateway: Gateway) -> None:
    with gateway.client() as client:
        answer = client.generate(ASK, max_tokens=200, json_schema=SCHEMA)
    assert answer.finish_reason == "stop", answer
    jsonschema.validate(json.loads(answer.text), SCHEMA)


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"regex": "[0-9]{3}-[a-z]{2}"}, "[0-9]{3}-[a-z]{2}"),
        ({"choice": ['yes "quoted"', "no\n"]}, 'yes "quoted"|no\n'),
        ({"grammar": 'root ::= "ja" | "nein"'}, "ja|nein"),
        ({"grammar": 'start: "oui" | "non"'}, "oui|non"),
    ],
    ids=["regex", "choice", "ebnf", "lark"],
)
def test_an_answer_is_held_to_its_form(
    gateway: Gateway, options: dict[str, Any], form: str
) -> None:
    with gateway.client() as client:
        for adapter in ("", "green"):
            text = client.generate(ASK, adapter, max_tokens=40, **options).text
            assert re.fullmatch(form, text)


@pytest.mark.parametrize(
    "options",
    [
        {"regex": "("},
        {"grammar": "root ::= ("},
        {"grammar": 'root ::= root "a"'},
        {"json_schema": {"type": 5}},
        {"json_schema": {"$ref": "#"}},
        {"json_schema": {"$ref": "#/nowhere"}},
        {"regex": "(((a{1,100}){1,100}){1,100}){1,100}"},
    ],
)
def test_a_form_that_cannot_be_held_is_refused_and_harms_nobody(
    gateway: Gateway, options: dict[str, Any]
) -> None:
    with gateway.client() as client:
        with pytest.raises(InvalidArgumentError, match="structured_output") as caught:
            client.generate(ASK, "green", max_tokens=8, **options)
        (kind,) = options
        assert [wrong.field for wrong in caught.value.violations] == [
            f"sampling.structured_output.{kind}"
        ]
        assert "/project/" not in str(caught.value)
        assert "Invalid grammar specification." not in str(caught.value), "it says where"
        assert client.generate("Hello", "green", max_tokens=2).text


def test_several_answers_differ_and_a_seed_repeats_them(gateway: Gateway) -> None:
    options: SamplingOptions = {"max_tokens": 12, "temperature": 1.0, "n": 3, "seed": 11}
    with gateway.client() as client:
        first, second = (client.generate(ASK, "green", **options) for _ in range(2))
        streamed = client.stream(ASK, "green", **options).result()
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in second.choices]
    assert texts == [choice.text for choice in streamed.choices]
    assert first.usage.completion_tokens == sum(len(c.token_ids) for c in first.choices)


def test_sampling_is_what_was_asked_for(gateway: Gateway) -> None:
    def ask(client: Client, **options: Any) -> str:
        return client.generate(ASK, max_tokens=40, ignore_eos=True, **options).text

    with gateway.client() as client:
        greedy = ask(client)
        assert ask(client, temperature=1.0, top_k=1) == greedy
        assert ask(client, temperature=1.0, min_p=1.0) == greedy
        assert ask(client, temperature=2.0, seed=1) != greedy
        assert ask(client, frequency_penalty=2.0) != greedy
        assert ask(client, repetition_penalty=1.5) != greedy
        ended = client.generate(ASK, max_tokens=40, stop=[greedy[8:11]])
        assert ended.text == greedy[: greedy.index(greedy[8:11])]
        assert ended.finish_reason == "stop"


def test_the_reply_tells_where_the_time_went(gateway: Gateway) -> None:
    with gateway.client() as client:
        timing = client.generate(ASK, "green", max_tokens=8, ignore_eos=True).timing
    assert timing.prefill > 0
    assert timing.decode > 0
    assert timing.queue >= 0


async def test_an_http_client_that_leaves_frees_its_seat(gateway: Gateway) -> None:
    async with AsyncOpenAI(base_url=f"http://{gateway.http}/v1", api_key="none") as client:
        options: Any = {
            "model": "red",
            "prompt": "Once upon a time",
            "max_tokens": 450,
            "extra_body": {"ignore_eos": True},
        }
        stream: Any = await client.completions.create(**options, stream=True)
        await anext(aiter(stream))
        whole = asyncio.create_task(client.completions.create(**options))
        assert await asyncio.to_thread(wait_until, lambda: gateway.requests() == 2, 120)
        await stream.close()
        whole.cancel()
        assert await asyncio.to_thread(wait_until, lambda: gateway.requests() == 0, 60)


def test_an_error_in_openais_form(gateway: Gateway) -> None:
    with openai(gateway) as client, pytest.raises(APIError) as caught:
        client.chat.completions.create(model="nobody", messages=ASK)
    assert caught.value.code == "adapter_not_found"
