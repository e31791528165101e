"""A judge that speaks OpenAI's chat completions over real HTTP, as a test writes down."""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Words:
    """What the judge says, in a well-formed completion."""

    text: str


@dataclass(frozen=True)
class Status:
    """An HTTP error."""

    code: int
    retry_after: str | None = None
    location: str | None = None


@dataclass(frozen=True)
class Raw:
    """A body as it stands, with status 200."""

    body: bytes


class Silence:
    """No answer before the client gives up."""


class HangUp:
    """The connection breaks."""


Reply = Words | Status | Raw | Silence | HangUp


@dataclass
class ScriptedJudge:
    """Answers each request as `script` says of its body; remembers what it was asked.

    with ScriptedJudge(lambda body: verdict(correct=True)) as judge:
        OpenAIModel(kind="openai", url=judge.url, model="m")
    """

    script: Callable[[Mapping[str, Any]], Reply]
    asked: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    headers: list[Mapping[str, str]] = field(default_factory=list[Mapping[str, str]])
    closing: threading.Event = field(default_factory=threading.Event)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                with judge.lock:
                    judge.in_flight += 1
                    judge.most_in_flight = max(judge.most_in_flight, judge.in_flight)
                try:
                    content = self.rfile.read(int(self.headers["content-length"]))
                    body = json.loads(content)
                    with judge.lock:
                        judge.asked.append(body)
                        judge.headers.append(dict(self.headers))
                    if self.path != "/v1/chat/completions":
                        self._send(404, b"{}")
                    else:
                        self._reply(judge.script(body))
                finally:
                    with judge.lock:
                        judge.in_flight -= 1

            def _reply(self, reply: Reply) -> None:
                match reply:
                    case Words(text):
                        completion = {
                            "choices": [{"message": {"role": "assistant", "content": text}}],
                            "usage": {"prompt_tokens": 100, "completion_tokens": 10},
                        }
                        self._send(200, json.dumps(completion).encode())
                    case Status(code):
                        more = {"retry-after": reply.retry_after, "location": reply.location}
                        self._send(code, b'{"error": "scripted"}', more)
                    case Raw(body):
                        self._send(200, body)
                    case Silence():
                        judge.closing.wait(30)
                        self.close_connection = True
                    case HangUp():
                        self.close_connection = True

            def _send(
                self, code: int, body: bytes, more: Mapping[str, str | None] | None = None
            ) -> None:
                self.send_response(code)
                self.send_header("content-length", str(len(body)))
                for name, value in (more or {}).items():
                    if value is not None:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Says nothing."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                """A client that gave up is no error here."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


def verdict(reason: str = "because", **passed: bool) -> Words:
    """A well-formed verdict on criteria."""
    return Words(json.dumps({name: {"reason": reason, "pass": ok} for name, ok in passed.items()}))


def question(body: Mapping[str, Any]) -> str:
    """What the judge is shown."""
    return body["messages"][-1]["content"]


def shown(body: Mapping[str, Any], name: str) -> str:
    """One of the texts the judge is shown, e.g. `answer`."""
    after = question(body).split(f"<{name} ", 1)[1].split(">\n", 1)[1]
    return after.split(f"\n</{name} ", 1)[0]
