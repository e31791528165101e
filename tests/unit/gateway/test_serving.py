"""Answers: the adapter a request names makes them, whatever the call."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from manylora.admin.v1 import admin_pb2
from manylora.inference.v1 import inference_pb2 as pb
from manylora_gateway.config import EngineConfig
from manylora_registry import Cache, Registry, Version
from tests.unit.gateway.conftest import Publish, Start
from tests.unit.gateway.in_process import RunningGateway
from tests.unit.gateway.test_errors import refused, told


def said(text: str) -> set[str]:
    """The adapters that spoke in an answer."""
    return set(text.split())


async def test_each_request_is_answered_by_the_adapter_it_names(
    gateway: RunningGateway, served: dict[str, Version]
) -> None:
    for reference, name in {
        "red": "red",
        "green@production": "green",
        "red@1": "red",
        f"green@{served['green'].digest[:19]}": "green",
    }.items():
        reply = await gateway.inference.Generate(pb.GenerateRequest(adapter=reference, text="hi"))
        assert said(reply.text) == {served[name].engine_name}
        assert (reply.adapter.name, reply.adapter.number) == (name, 1)
        assert reply.adapter.digest == served[name].digest
        assert reply.finish_reason == pb.FINISH_REASON_LENGTH
        assert list(reply.token_ids) == [1, 2, 3, 4]
        assert reply.usage == pb.Usage(prompt_tokens=2, completion_tokens=4)


async def test_equal_files_under_two_names_are_served_as_both(
    served: dict[str, Version], published: Publish, registry: Registry, start: Start
) -> None:
    copied = published("scarlet", seed=0)
    registry.set_alias("scarlet", "production", 1)
    assert copied.digest == served["red"].digest
    async with start() as gateway:
        for name in ("red", "scarlet"):
            reply = await gateway.inference.Generate(pb.GenerateRequest(adapter=name, text="hi"))
            assert len(said(reply.text) & {copied.engine_name, served["red"].engine_name}) == 1
            assert reply.adapter.name == name
        assert len(gateway.engine.loads) == 2, "green, and one for both"
        await gateway.admin.Unload(admin_pb2.UnloadRequest(adapter="scarlet"))
        reply = await gateway.inference.Generate(pb.GenerateRequest(adapter="red", text="hi"))
        assert reply.adapter.name == "red"


async def test_the_engine_is_told_whose_prompts_go_first(gateway: RunningGateway) -> None:
    engine = gateway.engine
    engine.hold_answers()
    engine.priorities.clear()
    running = []
    for adapter in ("red", "red", "green"):
        request = pb.GenerateRequest(adapter=adapter, text="hi")
        running.append(gateway.inference.Generate(request))
        await engine.until_running(len(running))
    engine.let_answer()
    await asyncio.gather(*running)
    # The second of a line goes behind its first, and one of two adapters counts for two.
    assert engine.priorities == [100, 200, 200]


async def test_no_adapter_means_the_bare_base(gateway: RunningGateway) -> None:
    reply = await gateway.inference.Generate(pb.GenerateRequest(text="hi"))
    assert said(reply.text) == {"base"}
    assert not reply.HasField("adapter")


async def test_a_stream_starts_with_its_version_and_ends_with_its_usage(
    gateway: RunningGateway, served: dict[str, Version]
) -> None:
    call = gateway.inference.GenerateStream(pb.GenerateRequest(adapter="red", text="hi"))
    events = [event async for event in call]
    assert [event.WhichOneof("event") for event in events] == [
        "started",
        *["delta"] * 4,
        "finished",
    ]
    assert events[0].started.adapter.digest == served["red"].digest
    assert events[0].started.request_id
    assert said("".join(event.delta.text for event in events)) == {served["red"].engine_name}
    assert events[-1].finished.usage == pb.Usage(prompt_tokens=2, completion_tokens=4)


async def test_a_batch_answers_each_request_for_itself(gateway: RunningGateway) -> None:
    batch = pb.BatchGenerateRequest(
        requests=[
            pb.GenerateRequest(adapter="red", text="hi"),
            pb.GenerateRequest(adapter="nobody", text="hi"),
            pb.GenerateRequest(text="hi", sampling=pb.Sampling(top_p=2)),
            pb.GenerateRequest(text="hi"),
        ]
    )
    results = {result.index: result async for result in gateway.inference.BatchGenerate(batch)}
    assert results[0].response.adapter.name == "red"
    assert results[1].error.code == code_pb2.NOT_FOUND
    assert results[2].error.code == code_pb2.INVALID_ARGUMENT
    assert len(results[2].error.details) == 2
    assert said(results[3].response.text) == {"base"}


async def test_tokens_reach_the_engine_untouched(gateway: RunningGateway) -> None:
    await gateway.inference.Generate(pb.GenerateRequest(tokens=pb.Tokens(ids=[7, 7, 9])))
    assert gateway.engine.prompts[-1] == [7, 7, 9]


async def test_tokens_are_counted_without_running_them(gateway: RunningGateway) -> None:
    already = len(gateway.engine.prompts)
    reply = await gateway.inference.CountTokens(pb.CountTokensRequest(text="hello"))
    assert reply.tokens == 5
    assert len(gateway.engine.prompts) == already


async def test_more_adapters_than_slots_all_get_their_answers(
    published: Publish, registry: Registry, start: Start
) -> None:
    names = [f"adapter-{index}" for index in range(7)]
    for seed, name in enumerate(names):
        published(name, seed)
        registry.set_alias(name, "production", 1)
    async with start() as gateway:
        requests = [
            gateway.inference.Generate(pb.GenerateRequest(adapter=name, text="hi"))
            for name in names * 6
        ]
        replies = await asyncio.gather(*requests)
        assert not gateway.engine.dead
    for name, reply in zip(names * 6, replies, strict=True):
        assert reply.adapter.name == name
        assert said(reply.text) == {f"{name}@1-{reply.adapter.digest[7:19]}"}


async def test_requests_spread_over_replicas_and_all_are_listed(
    served: dict[str, Version], start: Start
) -> None:
    async with start(replicas=2) as gateway:
        for fake in gateway.engines:
            fake.hold_answers()
        calls = [
            gateway.inference.Generate(pb.GenerateRequest(adapter="red", text="hi"))
            for _ in range(4)
        ]
        for fake in gateway.engines:
            await fake.until_running(2)
        listing = await gateway.admin.ListReplicas(admin_pb2.ListReplicasRequest())
        assert len({replica.replica_id for replica in listing.replicas}) == 2
        for replica in listing.replicas:
            assert (replica.slots, replica.requests) == (2, 2)
            held = {entry.adapter.name: entry.requests for entry in replica.adapters}
            assert held == {"red": 2, "green": 0}
        for fake in gateway.engines:
            fake.let_answer()
        await asyncio.gather(*calls)


async def test_an_operator_loads_and_unloads(gateway: RunningGateway, published: Publish) -> None:
    version = published("blue", 3)
    loaded = await gateway.admin.Load(admin_pb2.LoadRequest(adapter="blue@1"))
    assert loaded.adapter.digest == version.digest
    assert version.engine_name in gateway.engine.loaded
    unloaded = await gateway.admin.Unload(admin_pb2.UnloadRequest(adapter="blue@1"))
    assert unloaded.replicas == 1
    await gateway.engine.until_gone(version.engine_name)


async def test_listing_tells_latest_and_aliases(
    gateway: RunningGateway, registry: Registry, published: Publish
) -> None:
    published("red", 5)
    registry.set_alias("red", "canary", 2)
    listing = await gateway.inference.ListAdapters(pb.ListAdaptersRequest())
    red = next(adapter for adapter in listing.adapters if adapter.name == "red")
    assert red.latest.number == 2
    assert {entry.alias: entry.serving.number for entry in red.aliases} == {
        "canary": 2,
        "production": 1,
    }


async def test_both_ports_tell_their_health_and_their_services(gateway: RunningGateway) -> None:
    services = {
        gateway.front.inference_address: "manylora.inference.v1.InferenceService",
        gateway.front.admin_address: "manylora.admin.v1.AdminService",
    }
    for address, service in services.items():
        async with grpc.aio.insecure_channel(address) as channel:
            checks: Any = health_pb2_grpc.HealthStub(channel)
            health = await checks.Check(health_pb2.HealthCheckRequest(service=service))
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            for version in ("v1", "v1alpha"):
                reflect: Any = channel.stream_stream(
                    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                    reflection_pb2.ServerReflectionRequest.SerializeToString,
                    reflection_pb2.ServerReflectionResponse.FromString,
                )
                (reply,) = [reply async for reply in reflect(iter([ask]))]
                names = {entry.name for entry in reply.list_services_response.service}
                assert {service, "grpc.health.v1.Health"} <= names


async def test_verified_copies_are_what_the_engine_reads(
    gateway: RunningGateway, served: dict[str, Version], tmp_path: Path
) -> None:
    directory = gateway.engine.loaded[served["red"].engine_name]
    assert directory.is_relative_to(tmp_path / "cache")
    assert served["red"].digest.removeprefix("sha256:") in str(directory)


async def test_copies_on_disk_have_a_limit_and_those_in_the_engine_stay(
    start: Start, published: Publish, tmp_path: Path
) -> None:
    versions = {name: published(name, seed) for seed, name in enumerate("abcdef")}
    size = Cache(tmp_path / "cache").size
    config = EngineConfig(slots=1, host_adapters=2, max_concurrent=2, turn_s=0)
    async with start(engine=config) as gateway:
        await gateway.inference.Generate(pb.GenerateRequest(adapter="a@1", text="hi"))
        each = size()
    async with start(engine=config, cache_bytes=4 * each) as gateway:
        for name in "abcdef":
            await gateway.inference.Generate(pb.GenerateRequest(adapter=f"{name}@1", text="hi"))
            assert size() <= 4.5 * each
            assert all(directory.is_dir() for directory in gateway.engine.loaded.values())
        assert gateway.engine.loads[-1] == versions["f"].engine_name
        # What went is fetched again.
        await gateway.inference.Generate(pb.GenerateRequest(adapter="a@1", text="hi"))
    async with start(engine=config, cache_bytes=1) as gateway:
        for name in "abab":
            await gateway.inference.Generate(pb.GenerateRequest(adapter=f"{name}@1", text="hi"))
            assert all(directory.is_dir() for directory in gateway.engine.loaded.values())
    assert size() == 0


async def test_a_cache_that_cannot_be_written_is_not_taken_for_the_registry(
    gateway: RunningGateway,
    published: Publish,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    published("blue", 7)
    cache = tmp_path / "cache"
    shutil.rmtree(cache)
    cache.touch()
    blue, red = (pb.GenerateRequest(adapter=name, text="hi") for name in ("blue@1", "red"))
    status = await refused(gateway.inference.Generate(blue))
    assert told(status) == ("UNAVAILABLE", "CACHE_UNAVAILABLE")
    assert "registry" not in status.message
    assert str(cache) not in status.message, "no path of the server's is for clients"
    assert str(cache) in caplog.text
    # What is loaded goes on, and the other comes as soon as it can be written.
    assert (await gateway.inference.Generate(red)).text
    cache.unlink()
    assert (await gateway.inference.Generate(blue)).text


async def test_a_registry_that_is_away_is_not_taken_for_damage(
    gateway: RunningGateway, published: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    published("blue", 7)
    blue = pb.GenerateRequest(adapter="blue@1", text="hi")
    away = gateway.registry_location.rename(gateway.registry_location.with_name("away"))
    status = await refused(gateway.inference.Generate(blue))
    assert told(status) == ("UNAVAILABLE", "REGISTRY_UNAVAILABLE")
    assert str(gateway.registry_location) not in status.message, "no path is for clients"
    assert str(gateway.registry_location) in caplog.text
    away.rename(gateway.registry_location)
    assert (await gateway.inference.Generate(blue)).text


async def test_one_slot_is_enough_for_many_adapters(
    served: dict[str, Version], start: Start
) -> None:
    config = EngineConfig(slots=1, host_adapters=2, max_concurrent=2, turn_s=0)
    async with start(engine=config) as gateway:
        replies = await asyncio.gather(
            *(
                gateway.inference.Generate(pb.GenerateRequest(adapter=name, text="hi"))
                for name in ["red", "green", "", "red", "green"] * 4
            )
        )
        assert len(replies) == 20
        assert not gateway.engine.dead
