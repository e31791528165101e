"""Deltas arrive whole and in order, whoever else sends, and from nobody without the secret."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from manylora_gateway.deltas import DeltaReceiver, DeltaSender, FrontAddress, joined
from manylora_gateway.engine import Candidate, Delta, Finish, TokenLogprobs
from manylora_gateway.errors import ReplicaLostError

Pair = tuple[DeltaReceiver, FrontAddress]


@pytest.fixture
async def front() -> AsyncGenerator[Pair, None]:
    receiver = DeltaReceiver()
    yield receiver, await receiver.start("127.0.0.1")
    await receiver.close()


def word(index: int) -> Delta:
    scores = TokenLogprobs(Candidate(index, -0.5), (Candidate(index, -0.5),))
    return Delta(f"{index} ", (index,), (scores,))


async def test_streams_share_a_connection_and_never_mix(front: Pair) -> None:
    receiver, address = front
    sender = await DeltaSender.connect(address)

    async def send(name: str) -> None:
        for index in range(50):
            await sender.send(name, word(index))
            await asyncio.sleep(0)
        await sender.send(name, replace(word(50), finish=Finish("stop", 3, 51)))
        await sender.send(name, None)

    async def read(name: str) -> list[Delta]:
        found: list[Delta] = []
        with receiver.expect(name) as inbox:
            sending = asyncio.create_task(send(name))
            while deltas := await inbox.take():
                found.extend(deltas)
            await sending
        return found

    for deltas in await asyncio.gather(*(read(f"request-{index}") for index in range(20))):
        (whole,) = joined(deltas)
        assert whole.token_ids == tuple(range(51))
        assert whole.text == "".join(f"{index} " for index in range(51))
        assert [entry.chosen.token_id for entry in whole.logprobs] == list(range(51))
        assert whole.finish == Finish("stop", 3, 51)
        assert len(deltas) < 51, "what piled up came together"
    sender.close()


async def test_answers_to_one_request_stay_apart() -> None:
    deltas = [replace(word(index), choice=index % 2) for index in range(6)]
    first, second = joined(deltas)
    assert (first.choice, first.token_ids) == (0, (0, 2, 4))
    assert (second.choice, second.token_ids) == (1, (1, 3, 5))


async def test_who_has_not_the_secret_is_not_read(front: Pair) -> None:
    receiver, address = front
    stranger = await DeltaSender.connect(replace(address, secret=b"x" * 32))
    with receiver.expect("request") as inbox:
        await stranger.send("request", word(1))
        taking = asyncio.create_task(inbox.take())
        sender = await DeltaSender.connect(address)
        await sender.send("request", word(2))
        assert [delta.token_ids for delta in await taking] == [(2,)]
        sender.close()
    stranger.close()


async def test_what_cannot_be_sent_fails_its_own_request_alone(front: Pair) -> None:
    receiver, address = front
    sender = await DeltaSender.connect(address)
    with receiver.expect("good") as inbox:
        with pytest.raises(TypeError):
            await sender.send("bad", Delta(object(), ()))  # pyright: ignore[reportArgumentType]
        await sender.send("good", word(1))
        assert (await inbox.take())[0].token_ids == (1,)
    sender.close()


async def send_for_ever(sender: DeltaSender) -> None:
    async with asyncio.timeout(60):
        while sender:
            await sender.send("request", word(2))
            await asyncio.sleep(0)


async def test_a_front_that_hung_up_is_noticed(front: Pair) -> None:
    receiver, address = front
    sender = await DeltaSender.connect(address)
    with receiver.expect("request") as inbox:
        await sender.send("request", word(1))
        await inbox.take()
        await receiver.close()
        with pytest.raises(ReplicaLostError):
            await send_for_ever(sender)


async def test_a_front_that_is_not_there_is_noticed() -> None:
    # A port that was let go may be another's by now.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host, port = taken.getsockname()
        with pytest.raises(ReplicaLostError):
            await DeltaSender.connect(FrontAddress(host, port, b""))


async def test_what_failed_is_raised_after_what_came_before(front: Pair) -> None:
    receiver, _ = front
    with receiver.expect("request") as inbox:
        inbox.put(word(1))
        inbox.fail(ReplicaLostError("gone"))
        assert [delta.token_ids for delta in await inbox.take()] == [(1,)]
        with pytest.raises(ReplicaLostError, match="gone"):
            await inbox.take()
