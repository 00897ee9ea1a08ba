"""The ``lorafleet`` command. Results go to stdout (one JSON document with ``--json``), everything else to stderr.

Exit status: 0, 1 for an error (one line ``error: …``, below it, indented, what a message quotes, such as the end of a
log), 2 for a wrong command line. The commands import what they need when they run, so that ``--help`` does not wait for
torch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from lorafleet import __version__
from lorafleet.cli import (
    adapters,
    administration,
    audit,
    bench,
    clients,
    federation,
    fleet,
    grants,
    keys,
    proxy,
    quotas,
    requests,
    serving,
)
from lorafleet.errors import LorafleetError


@dataclass
class _Invocation:
    debug: bool = False


app = typer.Typer(
    name="lorafleet",
    help="LoRA experts trained where the data lives, mixed and served to every tenant from one base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorafleet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    context.obj.debug = debug
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if not debug:  # our own words, without those of every library
        logging.getLogger("lorafleet").setLevel(logging.INFO)


app.command()(fleet.demo)
app.command()(serving.serve)
app.command()(serving.openapi)
app.command()(requests.route)
app.command()(requests.generate)
app.command()(fleet.aggregate)
app.add_typer(adapters.app, name="adapter")
app.add_typer(administration.tenants, name="tenant")
app.add_typer(keys.app, name="key")
app.add_typer(grants.app, name="grant")
app.add_typer(quotas.app, name="quota")
app.add_typer(audit.app, name="audit")
app.add_typer(administration.database, name="db")
app.add_typer(bench.app, name="bench")
app.add_typer(clients.app, name="client")
fleet.coordinator.command()(proxy.proxy)
app.add_typer(fleet.coordinator, name="coordinator")
app.add_typer(federation.app, name="federation")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command (of ``sys.argv`` by default) and exits the process with its status."""
    invocation = _Invocation()
    try:
        app(args=None if arguments is None else list(arguments), prog_name="lorafleet", obj=invocation)
    except ModuleNotFoundError as error:
        if invocation.debug or (error.name or "").partition(".")[0] == "lorafleet":
            raise  # a fault of this package, not a missing one
        typer.echo(
            f"error: this command needs {error.name}, which is not installed; in the clone: pip install -e '.[server]' "
            "for a service or a coordinator, '.[client]' for a data owner, '.[tracing]' for traces, '.[demo]' for all",
            err=True,
        )
        sys.exit(1)
    except Exception as error:
        if invocation.debug:
            raise
        typer.echo(_said(error), err=True)
        sys.exit(1)


def _said(error: Exception) -> str:
    """One line ``error: …``; further lines of the message stand below it as they are, indented."""
    first, *quoted = str(error).strip().splitlines() or [""]
    first = " ".join(first.split())
    if not first or not isinstance(error, LorafleetError | OSError):
        first = f"{': '.join(filter(None, (type(error).__name__, first)))} (--debug shows the traceback)"
    return "\n".join([f"error: {first}", *(f"  {line}".rstrip() for line in quoted)])
