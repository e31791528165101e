"""Every form a version leaves in comes back as the same version."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manylora_registry import BaseModelIdentity, Registry
from manylora_registry.errors import (
    CorruptBlobError,
    DestinationError,
    RegistryError,
    SourceError,
    WrongBaseError,
)
from manylora_registry.manifest import load_manifest
from manylora_registry.transfer import export_version, import_version
from tests.unit.registry.test_faults import no_file_longer_than

FORMATS = ["peft", "hf", "oci", "tar"]
CARD = "---\nlicense: mit\n---\n# Spelling\n\nCorrects it. \u00e9\r\n"
DESCRIBED = {
    "metrics": {"f1": 0.75, "loss": 1e-9},
    "tags": {"lang": "en"},
    "lineage": {"run": "first", "recipe": "sha256:" + "1" * 64},
}


@pytest.fixture
def version(registry, base, make_adapter):
    adapter = make_adapter(card=CARD, config={"base_model_name_or_path": "org/base-1b"})
    return registry.publish("spelling", adapter, base=base, **DESCRIBED)


@pytest.fixture
def other(tmp_path):
    """A registry elsewhere."""
    with Registry.open(tmp_path / "other") as opened:
        yield opened


def digest_of(content):
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def tree(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("card", [CARD, None, "---\nno end"])
def test_it_comes_back_with_its_digest(
    registry, base, make_adapter, other, tmp_path, format_, card
):
    version = registry.publish("words", make_adapter(7, card=card), base=base, **DESCRIBED)

    export_version(registry, version, tmp_path / "out", format_)
    back = import_version(other, "again", tmp_path / "out", base=base)

    assert (back.digest, back.size, back.rank) == (version.digest, version.size, version.rank)
    if format_ != "peft":  # Which has no place for it.
        assert (back.metrics, back.tags, back.lineage) == tuple(DESCRIBED.values())
    assert other.verify().ok
    first = tree(registry.materialize(version, tmp_path / "cache-1"))
    assert first == tree(other.materialize(back, tmp_path / "cache-2"))


@pytest.mark.parametrize("format_", FORMATS)
def test_the_same_version_is_the_same_bytes(registry, version, tmp_path, format_):
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        export_version(registry, version, out, format_)

    one, two = ((out.read_bytes() if out.is_file() else tree(out)) for out in outs)
    assert one == two
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".partial"]


HELD = """
import runpy, sys

def hold(event, arguments):
    if event == "open" and str(arguments[0]).endswith(digest):
        print("held", flush=True)
        sys.stdin.readline()

