"""What clients are promised, asked of a real gateway."""

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from manylora_client import (
    AsyncClient,
    Client,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    Generation,
    InvalidArgumentError,
    NotFoundError,
)
from manylora_registry import Registry
from manylora_registry.base import BaseModelIdentity
from tests.e2e.harness import ADAPTERS, SLOTS, Gateway, wait_until, write_adapter

TIE = 1e-3
"""Log-probabilities this near are one rounding apart."""

LONG = 120
"""Tokens of an answer that is still under way when others have ended."""

QUESTIONS = (
    "Name three animals that live in the sea.",
    "What is the capital of Italy?",
    "Write a sentence about the moon.",
    "Explain what a compiler does.",
)


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_each_request_is_answered_by_the_adapter_it_names(gateway: Gateway) -> None:
    with gateway.client() as client:
        answers = {
            name: client.generate(ask(QUESTIONS[2]), name, max_tokens=24)
            for name in ("", *ADAPTERS)
        }
    assert answers[""].adapter is None
    for name in ADAPTERS:
        version = answers[name].adapter
        assert version is not None
        assert (version.name, version.number) == (name, 1)
    assert len({answer.text for answer in answers.values()}) == len(answers)


async def test_greedy_answers_are_the_same_alone_and_in_a_mixed_batch(gateway: Gateway) -> None:
    """Promise 2, with more adapters than slots and the bare base among them."""
    names = ("", *ADAPTERS)
    requests = [(names[i % len(names)], QUESTIONS[i % len(QUESTIONS)]) for i in range(16)]
    async with AsyncClient(gateway.inference, timeout=300) as client:

        async def generate(name: str, question: str) -> Generation:
            return await client.generate(ask(question), name, max_tokens=20, logprobs=2)

        alone = [await generate(*request) for request in requests]
        mixed = await asyncio.gather(*(generate(*request) for request in requests))
    ties = [
        f"{request}: {one.text!r} and {other.text!r}"
        for request, one, other in zip(requests, alone, mixed, strict=True)
        if one.token_ids != other.token_ids and differ_by_rounding(one, other)
    ]
    for request, one, other in zip(requests, alone, mixed, strict=True):
        assert one.token_ids == other.token_ids or differ_by_rounding(one, other), request
    assert len(ties) <= 1, ties


def differ_by_rounding(one: Generation, other: Generation) -> bool:
    """Whether the tokens part at a place where both candidates were equally likely."""
    pairs = zip(one.logprobs, other.logprobs, strict=False)
    for here, there in pairs:
        if here.chosen.token_id != there.chosen.token_id:
            likelihood = {entry.token_id: entry.logprob for entry in here.top}
            rival = likelihood.get(there.chosen.token_id)
            return rival is not None and abs(rival - here.chosen.logprob) <= TIE
    return False


async def test_a_swap_under_load_drops_and_mixes_nothing(
    gateway: Gateway, registry: Registry, identity: BaseModelIdentity, tmp_path: Path
) -> None:
    """Promises 1 and 6."""
    seen: list[tuple[str, int, str, str]] = []
    first, swapped, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async with AsyncClient(gateway.inference, timeout=120) as client:

        async def stream(turn: int) -> None:
            names = tuple(ADAPTERS)
            while not stop.is_set():
                # Every second request goes to the adapter that is swapped.
                name = "red" if turn % 2 else names[turn // 2 % len(names)]
                question = QUESTIONS[turn % len(QUESTIONS)]
                turn += 1
                answer = client.stream(ask(question), name, max_tokens=12)
                text = "".join([delta.text async for delta in answer])
                started = answer.adapter
                assert started is not None
                seen.append((name, started.number, question, text))
                if name == "red":
                    (first if started.number == 1 else swapped).set()

        streams = [asyncio.create_task(stream(offset)) for offset in range(4)]
        async with asyncio.timeout(300):
            await first.wait()
        adapter = write_adapter(tmp_path, identity, 8, seed=101)
        version = await asyncio.to_thread(registry.publish, "red", adapter, base=identity)
        await asyncio.to_thread(registry.set_alias, "red", "production", version.number)
        async with asyncio.timeout(300):
            await swapped.wait()
        already = len(seen)
        async with asyncio.timeout(300):
            while len(seen) < already + 12:
                await asyncio.wait(streams, timeout=0.1)
                assert not any(task.done() and task.exception() for task in streams)
        stop.set()
        await asyncio.gather(*streams)
        assert {number for name, number, *_ in seen if name == "red"} == {1, 2}
        held = await asyncio.to_thread(
            wait_until, lambda: ("red", 1) not in gateway.loaded(), within_s=120
        )
        assert held, "the old version is still in the engine"
        for name, number, question, text in sorted(set(seen)):
            alone = await client.generate(ask(question), f"{name}@{number}", max_tokens=12)
            assert alone.text == text, (name, number, question)


def test_a_corrupted_blob_is_refused_and_the_server_lives_on(
    gateway: Gateway,
    registry: Registry,
    registry_directory: Path,
    identity: BaseModelIdentity,
    tmp_path: Path,
) -> None:
    """Promise 5: a flipped bit never reaches the engine."""
    weights = write_adapter(tmp_path, identity, 4, seed=7) / "adapter_model.safetensors"
    version = registry.publish("spoilt", tmp_path, base=identity)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (blob,) = registry_directory.glob(f"blobs/sha256/*/*{digest[2:]}")
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)
    with gateway.client() as client:
        with pytest.raises(DataLossError):
            client.generate("Hello", f"spoilt@{version.number}", max_tokens=4)
        assert client.generate("Hello", "green", max_tokens=4).adapter is not None


