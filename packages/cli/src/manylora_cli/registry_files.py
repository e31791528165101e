"""The verbs of `manylora registry` that compare versions and carry them elsewhere."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora_cli.options import AsJson
from manylora_cli.output import print_json, print_table
from manylora_cli.registry_output import (
    Location,
    Reference,
    open_registry,
    progress_of_blobs,
    size_text,
    version_json,
)

if TYPE_CHECKING:
    from manylora_registry import Registry
    from manylora_registry.diff import ModuleChange, VersionDiff
    from manylora_registry.export import Format

SHOWN_MODULES = 10


def diff(
    before: Annotated[str, typer.Argument(metavar="REF", help="The version to compare from.")],
    after: Annotated[str, typer.Argument(metavar="REF", help="The version to compare to.")],
    all_modules: Annotated[
        bool, typer.Option("--all", help="Every module, not only those that moved most.")
    ] = False,
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Tell what differs between two versions.

    Compared are base, rank, the keys of adapter_config.json, metrics, tags and lineage, and for
    each module the effective update, scaling times B times A: its Frobenius norm before and
    after, the norm of the difference, and that relative to the norm before.

    \b
    manylora registry diff spelling@production spelling@4
    manylora registry diff spelling@3 spelling@4 --json | jq '.modules[] | select(.relative > 0.5)'
    """
    with open_registry(registry) as opened, _status("comparing weights"):
        found = opened.diff(opened.find(before), opened.find(after))
    if as_json:
        print_json(_diff_json(found))
        return
    for what, changes in _described(found):
        for key, (old, new) in changes.items():
            print(f"{what + ' ' if what else ''}{key}: {_shown(old)} -> {_shown(new)}")
    moved = [module for module in found.modules if module.change != 0]
    print(f"{len(moved)} of {len(found.modules)} modules differ; {_total(found)}")
    moved.sort(key=lambda module: -(math.inf if module.relative is None else module.relative))
    if moved:
        print_table(
            ("module", "before", "after", "change", "relative"),
            [
                (
                    module.module,
                    f"{module.before:.4g}",
                    f"{module.after:.4g}",
                    "other shape" if module.change is None else f"{module.change:.4g}",
                    "" if module.relative is None else f"{module.relative:.1%}",
                )
                for module in (moved if all_modules else moved[:SHOWN_MODULES])
            ],
            empty="",
        )
    if len(moved) > SHOWN_MODULES and not all_modules:
        typer.echo(f"and {len(moved) - SHOWN_MODULES} more: --all shows them", err=True)


