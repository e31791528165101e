"""Signatures over versions, with keys of one's own: OpenSSF model signing, https://sigstore.dev.

Signed is the directory that holds the version's manifest alone, as `manifest.json`. The manifest
names every file by its sha256 and the base by its fingerprint, so the signature covers them all
and is checked without reading the weights; `model_signing verify key` checks it without manylora.

A signature refers to a version and is no part of it: the digest stays what it was.
"""

import base64
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from manylora_registry.errors import SigningKeyError

KEYS_VARIABLE = "MANYLORA_REQUIRE_SIGNATURE"
PASSWORD_VARIABLE = "MANYLORA_SIGN_KEY_PASSWORD"  # noqa: S105 (the name of a variable)
KEY_BYTES = 1 << 16
"""More than any key in PEM has."""
SIGNATURE_BYTES = 1 << 20
SIGNATURES = 64
"""That travel with one version."""
SIGNATURE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
MANIFEST_NAME = "manifest.json"


def required_keys() -> tuple[Path, ...]:
    """The public keys in `$MANYLORA_REQUIRE_SIGNATURE`, separated as in PATH."""
    return tuple(Path(key) for key in os.environ.get(KEYS_VARIABLE, "").split(os.pathsep) if key)


class SigningKey:
    """An elliptic-curve key in PEM to sign versions with.

    It is read once, so that what gives it once, such as a pipe, signs any number of versions. One
    that is encrypted is opened with `$MANYLORA_SIGN_KEY_PASSWORD`.

    Raises:
        SigningKeyError: the key cannot be used.
    """

    def __init__(self, file: Path) -> None:
        # It asks for a text and passes it to what asks for bytes.
        password: Any = os.environ.get(PASSWORD_VARIABLE, "").encode() or None
        try:
            from model_signing.signing import Config

            self._config: Any = Config()
            with _in_memory(_key(file)) as copy:
                self._config.use_elliptic_key_signer(private_key=copy, password=password)
        except ModuleNotFoundError as error:
            raise _not_installed() from error
        except (OSError, ValueError, TypeError) as error:
            raise SigningKeyError(f"{file} cannot sign: {error}") from error
        except AttributeError as error:
            # What the library meets in a key of another kind, such as RSA.
            raise _wrong_kind(file) from error

    def sign(self, manifest: bytes) -> bytes:
        """A Sigstore bundle that signs a manifest."""
        with _signed_directory(manifest) as (directory, signature):
            self._config.sign(directory, signature)
            return signature.read_bytes()


def find_signer(
    manifest: bytes, signatures: Iterable[bytes], public_keys: Iterable[Path]
) -> Path | None:
    """The first of the keys by which one of the signatures is good; None where none is.

    Raises:
        SigningKeyError: a key cannot be used.
    """
    keys = [(path, _verifier(path)) for path in public_keys]
    for bundle in signatures:
        with _signed_directory(manifest) as (directory, signature):
            signature.write_bytes(bundle)
            for path, verifier in keys:
                if _is_good(directory, signature, verifier):
                    return path
    return None


def signed_digest(signature: bytes) -> str | None:
    """The digest of the version a signature says it is of; None for what is no signature.

    No key is asked: whether it tells the truth only `find_signer` finds out.
    """
    try:
        envelope = json.loads(signature)["dsseEnvelope"]
        (resource,) = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
        known = resource["name"] == MANIFEST_NAME and resource["algorithm"] == "sha256"
        return f"sha256:{resource['digest']}" if known else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def public_key_id(public_key: Path) -> str:
    """sha256 of the key's file, to tell keys apart without their paths.

    Raises:
        SigningKeyError: it cannot be read.
    """
    return hashlib.sha256(_readable(public_key)).hexdigest()


def _verifier(public_key: Path) -> Any:
    _readable(public_key)
    try:
        from model_signing.verifying import Config
    except ModuleNotFoundError as error:
        raise _not_installed() from error
    config: Any = Config()
    try:
        config.use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        # Whatever it is, no signature will ever be good by this key: better said at once.
        raise _wrong_kind(public_key) from error
    return config


def _is_good(directory: Path, signature: Path, verifier: Any) -> bool:
    try:
        verifier.verify(directory, signature)
    except Exception:
        # A hostile bundle makes the library raise anything; whatever it was, nothing was proved.
        return False
    return True


def _readable(public_key: Path) -> bytes:
    try:
        # It is read again at every use: a pipe would give it once, or be waited for without end.
        if public_key.is_fifo() or public_key.is_char_device():
            raise SigningKeyError(f"{public_key} is no file: a trusted key stays to be read again")
        content = _key(public_key)
    except OSError as error:
        raise SigningKeyError(f"{public_key} cannot be read: {error.strerror}") from error
    if b"PUBLIC KEY-----" not in content:
        raise SigningKeyError(f"{public_key} is no public key in PEM")
    return content


def _key(file: Path) -> bytes:
    with file.open("rb") as opened:
        content = opened.read(KEY_BYTES + 1)
    if len(content) > KEY_BYTES:
        raise SigningKeyError(f"{file} is no key: it holds more than {KEY_BYTES} bytes")
    return content


@contextlib.contextmanager
def _in_memory(content: bytes) -> Generator[Path]:
    """A file on no disk: what gave a private key once may not have been one either."""
    descriptor = os.memfd_create("key")
    try:
        os.write(descriptor, content)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _signed_directory(manifest: bytes) -> Generator[tuple[Path, Path]]:
    """What is signed, and a place for its signature."""
    with tempfile.TemporaryDirectory(prefix="manylora-") as place:
        directory = Path(place) / "version"
        directory.mkdir()
        (directory / MANIFEST_NAME).write_bytes(manifest)
        yield directory, Path(place) / "signature"


def _wrong_kind(key: Path) -> SigningKeyError:
    return SigningKeyError(
        f"{key} cannot be used: keys are elliptic-curve keys in PEM on prime256v1, secp384r1 or "
        "secp521r1"
    )


def _not_installed() -> SigningKeyError:
    return SigningKeyError("signatures need model-signing: install manylora-registry[signing]")
