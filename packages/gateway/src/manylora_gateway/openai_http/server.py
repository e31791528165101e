"""uvicorn around the application, started and stopped with the rest of the front."""

import asyncio
import contextlib
import errno
import logging
import math
import socket
import ssl
from collections.abc import Generator
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from manylora_gateway.errors import StartError

PEER_CERTIFICATE = "peer_certificate"
"""In the ASGI state: what `SSLObject.getpeercert` says of the client, None or empty without one."""
HANG_UP = "hang_up"
"""In the ASGI state: closes the connection at once, whatever is still to be sent."""
KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that none is closed under a request."""
FLUSH_S = 1
COMPLAIN_EVERY_S = 60

logger = logging.getLogger(__name__)


class HttpServer:
    """One port. It is taken first, so that a taken one is known before engines start.

    Args:
        address: HOST:PORT.
        field: of the config, for the error.
        tls: speaks HTTPS with it; None: HTTP.
        idle_s: a connection on which no request comes for so long, or not to the end of its
            headers, is closed.
    """

    def __init__(
        self,
        address: str,
        field: str,
        tls: ssl.SSLContext | None = None,
        idle_s: int = KEEP_ALIVE_S,
    ) -> None:
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        self._socket = socket.socket(family)
        # A port of a server that ended is free at once; two servers never share one.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # Not listened on yet: clients would be let in, and kept waiting while engines load.
            self._socket.bind((host.strip("[]"), int(port)))
        except (OSError, OverflowError) as error:
            self._socket.close()
            raise _taken(field, address) from error
        self._field = field
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._tls = tls
        self._idle_s = idle_s
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, app: ASGIApp, stall_s: float) -> None:
        """Answers from here on; a client that takes nothing for `stall_s` is cut off.

        Raises:
            StartError: another server that started meanwhile has the port.
        """
        try:
            self._socket.listen()
        except OSError as error:
            raise _taken(self._field, self.address) from error
        # Only the kernel sees it early: it takes megabytes of an answer that nobody reads. Its
        # connections inherit this, also those that are closed with something left to send.
        self._socket.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1000 * stall_s)
        )
        tls = self._tls
        config = uvicorn.Config(
            _plain_paths(app),
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=self._idle_s,
            timeout_graceful_shutdown=FLUSH_S,
            ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        )
        asyncio.get_running_loop().set_exception_handler(_Complaints())
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Closes the port; what still runs is cut off."""
        if self._server is None or self._serving is None:
            self._socket.close()
            return
        self._server.should_exit = True
        await self._serving


def _taken(field: str, address: str) -> StartError:
    return StartError(f"{field}: {address} cannot be listened on; is another server there?")


def _plain_paths(app: ASGIApp) -> ASGIApp:
    """`app` for targets as proxies send them, `http://host/path`, and with a slash at the end.

    For the latter Starlette redirects to a URL of its own, http:// behind a proxy that ends TLS.
    """

    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        _, absolute, rest = path.partition("://")
        if absolute and not path.startswith("/"):
            path = f"/{rest.partition('/')[2]}"
        await app({**scope, "path": path.rstrip("/") or "/"}, receive, send)

    return plain


class _Complaints:
    """What goes wrong in the event loop itself; of a want of files one line a minute.

    asyncio tries as often as there may be connections waiting, each second, with a trace for each.
    """

    def __init__(self) -> None:
        self._said_at = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif loop.time() - self._said_at >= COMPLAIN_EVERY_S:
            self._said_at = loop.time()
            logger.error("no files left for new connections: raise `ulimit -n` of the gateway")


class _Connection(H11Protocol):
    """Tells the application whose certificate the client showed, and does not wait for ever.

    uvicorn itself closes what is idle after a request, not what never sends one.
    """

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: clients that offer HTTP/2 as they begin, as Java's does, go on without."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins; with TLS the handshake is over."""
        super().connection_made(transport)
        self.app_state = self.app_state | {HANG_UP: transport.abort}
        tls = transport.get_extra_info("ssl_object")
        if tls is not None:
            self.app_state = self.app_state | {PEER_CERTIFICATE: tls.getpeercert()}
        self._looks_in = self.loop.call_later(self.timeout_keep_alive, self._look, None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends."""
        self._looks_in.cancel()
        super().connection_lost(exc)

    def _look(self, seen: object) -> None:
        """Hangs up where no request has begun since `seen`, and none is being answered."""
        # Typed as if there were always one.
        newest = cast("RequestResponseCycle | None", self.cycle)
        if newest is seen and (newest is None or newest.response_complete):
            self.transport.close()
        else:
            self._looks_in = self.loop.call_later(self.timeout_keep_alive, self._look, newest)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are the gateway's to hear."""
        yield