def export(
    reference: Reference,
    destination: Annotated[
        Path, typer.Argument(metavar="DEST", help="A path where nothing is yet.")
    ],
    format: Annotated[  # noqa: A002
        str, typer.Option("--format", metavar="peft|hf|oci|tar", help="The form to write.")
    ] = "peft",
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Write a version in a form other tools read.

    Importing it gives the same digest.

    \b
    peft  a directory for PEFT and vLLM
    hf    the same with a model card, to push to a Hugging Face hub
    oci   an OCI image layout, to copy to a container registry with oras, skopeo or crane
    tar   that layout as one file, to carry where no network goes

    All bytes are verified on their way out, and DEST appears whole or not at all.

    \b
    manylora registry export spelling@3 spelling-3.tar --format tar
    manylora registry export spelling layout --format oci
    oras cp --from-oci-layout layout:3 registry.example.com/adapters/spelling:3
    """
    from manylora_registry.transfer import export_version

    chosen = _format(format)
    with open_registry(registry) as opened, _status("exporting"):
        version = opened.find(reference)
        export_version(opened, version, destination, chosen)
    if as_json:
        print_json({**version_json(version), "destination": str(destination), "format": chosen})
    else:
        print(f"{version.name}@{version.number} ({version.digest}) written to {destination}")


def import_adapter(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="What `export` wrote, or a PEFT directory.")
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="The adapter to add a version to.")],
    base: Annotated[Path, typer.Option(metavar="DIR", help="The base model it was trained on.")],
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Publish an adapter that comes from elsewhere.

    SRC is a PEFT or a Hugging Face directory, an OCI layout, or a tar of one; which, is found out.
    Every file is checked as `manylora publish` does it:
    safetensors only, names and shapes against the base, no NaN, nothing else in the directory.
    What was exported from a registry gets the digest and the description it had there.

    \b
    manylora registry import spelling-3.tar --name spelling --base bases/smollm2-135m
    """
    from manylora_registry import Registry, identify_base
    from manylora_registry.transfer import import_version

    with _status("importing"):
        identity = identify_base(base)
        with Registry.open(registry) as opened:
            version = import_version(opened, name, source, base=identity)
    if as_json:
        print_json(version_json(version))
    else:
        print(f"{version.name}@{version.number} ({version.digest})")


def sign(
    reference: Reference,
    key: Annotated[Path, typer.Option(metavar="PEM", help="An elliptic-curve private key.")],
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Sign a version with a key of your own.

    The signature is an OpenSSF model signature over the version's manifest, which names every
    file by its sha256. The version's digest stays what it is. A key with a password is opened
    with MANYLORA_SIGN_KEY_PASSWORD. Where MANYLORA_REQUIRE_SIGNATURE names public keys, only
    versions signed by one of them are resolved, materialized and served.

    \b
    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl ec -in key.pem -pubout -out key.pub
    manylora registry sign spelling@3 --key key.pem
    """
    with open_registry(registry) as opened:
        version = opened.find(reference)
        digest = opened.signatures.sign(version, key)
    if as_json:
        print_json({**version_json(version), "signature": digest})
    else:
        print(f"{version.name}@{version.number} is signed ({digest})")


def verify_signature(
    reference: Reference,
    public_key: Annotated[
        list[Path],
        typer.Option("--public-key", metavar="PEM", help="A trusted key; repeatable."),
    ],
    registry: Location = None,
    as_json: AsJson = False,
) -> None:
    """Check that a trusted key signed a version.

    Exit status 1 if none of the keys did.
    """
    with open_registry(registry) as opened:
        version = opened.find(reference)
        signer = opened.signatures.verify(version, public_key)
    if as_json:
        print_json({**version_json(version), "signed_by": str(signer)})
    else:
        print(f"{version.name}@{version.number} is signed by {signer}")


def copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help="The registry to copy.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="A new one, or a copy begun.")],
    as_json: AsJson = False,
) -> None:
    """Copy a whole registry to another place.

    A directory to Postgres and a bucket, back, or to another directory.

    FROM and TO are each a DIRECTORY or DATABASE,BLOBS: two URLs with a comma between. Numbers,
    digests, aliases, their history and the events stay what they are. Every blob is verified as
    it is read and once more at the end. Started again after an interruption, it goes on.

    FROM may be in use meanwhile; what is published after the copy began may be missing in it.
    A password belongs into PGPASSWORD or ~/.pgpass, not into the URL.

    \b
    manylora registry copy registry \\
        postgresql+psycopg://manylora@db/adapters,s3://adapters/production
    manylora registry copy postgresql+psycopg://manylora@db/adapters,s3://adapters/production backup
    """
    from manylora_registry.transfer import copy_registry

    if _place(source) == _place(target):
        raise typer.BadParameter("FROM and TO are the same registry", param_hint="'TO'")
    with (
        _named(source, create=False) as opened,
        _named(target, create=True) as into,
        progress_of_blobs() as progress,
    ):
        report = copy_registry(opened, into, progress)
    if as_json:
        print_json(
            {
                "ok": report.ok,
                "versions": report.versions,
                "blobs": report.blobs,
                "size": report.size,
                "moves": report.moves,
                "problems": [str(problem) for problem in report.problems],
            }
        )
    else:
        for problem in report.problems:
            print(f"damaged: {problem}")
        print(
            f"{report.versions} versions, {report.blobs} blobs ({size_text(report.size)}), "
            f"{report.moves} alias moves copied: {'verified' if report.ok else 'DAMAGED'}"
        )
    if not report.ok:
        raise typer.Exit(1)


def _named(text: str, *, create: bool) -> "Registry":
    from manylora_registry import Registry

    directory, database, blobs = _parts(text)
    return Registry.open(directory, database=database, blobs=blobs, create=create)


def _place(text: str) -> tuple[Any, str]:
    """Where database and blobs are, of a directory by whatever name."""
    from manylora_registry.location import locate

    directory, database, blobs = _parts(text)
    found = locate(directory and os.path.realpath(directory), database, blobs)
    return found.database, found.blobs


def _parts(text: str) -> tuple[str | None, str | None, str | None]:
    """Directory, database and blobs, of DIRECTORY or DATABASE,BLOBS."""
    database, comma, blobs = text.partition(",")
    if comma and "://" in database and "://" in blobs:
        return None, database, blobs
    return text, None, None


def _format(text: str) -> "Format":
    match text:
        case "peft" | "hf" | "oci" | "tar":
            return text
        case _:
            raise typer.BadParameter(
                f"{text!r} is none of peft, hf, oci, tar", param_hint="'--format'"
            )


def _status(what: str) -> Any:
    """Says on a terminal what takes its time."""
    from rich.console import Console

    return Console(stderr=True).status(what)


def _described(found: "VersionDiff") -> list[tuple[str, Mapping[str, tuple[Any, Any]]]]:
    return [
        ("", found.identity),
        ("config", found.config),
        ("metric", found.metrics),
        ("tag", found.tags),
        ("lineage", found.lineage),
    ]


def _diff_json(found: "VersionDiff") -> dict[str, Any]:
    kinds = ("identity", "config", "metrics", "tags", "lineage")
    changes = dict(zip(kinds, (changes for _, changes in _described(found)), strict=True))
    return {
        "before": version_json(found.before),
        "after": version_json(found.after),
        **{
            kind: {key: {"before": old, "after": new} for key, (old, new) in pairs.items()}
            for kind, pairs in changes.items()
        },
        "modules": [_module_json(module) for module in found.modules],
    }


def _module_json(module: "ModuleChange") -> dict[str, Any]:
    return {
        "module": module.module,
        "before": module.before,
        "after": module.after,
        "change": module.change,
        "relative": module.relative,
    }


def _total(found: "VersionDiff") -> str:
    """How far all modules moved together."""
    before = math.hypot(*(module.before for module in found.modules))
    changes = [module.change for module in found.modules]
    if None in changes or not before:
        return "the shapes of some do, too" if None in changes else "the first one changes nothing"
    change = math.hypot(*(change for change in changes if change is not None))
    return f"all weights together moved by {change / before:.1%} of their norm"


def _shown(value: Any) -> str:
    import json

    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
