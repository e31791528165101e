"""`manylora adapters`: what a gateway serves, and what waits there and why."""

from typing import TYPE_CHECKING

from manylora_cli.options import AsJson, Server
from manylora_cli.output import print_json, print_table

if TYPE_CHECKING:
    from manylora_client import AdapterVersion


def adapters(
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """List what a gateway serves under which alias.

    An alias that points at a version the gateway does not serve (yet) shows that one as pending,
    with the reason if it cannot be served. `manylora registry list` tells of the registry alone.

    Token and TLS files come from MANYLORA_TOKEN, MANYLORA_TLS_CA, MANYLORA_TLS_CERT and
    MANYLORA_TLS_KEY.
    """
    from dataclasses import asdict

    from manylora_client import Client

    with Client(server) as client:
        listed = client.list_adapters()
    if as_json:
        print_json([asdict(adapter) for adapter in listed])
        return
    rows = list[list[str]]()
    for adapter in listed:
        start = [adapter.name, str(adapter.latest.number)]
        rows += [
            [*start, it.alias, _number(it.serving), _number(it.pending), it.pending_error]
            for it in adapter.aliases
        ] or [[*start, "", "", "", ""]]
    header = ("adapter", "latest", "alias", "serving", "pending", "reason")
    print_table(header, rows, empty="no adapters")


def _number(version: "AdapterVersion | None") -> str:
    return "" if version is None else str(version.number)
