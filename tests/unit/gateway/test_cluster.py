"""Calls to replicas through Serve's own responses, without Serve."""

# Ray's handles are typed by the deployment's class at run time only.
# pyright: reportUnknownMemberType=false

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.handle import DeploymentBroadcastResponse

from manylora_gateway.cluster import RayReplicas, stop
from manylora_gateway.config import GatewayConfig
from manylora_gateway.deltas import DeltaReceiver, FrontAddress
from manylora_gateway.errors import ReplicaLostError


class Answer:
    """What one replica says, once it does."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._said = asyncio.get_running_loop().create_future()

    def say(self) -> None:
        self._said.set_result("state")

    async def get_async(self) -> object:
        self.asked.set()
        return await self._said


class Handle:
    """Of a deployment with a replica for each answer."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = answers

    def broadcast(self, method: str) -> DeploymentBroadcastResponse:
        del method

        async def route() -> list[ReplicaResult]:
            return [cast("ReplicaResult", answer) for answer in self._answers]

        return DeploymentBroadcastResponse(route(), None)


def test_where_ray_did_not_start_none_is_started_to_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    stop(GatewayConfig(base=Path("base")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", range(8))
async def test_a_look_that_is_ended_as_its_answer_comes_ends(steps: int) -> None:
    answer = Answer()
    handle = cast("Any", Handle(answer))
    replicas = RayReplicas(handle, DeltaReceiver(), cast("FrontAddress", None))
    looking = asyncio.create_task(replicas.states())
    await answer.asked.wait()
    answer.say()
    for _ in range(steps):
        await asyncio.sleep(0)
    was_ending = looking.cancel()
    with suppress(asyncio.CancelledError):
        await looking
    assert looking.cancelled() == was_ending


def replicas_of(*answers: Answer) -> RayReplicas:
    handle, address = cast("Any", Handle(*answers)), cast("FrontAddress", None)
    return RayReplicas(handle, DeltaReceiver(), address, state_timeout_s=0.05)


async def test_a_replica_that_stands_still_is_left_out_of_the_states() -> None:
    still, answers = Answer(), Answer()
    answers.say()
    assert await replicas_of(still, answers).states() == ["state"]


async def test_replicas_that_all_stand_still_are_lost() -> None:
    with pytest.raises(ReplicaLostError, match="No engine replica answers"):
        await replicas_of(Answer(), Answer()).states()
