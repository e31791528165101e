"""What is under way is whole or absent, and has one holder."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from deploy.stages.errors import BusyError, DamagedError
from deploy.stages.gate_settings import Gates, SuiteGate
from deploy.stages.gates import fingerprint, still_open
from deploy.stages.hosting import Hosting
from deploy.stages.journal import Holder, Journal, Promotion, Rollback
from deploy.stages.operator import Figures
from deploy.stages.settings import Stage, StageConfig
from manylora_gateway.config import GatewayConfig

PROMOTION = Promotion("a1", 3, "sha256:3", "staging", 2, 7, gates="g", began=Figures(5, 1, 9, 0.5))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    config = StageConfig(alias="blue", state=tmp_path / "state")
    stage = Stage("blue", tmp_path, config, GatewayConfig(base=tmp_path), Gates())
    return Journal(stage, "red")


def test_an_entry_comes_back_as_it_was(journal: Journal) -> None:
    assert journal.read() is None
    journal.write(PROMOTION)
    assert journal.read() == PROMOTION
    changed = journal.update(PROMOTION, step=1, broken=("slow", "wrong"))
    assert journal.read() == changed
    journal.write(Rollback("b2", None, 4))
    assert journal.read() == Rollback("b2", None, 4)
    journal.end()
    journal.end()
    assert journal.read() is None


@pytest.mark.parametrize(
    ("hours_ago", "counts"), [(0.1, True), (23, True), (25, False), (-0.1, False)]
)
def test_passed_gates_count_for_a_day_and_not_from_a_clock_that_was_wrong(
    tmp_path: Path, hours_ago: float, counts: bool
) -> None:
    config = StageConfig(alias="blue", state=tmp_path / "state")
    stage = Stage("blue", tmp_path, config, GatewayConfig(base=tmp_path), Gates())
    passed_at = time.time() - hours_ago * 3600
    passed = replace(PROMOTION, gates=fingerprint(stage, "red"), passed_at=passed_at)
    assert still_open(passed, stage, "red") == counts


def test_passed_gates_do_not_count_once_a_file_they_were_asked_with_has_changed(
    tmp_path: Path,
) -> None:
    (tmp_path / "suite.yaml").write_text(
        "name: s\ntasks:\n  - {name: t, adapter: red, rows: rows.jsonl, scorers: [\n"
        "      {kind: sql, fixture: tables.sql},\n"
        "      {kind: judge, by: j, criteria: {right: is right}, labels: labels.jsonl}]}\n"
        "judges: {j: {kind: gateway}}\n"
    )
    names = ["suite.yaml", "rows.jsonl", "tables.sql", "labels.jsonl", "prompts.jsonl", "key.pub"]
    for name in names[1:]:
        (tmp_path / name).write_text("before")
    gates = Gates(
        signatures=(tmp_path / "key.pub",),
        suites=(SuiteGate(path=tmp_path / "suite.yaml"),),
        prompts=tmp_path / "prompts.jsonl",
    )
    config = StageConfig(alias="blue", state=tmp_path / "state")
    stage = Stage("blue", tmp_path, config, GatewayConfig(base=tmp_path), gates)
    asked = [fingerprint(stage, "red")]

    for name in names:
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        asked.append(fingerprint(stage, "red"))

    assert len(set(asked)) == 1 + len(names)


def in_child(act) -> int:
    """Has `act` done by another process, which then waits to be killed; its id."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # Ray, where another test began it in this process, has made an exit of it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            with act():
                os.write(writing, b"1")
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(reading, 1) == b"1"
    return child


def test_a_lock_dies_with_its_holder(journal: Journal) -> None:
    child = in_child(lambda: journal.alone("promote"))
    assert journal.running()
    said = f"promote of red on blue .* process {child}"
    with pytest.raises(BusyError, match=said), journal.alone("promote"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not journal.running()
    with journal.alone("promote"):
        assert journal.running()


def test_a_rollback_ends_a_promotion_and_no_other_rollback(journal: Journal) -> None:
    child = in_child(lambda: journal.alone("promote"))
    with journal.alone("rollback", instead_of="promote"):
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert journal.running()
    child = in_child(lambda: journal.alone("rollback"))
    with (
        pytest.raises(BusyError, match="rollback"),
        journal.alone("rollback", instead_of="promote"),
    ):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_promotion_that_ends_by_itself_just_then_is_waited_for(
    journal: Journal, tmp_path: Path
) -> None:
    child = in_child(lambda: journal.alone("promote"))
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    holder = tmp_path / "state/promotions/red.holder"
    holder.write_text(json.dumps({"pid": gone, "action": "promote"}))
    with ThreadPoolExecutor(1) as thread:
        ending = thread.submit(os.kill, child, signal.SIGKILL)
        with journal.alone("rollback", instead_of="promote"):
            ending.result()
    os.waitpid(child, 0)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"pid": "x", "action": "promote"}'])
def test_a_damaged_holder_is_named_and_nobody_ended(
    journal: Journal, tmp_path: Path, content: str
) -> None:
    child = in_child(lambda: journal.alone("promote"))
    (tmp_path / "state/promotions/red.holder").write_text(content)
    with (
        pytest.raises(DamagedError, match=r"red\.holder is damaged"),
        journal.alone("rollback", instead_of="promote"),
    ):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("pid", [0, -1])
def test_the_holder_is_one_process(pid: int) -> None:
    """Not tried with a signal: it would reach all processes there are."""
    with pytest.raises(ValidationError):
        TypeAdapter(Holder).validate_python({"pid": pid, "action": "promote"})


def test_a_damaged_record_of_a_gateway_is_named(tmp_path: Path) -> None:
    config = StageConfig(alias="blue", state=tmp_path)
    stage = Stage("blue", tmp_path, config, GatewayConfig(base=tmp_path), Gates())
    for content in ("{", "{}", "[]", '{"pid": "x", "inference": "", "admin": ""}'):
        (tmp_path / "gateway.json").write_text(content)
        with pytest.raises(DamagedError, match=r"gateway\.json is damaged"):
            Hosting(stage).last()


def test_a_rollback_ends_no_process_but_the_one_that_has_the_lock(
    journal: Journal, tmp_path: Path
) -> None:
    other = subprocess.Popen(["sleep", "60"])
    holder = tmp_path / "state/promotions/red.holder"
    holder.parent.mkdir(parents=True)
    holder.write_text(json.dumps({"pid": other.pid, "action": "promote"}))
    here, go_on = os.pipe(), os.pipe()

    def paused(event: str, arguments: tuple[object, ...]) -> None:
        """Stops where a promotion has its lock and is about to say so."""
        if event == "open" and str(arguments[0]).startswith(f"{holder}."):
            os.write(here[1], b"1")
            os.read(go_on[0], 1)

    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.addaudithook(paused)
        with journal.alone("promote"):
            signal.pause()
        os._exit(1)
    os.read(here[0], 1)
    entered = threading.Event()

    def roll_back() -> None:
        entered.set()
        with journal.alone("rollback", instead_of="promote"):
            pass

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(roll_back)
        entered.wait()
        # Long enough for a rollback that would look at the holder of before.
        wait([done], timeout=0.5)
        spared = other.poll() is None
        os.write(go_on[1], b"1")
        if not spared:
            os.kill(child, signal.SIGKILL)
        done.result()
    assert spared
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    other.kill()
    other.wait()
