"""What each script does, seen from outside: the registry, the gateways, exit status and output."""

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat, PublicFormat

from manylora_gateway.figures import Figures, VersionFigures
from manylora_gateway.rollouts import Rollouts
from tests.integration.deploy.conftest import GATES, World


@contextmanager
def on_a_share(world: World, name: str, number: int, act: Callable[[], object]) -> Iterator[None]:
    """Has `act` done once, when a version has its first share of production's requests.

    Production answers nothing before that: the script might be through with its canary.
    """
    engine, stop = world.gateways["production"].engine, threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            if number in world.division(name):
                act()
                break
        world.loop.call_soon_threadsafe(engine.let_answer)

    engine.hold_answers()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture(autouse=True)
def whole(world: World) -> None:
    """No version is broken when a test begins."""
    for gateway in world.gateways.values():
        gateway.engine.broken.clear()
    world.failures.clear()


def test_a_good_version_goes_all_the_way(world: World) -> None:
    name = world.adapter()
    assert world.scripts.good("candidate", f"{name}@2", "--why", "better") == (
        f"staging serves {name}@2\n"
    )
    with world.client(name):
        ended = world.scripts.run("promote", name, "--why", "it is", "--actor", "ann")
    assert ended.status == 0, ended.err
    assert ended.out == f"production serves {name}@2\n"
    for percent in (10, 50, 100):
        assert f"{percent} % passed" in ended.err
    assert (world.serving(name), world.division(name)) == (2, {})
    assert world.outcomes(name, "promote") == [
        ("gates", "passed"),
        ("canary 10 %", "passed"),
        ("canary 50 %", "passed"),
        ("canary 100 %", "passed"),
        ("", "done"),
    ]
    (evaluation,) = world.registry.evaluations(f"{name}@2")
    assert (evaluation.suite, evaluation.passed) == ("names", True)
    last = world.registry.history(name)[-1]
    assert (last.actor, last.why) == ("ann", "it is")
    assert world.scripts.good("promote", name) == f"production serves {name}@2\n"
    assert len(world.outcomes(name, "promote")) == 5


def test_what_was_never_a_candidate_is_told_to_become_one(world: World) -> None:
    name = world.adapter()

    assert world.scripts.refused("promote", name) == (
        f"promote: staging has no version of {name} to promote: "
        f"deploy/candidate {name}@NUMBER --stage staging brings one there"
    )
    assert world.outcomes(name, "promote") == []


def test_a_version_is_promoted_to_no_stage_of_the_same_alias(world: World) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")
    same = world.stages / "same"
    same.symlink_to("staging")
    try:
        line = world.scripts.refused("promote", name, "--to", "same")
    finally:
        same.unlink()
    assert "staging and same both serve the alias 'staging' of one registry" in line


def test_a_worse_version_is_refused_at_the_gate(world: World) -> None:
    name = world.adapter(versions=3)
    world.scripts.good("candidate", f"{name}@3")
    with world.client(name):
        line = world.scripts.refused("promote", name)
    assert line.startswith(f"promote: the gates of production are closed to {name}@3: names:")
    assert "regex 0.000 is below 0.900" in line
    assert "is worse" in line
    assert (world.serving(name), world.division(name)) == (1, {})
    assert world.outcomes(name, "promote") == [("gates", "refused")]
    assert not world.registry.evaluations(f"{name}@3")[-1].passed


def test_a_version_that_breaks_a_bound_is_taken_back_by_itself(world: World) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")

    def breaks() -> None:
        world.gateways["production"].engine.broken.add(f"{name}@2")

    # What was asked before it broke is too little for a step.
    world.gates(canary={**GATES["canary"], "window_s": 60, "requests": 3000})
    try:
        with on_a_share(world, name, 2, breaks):
            line = world.scripts.refused("promote", name)
    finally:
        world.gates(canary=GATES["canary"])
    assert f"{name}@2 was taken back at canary 10 %, and everybody is on version 1 again" in line
    assert re.search(r"requests failed, 0 may \(\d+ \w+; a probe was told: \w", line), line
    (rolled_back,) = world.registry.deployments(name, stage="production")[-1:]
    assert "a probe was told" in str(rolled_back.detail["reasons"])
    assert (world.serving(name), world.division(name)) == (1, {})
    assert world.outcomes(name, "promote")[-1] == ("canary 10 %", "rolled-back")
    with world.client(name):
        assert world.scripts.good("rollback", name, "--stage", "production", "--to", "1")


