"""Where the server is and how a channel to it is set up; the same for both clients."""

import os
import random
import ssl
import time
from pathlib import Path

import grpc

from manylora_client.errors import (
    InvalidInputError,
    ResourceExhaustedError,
    StatusError,
    UnavailableError,
)

DEFAULT_TARGET = "127.0.0.1:50051"
TARGET_VARIABLE = "MANYLORA_SERVER"
MAX_PORT = 65_535
DEFAULT_TIMEOUT = 300.0
"""Seconds; a CPU makes a hundred tokens a second for all its callers together."""
LONGEST_TIMEOUT = 1e9
"""Seconds; gRPC takes a longer deadline for one that has passed."""
TOKEN_VARIABLE = "MANYLORA_TOKEN"  # noqa: S105 - a name
TLS_VARIABLES = ("MANYLORA_TLS_CA", "MANYLORA_TLS_CERT", "MANYLORA_TLS_KEY")
MAX_MESSAGE_BYTES = 64 * 2**20
"""Room for a batch of long prompts; gRPC's own limit is 4 MiB."""


def resolve_target(target: str | None) -> str:
    """`target`, or the address in MANYLORA_SERVER, or the default one.

    Raises:
        InvalidInputError: it is a URL, or has no port, or one that is none.
    """
    found = target or os.environ.get(TARGET_VARIABLE) or DEFAULT_TARGET
    _, colon, port = found.rpartition("]")[2].rpartition(":")
    if found.startswith(("http://", "https://")):
        raise InvalidInputError(f"the server is HOST:PORT of gRPC, not a URL: {found}")
    if not colon or not port:
        # gRPC would take that of https.
        raise InvalidInputError(f"the server is HOST:PORT, and its port is missing: {found}")
    if port.isdecimal() and int(port) > MAX_PORT:
        # gRPC would connect to what is left of it in 16 bits.
        raise InvalidInputError(f"the port of the server must be at most {MAX_PORT}: {found}")
    return found


def tls_credentials(
    ca: str | os.PathLike[str] | None = None,
    certificate: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
) -> grpc.ChannelCredentials:
    """Credentials for a gateway that speaks TLS; all arguments are PEM files.

    Args:
        ca: certificates of the authorities the gateway's is checked by; None: gRPC's own list.
        certificate: the client's, with what stands between it and its authority; with `key`.
        key: its private key.

    Raises:
        InvalidInputError: a file cannot be used, or one of certificate and key is missing.
    """
    if (certificate is None) != (key is None):
        raise InvalidInputError("a client certificate and its key go together: give both")
    try:
        read = [
            None if path is None else Path(path).read_bytes() for path in (ca, key, certificate)
        ]
    except OSError as error:
        raise InvalidInputError(f"{error.filename} cannot be read: {error.strerror}") from error
    _check_tls_files(ca, certificate, key)
    return grpc.ssl_channel_credentials(*read)


def _check_tls_files(
    ca: str | os.PathLike[str] | None,
    certificate: str | os.PathLike[str] | None,
    key: str | os.PathLike[str] | None,
) -> None:
    """Refuses files gRPC cannot use: it would log so, or trust its own list, and fail later."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for path in (ca, certificate):
        try:
            if path is not None:
                context.load_verify_locations(path)
        except ssl.SSLError as error:
            raise InvalidInputError(
                f"{path} holds no certificates in PEM, or a damaged one"
            ) from error
    try:
        if certificate is not None:
            # Without a password it would ask on the terminal for one.
            context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            problem = f"is not the key of {certificate}"
        elif not error.reason:
            problem = "holds no plain private key"
        else:
            problem = f"and {certificate} cannot be used: {error.reason.replace('_', ' ').lower()}"
        raise InvalidInputError(f"{key} {problem}") from error


def resolve_credentials(
    credentials: grpc.ChannelCredentials | None,
) -> grpc.ChannelCredentials | None:
    """`credentials`, or those of the MANYLORA_TLS variables, or None: plain text."""
    if credentials is not None:
        return credentials
    files = [os.environ.get(name) or None for name in TLS_VARIABLES]
    return tls_credentials(*files) if any(files) else None


def deadline(timeout: float | None, default: float | None) -> float | None:
    """Seconds a call may take: `timeout`, or the client's; None: as long as it takes.

    Raises:
        InvalidInputError: it is no positive number.
    """
    seconds = default if timeout is None else timeout
    if seconds is None:
        return None
    try:
        if seconds > LONGEST_TIMEOUT:
            return None
        positive = seconds > 0
    except TypeError:
        positive = False
    if not positive:
        text = f"the timeout must be a positive number of seconds, not {seconds!r}"
        raise InvalidInputError(text)
    return seconds


class CallMetadata:
    """What goes with each call beside its message.

    Args:
        token: of the caller; None: the one in MANYLORA_TOKEN, if any.
    """

    def __init__(self, token: str | None) -> None:
        token = token or os.environ.get(TOKEN_VARIABLE) or ""
        if not (token.isascii() and token.isprintable()):
            raise InvalidInputError("the token has characters that cannot be sent")
        self._always = (("authorization", f"Bearer {token}"),) if token else ()

    def of(self, request_id: str | None) -> tuple[tuple[str, str], ...]:
        """The metadata of a call whose request is to be known as `request_id`."""
        if request_id is None:
            return self._always
        if not (request_id.isascii() and request_id.isprintable()):
            raise InvalidInputError("the request id has characters that cannot be sent")
        return (*self._always, ("x-request-id", request_id))


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Options of the channel.

    gRPC's own transparent retry stays on: it repeats a call only when the server is known not to
    have seen it. A retry policy in the service config would go further and also repeat calls that
    a server had begun, so there is none; see Attempts for what is repeated instead.
    """
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # Finds a vanished server during a long wait for an answer. No more often than a server
        # with default settings tolerates on a quiet connection: it closes one pinged faster.
        ("grpc.keepalive_time_ms", 301_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # A server that is being started is found soon after it listens.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]


class Attempts:
    """What is left of one call's deadline and of its retries.

    A call is repeated only when the server itself says so: UNAVAILABLE or RESOURCE_EXHAUSTED with
    a RetryInfo. Nothing of an answer has reached the caller then, and generating has no side
    effect, so a repeated call is never seen twice. A broken connection is not repeated: the
    server may be working on the call still, and would do it twice.
    """

    def __init__(self, retries: int, timeout: float | None) -> None:
        self._retries = retries
        self._end = None if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Seconds to the deadline; None without one."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def delay_after(self, error: StatusError) -> float | None:
        """Seconds to wait before the next attempt; None when `error` is final."""
        if not isinstance(error, UnavailableError | ResourceExhaustedError):
            return None
        if error.retry_after is None:
            return None
        if self._retries <= 0:
            return None
        # Spread, so that clients turned away together do not come back together.
        delay = error.retry_after * random.uniform(1.0, 1.25)  # noqa: S311
        remaining = self.remaining()
        if remaining is not None and delay >= remaining:
            return None
        self._retries -= 1
        return delay
