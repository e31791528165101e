"""TLS of all ports: the gateway's certificate, and the authority of its clients'."""

import logging
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc

from manylora_gateway.config import TlsConfig
from manylora_gateway.errors import StartError

USABLE_KEYS = (
    bytes.fromhex("06092a864886f70d010101"),
    bytes.fromhex("06072a8648ce3d020106082a8648ce3d030107"),
    bytes.fromhex("06072a8648ce3d020106052b81040022"),
    bytes.fromhex("06072a8648ce3d020106052b81040023"),
)
"""How a certificate tells that its key is RSA, or ECDSA on P-256, P-384 or P-521 (RFC 3279, 5480).
With others gRPC ends every handshake, however well HTTPS does."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Read:
    """The files of a `tls` section as they were at one time."""

    stamp: object
    context: ssl.SSLContext
    for_grpc: grpc.ServerCertificateConfiguration
    end: float
    """See `ServerTls.end`."""


class ServerTls:
    """The files of one `tls` section, read and checked, and read again when they change.

    The files are looked at with every handshake, so a connection that begins after they were
    replaced has the new certificate; those that stand are left alone. Files that do not fit
    together, as in the midst of being replaced, change nothing and are said so once, in the log.

    With `client_ca` a client without a certificate of that authority cannot connect at all.

    Raises:
        StartError: a file cannot be read, is no PEM, or certificate and key do not belong together.
    """

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._reading = threading.Lock()
        self._now = self._read()
        self._refused = self._now.stamp
        self.context = self._now.context
        """For HTTPS."""
        self.context.sni_callback = self._on_hello

    def end(self) -> float:
        """Until when clients take the certificate, in seconds since the epoch; 0 if they do not."""
        return self._current().end

    def credentials(self) -> grpc.ServerCredentials:
        """For one gRPC server."""
        given = self._now

        # None, which the types do not know of, keeps what was given before.
        def fetch() -> Any:
            nonlocal given
            if (now := self._current()) is given:
                return None
            given = now
            return now.for_grpc

        return grpc.dynamic_ssl_server_credentials(
            given.for_grpc, fetch, require_client_authentication=self._config.client_ca is not None
        )

    def _on_hello(self, connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
        connection.context = self._current().context

    def _current(self) -> _Read:
        with self._reading:
            stamp = self._look()
            if stamp not in (self._now.stamp, self._refused):
                try:
                    self._now = self._read()
                    logger.info("TLS files read again")
                except StartError as error:
                    self._refused = stamp
                    logger.error("TLS as before, the changed files cannot be used: %s", error)
            return self._now

    def _look(self) -> object:
        """Changes with each of the files; None where one is gone.

        ctime moves with permissions too, and no tool that copies a file sets it back.
        """
        config = self._config
        paths = (config.certificate, config.key, config.client_ca)
        try:
            found = [path.stat() for path in paths if path is not None]
        except OSError:
            return None
        return tuple((status.st_ctime_ns, status.st_size, status.st_ino) for status in found)

    def _read(self) -> _Read:
        """The files as they are.

        Raises:
            StartError: names the one that cannot be used.
        """
        config, stamp = self._config, self._look()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        _load_pair(context, config.certificate, config.key)
        authority = None
        if config.client_ca is not None:
            _load_certificates(context, config.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            # A session that is taken up again shows no certificate: a client whose authority was
            # replaced came back by it. Of TLS 1.2 Python cannot switch them off.
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0
        try:
            chain, key = config.certificate.read_bytes(), config.key.read_bytes()
            if config.client_ca is not None:
                authority = config.client_ca.read_bytes()
        except OSError as error:
            raise _unreadable(error) from error
        # Last: it logs, and what is wrong with another file is told by itself.
        end = _end(context, config.certificate)
        pairs = grpc.ssl_server_certificate_configuration([(key, chain)], authority)
        return _Read(stamp, context, pairs, end)


def _load_certificates(context: ssl.SSLContext, path: Path) -> None:
    """Has `context` trust the certificates in a file."""
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise StartError(f"tls: {path} holds no certificates in PEM, or a damaged one") from error
    except OSError as error:
        error.filename = path
        raise _unreadable(error) from error


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    # OpenSSL does not say which of two files it could not use.
    _load_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate)
    try:
        # Without a password it would ask on the terminal for one.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            text = f"is not the key of {certificate}"
        elif not error.reason:
            text = "holds no plain private key"
        else:
            text = f"and {certificate} cannot be used: {error.reason.replace('_', ' ').lower()}"
        raise StartError(f"tls: {key} {text}") from error
    except OSError as error:
        error.filename = key
        raise _unreadable(error) from error


def _end(context: ssl.SSLContext, certificate: Path) -> float:
    """See `ServerTls.end`; logs it too.

    It is no reason not to serve: this machine's clock may be the one that is wrong. A client that
    trusts the certificate itself shakes hands here, as Python reads dates of no other.

    Raises:
        StartError: its key is of a kind that no client, or none of gRPC's, can use.
    """
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    _load_certificates(trusting, certificate)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    try:
        for side in (client, server, client):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        logger.warning("tls: clients refuse %s: %s", certificate, error.verify_message)
        return 0.0
    except ssl.SSLError as error:
        raise _of_no_use(certificate) from error
    if not any(key in (client.getpeercert(binary_form=True) or b"") for key in USABLE_KEYS):
        raise _of_no_use(certificate)
    shown = (client.getpeercert() or {})["notAfter"]
    assert isinstance(shown, str)
    logger.info("tls: %s is valid until %s", certificate, shown)
    return float(ssl.cert_time_to_seconds(shown))


def _of_no_use(certificate: Path) -> StartError:
    return StartError(
        f"tls: {certificate} cannot be used for gRPC: make its key an RSA one, or an ECDSA one on "
        "P-256 or P-384"
    )


def _unreadable(error: OSError) -> StartError:
    return StartError(f"tls: {error.filename} cannot be read: {error.strerror}")


def names_in_auth_context(context: Mapping[str, Any]) -> Iterator[str]:
    """Names in the certificate of a gRPC client, from `ServicerContext.auth_context`."""
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        for value in context.get(key, ()):
            yield bytes(value).decode("utf-8", "replace")


def names_in_peer_certificate(certificate: Mapping[str, Any]) -> Iterator[str]:
    """Names in the certificate of an HTTPS client, from `SSLObject.getpeercert`."""
    for relative_name in certificate.get("subject", ()):
        for kind, value in relative_name:
            if kind == "commonName":
                yield value
    for kind, value in certificate.get("subjectAltName", ()):
        if kind in ("DNS", "URI", "email"):
            yield value
        elif kind == "IP Address":
            # Python writes out every group of an IPv6 address; gRPC, and people, do not.
            yield str(ip_address(value.strip()))
