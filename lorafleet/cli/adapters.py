"""``lorafleet adapter …``: what a registry holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafleet.cli import stores
from lorafleet.cli.adapter_places import Place, Row, with_place
from lorafleet.cli.output import JsonFlag, print_json, print_table

app = typer.Typer(
    help="Import, list, show and export adapters of a registry, and say which version is used: with --registry and "
    "--blobs on this machine's, with --server on that of a running server.",
    no_args_is_help=True,
)

Reference = Annotated[
    str,
    typer.Argument(
        metavar="TENANT/ADAPTER[@ALIAS|:VERSION]",
        help="Without alias or version: its champion, or its newest usable one.",
    ),
]


Numbered = Annotated[str, typer.Argument(metavar="TENANT/ADAPTER:VERSION", help="The version, in whatever state.")]


@app.command("import")
@with_place
def import_(
    name: Annotated[str, typer.Argument(metavar="TENANT/ADAPTER", help="The name that it gets.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An adapter in PEFT format.")],
    place: Place,
    base: Annotated[
        str | None,
        typer.Option(metavar="PATH|tiny", help="The base that the adapter was trained on. (default: the server's)"),
    ] = None,
    licence: Annotated[str, typer.Option(help="The licence of the weights.")] = "",
    base_licence: Annotated[str, typer.Option(help="The licence of the base, where none is registered yet.")] = "",
    by: stores.By = None,
    json: JsonFlag = False,
) -> None:
    """Add a folder in PEFT format as the next version of an adapter, which is made where it is new.

    The folder's README.md, of up to 64 kB, is kept as the version's model card. To a server the files go in pieces, and
    go on after a lost connection. One that was interrupted goes on where it stopped when the same command is given
    again within a day.
    """
    stores.adapter_name(name)
    with place.open(by=by) as adapters:
        row = adapters.import_(name, folder, base=base, licence=licence, base_licence=base_licence)
    if json:
        print_json(row)
    else:
        typer.echo(f"{row['reference']}  {row['digest']}")


@app.command("list")
@with_place
def list_(
    place: Place,
    tenant: Annotated[
        str | None, typer.Option(help="Whose adapters. (default, with --server: all that the key's tenant may use)")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """List every version of a tenant's adapters."""
    with place.open() as adapters:
        rows = adapters.versions(tenant)
    if json:
        print_json(rows)
    else:
        columns = ["reference", "state", "rank", "parameters", "digest"]
        print_table([*columns, "aliases"], [[*(row[c] for c in columns), ",".join(row["aliases"])] for row in rows])


@app.command()
@with_place
def show(reference: Reference, place: Place, json: JsonFlag = False) -> None:
    """Show one version: what it is, where it comes from, how it was evaluated."""
    with place.open() as adapters:
        shown = adapters.show(reference)
    if json:
        print_json(shown)
        return
    evaluations, card = shown.pop("evaluations"), shown.pop("card")
    shown |= {"aliases": ",".join(shown["aliases"]), "card": f"{len(card)} characters"}
    width = max(map(len, shown))
    for key, value in shown.items():
        typer.echo(f"{key.ljust(width)}  {value if value not in (None, '') else '-'}")
    if evaluations:
        measured = [(e.member or "the tenant itself", e.loss, e.tokens) for e in evaluations]
        print_table(["member", "loss", "tokens"], measured)


@app.command()
@with_place
def export(
    reference: Reference,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    place: Place,
    json: JsonFlag = False,
) -> None:
    """Write a version as a folder in PEFT format, which peft and vLLM read, with its model card as README.md.

    From a server: a version of the key's own tenant.
    """
    with place.open() as adapters:
        row = adapters.export(reference, out)
    if json:
        print_json(row)
    else:
        typer.echo(f"{row['reference']}  {row['digest']}  {out}")


