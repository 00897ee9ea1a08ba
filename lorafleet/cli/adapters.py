"""``lorafleet adapter …``: what a registry holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafleet.cli import stores
from lorafleet.cli.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from lorafleet.registry.records import Version

app = typer.Typer(help="Import, list, show and export adapters of a registry.", no_args_is_help=True)

Reference = Annotated[
    str,
    typer.Argument(
        metavar="TENANT/ADAPTER[@ALIAS|:VERSION]",
        help="Without alias or version: its champion, or its newest usable one.",
    ),
]


@app.command("import")
def import_(
    name: Annotated[str, typer.Argument(metavar="TENANT/ADAPTER", help="The name that it gets.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An adapter in PEFT format.")],
    base: Annotated[str, typer.Option(metavar="PATH|tiny", help="The base that the adapter was trained on.")],
    registry: stores.RegistryUrl,
    blobs: stores.BlobFolder,
    licence: Annotated[str, typer.Option(help="The licence of the weights.")] = "",
    json: JsonFlag = False,
) -> None:
    """Add a folder in PEFT format as the next version of an adapter, which is made where it is new."""
    from lorafleet.adapters import LoraAdapter
    from lorafleet.registry import Registry
    from lorafleet.registry.references import parse_reference

    reference = parse_reference(name)
    if reference.alias or reference.number:
        raise typer.BadParameter(f"found {name!r}, expected TENANT/ADAPTER: the version is the next one")
    with Registry.open(registry, blobs) as store:
        record = stores.register_base(store, base)
        weights = LoraAdapter.load(folder)
        version = stores.import_weights(
            store, reference.tenant, reference.adapter, weights, base=record, base_folder=base, licence=licence
        )
    if json:
        print_json({"reference": version.reference, **_fields(version)})
    else:
        typer.echo(f"{version.reference}  {version.digest}")


@app.command("list")
def list_(
    tenant: Annotated[str, typer.Option(help="Whose adapters.")],
    registry: stores.RegistryUrl,
    blobs: stores.BlobFolder,
    json: JsonFlag = False,
) -> None:
    """List every version of a tenant's adapters."""
    from lorafleet.registry import Registry

    rows = []
    with Registry.open(registry, blobs) as store:
        for adapter in store.adapters(tenant):
            names = store.aliases(tenant, adapter.name)
            for version in store.versions(tenant, adapter.name):
                aliases = [alias for alias, number in names.items() if number == version.number]
                rows.append({"reference": version.reference, **_fields(version), "aliases": aliases})
    if json:
        print_json(rows)
    else:
        columns = ["reference", "state", "rank", "parameters", "digest"]
        print_table([*columns, "aliases"], [[*(row[c] for c in columns), ",".join(row["aliases"])] for row in rows])


@app.command()
def show(reference: Reference, registry: stores.RegistryUrl, blobs: stores.BlobFolder, json: JsonFlag = False) -> None:
    """Show one version: what it is, where it comes from, how members evaluated it."""
    from lorafleet.registry import Registry

    with Registry.open(registry, blobs) as store:
        version = store.resolve(reference)
        shown = {"reference": version.reference, **_fields(version), "evaluations": store.evaluations(version)}
    if json:
        print_json(shown)
        return
    evaluations = shown.pop("evaluations")
    width = max(map(len, shown))
    for key, value in shown.items():
        typer.echo(f"{key.ljust(width)}  {value if value is not None else '-'}")
    if evaluations:
        print_table(["member", "loss", "tokens"], [(e.member, e.loss, e.tokens) for e in evaluations])


@app.command()
def export(
    reference: Reference,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    registry: stores.RegistryUrl,
    blobs: stores.BlobFolder,
    json: JsonFlag = False,
) -> None:
    """Write a version as a folder in PEFT format, which peft and vLLM read."""
    from lorafleet.registry import Registry

    with Registry.open(registry, blobs) as store:
        version = store.resolve(reference)
        store.load(version).save(out)
    if json:
        print_json({"reference": version.reference, "digest": version.digest, "folder": str(out)})
    else:
        typer.echo(f"{version.reference}  {version.digest}  {out}")


def _fields(version: Version) -> dict[str, Any]:
    return {
        "digest": version.digest,
        "base": version.base_digest,
        "rank": version.rank,
        "parameters": version.parameters,
        "state": version.state,
        "created_at": version.created_at,
        "licence": version.licence,
        "lineage": version.lineage,
    }