def test_where_nothing_can_be_kept_a_version_is_taken_back_all_the_same(world: World) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")
    kept = world.stages / "production/state/promotions"
    gateway, new = world.gateways["production"], world.registry.resolve(f"{name}@2").digest
    world.gates(canary={**GATES["canary"], "window_s": 60, "requests": 3000})
    try:
        with ThreadPoolExecutor() as pool:
            promotion = pool.submit(world.scripts.refused, "promote", name)
            # Its first probes, so that it has kept where it stands.
            while not gateway.metrics.figures.of(new).requests:
                time.sleep(0.005)
            # As a disk that is full, it takes no file any more.
            kept.rename(kept.with_name("aside"))
            kept.symlink_to("nowhere")
            gateway.engine.broken.add(f"{name}@2")
            line = promotion.result()
    finally:
        kept.unlink()
        kept.with_name("aside").rename(kept)
        world.gates(canary=GATES["canary"])
    assert f"{name}@2 was taken back at canary 10 %, and everybody is on version 1 again" in line
    assert (world.serving(name), world.division(name)) == (1, {})


@pytest.mark.parametrize("how", ["a bound", "a signal"])
def test_a_journal_damaged_in_a_canary_keeps_nobody_from_being_sent_back(
    world: World, how: str
) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")
    promotions = world.stages / "production/state/promotions"
    gateway, new = world.gateways["production"], world.registry.resolve(f"{name}@2").digest
    canary = {**GATES["canary"], "window_s": 60, "requests": 3000}
    world.gates(suites=[], smoke=None, canary=canary)
    try:
        with ThreadPoolExecutor() as pool:
            promotion = pool.submit(world.scripts.refused, "promote", name)
            while not gateway.metrics.figures.of(new).requests:
                time.sleep(0.005)
            (promotions / f"{name}.json").write_text("{")
            if how == "a bound":
                gateway.engine.broken.add(f"{name}@2")
            else:
                holder = json.loads((promotions / f"{name}.holder").read_text())
                os.kill(holder["pid"], signal.SIGINT)
            line = promotion.result()
    finally:
        world.gates(canary=GATES["canary"], smoke=GATES["smoke"])
    assert ("was taken back at canary 10 %" in line) == (how == "a bound")
    assert "everybody is " in line
    assert (world.serving(name), world.division(name)) == (1, {})


def test_a_promotion_that_cannot_be_kept_names_the_file_and_sends_everybody_back(
    world: World,
) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")
    kept = world.stages / "production/state/promotions"

    def refuses() -> None:
        kept.rename(kept.with_name("aside"))
        kept.symlink_to("nowhere")

    world.gates(suites=[], smoke=None, canary={**GATES["canary"], "window_s": 2})
    try:
        with on_a_share(world, name, 2, refuses), world.client(name):
            ended = world.scripts.run("promote", name)
    finally:
        kept.unlink()
        kept.with_name("aside").rename(kept)
        world.gates(canary=GATES["canary"], smoke=GATES["smoke"])
    assert ended.status == 1
    said = ended.err.strip().splitlines()
    assert said[-2] == "· everybody is back on version 1"
    assert f"{name}.json cannot be written (" in said[-1]
    assert (world.serving(name), world.division(name)) == (1, {})
    with world.client(name):
        assert world.scripts.good("promote", name) == f"production serves {name}@2\n"


def test_a_version_that_cannot_be_loaded_is_taken_back(world: World) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")
    world.gateways["production"].engine.refused.add(world.registry.resolve(f"{name}@2").engine_name)
    with world.client(name):
        line = world.scripts.refused("promote", name)
    assert "was taken back at canary 10 %" in line
    assert "the gateway cannot serve it" in line
    assert world.serving(name) == 1


