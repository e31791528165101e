"""The verbs of `manylora registry`, as scripts use them."""

import json

import pytest
from typer.testing import CliRunner

from manylora_cli.registry import app
from manylora_registry import Registry, identify_base


@pytest.fixture
def run(tmp_path):
    """Runs a verb on the registry; its JSON where it was asked for, else its text."""

    def ran(*words, code=0):
        result = CliRunner().invoke(app, [*words, "--registry", str(tmp_path / "registry")])
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if "--json" in words else result.stdout

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
    assert listed["aliases"] == {"production": {"version": 1, "generation": 1}}


def test_piped_tables_have_one_line_an_adapter(run, version):
    header, line = run("list").splitlines()

    assert header.split("\t")[0] == "adapter"
    assert line.split("\t")[:2] == ["spelling", "1"]


def test_a_version_is_withdrawn_and_still_shown(run, version):
    assert run("yank", "spelling@1", "--json")["yanked"]
    assert "(yanked)" in run("show", "spelling@1")


def test_verify_says_what_is_damaged_and_fails(run, version, tmp_path):
    assert run("verify", "--json")["ok"]
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

    result = CliRunner().invoke(app, [*words, "--json"])
    again = CliRunner().invoke(app, words)

    assert result.exit_code == 0, result.output
    assert (json.loads(result.stdout)["ok"], json.loads(result.stdout)["versions"]) == (True, 1)
    assert "1 versions, 3 blobs" in again.stdout
    with Registry.open(tmp_path / "there", create=False) as there:
        assert there.find("spelling@1") == version
