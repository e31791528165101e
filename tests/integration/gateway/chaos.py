"""Everything that goes wrong at once: clients, versions, replicas and the registry."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc

from benchmarks.synthetic import expected_tokens
from manylora_client import (
    AdapterVersion,
    AsyncClient,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    StatusError,
    UnavailableError,
)
from manylora_registry import Registry
from tests.e2e.harness import Gateway, replica_processes

PROMPTS = ([1], [2, 7, 1, 8], [3, 1, 4, 1, 5, 9, 2, 6])
WEATHER = (UnavailableError, ResourceExhaustedError, DeadlineExceededError)
"""What may happen to anybody here: a replica or the registry is away, or all is late."""


def engine_name(version: AdapterVersion | None) -> str | None:
    if version is None:
        return None
    return f"{version.name}@{version.number}-{version.digest.removeprefix('sha256:')[:12]}"


@dataclass
class Chaos:
    """The actors, and what came of what they did."""

    gateway: Gateway
    registry: Registry
    location: Path
    """Of the registry."""
    names: tuple[str, ...]
    """Adapters with two versions, at `production`."""
    spoilt: str
    """Reference of a version whose blob is damaged."""
    foreign: str
    """Reference of a version for another base."""
    kill_every_s: float
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What must never happen."""
    slowest_successor_s: float = 0.0
    """From a kill until both replicas answered again."""
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _registry_here: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, seconds: float, askers: int = 12) -> None:
        """Lets them loose for a while."""
        self._stop.clear()
        async with AsyncClient(self.gateway.inference, timeout=60) as client:
            actors: list[Callable[[AsyncClient], Awaitable[None]]] = [
                *[self.ask] * askers,
                *[self.vanish] * 2,
                *[self.hurry] * 2,
                self.ask_wrongly,
                self.move_aliases,
                self.hide_registry,
                self.kill_replicas,
            ]
            tasks = [asyncio.ensure_future(self._repeat(actor, client)) for actor in actors]
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
            self._stop.set()
            await asyncio.gather(*tasks)

    async def _repeat(
        self, actor: Callable[[AsyncClient], Awaitable[None]], client: AsyncClient
    ) -> None:
        while not self._stop.is_set():
            try:
                await actor(client)
            except StatusError as error:
                kind = type(error).__name__
                self.outcomes[kind] += 1
                if not isinstance(error, WEATHER) or error.reason is None:
                    self.wrong.append(f"{actor.__name__}: {kind} {error.reason}: {error}")

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()

    def _request(self) -> tuple[str, list[int], int]:
        name = self.chance.choice(("", *self.names))
        selector = self.chance.choice(("", "", "@1", "@2")) if name else ""
        return name + selector, self.chance.choice(PROMPTS), self.chance.randrange(1, 120)

    async def ask(self, client: AsyncClient) -> None:
        """One request, streamed or not, whose answer must be the named version's."""
        reference, prompt, count = self._request()
        if self.chance.random() < 0.5:
            answer = await client.generate(prompt, reference, max_tokens=count)
            tokens, version = list(answer.token_ids), answer.adapter
        else:
            stream = client.stream(prompt, reference, max_tokens=count)
            tokens = [token async for delta in stream for token in delta.token_ids]
            version = (await stream.result()).adapter
        said = "" if version is None else version.name
        if said != reference.partition("@")[0]:
            self.wrong.append(f"{reference} was answered by {version}")
        if tokens != expected_tokens(engine_name(version), prompt, count):
            self.wrong.append(f"{reference} got tokens that {version} did not make")
        self.outcomes["right"] += 1

    async def vanish(self, client: AsyncClient) -> None:
        """Leaves in the middle of an answer."""
        reference, prompt, _ = self._request()
        async with client.stream(prompt, reference, max_tokens=500) as stream:
            async for _ in stream:
                break
        self.outcomes["vanished"] += 1

    async def hurry(self, client: AsyncClient) -> None:
        """Has no time."""
        reference, prompt, _ = self._request()
        await client.generate(prompt, reference, max_tokens=500, timeout=self.chance.random() / 4)

    async def ask_wrongly(self, client: AsyncClient) -> None:
        """Asks for what cannot be had, each with its own error."""
        for reference, kind in (
            (self.spoilt, DataLossError),
            (self.foreign, FailedPreconditionError),
            ("nobody", NotFoundError),
            ("../../etc/passwd", InvalidArgumentError),
        ):
            try:
                await client.generate([1], reference, max_tokens=2)
            except kind:
                self.outcomes[f"refused {kind.__name__}"] += 1
            else:
                self.wrong.append(f"{reference} was answered")
        await self._pause(0.2)

    async def move_aliases(self, client: AsyncClient) -> None:
        """Moves an alias; somebody's requests go on with the other version."""
        async with self._registry_here:
            name, number = self.chance.choice(self.names), self.chance.choice((1, 2))
            await asyncio.to_thread(self.registry.set_alias, name, "production", number)
        self.outcomes["moves"] += 1
        await self._pause(1 + self.chance.random())

    async def hide_registry(self, client: AsyncClient) -> None:
        """Takes the registry away for a moment."""
        await self._pause(4)
        async with self._registry_here:
            away = self.location.rename(self.location.with_name("away"))
            await self._pause(1.5)
            away.rename(self.location)
        self.outcomes["registry away"] += 1

    async def kill_replicas(self, client: AsyncClient) -> None:
        """Kills a replica, and the next only when its successor is there."""
        await self._pause(self.kill_every_s)
        if self._stop.is_set() or await self._replicas() < 2:
            return
        victim = self.chance.choice(replica_processes(self.gateway.process.pid))
        os.kill(victim.pid, signal.SIGKILL)
        self.outcomes["killed"] += 1
        began = time.monotonic()
        while await self._replicas() < 2 and not self._stop.is_set():
            await self._pause(0.5)
        self.slowest_successor_s = max(self.slowest_successor_s, time.monotonic() - began)

    async def _replicas(self) -> int:
        """How many answer."""
        try:
            return len(await asyncio.to_thread(self.gateway.replicas))
        except grpc.RpcError as error:
            if cast("grpc.Call", error).code() is not grpc.StatusCode.UNAVAILABLE:
                self.wrong.append(f"ListReplicas: {error}")
            return 0
