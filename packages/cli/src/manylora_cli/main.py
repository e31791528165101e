"""The `manylora` command.

Every verb is a module of this package that imports what it needs when it runs, so that `--help`
and a wrong word on the command line answer at once.
"""

import atexit
import gc
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import version as installed
from typing import Annotated

import typer

from manylora_cli import (
    adapters,
    base,
    evaluate,
    generate,
    health,
    publish,
    registry,
    rollout,
    runs,
    serve,
    sweep,
    token,
    train,
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"manylora {installed('manylora')}")
        raise typer.Exit


app = typer.Typer(
    name="manylora",
    help="Train many LoRA adapters over one base model, version them, serve them all from it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_say_version
        ),
    ] = False,
) -> None:
    """Takes the options that belong to no verb."""


app.command("train")(train.train)
app.command("sweep")(sweep.sweep)
app.command("publish")(publish.publish)
app.add_typer(registry.app, name="registry")
app.command("serve")(serve.serve)
app.command("generate")(generate.generate)
app.command("health")(health.health)
app.command("adapters")(adapters.adapters)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(runs.app, name="runs")
app.command("token")(token.token)
app.add_typer(rollout.app, name="rollout")
app.add_typer(base.app, name="base")


def main() -> None:
    """Runs the command; a stated failure is one line on stderr and exit status 1."""
    # gRPC says on stderr, in lines of its own, what our errors say.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # None where the caller has closed it, as `>&-` does: nobody reads.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    if (reconfigure := getattr(sys.stdout, "reconfigure", None)) is not None:
        # What data or a path holds and the encoding of a terminal lacks; in JSON an escape too.
        reconfigure(errors="backslashreplace")
    # At its end the interpreter looks for cycles again and again among all that torch and others
    # have defined: 2 s of a processor behind the result, and a minute where it is shared by many.
    atexit.register(gc.freeze)
    with one_line("manylora", is_stated):
        app()


@contextmanager
def one_line(program: str, stated: Callable[[Exception], bool]) -> Generator[None]:
    """Ends `program` with one line on stderr and exit status 1 for an error that is `stated`."""
    try:
        yield
    except BrokenPipeError:
        # The reader of a pipe left; the interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        # Of the machine and not of the program: a full disk, a file nobody may read.
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"{program}: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if not stated(error):
            raise
        # Spaces stay as they are: they may be part of a path.
        print(f"{program}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(1)


def is_stated(error: Exception) -> bool:
    """Whether `error` is one of our packages' own, written for the user.

    Told by where its class is defined: importing every package's errors here would cost the
    start of every verb.
    """
    package, _, module = type(error).__module__.partition(".")
    return package.startswith("manylora_") and module == "errors"
