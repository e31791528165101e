"""TLS of all ports: the gateway's certificate, and the authority of its clients'."""

import ssl
from collections.abc import Iterator, Mapping
from typing import Any

import grpc

from manylora_gateway.config import TlsConfig
from manylora_gateway.errors import StartError


class ServerTls:
    """The files of one `tls` section, read and checked.

    With `client_ca` a client without a certificate of that authority cannot connect at all.

    Raises:
        StartError: a file cannot be read, is no PEM, or certificate and key do not belong together.
    """

    def __init__(self, config: TlsConfig) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        """For HTTPS."""
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        try:
            self.context.load_cert_chain(config.certificate, config.key)
            chain, key = config.certificate.read_bytes(), config.key.read_bytes()
            authority = None
            if config.client_ca is not None:
                self.context.load_verify_locations(config.client_ca)
                self.context.verify_mode = ssl.CERT_REQUIRED
                authority = config.client_ca.read_bytes()
        except OSError as error:
            raise StartError(f"tls: the files cannot be used: {error}") from error
        self.credentials = grpc.ssl_server_credentials(
            [(key, chain)], authority, require_client_auth=authority is not None
        )
        """For gRPC."""


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
