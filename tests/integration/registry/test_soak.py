"""Many processes at once, killed at random: no update is lost, nothing that is needed is missing.

Runs for `MANYLORA_SOAK_SECONDS`, some seconds unless set.
"""

import json
import os
import random
import signal
import time
import traceback
from datetime import timedelta

import pytest
import sqlalchemy as sa

from manylora_registry import schema
from manylora_registry.errors import (
    AliasConflictError,
    CorruptBlobError,
    NotFoundError,
    VersionInUseError,
    YankedError,
)

SECONDS = float(os.environ.get("MANYLORA_SOAK_SECONDS", "5"))
PROCESSES = 8
ADAPTERS = 6
NAMES = ("spelling", "grammar")
NOW = timedelta(0)


def work(place, base, adapters, cache, acknowledged, seed):
    """Does random things for ever; writes down what it was told is done."""
    chance = random.Random(seed)
    log = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    moves = 0
    with place.open() as registry:
        while True:
            name = chance.choice(NAMES)
            try:
                match chance.randrange(10):
                    case 0 | 1 | 2:
                        version = registry.publish(name, chance.choice(adapters), base=base)
                        done = ["published", name, version.number, version.digest]
                    case 3 | 4 | 5:
                        alias = registry.aliases(name).get("production")
                        move = registry.set_alias(
                            name,
                            "production",
                            chance.choice(registry.versions(name)).number,
                            expect=alias.generation if alias else 0,
                            why=f"{seed}-{moves}",
                        )
                        moves += 1
                        done = ["moved", name, move.generation, move.why]
                    case 6:
                        version = registry.delete(chance.choice(registry.versions(name)))
                        done = ["deleted", name, version.number, version.digest]
                    case 7:
                        registry.collect_garbage(grace=NOW)
                        continue
                    case 8:
                        version = chance.choice(registry.versions(name))
                        with registry.lease(version):
                            materialize(registry, version, cache)
                        continue
                    case _:
                        materialize(registry, registry.resolve(name), cache)
                        continue
            except (AliasConflictError, VersionInUseError, NotFoundError, YankedError):
                continue
            os.write(log, json.dumps(done).encode() + b"\n")


def materialize(registry, version, cache):
    try:
        registry.materialize(version, cache)
    except CorruptBlobError:
        # Deleted, collected and published again between finding it and reading it.
        registry.materialize(version, cache)


def start(*arguments):
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def said(logs):
    """What was acknowledged; a line that was cut off was not."""
    return [
        json.loads(line)
        for log in logs
        if log.exists()
        for line in log.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def kinds(logs):
    return {kind for kind, *_ in said(logs)}


def expire_leases(place):
    """What a day does to the leases of the dead."""
    engine = sa.create_engine(place.database)
    with engine.begin() as raw:
        raw.execute(sa.update(schema.leases).values(expires_at=0))
    engine.dispose()


@pytest.mark.parametrize("place", ["local"], indirect=True)
def test_processes_that_are_killed_lose_nothing(place, base, make_adapter, tmp_path):
    place.open().close()
    adapters = [make_adapter(seed) for seed in range(ADAPTERS)]
    chance = random.Random(0)
    logs = []

    def begin():
        logs.append(tmp_path / f"acknowledged-{len(logs)}")
        return start(place, base, adapters, tmp_path / "cache", logs[-1], len(logs))

    running = [begin() for _ in range(PROCESSES)]
    end = time.monotonic() + SECONDS
    failed = []
    while time.monotonic() < end or not {"published", "moved", "deleted"} <= kinds(logs):
        time.sleep(chance.uniform(0, 0.3))
        victim = running.pop(chance.randrange(PROCESSES))
        os.kill(victim, signal.SIGKILL)
        failed.append(os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) != -signal.SIGKILL)
        running.append(begin())
    for process in running:
        os.kill(process, signal.SIGKILL)
        failed.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != -signal.SIGKILL)

    assert not any(failed)
    expire_leases(place)
    with place.open() as registry:
        check(registry, said(logs), tmp_path / "checked")


def check(registry, said, cache):
    assert registry.verify().problems == ()
    moves = [(name, number, why) for kind, name, number, why in said if kind == "moved"]
    assert len({(name, generation) for name, generation, _ in moves}) == len(moves)
    published = [event for event in registry.events() if event.kind == "published"]
    for name in NAMES:
        versions = registry.versions(name)
        history = [(name, move.generation, move.why) for move in registry.history(name)]
        assert {move for move in moves if move[0] == name} <= set(history)
        assert [generation for _, generation, _ in history] == list(range(1, len(history) + 1))
        assert [e.version for e in published if e.name == name] == [v.number for v in versions]
        digests = {version.number: version.digest for version in versions}
        for kind, of, number, digest in said:
            if of == name and kind != "moved":
                assert digests[number] == digest
    registry.collect_garbage(grace=NOW)
    report = registry.verify()
    assert (report.problems, report.unreferenced) == ((), ())
    for name in NAMES:
        for version in registry.versions(name):
            if not version.collected:
                registry.materialize(version, cache)