def test_whatever_ends_a_canary_sends_everybody_back(world: World) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")
    world.gates(suites=[], prompts=None, smoke=None)
    try:
        ended = world.scripts.run("promote", name)
    finally:
        world.gates(prompts=GATES["prompts"], smoke=GATES["smoke"])
    assert ended.status == 1
    said = ended.err.strip().splitlines()
    assert "takes 10 %" in said[-3]
    assert said[-2] == "· everybody is back on version 1"
    assert f"has no prompts for {name}" in said[-1]
    assert (world.serving(name), world.division(name)) == (1, {})
    with world.client(name):
        assert world.scripts.good("promote", name) == f"production serves {name}@2\n"


class Restarted(Figures):
    """Of a gateway that is restarted once a version has answered something."""

    def __init__(self, digest: str) -> None:
        super().__init__()
        self._digest: str | None = digest

    def of(self, digest: str) -> VersionFigures:
        if digest == self._digest and super().of(digest).requests:
            self._digest = None
            self._versions.clear()
        return super().of(digest)


def test_a_gateway_that_counts_anew_is_noticed_by_what_the_present_version_did(
    world: World,
) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")
    present, new = (world.registry.resolve(f"{name}@{number}").digest for number in (1, 2))
    figures = Restarted(new)
    # More than it comes to again while a step lasts.
    figures.of(present).requests = 1_000_000
    world.gateways["production"].metrics.figures = figures
    with world.client(name):
        ended = world.scripts.run("promote", name)
    assert ended.status == 0, ended.err
    assert "the gateway was restarted and counts anew" in ended.err


def test_a_canary_that_its_gateway_lost_does_not_come_back(world: World) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")
    state = world.stages.parent / "production/state"

    def restart() -> None:
        # What a gateway that was restarted knows, if it cannot set its rollouts again yet.
        restarted = Rollouts(state)
        restarted.read()
        vars(world.gateways["production"].routes.rollouts).update(vars(restarted))

    with on_a_share(world, name, 2, restart), world.client(name):
        ended = world.scripts.run("promote", name)
    assert ended.status == 1
    assert "divided otherwise meanwhile (version 1 100 %)" in ended.err
    assert json.loads((state / "rollouts.json").read_text())["rollouts"] == []


def test_an_alias_that_may_not_move_any_more_sends_everybody_back(world: World) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")

    def protect() -> None:
        world.registry.protect(name, "production", suite="nightly")

    with on_a_share(world, name, 2, protect), world.client(name):
        ended = world.scripts.run("promote", name)

    assert ended.status == 1
    said = ended.err.strip().splitlines()
    assert said[-2] == "· everybody is back on version 1"
    assert "production is protected, and version 2 has no record of nightly" in said[-1]
    assert (world.serving(name), world.division(name)) == (1, {})
    world.registry.record_evaluation(f"{name}@2", "nightly", {}, passed=True)
    assert world.scripts.good("promote", name) == f"production serves {name}@2\n"


def test_mistakes_in_what_gates_name_are_told_before_anything_is_asked(world: World) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")
    suite = {"path": f"suites/{name}.yaml"}
    bound = [{"score": "regex", "at_least": 0.5}]
    prompts = world.stages / "production/prompts.jsonl"
    prompts.write_text('{"messages": 5}\n')
    try:
        world.gates(
            signatures=["key.pem"],
            prompts="gone.jsonl",
            suites=[{"path": "suites/gone.yaml"}, {**suite, "thresholds": {"nmae": bound}}],
        )
        for arguments in (("promote", name), ("promote", name, "--plan")):
            line = world.scripts.refused(*arguments)
            for said in (
                "key.pem",
                "gone.jsonl",
                "gone.yaml",
                f"has no task 'nmae'; it has {name}",
            ):
                assert said in line
        world.gates(signatures=[], prompts="prompts.jsonl", suites=[])
        assert "prompts.jsonl line 1: messages: " in world.scripts.refused("promote", name)
        world.gates(
            prompts=GATES["prompts"],
            suites=[{**suite, "thresholds": {name: [{"score": "regx", "at_least": 0.5}]}}],
        )
        assert "has no score regx; it has regex" in world.scripts.refused("promote", name)
    finally:
        world.gates(signatures=[], prompts=GATES["prompts"])
    assert world.registry.evaluations(f"{name}@2") == []
    assert world.outcomes(name, "promote") == []


