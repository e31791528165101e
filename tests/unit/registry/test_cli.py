"""The verbs of `manylora registry`, as scripts use them."""

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from manylora_cli.registry import app
from manylora_registry import Registry, identify_base
from manylora_registry.errors import AliasProtectedError, QueryError

# Wide, so that no message is folded in its middle, wherever the length of a path puts that.
RUNNER = CliRunner(env={"COLUMNS": "1000"})


@pytest.fixture
def run(tmp_path):
    """Runs a verb on the registry; its JSON where it was asked for, else its text."""

    def ran(*words, code=0, fails=False, lines=False):
        result = RUNNER.invoke(app, [*words, "--registry", str(tmp_path / "registry")])
        if fails:
            return result.exception
        assert result.exit_code == code, result.output
        if lines:
            return result.stdout.splitlines()
        return json.loads(result.stdout) if "--json" in words else result.output

    return ran


@pytest.fixture
def version(registry, base, make_adapter):
    return registry.publish("spelling", make_adapter(), base=base, metrics={"loss": 0.5})


def test_aliases_are_moved_and_shown(run, version):
    move = run("alias", "spelling", "production", "1", "--expect", "0", "--why", "go", "--json")

    assert (move["generation"], move["version"], move["why"]) == (1, 1, "go")
    assert run("history", "spelling", "--json") == [move]
    shown = run("show", "spelling", "--json")
    assert (shown["digest"], shown["aliases"]) == (version.digest, ["production"])
    assert shown["metrics"] == {"loss": 0.5}
    (listed,) = run("list", "--json")
    assert listed["aliases"] == {"production": {"version": 1, "generation": 1, "protected": False}}


def test_piped_tables_have_one_line_an_adapter(run, version):
    header, line = run("list").splitlines()

    assert header.split("\t")[0] == "adapter"
    assert line.split("\t")[:2] == ["spelling", "1"]


def test_a_version_is_withdrawn_and_still_shown(run, version):
    assert run("yank", "spelling@1", "--json")["yanked"]
    assert "(yanked)" in run("show", "spelling@1")


def test_verify_says_what_is_damaged_and_fails(run, version, tmp_path):
    assert run("verify", "--json")["ok"]
    assert run("verify").count("\n") == 1, "no bar is shown in a pipe"
    for blob in (tmp_path / "registry" / "blobs").rglob(version.digest[7:]):
        blob.unlink()

    report = run("verify", "--json", code=1)

    assert not report["ok"]
    assert report["problems"][0]["path"] == "spelling@1"
    assert "damaged: spelling@1" in run("verify", code=1)


@pytest.mark.parametrize("form", ["peft", "hf", "oci", "tar"])
def test_a_version_goes_out_and_comes_in_again(
    run, registry, make_adapter, base_directory, tmp_path, form
):
    identity = identify_base(base_directory)
    adapter = make_adapter(config={"base_model_name_or_path": "tiny"})
    version = registry.publish("spelling", adapter, base=identity)
    out = tmp_path / "out"

    run("export", "spelling@1", str(out), "--format", form)
    added = run("import", str(out), "--name", "other", "--base", str(base_directory), "--json")

    assert (added["name"], added["number"], added["digest"]) == ("other", 1, version.digest)


def test_a_form_that_is_none_is_wrong_usage(run, version, tmp_path):
    run("export", "spelling@1", str(tmp_path / "out"), "--format", "zip", code=2)

    assert not (tmp_path / "out").exists()


def test_a_diff_says_what_moved(run, registry, base, version, make_adapter):
    registry.publish("spelling", make_adapter(1), base=base, metrics={"loss": 0.25})

    found = run("diff", "spelling@1", "spelling@2", "--json")
    lines = run("diff", "spelling@1", "spelling@2").splitlines()

    assert found["metrics"] == {"loss": {"before": 0.5, "after": 0.25}}
    assert [module["module"] for module in found["modules"]] == [
        "model.layers.0.q_proj",
        "model.layers.0.up_proj",
    ]
    assert lines[0] == "metric loss: 0.5 -> 0.25"
    assert lines[1].startswith("2 of 2 modules differ; all weights together moved by")
    assert lines[2].split("\t") == ["module", "before", "after", "change", "relative"]
    assert len(lines) == 5
    assert run("diff", "spelling@1", "spelling@1").splitlines() == [
        "0 of 2 modules differ; all weights together moved by 0.0% of their norm"
    ]


