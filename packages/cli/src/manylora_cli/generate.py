"""`manylora generate`: ask the gateway one thing."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora_cli.options import Server
from manylora_cli.output import lacks_letters

if TYPE_CHECKING:
    from manylora_client import AdapterVersion, GenerationStream, Input, SamplingOptions


def generate(
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="What to ask; - reads standard input.")
    ],
    adapter: Annotated[
        str,
        typer.Option(metavar="REF", help="Adapter reference NAME[@SELECTOR]; default: bare base."),
    ] = "",
    server: Server = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Most tokens to generate; default: the gateway's."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", min=0, help="0, the default, is greedy.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            min=0,
            max=1,
            help="Keep the likeliest candidates of this share; default: 1, all.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K", min=0, help="Keep the K likeliest candidates; 0, the default: all."
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", min=0, max=1, help="Cut below this share of the likeliest; default: 0."
        ),
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="-2 to 2: makes repetition less likely.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="-2 to 2: the same, for each repetition.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Above 1: tokens seen become less likely.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", metavar="N", min=1, help="Answers to sample; default: 1.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Makes sampling repeatable.")
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="With --json: candidates at each position."),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Answer in this schema."),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Answer with a match of it.")
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(metavar="S", help="Answer with one of these; repeatable."),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Answer in this grammar."),
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
    request_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Names the request in the gateway's log.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Deadline; default: 300.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", envvar="MANYLORA_TOKEN", help="Says who asks."),
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="MANYLORA_TLS_CA", help="Whom to trust; turns TLS on."),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="MANYLORA_TLS_CERT", help="Client certificate."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", envvar="MANYLORA_TLS_KEY", help="Its key.")
    ] = None,
) -> None:
    """Generate an answer to TEXT.

    TEXT is one user message of a chat, or with --raw it goes as it stands. The answer goes to
    standard output, the version that gave it to standard error.
    """
    import sys

    if raw and system is not None:
        raise typer.BadParameter("a system message needs the chat template, which --raw leaves out")
    if stream and n not in (None, 1) and not as_json:
        raise typer.BadParameter("several answers stream at once: add --json to tell them apart")
    forms = {
        "--json-schema": json_schema,
        "--regex": regex,
        "--choice": choice or None,
        "--grammar": grammar,
    }
    given = [option for option, value in forms.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"give only one of {', '.join(given)}")
    if text == "-":
        text = sys.stdin.read()
    prompt: Input = text if raw else _chat(system, text)
    options: SamplingOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "repetition_penalty": repetition_penalty,
        "n": n,
        "seed": seed,
        "stop": stop or (),
        "logprobs": logprobs,
        "json_schema": None if json_schema is None else _text(json_schema),
        "regex": regex,
        "choice": choice or (),
        "grammar": None if grammar is None else _text(grammar),
    }

    from manylora_client import Client, tls_credentials

    files = (tls_ca, tls_cert, tls_key)
    credentials = tls_credentials(*files) if any(files) else None
    with Client(server, credentials=credentials, token=token) as client:
        if stream:
            with client.stream(
                prompt, adapter, timeout=timeout, request_id=request_id, **options
            ) as streaming:
                _print_stream(streaming, as_json=as_json)
            return
        answer = client.generate(prompt, adapter, timeout=timeout, request_id=request_id, **options)
    if as_json:
        _print_json(answer)
    else:
        for one in answer.choices or (answer,):
            print(one.text)
        _say(answer.adapter, answer.finish_reason, answer.usage.completion_tokens)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is no UTF-8: {error}") from error


def _chat(system: str | None, text: str) -> list[Mapping[str, str]]:
    user = {"role": "user", "content": text}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def _print_stream(answer: "GenerationStream", *, as_json: bool) -> None:
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
    if (finished := answer.finished) is not None:
        _say(answer.adapter, finished.finish_reason, finished.usage.completion_tokens)


def _print_json(value: Any, **more: str) -> None:
    """Prints a dataclass, with `more` before its fields, as one line of JSON."""
    import json
    from dataclasses import asdict

    print(json.dumps({**more, **asdict(value)}, ensure_ascii=lacks_letters()), flush=True)


def _say(version: "AdapterVersion | None", finish_reason: str, tokens: int) -> None:
    """Names the version that answered, and why it ended, on standard error."""
    typer.echo(f"{version or 'bare base'} · {tokens} tokens · {finish_reason}", err=True)