def test_an_adapter_for_another_base_is_refused(
    gateway: Gateway, registry: Registry, identity: BaseModelIdentity, tmp_path: Path
) -> None:
    """Promise 8."""
    other = BaseModelIdentity("sha256:" + "0" * 64, identity.tensors)
    registry.publish("foreign", write_adapter(tmp_path, other, 4, 8), base=other)
    with gateway.client() as client:
        with pytest.raises(FailedPreconditionError):
            client.generate("Hello", "foreign@1", max_tokens=4)
        assert client.generate("Hello", "green", max_tokens=4).adapter is not None


def test_a_rank_above_the_engines_is_refused(
    gateway: Gateway, registry: Registry, identity: BaseModelIdentity, tmp_path: Path
) -> None:
    registry.publish("wide", write_adapter(tmp_path, identity, 32, 9), base=identity)
    with gateway.client() as client, pytest.raises(FailedPreconditionError):
        client.generate("Hello", "wide@1", max_tokens=4)


@pytest.mark.parametrize("reference", ["nobody", "red@99", "red@nowhere", "red@sha256:" + "0" * 12])
def test_what_is_not_there_is_not_found(gateway: Gateway, reference: str) -> None:
    with gateway.client() as client, pytest.raises(NotFoundError):
        client.generate("Hello", reference, max_tokens=4)


@pytest.mark.parametrize("reference", ["../../etc/passwd", "red@", "/tmp/red", "file:///red@1"])
def test_a_reference_is_never_a_path(gateway: Gateway, reference: str) -> None:
    """Promise 9."""
    with gateway.client() as client, pytest.raises(InvalidArgumentError):
        client.generate("Hello", reference, max_tokens=4)


def test_a_cancelled_stream_frees_its_slot(gateway: Gateway) -> None:
    """Promise 7: all slots are taken by long streams; once they are dropped others get in."""
    stays, *dropped = list(ADAPTERS)[:SLOTS]
    with gateway.client() as client, ThreadPoolExecutor(1) as pool:
        streams = [
            client.stream("Once upon a time", name, max_tokens=450, ignore_eos=True)
            for name in dropped
        ]
        for stream in streams:
            next(stream)
        other = pool.submit(_long, client, stays)
        assert wait_until(lambda: gateway.requests() == SLOTS, within_s=120)
        for stream in streams:
            stream.close()
        # Else they would have gone on for longer than the other.
        assert wait_until(lambda: gateway.requests() == 1 and not other.done(), within_s=60)
        assert client.generate("Hello", "gold", max_tokens=4).text
        assert other.result().usage.completion_tokens == LONG


def test_a_passed_deadline_ends_the_request(gateway: Gateway) -> None:
    with gateway.client() as client, ThreadPoolExecutor(1) as pool:
        other = pool.submit(_long, client, "red")
        assert wait_until(lambda: gateway.requests() == 1, within_s=120)
        with pytest.raises(DeadlineExceededError):
            client.generate("Hello", "red", max_tokens=450, ignore_eos=True, timeout=1.0)
        assert wait_until(lambda: gateway.requests() == 1 and not other.done(), within_s=60)
        assert other.result().usage.completion_tokens == LONG


def _long(client: Client, name: str) -> Generation:
    return client.generate("Once upon a time", name, max_tokens=LONG, ignore_eos=True)
