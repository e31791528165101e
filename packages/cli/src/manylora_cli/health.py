"""`manylora health`: whether a gateway wants requests, by the question that probes ask."""

# The health package has no types at all.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportAttributeAccessIssue=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from typing import Annotated

import typer

from manylora_cli.options import Server


def health(
    server: Server = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Wait so long for an answer.")
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Ask a gateway whether it serves; exit status 1 if it does not.

    TLS files come from MANYLORA_TLS_CA, MANYLORA_TLS_CERT and MANYLORA_TLS_KEY; a token is not
    needed.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from manylora_client.channel import resolve_credentials, resolve_target
    from manylora_client.status import call_error

    target = resolve_target(server)
    credentials = resolve_credentials(None)
    opened = (
        grpc.insecure_channel(target)
        if credentials is None
        else grpc.secure_channel(target, credentials)
    )
    with opened as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout
            )
        except grpc.RpcError as error:
            raise call_error(error, target) from None
    status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    if as_json:
        import json

        print(json.dumps({"server": target, "status": status}))
    else:
        print(status)
    if status != "SERVING":
        raise typer.Exit(1)
