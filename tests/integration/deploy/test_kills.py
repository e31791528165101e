"""Every script, killed before and after each of its effects and run again, ends as if it had not.

One client asks production all the while, and nothing of it may fail.
"""

import json
import logging
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.integration.deploy.conftest import World
from tests.integration.deploy.scripts import ROOT, Ended

MOST_MOMENTS = 100


@pytest.fixture(autouse=True)
def quick_gates(world: World) -> Iterator[None]:
    """Two steps and no suite: each promotion is gone through dozens of times."""
    for gateway in world.gateways.values():
        gateway.engine.broken.clear()
    world.failures.clear()
    yield
    world.gates(canary={"steps": [10, 50, 100], "window_s": 0.05, "look_s": 0.02, "requests": 3})


def quick(world: World, versions: int = 2) -> str:
    """A new adapter, and gates that are quick."""
    name = world.adapter(versions)
    world.gates(
        suites=[],
        smoke=None,
        canary={"steps": [50, 100], "window_s": 0.01, "look_s": 0.01, "requests": 2},
    )
    return name


def killed_everywhere(
    world: World,
    prepare: Callable[[], str],
    arguments: Callable[[str], tuple[str, ...]],
    check: Callable[[str, Ended], None],
) -> int:
    """Kills a script at each moment, each time on a new adapter; how many there were."""
    for moment in range(MOST_MOMENTS):
        name = prepare()
        with world.client(name):
            first = world.scripts.run(*arguments(name), kill=moment)
            ended = world.scripts.run(*arguments(name)) if first.killed else first
        check(name, ended)
        assert not (world.stages / f"production/state/promotions/{name}.json").exists()
        if not first.killed:
            # It came to no such moment.
            return moment
    raise AssertionError("there is no end of moments")


def test_a_promotion(world: World) -> None:
    def prepare() -> str:
        name = quick(world)
        world.registry.set_alias(name, "staging", 2)
        return name

    def check(name: str, ended: Ended) -> None:
        assert ended.status == 0, ended.err
        moves = [move for move in world.registry.history(name) if move.alias == "production"]
        assert [move.version for move in moves] == [1, 2]
        assert world.division(name) == {}
        assert sorted(world.outcomes(name, "promote")) == [
            ("", "done"),
            ("canary 100 %", "passed"),
            ("canary 50 %", "passed"),
            ("gates", "passed"),
        ]

    assert killed_everywhere(world, prepare, lambda name: ("promote", name), check) > 20


def test_a_refusal(world: World) -> None:
    def prepare() -> str:
        name = world.adapter(versions=3)
        world.registry.set_alias(name, "staging", 3)
        return name

    def check(name: str, ended: Ended) -> None:
        assert ended.status == 1, ended.err
        assert "the gates of production are closed" in ended.err
        assert (world.serving(name), world.division(name)) == (1, {})
        assert {*world.outcomes(name, "promote")} == {("gates", "refused")}

    assert killed_everywhere(world, prepare, lambda name: ("promote", name), check) > 5


def test_a_version_that_is_taken_back(world: World) -> None:
    def prepare() -> str:
        name = quick(world)
        world.registry.set_alias(name, "staging", 2)
        bad = world.registry.resolve(f"{name}@2")
        world.gateways["production"].engine.refused.add(bad.engine_name)
        return name

    def check(name: str, ended: Ended) -> None:
        assert ended.status == 1, ended.err
        assert "was taken back" in ended.err
        assert (world.serving(name), world.division(name)) == (1, {})
        assert ("canary 50 %", "rolled-back") in world.outcomes(name, "promote")

    assert killed_everywhere(world, prepare, lambda name: ("promote", name), check) > 8


@pytest.mark.parametrize("to", [(), ("--to", "1")])
def test_a_rollback(world: World, to: tuple[str, ...]) -> None:
    def prepare() -> str:
        name = quick(world)
        world.registry.set_alias(name, "production", 2)
        return name

    def check(name: str, ended: Ended) -> None:
        assert ended.status == 0, ended.err
        assert [move.version for move in world.registry.history(name)] == [1, 2, 1]
        assert world.outcomes(name, "rollback") == [("alias", "done")]

    arguments = ("--stage", "production", *to)
    assert killed_everywhere(world, prepare, lambda name: ("rollback", name, *arguments), check) > 8


