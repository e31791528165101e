"""Runs in MLflow and trackio: what was recorded is what the tracker holds, however often."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

import manylora_trainer
from manylora_cli.runs import app
from manylora_trainer.errors import ExportError
from manylora_trainer.exporters import export_run
from manylora_trainer.saved_runs import read_run


@pytest.fixture
def run(make_task, write_recipe, tmp_path):
    recipe = write_recipe(make_task("first", steps=4), make_task("second", steps=2))
    manylora_trainer.train(recipe, tmp_path / "run")
    return read_run(tmp_path / "run")


def test_mlflow_holds_each_adapter_once(run, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    # Beside a database, MLflow keeps files where it is called from.
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    verb = ["export", str(run.path), "--to", "mlflow", "--uri", store, "--json"]
    _, again = (CliRunner().invoke(app, verb) for _ in range(2))
    assert [entry["task"] for entry in json.loads(again.stdout)] == ["first", "second"]
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("manylora")
    assert experiment is not None
    found = {r.data.params["task.name"]: r for r in client.search_runs([experiment.experiment_id])}
    assert sorted(found) == ["first", "second"]
    first = found["first"]
    history = client.get_metric_history(first.info.run_id, "loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == run.curve(
        "first", "loss"
    )
    assert first.data.params["task.lora.rank"] == "4"
    assert first.data.tags["manylora.base"] == run.record["base"]["fingerprint"]
    assert first.info.status == "FINISHED"
    began, ended = (int(1000 * run.entries[at]["time"]) for at in (0, -1))
    times = [began, first.info.start_time, first.info.end_time or 0, ended]
    assert times == sorted(times)
    assert first.info.start_time != first.info.end_time
    artifacts = {entry.path for entry in client.list_artifacts(first.info.run_id)}
    assert artifacts == {"README.md", "recipe.yaml"}


def test_a_run_whose_adapter_ended_early_is_exported(
    make_task, write_recipe, tmp_path, monkeypatch
):
    from mlflow import MlflowClient

    stopping = {"patience": 1, "min_delta": 100.0}
    recipe = write_recipe(make_task("first", early_stopping=stopping))
    manylora_trainer.train(recipe, tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.tasks["first"].ended_early
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    (exported,) = export_run(run, "mlflow", store)
    assert exported.metrics > 0
    (found,) = MlflowClient(store).search_runs(["1"])
    assert "ended" not in found.data.metrics


def test_an_adapter_that_stopped_has_failed_whatever_became_of_the_others(
    make_task, write_recipe, tmp_path, monkeypatch
):
    from mlflow import MlflowClient

    breaking = {"learning_rate": 1e30, "clip_norm": None}
    recipe = write_recipe(make_task("first", optimizer=breaking), make_task("second"))
    manylora_trainer.train(recipe, tmp_path / "run")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    export_run(read_run(tmp_path / "run"), "mlflow", store)
    found = MlflowClient(store).search_runs(["1"])
    states = {run.data.params["task.name"]: run.info.status for run in found}
    assert states == {"first": "FAILED", "second": "FINISHED"}


def test_a_run_under_way_has_no_end(run, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    export_run(replace(run, state="running"), "mlflow", store)
    found = MlflowClient(store).search_runs(["1"])
    assert {(there.info.status, there.info.end_time) for there in found} == {("RUNNING", None)}


# In a process of its own: trackio reads where it writes when it is imported.
READ_TRACKIO = """
import json, sys
import trackio
from trackio.sqlite_storage import SQLiteStorage
runs = trackio.Api().runs("mine")
print(json.dumps({run.name: SQLiteStorage.get_logs("mine", run.name) for run in runs}))
"""


def read_trackio(directory):
    answer = subprocess.run(
        [sys.executable, "-c", READ_TRACKIO],
        env={"TRACKIO_DIR": str(directory), "PATH": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout.splitlines()[-1])


def test_trackio_holds_each_adapter_once(run, tmp_path):
    directory = tmp_path / "trackio"
    verb = [sys.executable, "-m", "manylora_cli", "runs", "export", str(run.path), "--json"]
    verb += ["--to", "trackio", "--uri", str(directory), "--project", "mine"]
    _, again = (
        subprocess.run(verb, stdout=subprocess.PIPE, text=True, check=True) for _ in range(2)
    )
    names = {entry["task"]: entry["name"] for entry in json.loads(again.stdout)}
    held = read_trackio(directory)
    assert sorted(held) == sorted(names.values())
    logged = held[names["first"]]
    assert [(entry["step"], entry["loss"]) for entry in logged] == run.curve("first", "loss")
    assert [e["step"] for e in logged if "validation_loss" in e] == [2, 4]


def test_an_export_that_trackio_refuses_leaves_the_earlier_one(run, tmp_path):
    directory, recipe = tmp_path / "trackio", run.path / "recipe.yaml"
    verb = [sys.executable, "-m", "manylora_cli", "runs", "export", str(run.path)]
    verb += ["--to", "trackio", "--uri", str(directory), "--project", "mine"]
    subprocess.run(verb, check=True)
    held = read_trackio(directory)
    # A name that trackio keeps for itself.
    recipe.write_text(f"_reserved: 1\n{recipe.read_text()}")
    again = subprocess.run(verb, stderr=subprocess.PIPE, text=True)
    assert again.returncode == 1
    assert "_reserved" in again.stderr
    assert read_trackio(directory) == held


def test_trackio_gets_no_row_for_a_step_without_numbers(make_task, write_recipe, tmp_path):
    broken = {"learning_rate": 1e30, "clip_norm": None, "schedule": "constant"}
    split = {"validation": 0, "held_out": 0}
    recipe = write_recipe(make_task("first", steps=4, optimizer=broken, split=split))
    manylora_trainer.train(recipe, tmp_path / "run")
    directory = tmp_path / "trackio"
    verb = [sys.executable, "-m", "manylora_cli", "runs", "export", str(tmp_path / "run")]
    verb += ["--to", "trackio", "--uri", str(directory), "--project", "mine"]
    subprocess.run(verb, check=True)
    (logged,) = read_trackio(directory).values()
    assert [entry["step"] for entry in logged] == [1]


def test_a_tracker_that_refuses_or_is_not_installed_is_said_in_one_line(run):
    with pytest.raises(ExportError, match="MLflow at nowhere:"):
        export_run(run, "mlflow", "nowhere://at-all")
    without = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.modules['mlflow'] = None\n"
            "from manylora_cli.main import main\n"
            f"sys.argv = ['manylora', 'runs', 'export', {str(run.path)!r}, '--to', 'mlflow']\n"
            "main()",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert without.returncode == 1
    assert without.stderr.startswith("manylora: mlflow is not installed; install it with")


def test_a_place_for_files_that_takes_none_is_told(run, tmp_path):
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (tmp_path / "plain").write_bytes(b"")
    client = MlflowClient(tracking_uri=store)
    client.create_experiment("manylora", artifact_location=f"file://{tmp_path}/plain/artifacts")
    with pytest.raises(ExportError, match=r"MLflow at sqlite:.*plain"):
        export_run(run, "mlflow", store)


def test_an_export_that_fails_leaves_the_earlier_one(run, tmp_path):
    from mlflow import MlflowClient

    store, files = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "files"
    client = MlflowClient(tracking_uri=store)
    experiment = client.create_experiment("manylora", artifact_location=f"file://{files}")

    def held():
        found = client.search_runs([experiment])
        return {entry.info.run_id for entry in found if entry.info.status == "FINISHED"}

    export_run(run, "mlflow", store)
    first = held()
    files.rename(tmp_path / "away")
    files.write_bytes(b"")

    with pytest.raises(ExportError):
        export_run(run, "mlflow", store)

    assert held() == first
    assert len(client.search_runs([experiment])) == 2, "a part of a run is left"
    files.unlink()
    export_run(run, "mlflow", store)
    assert len(client.search_runs([experiment])) == 2
    assert not held() & first


def test_a_server_that_fails_is_told_after_few_attempts(run, monkeypatch):
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    asked: list[str] = []

    class Failing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ExportError, match=f"MLflow at {uri}: .*503"):
            export_run(run, "mlflow", uri)
        server.shutdown()
    assert len(asked) == 3
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() * len(asked) < 120, "one that hangs, in seconds"