def test_a_registry_is_copied_and_verified(version, tmp_path):
    words = ["copy", str(tmp_path / "registry"), str(tmp_path / "there")]

    result = RUNNER.invoke(app, [*words, "--json"])
    again = RUNNER.invoke(app, words)

    assert result.exit_code == 0, result.output
    assert (json.loads(result.stdout)["ok"], json.loads(result.stdout)["versions"]) == (True, 1)
    assert "1 versions, 3 blobs" in again.stdout
    with Registry.open(tmp_path / "there", create=False) as there:
        assert there.find("spelling@1") == version


def test_versions_are_listed_by_filter_and_order(run, registry, base, make_adapter):
    for seed in (1, 2, 3):
        registry.publish("spelling", make_adapter(seed), base=base)
        run("tag", f"spelling@{seed}", "lang=en", f"seed={seed}", "--json")
        run("metric", f"spelling@{seed}", f"f1={seed / 10}")

    found = run(
        "list", "--where", "tag.lang=en and metric.f1>0.1", "--sort", "-metric.f1", "--json"
    )
    assert [version["number"] for version in found] == [3, 2]
    assert found[0]["tags"] == {"lang": "en", "seed": "3"}
    assert "spelling@3\tlang=en seed=3\tf1=0.3" in run("list", "--versions")
    assert run("tag", "spelling@3", "--remove", "seed").strip() == "spelling@3: lang=en"
    page = run("list", "--versions", "--limit", "2")
    (key,) = re.findall(r"more: --after (\S+)", page)
    assert "spelling@3" in run("list", "--versions", "--limit", "2", "--after", key)
    assert isinstance(run("list", "--where", "colour=red", fails=True), QueryError)
    run("tag", "spelling@1", "nothing", code=2)
    run("metric", "spelling@1", "f1=high", code=2)


def test_a_protected_alias_needs_a_gate_or_a_reason(run, version, registry, tmp_path):
    run("protect", "spelling", "production", "--suite", "nightly")
    assert isinstance(run("alias", "spelling", "production", "1", fails=True), AliasProtectedError)
    report = tmp_path / "report.json"
    report.write_text('{"f1": 0.9}')
    run("gate", "spelling@1", "nightly", "--failed")
    run("gate", "spelling@1", "nightly", "--passed", "--result", str(report))
    assert run("alias", "spelling", "production", "1", "--json")["override"] is False
    shown = run("show", "spelling", "--json")
    assert [(each["passed"], each["result"]) for each in shown["evaluations"]] == [
        (False, {}),
        (True, {"f1": 0.9}),
    ]
    assert shown["protections"][0]["suite"] == "nightly"
    assert "evaluation nightly  passed" in run("show", "spelling")
    run("protect", "spelling", "production", "--off", "--why", "retired")


def test_an_alias_is_rolled_back(run, version, registry, base, make_adapter):
    registry.publish("spelling", make_adapter(2), base=base)
    for number in ("1", "2"):
        run("alias", "spelling", "production", number)

    move = run("rollback", "spelling", "production", "--why", "worse", "--json")

    assert (move["version"], move["previous"], move["why"]) == (1, 2, "worse")


def test_a_deleted_version_is_collected(run, version):
    assert run("delete", "spelling@1", "--json")["deleted"]
    assert "(deleted)" in run("show", "spelling@1")
    assert run("gc", "--json")["collected"] == []
    dry = run("gc", "--grace", "0", "--dry-run", "--json")
    assert dry["collected"] == ["spelling@1"]
    assert run("gc", "--grace", "0s", "--json") == {**dry, "dry_run": False}
    run("gc", "--grace", "soon", code=2)
    kinds = [json.loads(line)["kind"] for line in run("events", "--json", lines=True)]
    assert kinds == ["published", "deleted", "collected"]
    assert "collected\tspelling@1" in run("events", "--since", "2")