@app.command()
@with_place
def promote(
    reference: Annotated[
        str, typer.Argument(metavar="TENANT/ADAPTER:VERSION|@ALIAS", help="The version that is to be used.")
    ],
    place: Place,
    alias: Annotated[str, typer.Option(help="What it is to be used as.")] = "champion",
    force: Annotated[bool, typer.Option("--force", help="Also where it is not measured to be better.")] = False,
    by: stores.By = None,
    json: JsonFlag = False,
) -> None:
    """Point an alias at a version that is measured to be better than the one that the alias points at.

    Better is a lower median of held-out losses, over those who measured both versions where there are such.
    """
    from lorafleet.registry.references import parse_reference

    parsed = parse_reference(reference)
    if not (parsed.alias or parsed.number):
        raise typer.BadParameter(f"found {reference!r}, expected TENANT/ADAPTER:VERSION or TENANT/ADAPTER@ALIAS")
    with place.open(by=by) as adapters:
        done = adapters.promote(reference, alias, force=force)
    number = done.pop("version")
    if json:
        print_json(done)
    else:
        before = "new" if done["before"] is None else f"before: version {done['before']}"
        typer.echo(f"{parsed.tenant}/{parsed.adapter}@{alias}  version {number} ({before})")


@app.command()
@with_place
def rollback(
    name: Annotated[
        str, typer.Argument(metavar="TENANT/ADAPTER[@ALIAS]", help="Which alias; its champion without one.")
    ],
    place: Place,
    by: stores.By = None,
    json: JsonFlag = False,
) -> None:
    """Point an alias where it pointed before; once more, and it goes one move further back."""
    from lorafleet.registry.records import CHAMPION
    from lorafleet.registry.references import parse_reference

    parsed = parse_reference(name)
    if parsed.number:
        raise typer.BadParameter(f"found {name!r}, expected TENANT/ADAPTER or TENANT/ADAPTER@ALIAS")
    alias = parsed.alias or CHAMPION
    with place.open(by=by) as adapters:
        row = adapters.rollback(parsed.tenant, parsed.adapter, alias)
    if json:
        print_json(row)
    else:
        typer.echo(f"{parsed.tenant}/{parsed.adapter}@{alias}  version {row['reference'].rpartition(':')[2]}")


@app.command()
@with_place
def retire(reference: Numbered, place: Place, by: stores.By = None, json: JsonFlag = False) -> None:
    """Take a version that no alias points at out of use; whoever asks for its number still gets it."""
    _check_numbered(reference)
    with place.open(by=by) as adapters:
        row = adapters.retire(reference)
    _print_state(row, json)


@app.command()
@with_place
def quarantine(reference: Numbered, place: Place, by: stores.By = None, json: JsonFlag = False) -> None:
    """Stop a version at once, for everybody; aliases that point at it go back to where they pointed before."""
    _check_numbered(reference)
    with place.open(by=by) as adapters:
        row = adapters.quarantine(reference)
    _print_state(row, json)
    if json:
        return
    for alias, number in row["aliases"].items():
        where = "nothing usable before: it answers nothing now" if number is None else f"back to version {number}"
        typer.echo(f"@{alias}  {where}")


@app.command()
@with_place
def restore(reference: Numbered, place: Place, by: stores.By = None, json: JsonFlag = False) -> None:
    """Make a retired or quarantined version usable again."""
    _check_numbered(reference)
    with place.open(by=by) as adapters:
        row = adapters.restore(reference)
    _print_state(row, json)


@app.command()
@with_place
def evaluate(
    reference: Numbered,
    loss: Annotated[float, typer.Option(help="The loss that you measured, in nats per token.")],
    tokens: Annotated[int, typer.Option(min=1, help="Over so many held-out tokens.")],
    place: Place,
    by: stores.By = None,
    json: JsonFlag = False,
) -> None:
    """Record what the tenant itself measured for a version that was imported; the next time replaces it.

    Two versions that the tenant measured on the same texts can be promoted by that, without --force.
    """
    _check_numbered(reference)
    with place.open(by=by) as adapters:
        row = adapters.evaluate(reference, loss=loss, tokens=tokens)
    if json:
        print_json(row)
    else:
        typer.echo(f"{row['reference']}  loss {loss:.4f} over {tokens} tokens")


def _check_numbered(reference: str) -> None:
    from lorafleet.registry.references import parse_reference

    if parse_reference(reference).number is None:
        raise typer.BadParameter(f"found {reference!r}, expected TENANT/ADAPTER:VERSION")


def _print_state(row: Row, json: bool) -> None:
    if json:
        print_json(row)
    else:
        typer.echo(f"{row['reference']}  {row['state']}")