def test_a_stage_may_ask_for_a_signature(world: World, tmp_path: Path) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    key = ec.generate_private_key(ec.SECP256R1())
    private.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    world.gates(signatures=[str(public)])
    try:
        assert "production asks for a signature" in world.scripts.refused("promote", name)
        assert world.serving(name) == 1
        world.registry.signatures.sign(world.registry.resolve(f"{name}@2"), private)
        world.scripts.good("promote", name)
        assert world.serving(name) == 2
    finally:
        world.gates(signatures=[])


@pytest.mark.parametrize(("most", "passes"), [(0.5, False), (1.0, True)])
def test_copies_tell_a_version_that_answers_otherwise(
    world: World, most: float, passes: bool
) -> None:
    name = world.adapter()
    world.gateways["production"].engine.astray.add(f"{name}@2")
    world.scripts.good("candidate", f"{name}@2")
    canary = GATES["canary"]
    world.gates(canary={**canary, "copies": 100, "bounds": {"different": most}})
    try:
        with world.client(name):
            ended = world.scripts.run("promote", name)
    finally:
        world.gates(canary=canary)
    assert (world.serving(name), ended.status) == ((2, 0) if passes else (1, 1)), ended.err
    said = "copies compared" if passes else "copies were answered otherwise or not at all, 50% may"
    assert said in ended.err


def test_a_version_needs_the_approval_of_another(world: World) -> None:
    name = world.adapter()
    world.gates(approval={"required": True, "by": ["ann", "bob"]})
    try:
        world.scripts.good("candidate", f"{name}@2")
        waiting = world.scripts.refused("promote", name, "--actor", "bob")
        assert f"deploy/approve {name}@2 --stage production" in waiting
        assert "may not approve" in world.scripts.refused("approve", f"{name}@2", "--actor", "eve")
        world.scripts.good("approve", f"{name}@2", "--actor", "bob")
        assert "needs approval" in world.scripts.refused("promote", name, "--actor", "bob")
        assert "needs approval" in world.scripts.refused("promote", name, "--actor", "bob ")
        world.scripts.good("approve", f"{name}@2", "--actor", "ann")
        world.scripts.good("approve", f"{name}@2", "--actor", "ann", "--withdraw")
        assert "needs approval" in world.scripts.refused("promote", name, "--actor", "bob")
        world.scripts.good("approve", f"{name}@2", "--actor", "ann")
        ended = world.scripts.run("promote", name, "--actor", "bob")
        assert ended.status == 0, ended.err
        assert "has passed the gates already" in ended.err
        assert world.serving(name) == 2
        world.scripts.good("rollback", name, "--stage", "production", "--actor", "bob")
        assert "needs approval" in world.scripts.refused("promote", name, "--actor", "bob")
        assert world.serving(name) == 1
        world.scripts.good("approve", f"{name}@2", "--actor", "ann")
        world.scripts.good("promote", name, "--actor", "bob")
        assert world.serving(name) == 2
    finally:
        world.gates(approval={})


def test_gates_are_asked_again_when_their_rows_have_changed(world: World) -> None:
    name = world.adapter()
    rows = world.stages / "production/suites/rows.jsonl"
    world.gates(approval={"required": True})
    try:
        world.scripts.good("candidate", f"{name}@2")
        for changed, already, evaluations in (
            (False, False, 1),
            (False, True, 1),
            (True, False, 2),
        ):
            if changed:
                rows.write_text(rows.read_text().replace("?", "!"))
            ended = world.scripts.run("promote", name)
            assert "needs approval" in ended.err
            assert ("has passed the gates already" in ended.err) == already
            assert len(world.registry.evaluations(f"{name}@2")) == evaluations
    finally:
        world.gates(approval={})


