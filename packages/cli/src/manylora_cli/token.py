"""`manylora token`: a secret for a client, and what of it the gateway may know."""

from typing import Annotated

import typer


def token(
    hash_stdin: Annotated[
        bool, typer.Option("--hash", help="Read a token from standard input and make none.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print both as JSON.")] = False,
) -> None:
    """Make a bearer token for a client of the gateway.

    Its sha256 goes into the gateway's tenants file. The token goes to standard output, to be kept
    by the client alone, its digest to standard error; with --hash the digest goes to standard
    output.
    """
    import json
    import secrets
    import sys

    from manylora_gateway.access import token_digest

    made = sys.stdin.read().strip() if hash_stdin else f"ml_{secrets.token_urlsafe(32)}"
    if not made:
        raise typer.BadParameter("there is no token on standard input")
    digest = token_digest(made)
    if hash_stdin:
        print(json.dumps({"digest": digest}) if as_json else digest)
    elif as_json:
        print(json.dumps({"token": made, "digest": digest}))
    else:
        print(made)
        typer.echo(digest, err=True)
