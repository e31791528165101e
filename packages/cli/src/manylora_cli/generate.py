"""`manylora generate`: ask the gateway one thing."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from manylora_client import AdapterVersion, Client, Input, SamplingOptions


def generate(
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="What to ask; - reads standard input.")
    ],
    adapter: Annotated[
        str,
        typer.Option(metavar="REF", help="Adapter reference NAME[@SELECTOR]; default: bare base."),
    ] = "",
    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The gateway; default: MANYLORA_SERVER, or 127.0.0.1:50051.",
        ),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most tokens to generate.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", min=0, help="0, the default, is greedy.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Makes sampling repeatable.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="S", help="End before this string; repeatable."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message before TEXT.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send TEXT as it stands, without the chat template.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the answer as JSON; with --stream one event a line."),
    ] = False,
) -> None:
    """Generate an answer to TEXT, by default as one user message of a chat.

    The text goes to standard output; the version that answered to standard error.
    """
    import sys

    if raw and system is not None:
        raise typer.BadParameter("a system message needs the chat template, which --raw leaves out")
    if text == "-":
        text = sys.stdin.read()
    prompt: Input = text if raw else _chat(system, text)
    options: SamplingOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "stop": stop or (),
    }

    from manylora_client import Client

    with Client(server) as client:
        if stream:
            _stream(client, prompt, adapter, options, as_json=as_json)
            return
        answer = client.generate(prompt, adapter, **options)
    if as_json:
        _print_json(answer)
    else:
        print(answer.text)
        _say(answer.adapter, answer.finish_reason, answer.usage.completion_tokens)


def _chat(system: str | None, text: str) -> list[Mapping[str, str]]:
    user = {"role": "user", "content": text}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def _stream(
    client: "Client",
    prompt: "Input",
    adapter: str,
    options: "SamplingOptions",
    *,
    as_json: bool,
) -> None:
    with client.stream(prompt, adapter, **options) as answer:
        if as_json:
            _print_json(answer.started, event="started")
            for delta in answer:
                _print_json(delta, event="delta")
            _print_json(answer.finished, event="finished")
            return
        try:
            for delta in answer:
                print(delta.text, end="", flush=True)
        finally:
            # An error or Ctrl-C in the middle gets a line of its own.
            print(flush=True)
        finished = answer.finished
    if finished is not None:
        _say(answer.adapter, finished.finish_reason, finished.usage.completion_tokens)


def _print_json(value: Any, **more: str) -> None:
    """Prints a dataclass, with `more` before its fields, as one line of JSON."""
    import json
    from dataclasses import asdict

    print(json.dumps({**more, **asdict(value)}, ensure_ascii=False), flush=True)


def _say(version: "AdapterVersion | None", finish_reason: str, tokens: int) -> None:
    """Names the version that answered, and why it ended, on standard error."""
    typer.echo(f"{version or 'bare base'} · {tokens} tokens · {finish_reason}", err=True)
