"""The files of a stage, read and found wrong."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from deploy.stages.errors import NoStageError, SettingsError
from deploy.stages.gates import check_files
from deploy.stages.history import records
from deploy.stages.settings import load_stage, stage_names
from manylora_registry import Registry

SHIPPED = Path(__file__).parents[3] / "deploy"
FILES = ("gates.yaml", "gateway.yaml", "stage.yaml", "tenants.yaml")


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MANYLORA_STAGES", str(tmp_path))
    stage = tmp_path / "blue"
    stage.mkdir()
    (stage / "stage.yaml").write_text("alias: blue\nstate: kept\ntoken_file: token\n")
    (stage / "gateway.yaml").write_text(
        "base: ../base\nregistry: /r\nstate: s\nfollow: {aliases: [blue]}\n"
    )
    (stage / "gates.yaml").write_text("suites: [{path: ../suite.yaml}]\nprompts: p.jsonl\n")
    return stage


def test_paths_start_at_the_stage(stages: Path) -> None:
    stage = load_stage("blue")
    assert stage.state == stages / "kept"
    assert stage.gateway.base == stages / "../base"
    assert stage.gateway.registry == Path("/r")
    assert stage.gates.suites[0].path == stages / "../suite.yaml"
    assert stage.gates.prompts == stages / "p.jsonl"
    (stages / "token").write_text("secret\n")
    assert stage.token == "secret"


def test_suites_that_record_one_adapter_have_names_of_their_own(stages: Path) -> None:
    for file, name, adapter in (
        ("one", "Nightly run", "a@2"),
        ("two", "nightly-run", "a"),
        ("other", "Nightly run", "b"),
    ):
        (stages / f"{file}.yaml").write_text(
            f"name: {name}\n"
            f"tasks: [{{name: t, adapter: {adapter}, rows: r.jsonl, scorers: [exact_match]}}]\n"
        )
    (stages / "gates.yaml").write_text("suites: [{path: one.yaml}, {path: other.yaml}]\n")
    check_files(load_stage("blue"))

    for second in ("one", "two"):
        (stages / "gates.yaml").write_text(
            f"suites: [{{path: one.yaml}}, {{path: {second}.yaml}}]\n"
        )
        with pytest.raises(SettingsError, match=r"records a as 'nightly-run', as .*one\.yaml does"):
            check_files(load_stage("blue"))


def test_every_mistake_of_every_file_is_told_at_once(stages: Path) -> None:
    (stages / "stage.yaml").write_text("alias: Blue!\nstat: kept\n")
    (stages / "gateway.yaml").write_text("base: b\nengine: {slots: 0}\n")
    (stages / "gates.yaml").write_text("canary: {steps: [25, 5]}\nsmoke: {errors: 2}\n")
    (stages / "tenants.yaml").write_text("tenants: [{name: x, adapters: []}]\n")
    with pytest.raises(SettingsError) as caught:
        load_stage("blue")
    for said in ("alias", "stat: unknown key", "state: is required", "engine.slots"):
        assert said in str(caught.value)
    for said in ("canary.steps: must rise", "smoke.errors", "neither tokens nor certificates"):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        ("smoke: {errors: 1, answer_p95_s: 5}", "smoke.errors: Input should be less than 1"),
        ("smoke: {errors: 0.9, answer_p95_s: 5}", ""),
        ("canary: {bounds: {different: 0.5}}", "bounds.different is about copies"),
        (
            "canary: {copies: 5, steps: [100], bounds: {different: 0.5}}",
            "steps must begin below 100",
        ),
        (
            "canary: {steps: [100], bounds: {tokens_ratio: 2}}",
            "bounds.tokens_ratio sets the version",
        ),
        ("canary: {steps: [100], bounds: {first_token_ratio: 2}}", "bounds.first_token_ratio sets"),
        ("canary: {steps: [100], bounds: {first_token_p95_s: 2}}", ""),
    ],
)
def test_a_bound_that_nothing_would_be_held_to_is_refused(
    stages: Path, gates: str, said: str
) -> None:
    (stages / "gates.yaml").write_text(f"{gates}\n")
    if not said:
        load_stage("blue")
        return
    with pytest.raises(SettingsError, match=said):
        load_stage("blue")


def test_files_that_contradict_each_other_are_refused(stages: Path) -> None:
    (stages / "gateway.yaml").write_text("base: b\n")
    with pytest.raises(SettingsError, match=r"follow\.aliases lacks 'blue'.*state is required"):
        load_stage("blue")


def test_an_unknown_stage_says_which_there_are(stages: Path) -> None:
    with pytest.raises(NoStageError, match=r"no stage 'green' .*\(there: blue\)"):
        load_stage("green")


def test_the_shipped_stages_are_sound_and_of_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANYLORA_STAGES", raising=False)
    assert {"local", "staging", "production"} <= {*stage_names()}
    ports: set[str] = set()
    for name in ("local", "staging", "production"):
        stage = load_stage(name)
        assert stage.alias == name
        assert {file.name for file in (SHIPPED / name).glob("*.yaml")} == {*FILES}
        listen = stage.gateway.listen
        ports |= {listen.inference, listen.admin, str(listen.http)}
        for suite in stage.gates.suites:
            assert suite.path.is_file()
    assert len(ports) == 9, "two stages run on one machine"
    registries = {load_stage(name).gateway.registry for name in ("local", "staging", "production")}
    assert len({path.resolve() for path in registries if path is not None}) == 1


@pytest.mark.parametrize(
    "script", ["up", "down", "status", "candidate", "promote", "rollback", "approve", "history"]
)
def test_each_script_answers_help_without_a_python_of_its_own(script: str) -> None:
    done = subprocess.run([SHIPPED / script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Usage: deploy/{script}" in done.stdout
    lost = subprocess.run(
        [SHIPPED / script, "--help"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ, MANYLORA_PYTHON="/nowhere/python"),
    )
    assert (lost.returncode, lost.stdout) == (1, "")
    assert lost.stderr.startswith(f"{script}: there is no /nowhere/python")


def test_a_gateway_elsewhere_that_is_not_reached_is_not_said_to_serve(stages: Path) -> None:
    (stages / "stage.yaml").write_text(
        "alias: blue\nstate: kept\nconnect: {inference: 'localhost:1', admin: 'localhost:1'}\n"
    )
    done = subprocess.run(
        [SHIPPED / "status", "blue"], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("blue: not reached at localhost:1, not healthy: ")
    assert "/r is not a registry" in done.stdout
    assert "no manylora server answers at localhost:1" in done.stdout


def test_history_is_in_the_order_it_happened_in_whatever_the_clock_said(
    stages: Path, tmp_path: Path
) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        for action in ("first", "second", "third"):
            registry.record_deployment("blue", action, "done")
    with contextlib.closing(sqlite3.connect(tmp_path / "registry/registry.sqlite")) as database:
        # An hour back, as after a clock was set right.
        database.execute("UPDATE deployments SET at = at - 3600000000 WHERE action = 'third'")
        database.commit()
    gateway = stages / "gateway.yaml"
    gateway.write_text(gateway.read_text().replace("/r", str(tmp_path / "registry")))

    assert [record.action for record, _ in records(None, None, 2)] == ["second", "third"]


def test_a_status_tells_what_it_can_of_each_stage(stages: Path, tmp_path: Path) -> None:
    """Here neither the registry nor the certificates to call the gateway with are there."""
    (stages / "stage.yaml").write_text(
        "alias: blue\nstate: kept\nconnect: {inference: 'localhost:1', admin: 'localhost:1'}\n"
    )
    shutil.copytree(stages, tmp_path / "green")
    done = subprocess.run(
        [SHIPPED / "status"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ, MANYLORA_TLS_CA=str(tmp_path / "gone.pem")),
    )
    assert done.returncode == 0, done.stderr
    for name in ("blue", "green"):
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"{name}: "))
        assert line.startswith(f"{name}: not reached at localhost:1, not healthy: ")
        assert "gone.pem cannot be read: No such file or directory" in line


def test_a_state_that_cannot_be_a_directory_is_one_line(stages: Path) -> None:
    (stages / "stage.yaml").write_text("alias: blue\nstate: gates.yaml\n")
    done = subprocess.run(
        [SHIPPED / "up", "blue"], capture_output=True, text=True, check=False, env=os.environ
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == f"up: {stages}/gates.yaml: File exists"
    assert "Traceback" not in done.stderr
