"""Signatures: who signed a version is known, and where it matters nothing else is served."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from typer.testing import CliRunner

from manylora_cli.registry import app
from manylora_registry import Cache, Registry
from manylora_registry.errors import (
    CorruptBlobError,
    SigningKeyError,
    SourceError,
    UnsignedError,
)
from manylora_registry.transfer import copy_registry, export_version, import_version


@pytest.fixture
def make_key(tmp_path):
    """Writes NAME.pem and NAME.pub."""

    def make(name, password=None, key=None):
        key = key or ec.generate_private_key(ec.SECP256R1())
        encryption = (
            serialization.BestAvailableEncryption(password)
            if password
            else serialization.NoEncryption()
        )
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
            )
        )
        public.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        return private, public

    return make


@pytest.fixture
def ours(make_key):
    return make_key("ours")


@pytest.fixture
def theirs(make_key):
    return make_key("theirs")


@pytest.fixture
def version(registry, base, make_adapter):
    return registry.publish("spelling", make_adapter(), base=base)


def blob_of(tmp_path, digest):
    (path,) = (tmp_path / "registry" / "blobs").rglob(digest.removeprefix("sha256:"))
    path.chmod(0o644)
    return path


def test_a_signature_is_found_by_its_key(registry, version, ours, theirs):
    registry.signatures.sign(version, ours[0])

    assert registry.signatures.verify(version, [theirs[1], ours[1]]) == ours[1]
    with pytest.raises(UnsignedError, match="1 signatures"):
        registry.signatures.verify(version, [theirs[1]])
    report = registry.verify()
    assert (report.ok, report.unreferenced) == (True, ())


def test_a_signature_is_no_part_of_the_version(
    registry, base, version, make_adapter, ours, tmp_path
):
    registry.signatures.sign(version, ours[0])

    assert registry.find("spelling@1") == version
    assert registry.publish("spelling", make_adapter(), base=base) == version
    assert {path.name for path in registry.materialize(version, tmp_path / "cache").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_what_is_published_with_a_key_is_signed(registry, base, make_adapter, ours):
    registry.signatures.sign_published_with(ours[0])
    version = registry.publish("spelling", make_adapter(), base=base)

    assert registry.signatures.verify(version, [ours[1]]) == ours[1]


def test_an_alias_moves_to_nothing_that_would_not_resolve(registry, base, make_adapter, ours):
    unsigned = registry.publish("spelling", make_adapter(seed=1), base=base)
    signed = registry.publish("spelling", make_adapter(seed=2), base=base)
    registry.signatures.sign(signed, ours[0])
    registry.set_alias("spelling", "production", unsigned.number)
    registry.set_alias("spelling", "production", signed.number)
    registry.signatures.require([ours[1]])

    with pytest.raises(UnsignedError):
        registry.set_alias("spelling", "production", unsigned.number)
    with pytest.raises(UnsignedError):
        registry.rollback("spelling", "production")

    assert registry.resolve("spelling") == signed
    registry.signatures.sign(unsigned, ours[0])
    assert registry.rollback("spelling", "production").version == unsigned.number


def test_a_key_that_cannot_sign_is_refused_before_anything_is_published(registry, ours, tmp_path):
    for key in (tmp_path / "nothing.pem", ours[1]):
        with pytest.raises(SigningKeyError, match=key.name):
            registry.signatures.sign_published_with(key)


def test_a_key_that_is_given_once_signs_all_that_is_published(registry, base, make_adapter, ours):
    read, write = os.pipe()
    with os.fdopen(write, "wb") as pipe:
        pipe.write(ours[0].read_bytes())
    registry.signatures.sign_published_with(Path(f"/dev/fd/{read}"))
    os.close(read)

    for seed in (1, 2):
        version = registry.publish("spelling", make_adapter(seed=seed), base=base)
        assert registry.signatures.verify(version, [ours[1]]) == ours[1]


def test_a_key_without_an_end_is_refused(registry, version, tmp_path):
    with pytest.raises(SigningKeyError, match="/dev/zero is no key"):
        registry.signatures.sign(version, Path("/dev/zero"))
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SigningKeyError, match="huge is no key"):
        registry.signatures.verify(version, [huge])


@pytest.mark.timeout(30)
def test_a_pipe_for_a_trusted_key_is_refused_and_not_waited_for(registry, version, tmp_path):
    pipe = tmp_path / "trusted"
    os.mkfifo(pipe)

    with pytest.raises(SigningKeyError, match="trusted is no file"):
        registry.signatures.verify(version, [pipe])


@pytest.mark.parametrize("kind", ["RSA", "Ed25519", "another curve"])
def test_a_key_of_another_kind_is_refused_and_not_taken_for_a_missing_signature(
    registry, version, ours, make_key, kind
):
    key = {
        "RSA": lambda: rsa.generate_private_key(65537, 2048),
        "Ed25519": ed25519.Ed25519PrivateKey.generate,
        "another curve": lambda: ec.generate_private_key(ec.SECP256K1()),
    }[kind]()
    private, public = make_key("other", key=key)

    with pytest.raises(SigningKeyError, match=r"other\.pem cannot"):
        registry.signatures.sign(version, private)
    registry.signatures.sign(version, ours[0])
    with pytest.raises(SigningKeyError, match=r"other\.pub cannot be used: .* elliptic-curve"):
        registry.signatures.verify(version, [public, ours[1]])


@pytest.mark.parametrize("damage", [lambda blob: blob.write_bytes(b"{}"), Path.unlink])
def test_a_damaged_signature_is_forgotten_and_made_anew(registry, version, ours, tmp_path, damage):
    registry.signatures.require([ours[1]])
    damage(blob_of(tmp_path, registry.signatures.sign(version, ours[0])))

    report = registry.verify(repair=True)

    assert report.affected == ("spelling@1",)
    assert "sign it again" in str(report.problems[0])
    assert registry.verify().ok
    with pytest.raises(UnsignedError):
        registry.resolve("spelling@1")
    registry.signatures.sign(version, ours[0])
    assert registry.resolve("spelling@1") == version
    export_version(registry, version, tmp_path / "exported", "oci")


def test_an_encrypted_key_needs_its_password(registry, version, make_key, monkeypatch):
    private, public = make_key("locked", b"open sesame")
    with pytest.raises(SigningKeyError):
        registry.signatures.sign(version, private)
    monkeypatch.setenv("MANYLORA_SIGN_KEY_PASSWORD", "open sesame")

    registry.signatures.sign(version, private)

    assert registry.signatures.verify(version, [public]) == public


class TestWhereSignaturesAreRequired:
    @pytest.fixture(autouse=True)
    def policy(self, version, registry, ours):
        registry.signatures.require([ours[1]])

    def test_nothing_unsigned_is_resolved_or_materialized(self, registry, version, tmp_path):
        for use in (
            lambda: registry.resolve("spelling@1"),
            lambda: registry.materialize(version, tmp_path / "cache"),
            lambda: registry.materialize(version),
            lambda: registry.hold(version, Cache(tmp_path / "cache")),
        ):
            with pytest.raises(UnsignedError, match="spelling@1 is not signed"):
                use()
        assert registry.find("spelling@1") == version
        assert not (tmp_path / "cache").exists()

    def test_what_a_trusted_key_signed_is(self, registry, version, ours, tmp_path):
        registry.signatures.sign(version, ours[0])

        assert registry.resolve("spelling@1") == version
        assert registry.materialize(version, tmp_path / "cache").is_dir()

    def test_what_another_key_signed_is_not(self, registry, version, theirs):
        registry.signatures.sign(version, theirs[0])

        with pytest.raises(UnsignedError):
            registry.resolve("spelling@1")

    def test_the_signature_of_another_version_does_not_do(
        self, registry, version, base, make_adapter, ours, tmp_path
    ):
        registry.signatures.sign(version, ours[0])
        other = registry.publish("spelling", make_adapter(1), base=base)
        # Whoever can write to the database can attach any signature to any version.
        registry.signatures.add(other, self.signature(registry, version))

        with pytest.raises(UnsignedError):
            registry.resolve("spelling@2")
        assert registry.resolve("spelling@1") == version

    def test_a_signature_that_was_changed_does_not_do(
        self, registry, version, ours, tmp_path, base, make_adapter
    ):
        registry.signatures.sign(version, ours[0])
        bundle = json.loads(self.signature(registry, version))
        envelope = bundle["dsseEnvelope"]
        contents = (
            json.dumps(bundle | {"dsseEnvelope": envelope | {"signatures": []}}),
            json.dumps(bundle | {"dsseEnvelope": envelope | {"payload": envelope["payload"][4:]}}),
            "{}", "[]", "", "[" * 10_000, "null",
        )  # fmt: skip
        for seed, content in enumerate(contents, start=1):
            other = registry.publish("other", make_adapter(seed), base=base)
            registry.signatures.add(other, content.encode())
            with pytest.raises(UnsignedError):
                registry.resolve(f"other@{other.number}")

    def test_damaged_blobs_are_noticed(self, registry, version, ours, tmp_path):
        digest = registry.signatures.sign(version, ours[0])
        blob_of(tmp_path, digest).write_bytes(b"{}")

        with pytest.raises(CorruptBlobError):
            registry.resolve("spelling@1")
        assert not registry.verify().ok

    @staticmethod
    def signature(registry, version):
        (found,) = {
            blob
            for blob in registry.blobs.digests()
            if b"dsseEnvelope" in registry.blobs.open(blob).read()
        }
        return registry.blobs.open(found).read()


def test_the_environment_sets_the_policy(registry, version, ours, theirs, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "MANYLORA_REQUIRE_SIGNATURE", os.pathsep.join(map(str, [theirs[1], ours[1]]))
    )

    with Registry.open(tmp_path / "registry") as strict:
        with pytest.raises(UnsignedError):
            strict.resolve("spelling@1")
        registry.signatures.sign(version, ours[0])
        assert strict.resolve("spelling@1") == version
    monkeypatch.setenv("MANYLORA_REQUIRE_SIGNATURE", str(tmp_path / "gone.pub"))
    with (
        Registry.open(tmp_path / "registry") as strict,
        pytest.raises(SigningKeyError, match=r"gone\.pub"),
    ):
        strict.resolve("spelling@1")


def test_signatures_are_copied(registry, version, ours, tmp_path):
    registry.signatures.sign(version, ours[0])
    with Registry.open(tmp_path / "target") as target:
        assert copy_registry(registry, target).ok

        assert target.signatures.verify(version, [ours[1]]) == ours[1]


def test_the_reference_tool_agrees(registry, version, ours, tmp_path):
    digest = registry.signatures.sign(version, ours[0])
    directory = tmp_path / "signed"
    directory.mkdir()
    (directory / "manifest.json").write_bytes(registry.blobs.open(version.digest).read())
    (tmp_path / "bundle").write_bytes(registry.blobs.open(digest).read())

    done = subprocess.run(
        [sys.executable, "-m", "model_signing", "verify", "key", directory,
         "--signature", tmp_path / "bundle", "--public_key", ours[1]],
        capture_output=True,
        text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr


def test_the_verbs_sign_and_check(registry, version, ours, theirs, tmp_path):
    place = ["--registry", str(tmp_path / "registry")]
    runner = CliRunner()

    signed = runner.invoke(app, ["sign", "spelling@1", "--key", str(ours[0]), *place])
    good = runner.invoke(
        app, ["verify-signature", "spelling@1", "--public-key", str(ours[1]), "--json", *place]
    )
    bad = runner.invoke(
        app, ["verify-signature", "spelling@1", "--public-key", str(theirs[1]), *place]
    )

    assert (signed.exit_code, good.exit_code, bad.exit_code) == (0, 0, 1)
    assert json.loads(good.stdout)["signed_by"] == str(ours[1])
    assert isinstance(bad.exception, UnsignedError)


class TestSignaturesTravel:
    """In every form that has room for them, and the digest stays what it was."""

    @pytest.fixture
    def other(self, tmp_path):
        with Registry.open(tmp_path / "other") as opened:
            yield opened

    @pytest.fixture(params=["hf", "oci", "tar"])
    def out(self, request, registry, version, ours, theirs, tmp_path):
        """An export with two signatures."""
        for private, _ in (ours, theirs):
            registry.signatures.sign(version, private)
        export_version(registry, version, tmp_path / "out", request.param)
        return tmp_path / "out"

    def test_and_are_good_where_they_arrive(self, out, version, other, base, ours, theirs):
        arrived = import_version(other, "again", out, base=base)
        assert (arrived.number, arrived.digest) == (1, version.digest)
        assert import_version(other, "again", out, base=base) == arrived

        for _, public in (ours, theirs):
            assert other.signatures.verify(arrived, [public]) == public
        assert other.verify().ok
        other.signatures.require([ours[1]])
        assert other.resolve("again@1") == arrived

    def test_and_are_checked_before_anything_is_visible(self, out, other, base, ours, make_key):
        other.signatures.require([make_key("strangers")[1]])
        with pytest.raises(UnsignedError, match="2 signatures"):
            import_version(other, "again", out, base=base)
        assert other.adapters() == []

        other.signatures.require([ours[1]])
        assert import_version(other, "again", out, base=base).number == 1

    def test_what_is_unsigned_does_not_arrive_where_signatures_are_required(
        self, registry, version, other, base, ours, tmp_path
    ):
        export_version(registry, version, tmp_path / "out", "oci")
        registry.signatures.sign(version, ours[0])
        export_version(registry, version, tmp_path / "stripped", "hf")
        shutil.rmtree(tmp_path / "stripped" / "manylora")
        other.signatures.require([ours[1]])

        for source in ("out", "stripped"):
            with pytest.raises(UnsignedError):
                import_version(other, "again", tmp_path / source, base=base)
        assert other.adapters() == []

    def test_what_is_unsigned_does_not_leave_where_signatures_are_required(
        self, registry, version, ours, tmp_path
    ):
        registry.signatures.require([ours[1]])
        with pytest.raises(UnsignedError):
            export_version(registry, version, tmp_path / "out", "peft")
        assert not (tmp_path / "out").exists()

        registry.signatures.sign(version, ours[0])
        export_version(registry, version, tmp_path / "out", "peft")

    @pytest.mark.parametrize("what", ["of another version", "no signature", "a link"])
    def test_what_is_no_signature_of_the_version_is_refused(
        self, registry, version, other, base, ours, make_adapter, tmp_path, what
    ):
        registry.signatures.sign(version, ours[0])
        export_version(registry, version, tmp_path / "out", "hf")
        bundle = tmp_path / "out" / "manylora" / "signatures" / "1.json"
        if what == "of another version":
            second = registry.publish("spelling", make_adapter(2), base=base)
            registry.signatures.sign(second, ours[0])
            bundle.write_bytes(registry.signatures.of(second)[0])
        elif what == "no signature":
            bundle.write_bytes(b'{"dsseEnvelope": {"payload": "e30="}}')
        else:
            bundle.rename(tmp_path / "bundle")
            bundle.symlink_to(tmp_path / "bundle")

        with pytest.raises(SourceError):
            import_version(other, "again", tmp_path / "out", base=base)
        assert other.adapters() == []

    def test_in_a_layout_they_refer_to_the_version(self, registry, version, ours, tmp_path):
        registry.signatures.sign(version, ours[0])
        export_version(registry, version, tmp_path / "out", "oci")

        described, referrer = json.loads((tmp_path / "out/index.json").read_text())["manifests"]
        blobs = tmp_path / "out/blobs/sha256"
        manifest = json.loads((blobs / referrer["digest"][7:]).read_text())
        assert described["digest"] == manifest["subject"]["digest"] == version.digest
        assert manifest["artifactType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
        (layer,) = manifest["layers"]
        assert [(blobs / layer["digest"][7:]).read_bytes()] == registry.signatures.of(version)