digest = sys.argv.pop(1)
sys.addaudithook(hold)
runpy.run_module("manylora_cli", run_name="__main__")
"""
"""The command that follows, held up when it opens the blob of that digest."""


@pytest.fixture
def waiting_export(registry, version, tmp_path):
    """An export to `out` in another process, which waits for a line before its first blob."""
    digest = load_manifest(registry.blobs, version.digest).config.digest
    words = ("registry", "export", "spelling@1", "out", "--registry", "registry")
    with subprocess.Popen(
        [sys.executable, "-c", HELD, digest[7:], *words],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_what_a_killed_export_left_goes_with_the_next_one(
    registry, version, tmp_path, waiting_export
):
    waiting_export.kill()
    waiting_export.wait()
    assert [*tmp_path.glob(".*.partial")]

    export_version(registry, version, tmp_path / "out")

    assert not [*tmp_path.glob(".*.partial")]


def test_an_export_leaves_alone_what_another_is_writing(
    registry, version, tmp_path, waiting_export
):
    export_version(registry, version, tmp_path / "out")
    _, said = waiting_export.communicate(b"\n")

    assert b"Directory not empty" in said
    assert not [*tmp_path.glob(".*.partial")]


def test_of_exports_that_begin_together_one_is_there_and_the_others_say_so(
    registry, version, tmp_path
):
    together = threading.Barrier(4)

    def export(out):
        together.wait()
        try:
            export_version(registry, version, out)
        except DestinationError as error:
            return str(error.__cause__)
        return ""

    with ThreadPoolExecutor(4) as threads:
        for number in range(25):
            said = sorted(threads.map(export, [tmp_path / f"out{number}"] * 4))
            assert said[0] == ""
            assert all("Directory not empty" in each for each in said[1:]), said


def test_the_hub_understands_the_card(registry, version, tmp_path):
    export_version(registry, version, tmp_path / "out", "hf")

    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["base_model"]) == ("peft", "org/base-1b")
    eval_results = getattr(card.data, "eval_results")  # noqa: B009 (its type does not tell)
    assert {(result.metric_type, result.metric_value) for result in eval_results} == {
        ("f1", 0.75),
        ("loss", 1e-9),
    }
    assert data["manylora"]["digest"] == version.digest
    assert data["manylora"]["lineage"] == DESCRIBED["lineage"]
    assert "Corrects it. \u00e9" in card.text
    assert {*tree(tmp_path / "out")} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manylora/README.md",
        "manylora/description.json",
        "manylora/manifest.json",
    }


def test_a_base_that_is_known_by_fingerprint_alone_is_not_named_to_the_hub(
    registry, base, make_adapter, tmp_path
):
    version = registry.publish("words", make_adapter(), base=base)
    export_version(registry, version, tmp_path / "out", "hf")

    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert "base_model" not in front
    assert front["manylora"]["base_fingerprint"] == base.fingerprint


def test_the_layout_is_as_the_image_spec_says(registry, version, tmp_path):
    export_version(registry, version, tmp_path / "out", "oci")

    files = tree(tmp_path / "out")
    assert json.loads(files.pop("oci-layout")) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads(files.pop("index.json"))
    assert (index["schemaVersion"], len(index["manifests"])) == (2, 1)
    for path, content in files.items():
        assert path == f"blobs/sha256/{digest_of(content)[7:]}"
    (descriptor,) = index["manifests"]
    content = files[f"blobs/sha256/{descriptor['digest'][7:]}"]
    manifest = json.loads(content)
    assert (descriptor["digest"], descriptor["size"]) == (version.digest, len(content))
    assert descriptor["mediaType"] == manifest["mediaType"]
    listed = [manifest["config"], *manifest["layers"]]
    for entry in listed:
        assert len(files[f"blobs/sha256/{entry['digest'][7:]}"]) == entry["size"]
    assert {entry["digest"] for entry in listed} | {version.digest} == {
        digest_of(content) for content in files.values()
    }


@pytest.mark.parametrize("format_", FORMATS)
def test_nothing_is_written_over(registry, version, tmp_path, format_):
    out = tmp_path / "out"
    if format_ == "tar":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "novel.txt").write_text("mine")

    with pytest.raises(DestinationError, match="give a new path"):
        export_version(registry, version, out, format_)

    assert (out.read_text() if out.is_file() else tree(out)) in ("mine", {"novel.txt": b"mine"})


@pytest.mark.parametrize("format_", FORMATS)
def test_a_damaged_blob_leaves_nothing(registry, version, tmp_path, format_):
    before = {*tmp_path.iterdir()}
    weights = max(
        (tmp_path / "registry" / "blobs").rglob("?" * 64), key=lambda path: path.stat().st_size
    )
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")

    with pytest.raises(CorruptBlobError):
        export_version(registry, version, tmp_path / "out", format_)

    assert {*tmp_path.iterdir()} == before


@pytest.mark.parametrize("format_", ["hf", "oci", "tar"])
def test_a_version_of_another_base_is_refused(registry, base, version, other, tmp_path, format_):
    export_version(registry, version, tmp_path / "out", format_)
    wrong = BaseModelIdentity("sha256:" + "c" * 64, base.tensors)

    with pytest.raises(WrongBaseError):
        import_version(other, "again", tmp_path / "out", base=wrong)

    assert other.adapters() == []


class TestHostileSources:
    @pytest.fixture
    def layout(self, registry, version, tmp_path):
        export_version(registry, version, tmp_path / "layout", "oci")
        return tmp_path / "layout"

    @pytest.fixture
    def refused(self, other, base):
        def refuse(source, says=None):
            with pytest.raises(SourceError, match=says) as failed:
                import_version(other, "again", source, base=base)
            assert "\n" not in str(failed.value)
            assert other.adapters() == []
            assert other.verify().unreferenced == ()

        return refuse

    @pytest.fixture(params=[b"lora_A", b'"layers"'], ids=["weights", "manifest"])
    def blob(self, request, layout):
        blobs = (layout / "blobs/sha256").iterdir()
        (found,) = (path for path in blobs if request.param in path.read_bytes())
        return found

    @pytest.mark.parametrize("damage", ["flip", "cut", "long", "gone", "link", "pipe", "directory"])
    def test_a_damaged_blob_is_refused(self, layout, refused, blob, tmp_path, damage):
        content = blob.read_bytes()
        blob.unlink()
        match damage:
            case "flip":
                blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            case "cut":
                blob.write_bytes(content[:-1])
            case "long":
                blob.write_bytes(content + b"x")
            case "link":
                (tmp_path / "outside").write_bytes(content)
                blob.symlink_to(tmp_path / "outside")
            case "pipe":
                os.mkfifo(blob)
            case "directory":
                blob.mkdir()
            case _:
                pass

        refused(layout, "is damaged")

    def test_no_more_is_written_than_the_manifest_says(self, layout, refused, blob):
        os.truncate(blob, 1 << 30)

        with no_file_longer_than(1 << 20):
            refused(layout, "is damaged")

    @pytest.mark.parametrize(
        "digest", ["sha256:../../../secret", "../x", "sha256:" + "A" * 64, "md5:0", 3, None]
    )
    def test_a_digest_that_leads_elsewhere_is_refused(self, layout, refused, digest):
        index = json.loads((layout / "index.json").read_text())
        index["manifests"][0]["digest"] = digest
        (layout / "index.json").write_text(json.dumps(index))

        refused(layout)

    @pytest.mark.parametrize(
        "index",
        ["", "[]", "{}", '{"manifests": []}', '{"manifests": [3]}', "[" * 100_000,
         '{"manifests": [{"digest": "x"}, {"digest": "y"}]}', '{"manifests": {"a": 1}}'],
    )  # fmt: skip
    def test_an_index_of_another_shape_is_refused(self, layout, refused, index):
        (layout / "index.json").write_text(index)

        refused(layout)

    @pytest.mark.parametrize(
        ("sizes", "says"),
        [
            # A negative size would hide a huge one in their sum.
            ((1 << 60, -(1 << 60)), "is not the manifest of an adapter"),
            ((1 << 60, 1), "says it holds"),
        ],
    )
    def test_a_manifest_of_impossible_sizes_is_refused(self, layout, refused, sizes, says):
        index = json.loads((layout / "index.json").read_text())
        name = index["manifests"][0]["digest"][7:]
        manifest = json.loads((layout / "blobs/sha256" / name).read_text())
        for layer, size in zip(manifest["layers"], sizes, strict=True):
            layer["size"] = size
        content = json.dumps(manifest).encode()
        index["manifests"][0]["digest"] = digest_of(content)
        (layout / "blobs/sha256" / digest_of(content)[7:]).write_bytes(content)
        (layout / "index.json").write_text(json.dumps(index))

        refused(layout, says)

    @pytest.mark.parametrize("kind", ["link", "hard link", "device", "twice", "sparse", "climbing"])
    def test_a_tar_of_anything_but_plain_files_is_refused(
        self, layout, refused, tmp_path, kind, other, base
    ):
        archive = tmp_path / "it.tar"
        with tarfile.open(archive, "w") as tar:
            for path in ("oci-layout", "index.json"):
                tar.add(layout / path, path)
            for path in (layout / "blobs/sha256").iterdir():
                tar.add(path, f"blobs/sha256/{path.name}")
            entry = tarfile.TarInfo("../../../../evil" if kind == "climbing" else "more")
            match kind:
                case "link":
                    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
                case "hard link":
                    entry.type, entry.linkname = tarfile.LNKTYPE, "index.json"
                case "device":
                    entry.type = tarfile.CHRTYPE
                case "twice":
                    entry = tarfile.TarInfo("index.json")
                case "sparse":
                    entry.type = tarfile.GNUTYPE_SPARSE
                case _:
                    pass
            tar.addfile(entry, io.BytesIO())
        if kind == "climbing":
            import_version(other, "again", archive, base=base)  # It is never looked at.
            assert not [*tmp_path.rglob("evil")]
        else:
            refused(archive, "is no plain file, or there twice")

    def test_a_tar_of_too_many_entries_is_refused(self, refused, tmp_path):
        archive = tmp_path / "it.tar"
        with tarfile.open(archive, "w") as tar:
            for number in range(1001):
                tar.addfile(tarfile.TarInfo(str(number)))

        refused(archive, "more than 1000 entries")

    def test_a_tar_packed_by_another_tool_is_read(self, layout, other, base, version, tmp_path):
        archive = tmp_path / "it.tar"
        with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
            tar.add(layout, ".")

        assert import_version(other, "again", archive, base=base).digest == version.digest

    def test_a_tar_with_an_endless_header_is_refused(self, refused, tmp_path):
        entry = tarfile.TarInfo("x")
        entry.type, entry.size = tarfile.XHDTYPE, 1 << 30
        archive = tmp_path / "it.tar"
        with archive.open("wb") as file:
            file.write(entry.tobuf(tarfile.USTAR_FORMAT))
            file.truncate(1 << 31)

        refused(archive, "header in it is too long")

    @pytest.mark.parametrize("content", [b"", b"x", b"\x1f\x8b\x08", b"PK\x03\x04", bytes(10_240)])
    def test_a_file_that_is_no_tar_is_refused(self, refused, tmp_path, content):
        (tmp_path / "it.tar").write_bytes(content)

        refused(tmp_path / "it.tar")

    def test_nothing_there_is_refused(self, refused, tmp_path):
        refused(tmp_path / "nothing", "is not there")

    def test_a_byte_changed_anywhere_is_refused_or_is_not_of_the_adapter(
        self, registry, version, base, other, tmp_path
    ):
        export_version(registry, version, tmp_path / "good.tar", "tar")
        good = (tmp_path / "good.tar").read_bytes()

        @settings(
            max_examples=80,
            deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture],
        )
        @given(st.integers(0, len(good) - 1), st.integers(1, 255))
        def try_one(at, change):
            content = bytearray(good)
            content[at] ^= change
            (tmp_path / "it.tar").write_bytes(content)
            try:
                found = import_version(other, "again", tmp_path / "it.tar", base=base)
            except RegistryError:
                pass
            else:
                assert found.digest == version.digest

        try_one()
