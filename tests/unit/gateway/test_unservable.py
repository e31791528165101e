"""What an alias serves whose target cannot be served, above all after a restart."""

import logging
from pathlib import Path

import pytest

from manylora.inference.v1 import inference_pb2 as pb
from manylora_registry import Registry, Version
from tests.unit.gateway.conftest import Publish, Start
from tests.unit.gateway.in_process import MAX_RANK, OTHER_BASE, RunningGateway
from tests.unit.gateway.test_errors import refused, told

DAMAGES = ("corrupt", "missing")
"""What is found when weights are loaded; the other flaws stand in the registry."""


def flawed(flaw: str, published: Publish, registry: Path, seed: int) -> Version:
    """A version of `red` that cannot be served."""
    if flaw == "other base":
        return published("red", seed, base=OTHER_BASE)
    if flaw == "rank":
        return published("red", seed, rank=2 * MAX_RANK)
    before = set(registry.glob("blobs/sha256/*/*"))
    version = published("red", seed)
    for blob in set(registry.glob("blobs/sha256/*/*")) - before:
        if b"lora_A" in (content := blob.read_bytes()):
            blob.unlink()
            if flaw == "corrupt":
                blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return version


async def answering(gateway: RunningGateway, adapter: str) -> int:
    """The number of the version that answers."""
    answer = await gateway.inference.Generate(pb.GenerateRequest(adapter=adapter, text="hi"))
    return answer.adapter.number


@pytest.mark.parametrize("place", ["loaded at the start", "read at the start", "asked for"])
@pytest.mark.parametrize("flaw", ["other base", "rank", *DAMAGES])
async def test_the_version_before_is_served_after_a_restart_too(
    served: dict[str, Version],
    registry: Registry,
    published: Publish,
    start: Start,
    tmp_path: Path,
    flaw: str,
    place: str,
) -> None:
    alias = "canary" if place == "asked for" else "production"
    if place == "read at the start":
        for name in ("blue", "brown"):
            published(name, 3)
            registry.set_alias(name, "production", 1)
    registry.set_alias("red", alias, 1)
    for seed in (5, 6):
        version = flawed(flaw, published, tmp_path / "registry", seed)
        registry.set_alias("red", alias, version.number)
    reference = f"red@{alias}"
    async with start() as gateway:
        if place != "loaded at the start" and flaw in DAMAGES:
            # Nobody knew of it.
            request = pb.GenerateRequest(adapter=reference, text="hi")
            assert told(await refused(gateway.inference.Generate(request)))[0] == "DATA_LOSS"
        elif place != "loaded at the start":
            # Who asks makes the look that nothing waited for.
            assert await answering(gateway, reference) == 1
        entry = await gateway.until_failed(reference)
        assert (entry.serving.number, entry.pending.number) == (1, 3)
        assert await answering(gateway, reference) == 1
        published("red", 7)
        registry.set_alias("red", alias, 4)
        await gateway.until_serving(reference, 4)
        assert await answering(gateway, reference) == 4


async def test_a_version_that_was_rolled_back_from_does_not_come_back(
    served: dict[str, Version],
    registry: Registry,
    published: Publish,
    start: Start,
    tmp_path: Path,
) -> None:
    flawed("corrupt", published, tmp_path / "registry", 5)
    for seed in (6, 7):
        published("red", seed)
    for number in (2, 3, 2):
        registry.set_alias("red", "production", number)
    async with start() as gateway:
        entry = await gateway.until_failed("red@production")
        assert (entry.serving.number, entry.pending.number) == (1, 2)


@pytest.mark.parametrize("withdrawn", ["target", "before"])
async def test_a_withdrawn_version_is_not_gone_back_to_nor_behind(
    served: dict[str, Version],
    registry: Registry,
    published: Publish,
    start: Start,
    tmp_path: Path,
    withdrawn: str,
) -> None:
    published("red", 5)
    registry.set_alias("red", "production", 2)
    flawed("corrupt", published, tmp_path / "registry", 6)
    registry.set_alias("red", "production", 3)
    registry.yank("red@3" if withdrawn == "target" else "red@2")
    async with start() as gateway:
        entry = await gateway.until_failed("red@production")
        assert not entry.HasField("serving")
        status = await refused(
            gateway.inference.Generate(pb.GenerateRequest(adapter="red", text="hi"))
        )
        reason = "ADAPTER_YANKED" if withdrawn == "target" else "ADAPTER_CORRUPT"
        assert told(status)[1] == reason
        assert not {name for name in gateway.engine.loaded if name.startswith("red@")}


async def test_a_registry_that_is_away_brings_back_no_earlier_version(
    served: dict[str, Version],
    registry: Registry,
    published: Publish,
    start: Start,
    tmp_path: Path,
) -> None:
    async with start() as gateway:
        assert await answering(gateway, "red") == 1
    published("red", 5)
    registry.set_alias("red", "production", 2)
    blobs = tmp_path / "registry" / "blobs"
    blobs.rename(blobs.with_name("away"))
    async with start() as gateway:
        entry = await gateway.until_failed("red@production")
        assert not entry.HasField("serving")
        blobs.with_name("away").rename(blobs)
        await gateway.until_serving("red@production", 2)


async def test_an_adapter_of_another_base_is_known_once(
    served: dict[str, Version],
    registry: Registry,
    published: Publish,
    start: Start,
    caplog: pytest.LogCaptureFixture,
) -> None:
    published("alien", 5, base=OTHER_BASE)
    registry.set_alias("alien", "production", 1)
    with caplog.at_level(logging.INFO):
        async with start() as gateway:
            request = pb.GenerateRequest(adapter="alien", text="hi")
            status = await refused(gateway.inference.Generate(request))
            assert told(status)[0] == "FAILED_PRECONDITION"
            assert "made for the base" in status.message
            published("alien", 6, base=OTHER_BASE)
            registry.set_alias("alien", "production", 2)
            # Events come in order: what is followed has moved, so the other change was seen too.
            published("red", 7)
            registry.set_alias("red", "production", 2)
            await gateway.until_serving("red@production", 2)
            assert gateway.metrics.registry.get_sample_value(
                "manylora_swaps_total", {"outcome": "failed"}
            ) in (None, 0)
            published("alien", 8)
            registry.set_alias("alien", "production", 3)
            await gateway.until_serving("alien@production", 3)
            assert await answering(gateway, "alien") == 3
    told_of = [record for record in caplog.records if "alien@production" in record.getMessage()]
    assert {record.levelno for record in told_of} == {logging.INFO}
    assert len(told_of) == len({record.getMessage() for record in told_of})