def test_a_rollback_that_somebody_else_finished_otherwise_is_over(world: World) -> None:
    name = quick(world, versions=3)
    for number in (2, 3):
        world.registry.set_alias(name, "production", number)
    # Behind the records of three moves by hand, it has kept what it is about to do.
    assert world.scripts.run("rollback", name, "--stage", "production", kill=7).killed
    assert (world.stages / f"production/state/promotions/{name}.json").exists()
    world.registry.set_alias(name, "production", 1)
    world.registry.set_alias(name, "staging", 2)
    assert "interrupted" in world.scripts.refused("promote", name)
    world.scripts.good("rollback", name, "--stage", "production")
    world.scripts.good("promote", name)
    assert world.serving(name) == 2


def test_a_rollback_of_a_canary_whose_script_was_killed(world: World) -> None:
    def prepare() -> str:
        name, _ = killed_in_canary(world)
        assert "interrupted" in world.scripts.good("status", "production")
        return name

    def check(name: str, ended: Ended) -> None:
        assert ended.status == 0, ended.err
        assert (world.serving(name), world.division(name)) == (1, {})
        assert world.outcomes(name, "rollback") == [("rollout", "done")]

    arguments = ("--stage", "production")
    assert killed_everywhere(world, prepare, lambda name: ("rollback", name, *arguments), check) > 6


def test_a_damaged_journal_keeps_no_rollback_from_going_back(world: World) -> None:
    name, _ = killed_in_canary(world)
    file = world.stages / f"production/state/promotions/{name}.json"
    file.write_text("{")
    ended = world.scripts.run("rollback", name, "--stage", "production")
    assert (ended.status, ended.out) == (0, f"production serves {name}@1 again\n")
    assert f"{file} is damaged: going by what the gateway and the registry tell" in ended.err
    assert (world.serving(name), world.division(name)) == (1, {})

    world.registry.set_alias(name, "production", 2)
    for _ in range(2):
        file.write_text("{")
        world.scripts.good("rollback", name, "--stage", "production")
        assert world.serving(name) == 1


def candidate(world: World) -> str:
    """An adapter in its first version, and in the second before; staging has the second too."""
    name = quick(world)
    world.registry.set_alias(name, "production", 2)
    world.registry.set_alias(name, "production", 1)
    world.registry.set_alias(name, "staging", 2)
    return name


def killed_in_canary(world: World) -> tuple[str, int]:
    """An adapter whose promotion was killed when a share was given, and at which moment."""
    for moment in range(0, MOST_MOMENTS, 2):
        name = candidate(world)
        assert world.scripts.run("promote", name, kill=moment).killed
        if 2 in world.division(name):
            return name, moment
    raise AssertionError("no share was given")


def test_a_window_that_began_by_a_clock_that_was_set_back_ends_all_the_same(world: World) -> None:
    name, _ = killed_in_canary(world)
    file = world.stages / f"production/state/promotions/{name}.json"
    begun = json.loads(file.read_text())
    file.write_text(json.dumps({**begun, "began_at": time.time() + 3600}))

    with world.client(name):
        assert world.scripts.good("promote", name) == f"production serves {name}@2\n"


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_interrupts_a_canary_sends_everybody_back(world: World, by: signal.Signals) -> None:
    _, moment = killed_in_canary(world)
    name = candidate(world)
    with world.client(name):
        ended = world.scripts.run("promote", name, kill=moment, by=by)
        assert ended.status == 1, ended.err
        assert "everybody is back on version 1. Run it again to go on" in ended.err
        assert (world.serving(name), world.division(name)) == (1, {})
        assert world.scripts.run("promote", name).status == 0
    assert (world.serving(name), world.division(name)) == (2, {})
    assert ("canary 50 %", "interrupted") in world.outcomes(name, "promote")


def test_a_second_signal_does_not_keep_everybody_from_being_sent_back(world: World) -> None:
    _, moment = killed_in_canary(world)
    name = candidate(world)
    with world.client(name):
        ended = world.scripts.run("promote", name, kill=moment, by=signal.SIGINT, times=3)
    assert ended.status == 1, ended.err
    assert "everybody is back on version 1. Run it again to go on" in ended.err
    assert (world.serving(name), world.division(name)) == (1, {})


