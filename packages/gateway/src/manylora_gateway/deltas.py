"""Deltas on their way from replicas to the front, past Ray Serve's handles.

A Serve handle carries a message for each delta and stops at about 1,400 a second. So a handle
carries the request and how it ended, and the deltas go over one TCP connection from each replica
to the front: all that its streams made within `FLUSH_S` travel in one frame, and what has
piled up for one stream by the time it is read becomes one delta. A delta is therefore late by
`FLUSH_S` at most, however many streams there are, and a slow reader costs messages, not memory.

A frame is its length (four bytes, big-endian) and a MessagePack list of (request id, delta or
nil for the end). A connection begins with the secret of the listening front: nothing that comes
without it is read.
"""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import msgspec

from manylora_gateway.engine import Delta
from manylora_gateway.errors import ReplicaLostError

FLUSH_S = 0.002
SECRET_BYTES = 32
LENGTH_BYTES = 4
HELLO_TIMEOUT_S = 30.0
"""A machine may stand still for seconds, and a hello that was late for that ends no streams."""
MAX_FRAME_BYTES = 64 << 20
HIGH_WATER_BYTES = 4 << 20
"""Unsent bytes above which a stream that makes more has to wait."""
END_GRACE_S = 30.0
"""The end of a stream may come this much later than the news that its call returned."""

Parcel = tuple[str, Delta | None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrontAddress:
    """Where a front takes deltas."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class Inbox:
    """The deltas of one stream that were not read yet."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._ended = False
        self._error: BaseException | None = None
        self._news = asyncio.Event()

    def put(self, delta: Delta | None) -> None:
        """Takes the next delta, or the end."""
        if delta is None:
            self._ended = True
        else:
            self._deltas.append(delta)
        self._news.set()

    def fail(self, error: BaseException) -> None:
        """No more will come."""
        self._error = error
        self._news.set()

    async def take(self) -> list[Delta]:
        """All that came since the last time, joined; empty once the stream has ended.

        Raises:
            Exception: what `fail` was given, when everything before it was taken.
        """
        while not self._deltas:
            if self._ended:
                return []
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        deltas, self._deltas = self._deltas, []
        return joined(deltas)


def joined(deltas: list[Delta]) -> list[Delta]:
    """The same text and tokens in one delta for each answer."""
    if len(deltas) == 1:
        return deltas
    choices: dict[int, list[Delta]] = {}
    for delta in deltas:
        choices.setdefault(delta.choice, []).append(delta)
    return [
        replace(
            parts[-1],
            text="".join(part.text for part in parts),
            token_ids=tuple(token for part in parts for token in part.token_ids),
            logprobs=tuple(entry for part in parts for entry in part.logprobs),
            prompt_tokens=sum(part.prompt_tokens for part in parts),
        )
        for parts in choices.values()
    ]


class DeltaReceiver:
    """The front's end: sorts what replicas send into inboxes."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._inboxes: dict[str, Inbox] = {}
        self._decoder = msgspec.msgpack.Decoder(list[Parcel])
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, host: str) -> FrontAddress:
        """Listens on any free port of `host`."""
        self._server = await asyncio.start_server(self._serve, host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return FrontAddress(host, port, self._secret)

    async def close(self) -> None:
        """Hangs up."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()

    @contextmanager
    def expect(self, request_id: str) -> Generator[Inbox, None, None]:
        """Where the deltas of a request will be; what comes afterwards is dropped."""
        inbox = self._inboxes[request_id] = Inbox()
        try:
            yield inbox
        finally:
            del self._inboxes[request_id]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await reader.readexactly(SECRET_BYTES)
            if not hmac.compare_digest(hello, self._secret):
                logger.warning("a connection without the secret was refused")
                return
            while True:
                length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
                if length > MAX_FRAME_BYTES:
                    logger.error("a frame of %d bytes was refused", length)
                    return
                self._sort(self._decoder.decode(await reader.readexactly(length)))
        except msgspec.MsgspecError:
            logger.exception("a replica sent what is no delta; its connection is closed")
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            # Its calls fail through Ray, or have ended.
            return
        finally:
            self._writers.discard(writer)
            writer.close()

    def _sort(self, parcels: Iterable[Parcel]) -> None:
        for request_id, delta in parcels:
            if (inbox := self._inboxes.get(request_id)) is not None:
                inbox.put(delta)


class DeltaSender:
    """A replica's end of the connection to one front."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder()
        self._parcels: list[msgspec.Raw] = []
        self._flush: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(cls, address: FrontAddress) -> "DeltaSender":
        """Connects to a front.

        Raises:
            ReplicaLostError: it cannot be reached.
        """
        try:
            _, writer = await asyncio.open_connection(address.host, address.port)
        except OSError as error:
            raise ReplicaLostError("The front cannot be reached from the replica.") from error
        writer.write(address.secret)
        return cls(writer)

    @property
    def open(self) -> bool:
        """Whether what is sent may arrive."""
        return not self._writer.is_closing()

    async def send(self, request_id: str, delta: Delta | None) -> None:
        """Sends a delta within `FLUSH_S`, or the end.

        Raises:
            ReplicaLostError: the connection is gone.
        """
        if not self.open:
            raise ReplicaLostError("The front hung up.")
        # Here, so that what cannot be packed fails its own request alone.
        self._parcels.append(msgspec.Raw(self._encoder.encode((request_id, delta))))
        if self._flush is None:
            self._flush = self._loop.call_later(FLUSH_S, self._write)
        if self._writer.transport.get_write_buffer_size() > HIGH_WATER_BYTES:
            with suppress(ConnectionError):
                await self._writer.drain()

    def close(self) -> None:
        """Sends what is left and hangs up."""
        if self._flush is not None:
            self._flush.cancel()
            self._write()
        self._writer.close()

    def _write(self) -> None:
        self._flush = None
        payload = self._encoder.encode(self._parcels)
        self._parcels = []
        self._writer.write(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)
