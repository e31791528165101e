"""Signatures: who signed a version is known, and where it matters nothing else is served."""

import json
import os
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from manylora_cli.registry import app
from manylora_registry import Cache, Registry
from manylora_registry.errors import CorruptBlobError, SigningKeyError, UnsignedError


@pytest.fixture
def make_key(tmp_path):
    """Writes NAME.pem and NAME.pub."""

    def make(name, password=None):
        key = ec.generate_private_key(ec.SECP256R1())
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
    registry.sign(version, ours[0])

    assert registry.verify_signature(version, [theirs[1], ours[1]]) == ours[1]
    with pytest.raises(UnsignedError, match="1 signatures"):
        registry.verify_signature(version, [theirs[1]])
    report = registry.verify()
    assert (report.ok, report.unreferenced) == (True, ())


def test_a_signature_is_no_part_of_the_version(
    registry, base, version, make_adapter, ours, tmp_path
):
    registry.sign(version, ours[0])

    assert registry.find("spelling@1") == version
    assert registry.publish("spelling", make_adapter(), base=base) == version
    assert {path.name for path in registry.materialize(version, tmp_path / "cache").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_what_is_published_with_a_key_is_signed(registry, base, make_adapter, ours):
    registry.sign_published_with(ours[0])
    version = registry.publish("spelling", make_adapter(), base=base)

    assert registry.verify_signature(version, [ours[1]]) == ours[1]


def test_a_key_that_cannot_sign_publishes_nothing(registry, base, make_adapter, ours, tmp_path):
    for key in (tmp_path / "nothing.pem", ours[1]):
        registry.sign_published_with(key)
        with pytest.raises(SigningKeyError, match=key.name):
            registry.publish("spelling", make_adapter(), base=base)
    assert registry.adapters() == []


def test_an_encrypted_key_needs_its_password(registry, version, make_key, monkeypatch):
    private, public = make_key("locked", b"open sesame")
    with pytest.raises(SigningKeyError):
        registry.sign(version, private)
    monkeypatch.setenv("MANYLORA_SIGN_KEY_PASSWORD", "open sesame")

    registry.sign(version, private)

    assert registry.verify_signature(version, [public]) == public


class TestWhereSignaturesAreRequired:
    @pytest.fixture(autouse=True)
    def policy(self, version, registry, ours):
        registry.require_signatures_of([ours[1]])

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
        registry.sign(version, ours[0])

        assert registry.resolve("spelling@1") == version
        assert registry.materialize(version, tmp_path / "cache").is_dir()

    def test_what_another_key_signed_is_not(self, registry, version, theirs):
        registry.sign(version, theirs[0])

        with pytest.raises(UnsignedError):
            registry.resolve("spelling@1")

    def test_the_signature_of_another_version_does_not_do(
        self, registry, version, base, make_adapter, ours, tmp_path
    ):
        registry.sign(version, ours[0])
        other = registry.publish("spelling", make_adapter(1), base=base)
        # Whoever can write to the database can attach any signature to any version.
        registry._signatures.add(other, self.signature(registry, version))

        with pytest.raises(UnsignedError):
            registry.resolve("spelling@2")
        assert registry.resolve("spelling@1") == version

    def test_a_signature_that_was_changed_does_not_do(
        self, registry, version, ours, tmp_path, base, make_adapter
    ):
        registry.sign(version, ours[0])
        bundle = json.loads(self.signature(registry, version))
        envelope = bundle["dsseEnvelope"]
        contents = (
            json.dumps(bundle | {"dsseEnvelope": envelope | {"signatures": []}}),
            json.dumps(bundle | {"dsseEnvelope": envelope | {"payload": envelope["payload"][4:]}}),
            "{}", "[]", "", "[" * 10_000, "null",
        )  # fmt: skip
        for seed, content in enumerate(contents, start=1):
            other = registry.publish("other", make_adapter(seed), base=base)
            registry._signatures.add(other, content.encode())
            with pytest.raises(UnsignedError):
                registry.resolve(f"other@{other.number}")

    def test_damaged_blobs_are_noticed(self, registry, version, ours, tmp_path):
        digest = registry.sign(version, ours[0])
        blob_of(tmp_path, digest).write_bytes(b"{}")

        with pytest.raises(CorruptBlobError):
            registry.resolve("spelling@1")
        assert not registry.verify().ok

    @staticmethod
    def signature(registry, version):
        (found,) = {
            blob
            for blob in registry._blobs.digests()
            if b"dsseEnvelope" in registry._blobs.open(blob).read()
        }
        return registry._blobs.open(found).read()


def test_the_environment_sets_the_policy(registry, version, ours, theirs, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "MANYLORA_REQUIRE_SIGNATURE", os.pathsep.join(map(str, [theirs[1], ours[1]]))
    )

    with Registry.open(tmp_path / "registry") as strict:
        with pytest.raises(UnsignedError):
            strict.resolve("spelling@1")
        registry.sign(version, ours[0])
        assert strict.resolve("spelling@1") == version
    monkeypatch.setenv("MANYLORA_REQUIRE_SIGNATURE", str(tmp_path / "gone.pub"))
    with (
        Registry.open(tmp_path / "registry") as strict,
        pytest.raises(SigningKeyError, match=r"gone\.pub"),
    ):
        strict.resolve("spelling@1")


def test_signatures_are_copied(registry, version, ours, tmp_path):
    registry.sign(version, ours[0])
    with Registry.open(tmp_path / "target") as target:
        assert registry.copy_to(target).ok

        assert target.verify_signature(version, [ours[1]]) == ours[1]


def test_the_reference_tool_agrees(registry, version, ours, tmp_path):
    digest = registry.sign(version, ours[0])
    directory = tmp_path / "signed"
    directory.mkdir()
    (directory / "manifest.json").write_bytes(registry._blobs.open(version.digest).read())
    (tmp_path / "bundle").write_bytes(registry._blobs.open(digest).read())

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