@pytest.mark.parametrize("listener", ["tee", "terminal"])
def test_a_listener_that_ends_with_a_canary_keeps_nobody_from_being_sent_back(
    world: World, listener: str
) -> None:
    name = candidate(world)
    canary = {"steps": [50, 100], "window_s": 60, "look_s": 0.01, "requests": 2}
    world.gates(suites=[], smoke=None, canary=canary)
    ours, its = pty.openpty() if listener == "terminal" else os.pipe()
    command = [str(ROOT / "deploy/promote"), name]
    promotion = subprocess.Popen(
        ["setsid", "--ctty", *command] if listener == "terminal" else command,
        stdin=its if listener == "terminal" else None,
        stderr=its,
        env={**os.environ, "MANYLORA_STAGES": str(world.stages), "MANYLORA_PYTHON": sys.executable},
    )
    os.close(its)
    while 2 not in world.division(name):
        time.sleep(0.005)

    # The kernel sends SIGHUP for a terminal by itself.
    os.close(ours)
    if listener == "tee":
        promotion.send_signal(signal.SIGINT)

    assert promotion.wait(60) == 1
    assert (world.serving(name), world.division(name)) == (1, {})


def test_who_interrupts_behind_the_move_of_the_alias_sends_nobody_back(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Until the gateway has followed the alias, they would be back on the old version."""
    name, moment = "", -1
    while not name or world.serving(name) == 1:
        moment += 2
        name = candidate(world)
        assert world.scripts.run("promote", name, kill=moment).killed
    name = candidate(world)
    with world.client(name), caplog.at_level(logging.INFO):
        ended = world.scripts.run("promote", name, kill=moment, by=signal.SIGINT)
        assert ended.status == 1, ended.err
        assert f"interrupted; {name}@2 serves already. Run it again to go on" in ended.err
        assert f"{name}@production is divided: version 2 100 %" in caplog.text
        assert f"{name}@production is divided: no more" not in caplog.text
        assert world.scripts.run("promote", name).status == 0
    assert (world.serving(name), world.division(name)) == (2, {})
    assert ("", "done") in world.outcomes(name, "promote")


def test_a_candidate(world: World) -> None:
    def check(name: str, ended: Ended) -> None:
        assert ended.status == 0, ended.err
        moves = [move for move in world.registry.history(name) if move.alias == "staging"]
        assert [move.version for move in moves] == [2]
        assert world.outcomes(name, "candidate") == [("", "done")]

    moments = killed_everywhere(
        world, lambda: quick(world), lambda name: ("candidate", f"{name}@2"), check
    )
    assert moments == 4


@pytest.mark.parametrize("script", ["candidate", "promote", "rollback"])
def test_the_record_of_a_move_that_was_killed_behind_it_is_kept_by_the_next_script(
    world: World, script: str
) -> None:
    """Whatever that script is, and told by the one that did it, where that can be known."""

    name, moment = "", -1
    while not name or world.serving(name) == 2:
        moment += 2
        name = quick(world, versions=3)
        world.registry.set_alias(name, "production", 2, actor="ann", why="by hand")
        world.registry.set_alias(name, "staging", 3)
        arguments = {
            "candidate": (f"{name}@3", "--stage", "production"),
            "promote": (name,),
            "rollback": (name, "--stage", "production"),
        }
        assert world.scripts.run(script, *arguments[script], kill=moment).killed
    world.scripts.good("rollback", name, "--stage", "production", "--to", "2")
    moves = [move for move in world.registry.history(name) if move.alias == "production"]
    records = world.registry.deployments(name, stage="production")
    done = [record for record in records if record.outcome == "done"]
    assert [record.detail["generation"] for record in done] == [1, 2, 3, 4]
    assert [record.version for record in done] == [move.version for move in moves]
    assert done[1].action == "alias"
    assert (done[1].actor, done[1].why) == ("ann", "by hand")
    assert done[2].action == ("alias" if script == "candidate" else script)


def test_an_approval(world: World) -> None:
    def check(name: str, ended: Ended) -> None:
        assert ended.status == 0, ended.err
        assert world.outcomes(name, "approve") == [("", "given")]

    moments = killed_everywhere(
        world, lambda: quick(world), lambda name: ("approve", f"{name}@2"), check
    )
    assert moments == 2
