"""An S3 server on this machine, and a proxy before it that misbehaves as it is told."""

import contextlib
import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

import boto3

BUCKET = "adapters"
KEYS = {
    "aws_access_key_id": "test",
    "aws_secret_access_key": "test",
    "region_name": "us-east-1",
}
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
Fault = Literal["500", "503", "403", "silence", "reset", "cut", "drip", "flip"]
_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a running server with an empty bucket `BUCKET`."""
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    try:
        url = server.stdout.readline().strip()
        boto3.client("s3", endpoint_url=url, **KEYS).create_bucket(Bucket=BUCKET)
        yield url
    finally:
        server.kill()
        server.communicate()


class FaultyProxy:
    """Passes requests on and spoils the answers to those of `method`, a fault each, in order.

    500, 503, 403: it answers that itself. silence: takes the request and says nothing. reset:
    closes the connection. cut: half of the body, then closes. drip: a byte now and then. flip:
    one wrong bit in the body.
    """

    def __init__(self, upstream: str) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self.state = _State(urlsplit(upstream).netloc)
        self._server.state = self.state  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyProxy":
        # Short polls, so that closing it takes no half a second in each test.
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.state.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def spoil(self, method: str, *faults: Fault) -> None:
        """Spoils the next answers to `method`."""
        self.state.method, self.state.faults, self.state.seen = method, list(faults), 0

    @property
    def requests(self) -> int:
        """How many requests of the spoiled method came since."""
        return self.state.seen


class _State:
    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.method = ""
        self.faults: list[Fault] = []
        self.seen = 0
        self.closing = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def pass_on(self) -> None:
        state: _State = self.server.state  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = None
        if self.command == state.method:
            state.seen += 1
            fault = state.faults.pop(0) if state.faults else None
        self.close_connection = True
        match fault:
            case "500" | "503" | "403":
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            case "silence":
                state.closing.wait()
                return
            case "reset":
                return
            case _:
                pass
        upstream = http.client.HTTPConnection(state.upstream)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("connection", "date", "server", "transfer-encoding"):
                self.send_header(key, value)
        self.send_header("Connection", "close")
        self.end_headers()
        with contextlib.suppress(OSError):
            self._answer(fault, content, state.closing)

    def _answer(self, fault: Fault | None, content: bytes, closing: threading.Event) -> None:
        if fault == "cut":
            content = content[: len(content) // 2]
        elif fault == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault != "drip":
            self.wfile.write(content)
            return
        ends = time.monotonic() + 60
        for at in range(len(content)):
            self.wfile.write(content[at : at + 1])
            if closing.wait(0.05) or time.monotonic() > ends:
                return


for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
    setattr(_Handler, f"do_{method}", _Handler.pass_on)