def test_a_plan_changes_nothing(world: World) -> None:
    name = world.adapter()
    assert "would move" in world.scripts.good("candidate", f"{name}@2", "--plan")
    assert "staging" not in world.registry.aliases(name)
    world.scripts.good("candidate", f"{name}@2")
    before = world.registry.deployments()
    ended = world.scripts.run("promote", name, "--plan")
    assert ended.status == 0
    assert ended.err.splitlines() == [
        f"· would ask names/{name} beside version 1 through staging",
        "· would send 4 requests through staging",
        f"· would give version 2 10 % of {name}@production and watch it for 0.05 s and 3 requests",
        f"· would give version 2 50 % of {name}@production and watch it for 0.05 s and 3 requests",
        f"· would give version 2 100 % of {name}@production and watch it for 0.05 s and 3 requests",
        f"· would move {name}@production from version 1 to 2, if it is at generation 1 still",
    ]
    world.scripts.good("rollback", name, "--stage", "production", "--to", "1", "--plan")
    told = world.scripts.good("approve", f"{name}@2", "--actor", "ann", "--plan")
    assert told == f"{name}@2 would be approved for production by ann\n"
    planned = world.scripts.good("approve", f"{name}@2", "--actor", "ann", "--plan", "--json")
    assert json.loads(planned)["approved"] is False
    assert world.registry.deployments() == before
    assert world.serving(name) == 1


def test_a_rollback_goes_back_once_and_not_to_and_fro(world: World) -> None:
    name = world.adapter(versions=2)
    world.registry.set_alias(name, "production", 2)
    with world.client(name):
        for _ in range(3):
            world.scripts.good("rollback", name, "--stage", "production", "--why", "slow")
            assert world.serving(name) == 1
    assert world.outcomes(name, "rollback") == [("alias", "done")]
    assert [move.version for move in world.registry.history(name)] == [1, 2, 1]


def test_to_promote_an_older_version_again_is_to_go_back(world: World) -> None:
    name = world.adapter(versions=2)
    for number in (2, 1):
        world.registry.set_alias(name, "production", number)
    told = world.scripts.good("rollback", name, "--stage", "production")
    assert (
        told == f"production went back to {name}@1 already; --to goes to another that it served\n"
    )
    assert "serves" in world.scripts.good("rollback", name, "--stage", "production", "--to", "2")
    assert world.serving(name) == 2
    assert "no version 7" in world.scripts.refused(
        "rollback", name, "--stage", "production", "--to", "7"
    )


def test_a_version_that_the_gateway_has_not_followed_is_rolled_back(world: World) -> None:
    name = world.adapter(versions=2)
    world.gateways["production"].engine.refused.add(world.registry.resolve(f"{name}@2").engine_name)
    world.registry.set_alias(name, "production", 2)
    assert world.scripts.good("rollback", name, "--stage", "production") == (
        f"production serves {name}@1 again\n"
    )
    assert [move.version for move in world.registry.history(name)] == [1, 2, 1]


def test_a_rollback_goes_to_no_version_that_never_served_the_stage(world: World) -> None:
    name = world.adapter(versions=3)
    world.registry.set_alias(name, "production", 2)
    world.scripts.good("candidate", f"{name}@3")
    other = world.adapter(versions=2)
    for wrong in (f"{name}@3", f"{other}@1"):
        line = world.scripts.refused("rollback", name, "--stage", "production", "--to", wrong)
        assert f"{wrong} never served production as {name}" in line
    assert world.serving(name) == 2
    world.scripts.good("rollback", name, "--stage", "production", "--to", "1")
    world.scripts.good("rollback", name, "--stage", "production", "--to", "2")
    assert world.serving(name) == 2


def _until_serving(world: World, alias: str, number: int) -> None:
    """Until production has followed an alias that was moved by hand."""
    serving = world.gateways["production"].until_serving(alias, number)
    asyncio.run_coroutine_threadsafe(serving, world.loop).result(60)


def test_a_version_that_was_withdrawn_can_be_rolled_back_and_replaced(world: World) -> None:
    """Who withdraws a bad version in a hurry has the other two scripts before him."""
    other = world.adapter()
    name = world.adapter(versions=2)
    world.scripts.good("candidate", f"{name}@2", "--stage", "production")
    world.registry.yank(f"{name}@2")

    _until_serving(world, f"{other}@production", 1)
    told = world.scripts.good("status", "production")
    assert f"production\t{other}@production\t1\t1" in told
    assert world.scripts.good("rollback", name, "--stage", "production") == (
        f"production serves {name}@1 again\n"
    )

    other = world.adapter()
    world.scripts.good("candidate", f"{other}@2")
    world.registry.yank(f"{other}@1")
    assert world.scripts.good("promote", other) == f"production serves {other}@2\n"
    assert world.outcomes(other, "promote") == [("gates", "passed"), ("", "done")]
    world.registry.yank(f"{other}@2")
    line = world.scripts.refused("rollback", other, "--stage", "production")
    assert "production pointed at no version before 2 that can be served: deploy/promote" in line


