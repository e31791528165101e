"""`manylora rollout`: divide the requests for an alias among versions."""

# Generated modules of gRPC and protobuf.
# pyright: reportMissingTypeStubs=false

import re
from typing import TYPE_CHECKING, Annotated

import typer

from manylora_cli.output import lacks_letters, print_table

if TYPE_CHECKING:
    from manylora.admin.v1.admin_pb2 import GetRolloutRequest, Rollout, SetRolloutRequest

app = typer.Typer(
    help="""Divide the requests for an alias among versions.

    Token and TLS files come from MANYLORA_TOKEN, MANYLORA_TLS_CA, MANYLORA_TLS_CERT and
    MANYLORA_TLS_KEY.
    """,
    no_args_is_help=True,
)

SHARE = re.compile(r"(\d+)=(\d+)%?")
TIMEOUT_S = 300.0
"""A version is loaded on every replica first."""

Adapter = Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")]
Alias = Annotated[str, typer.Option(metavar="ALIAS", help="The alias whose requests it is about.")]
Admin = Annotated[str, typer.Option(metavar="HOST:PORT", help="The gateway's admin port.")]
Json = Annotated[bool, typer.Option("--json", help="Print the rollout as JSON.")]
ADMIN = "127.0.0.1:50052"


@app.command("set")
def set_(
    adapter: Adapter,
    shares: Annotated[
        list[str] | None,
        typer.Argument(metavar="VERSION=PERCENT...", help="Together 100, e.g. 4=10 3=90."),
    ] = None,
    shadow: Annotated[
        str | None,
        typer.Option(metavar="VERSION=PERCENT", help="Copy so many requests to a version."),
    ] = None,
    alias: Alias = "production",
    admin: Admin = ADMIN,
    as_json: Json = False,
) -> None:
    """Load the versions everywhere, then give each its share."""
    from manylora.admin.v1 import admin_pb2

    if not shares and shadow is None:
        raise typer.BadParameter("give shares or a shadow; `manylora rollout clear` ends one")
    request = admin_pb2.SetRolloutRequest(adapter=adapter, alias=alias)
    for version, percent in map(_share, shares or ()):
        request.shares.add(version=version, percent=percent)
    if shadow is not None:
        request.shadow.version, request.shadow.percent = _share(shadow)
    _show(_call(admin, "SetRollout", request), as_json)


@app.command()
def show(
    adapter: Adapter, alias: Alias = "production", admin: Admin = ADMIN, as_json: Json = False
) -> None:
    """Show each version's share and how it does."""
    from manylora.admin.v1 import admin_pb2

    request = admin_pb2.GetRolloutRequest(adapter=adapter, alias=alias)
    _show(_call(admin, "GetRollout", request), as_json)


@app.command()
def clear(
    adapter: Adapter, alias: Alias = "production", admin: Admin = ADMIN, as_json: Json = False
) -> None:
    """Send everybody back to what the alias points at, at once."""
    from manylora.admin.v1 import admin_pb2

    request = admin_pb2.SetRolloutRequest(adapter=adapter, alias=alias)
    _show(_call(admin, "SetRollout", request), as_json)


def _share(text: str) -> tuple[int, int]:
    found = SHARE.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not VERSION=PERCENT, e.g. 4=10")
    return int(found[1]), int(found[2])


def _call(target: str, method: str, request: "SetRolloutRequest | GetRolloutRequest") -> "Rollout":
    import grpc

    from manylora.admin.v1.admin_pb2_grpc import AdminServiceStub
    from manylora_client.channel import CallMetadata, resolve_credentials
    from manylora_client.status import call_error

    # Who asks and whom to trust come from the variables that every client of the gateway reads.
    credentials = resolve_credentials(None)
    opened = (
        grpc.insecure_channel(target)
        if credentials is None
        else grpc.secure_channel(target, credentials)
    )
    with opened as channel:
        try:
            call = getattr(AdminServiceStub(channel), method)
            metadata = CallMetadata(None).of(None)
            return call(request, timeout=TIMEOUT_S, metadata=metadata).rollout
        except grpc.RpcError as error:
            raise call_error(error, target) from None


def _show(rollout: "Rollout", as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(_plain(rollout), ensure_ascii=lacks_letters()))
        return
    print_table(
        ("version", "share", "requests", "errors", "p95 to first token"),
        [
            (
                str(share.version.number),
                f"{share.percent} %",
                str(share.figures.requests),
                str(share.figures.errors),
                f"{1000 * share.figures.ttft_p95_s:.0f} ms",
            )
            for share in rollout.shares
        ],
        empty=f"nothing can be served of {rollout.adapter}@{rollout.alias}",
    )
    if rollout.HasField("shadow"):
        seen = rollout.shadow
        print(
            f"copies of {seen.percent} % to version {seen.version.number}: {seen.same} the same, "
            f"{seen.different} different, {seen.failed} failed, {seen.skipped} skipped"
        )
    if not rollout.durable:
        typer.echo("The gateway has no `state` directory: this ends when it does.", err=True)


def _plain(rollout: "Rollout") -> dict[str, object]:
    """The rollout with numbers as numbers, which protobuf's own JSON makes strings of."""
    shadow = None
    if rollout.HasField("shadow"):
        shadow = {
            "version": rollout.shadow.version.number,
            **{
                field.name: getattr(rollout.shadow, field.name)
                for field in rollout.shadow.DESCRIPTOR.fields
                if field.name != "version"
            },
        }
    return {
        "adapter": rollout.adapter,
        "alias": rollout.alias,
        "durable": rollout.durable,
        "shares": [
            {
                "version": share.version.number,
                "digest": share.version.digest,
                "percent": share.percent,
                "figures": {
                    **{
                        field.name: getattr(share.figures, field.name)
                        for field in share.figures.DESCRIPTOR.fields
                    },
                    "errors_by_reason": dict(share.figures.errors_by_reason),
                },
            }
            for share in rollout.shares
        ],
        "shadow": shadow,
    }