def test_verify_repairs_and_says_what_is_affected(run, version, tmp_path):
    for blob in (tmp_path / "registry" / "blobs").rglob(version.digest[7:]):
        blob.chmod(0o644)
        blob.write_bytes(b"{}")

    report = run("verify", "--repair", "--json", code=1)

    assert (report["affected"], report["set_aside"]) == (["spelling@1"], [version.digest])
    assert "affected: spelling@1" in run("verify", code=1)


def test_a_gate_without_a_verdict_says_how_to_give_one(run, version):
    assert "--passed or --failed" in run("gate", "spelling@1", "nightly", code=2)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": "\\ud800"}'])
def test_figures_that_are_no_json_are_wrong_usage_and_not_kept(run, version, tmp_path, text):
    (tmp_path / "figures.json").write_text(text)

    said = run(
        "gate",
        "spelling@1",
        "nightly",
        "--passed",
        "--result",
        str(tmp_path / "figures.json"),
        code=2,
    )
    assert "is no JSON" in said
    assert run("show", "spelling@1", "--json")["evaluations"] == []


def test_files_of_others_among_the_blobs_are_left_alone(run, version, tmp_path):
    directory = tmp_path / "registry" / "blobs" / "sha256" / "zz"
    directory.mkdir()
    foreign = directory / os.fsdecode(b"n\xffotes")
    foreign.write_text("mine")

    for _ in range(2):
        assert run("gc", "--grace", "0", "--json")["deleted"] == []
    assert foreign.read_text() == "mine"
    assert run("verify", "--json")["unreferenced"] == []


@pytest.mark.parametrize(
    "change", [f"digest = 'sha256:{'0' * 64}'", "rank = 4", "size = 1", "base_fingerprint = 'x'"]
)
def test_verify_notices_a_version_that_was_changed_in_the_database(run, version, tmp_path, change):
    with contextlib.closing(sqlite3.connect(tmp_path / "registry" / "registry.sqlite")) as database:
        database.execute(f"UPDATE versions SET {change}")
        database.commit()

    (problem,) = run("verify", "--json", code=1)["problems"]
    assert problem["path"] == "spelling@1"


def test_a_registry_is_not_copied_to_itself(version, tmp_path):
    registry = tmp_path / "registry"
    (tmp_path / "link").symlink_to(registry)
    urls = f"sqlite:///{registry}/registry.sqlite,{registry.as_uri()}"

    for target in (registry, tmp_path / "link", urls):
        copied = RUNNER.invoke(app, ["copy", str(registry), str(target)])
        assert copied.exit_code == 2
        assert "the same registry" in copied.output


def test_a_destination_that_is_no_text_is_told_all_the_same(version, tmp_path):
    destination = tmp_path / os.fsdecode(b"n\xff")

    words = ("export", "spelling@1", str(destination), "--json")
    done = subprocess.run(
        [sys.executable, "-m", "manylora_cli", "registry", *words],
        capture_output=True,
        env={**os.environ, "PYTHONUTF8": "1", "MANYLORA_REGISTRY": str(tmp_path / "registry")},
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["destination"] == str(destination)


def test_an_error_names_a_path_with_all_its_spaces(tmp_path):
    path = tmp_path / "two  spaces"
    done = subprocess.run(
        [sys.executable, "-m", "manylora_cli", "registry", "list", "--registry", path],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert str(path) in done.stderr


def test_a_closed_stdout_is_no_failure(version, tmp_path):
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m manylora_cli registry list >&-', sys.executable],
        capture_output=True,
        env={**os.environ, "MANYLORA_REGISTRY": str(tmp_path / "registry")},
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, b"")