def test_a_version_that_is_withdrawn_in_its_canary_is_told(world: World) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2")
    world.gates(suites=[], smoke=None, canary={**GATES["canary"], "window_s": 60})
    try:
        with on_a_share(world, name, 2, lambda: world.registry.yank(f"{name}@2")):
            line = world.scripts.refused("promote", name)
    finally:
        world.gates(canary=GATES["canary"], smoke=GATES["smoke"])
    assert "(version 1 100 %), as version 2 was withdrawn; this promotion is over" in line
    assert (world.serving(name), world.division(name)) == (1, {})


def test_a_rollback_passes_over_versions_that_were_withdrawn(world: World) -> None:
    name = world.adapter(versions=4)
    for number in (2, 3, 4):
        world.registry.set_alias(name, "production", number)
    world.registry.yank(f"{name}@3")
    for _ in range(2):
        world.scripts.good("rollback", name, "--stage", "production")
        assert world.serving(name) == 2
    world.registry.yank(f"{name}@2")
    world.scripts.good("rollback", name, "--stage", "production")
    assert world.serving(name) == 1
    world.registry.yank(f"{name}@1")
    line = world.scripts.refused("rollback", name, "--stage", "production")
    assert "before 1 that can be served: --to 4 goes to one it meant since" in line
    world.scripts.good("rollback", name, "--stage", "production", "--to", "4")
    assert world.serving(name) == 4


def test_a_rollback_that_cannot_be_done_is_not_under_way(world: World) -> None:
    name = world.adapter(versions=4)
    world.registry.set_alias(name, "production", 2)
    # Behind the records of two moves by hand, it has kept what it is about to do.
    killed = world.scripts.run("rollback", name, "--stage", "production", kill=5)
    assert killed.killed
    assert (world.stages / f"production/state/promotions/{name}.json").exists()
    for number in (1, 2):
        world.registry.yank(f"{name}@{number}")
    assert "deploy/promote" in world.scripts.refused("rollback", name, "--stage", "production")
    world.scripts.good("candidate", f"{name}@4")
    assert world.scripts.good("promote", name) == f"production serves {name}@4\n"


def test_status_and_history_tell_machines_too(world: World) -> None:
    name = world.adapter()
    world.scripts.good("candidate", f"{name}@2", "--why", "for history")
    told = {stage["stage"]: stage for stage in json.loads(world.scripts.good("status", "--json"))}
    assert told["production"]["healthy"]
    entry = next(one for one in told["staging"]["adapters"] if one["name"] == name)
    assert (entry["version"], entry["serving"], entry["under_way"]) == (2, 2, "")
    (record,) = json.loads(world.scripts.good("history", name, "--json"))
    assert (record["action"], record["why"]) == ("candidate", "for history")
    assert "for history" in world.scripts.good("history", name)


def test_a_damaged_file_of_a_promotion_is_named(world: World) -> None:
    name = world.adapter()
    world.registry.set_alias(name, "production", 2)
    world.scripts.good("candidate", f"{name}@1")
    for content in ("{", "{}"):
        file = world.stages / f"production/state/promotions/{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        assert f"{file} is damaged: remove it" in world.scripts.refused("promote", name)
        assert f"{file} is damaged: remove it" in world.scripts.good("status", "production")


def test_wrong_usage_and_bad_references_are_told_apart(world: World) -> None:
    assert world.scripts.run("candidate").status == 2
    assert "no adapter" in world.scripts.refused("candidate", "nobody@1")
    assert "there is no stage 'moon'" in world.scripts.refused("up", "moon")
    assert "something else runs the gateway" in world.scripts.refused("up", "staging")
