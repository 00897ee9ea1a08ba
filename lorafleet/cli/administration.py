"""``lorafleet tenant …`` and ``lorafleet db …``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lorafleet.cli import stores
from lorafleet.cli.output import JsonFlag, print_json, print_table

tenants = typer.Typer(help="Create, weigh and list tenants.", no_args_is_help=True)
database = typer.Typer(
    help="Migrate and check a registry's database, and delete weights that nobody needs.", no_args_is_help=True
)


@tenants.command()
def create(
    name: Annotated[str, typer.Argument(help="Its name in requests and in references NAME/ADAPTER.")],
    registry: stores.RegistryUrl,
    blobs: stores.BlobFolder,
    weight: Annotated[float, typer.Option(help="Its fair share relative to other tenants.")] = 1.0,
    by: stores.By = None,
    json: JsonFlag = False,
) -> None:
    """Create a tenant."""
    from lorafleet.registry import Registry

    with Registry.open(registry, blobs) as store:
        tenant = store.create_tenant(name, weight=weight, by=stores.operator(by))
    if json:
        print_json({"name": tenant.name, "weight": tenant.weight, "created_at": tenant.created_at})
    else:
        typer.echo(tenant.name)


@tenants.command()
def weight(
    name: Annotated[str, typer.Argument(help="Whose.")],
    value: Annotated[
        float, typer.Argument(metavar="WEIGHT", help="Its fair share relative to others: twice is twice as much.")
    ],
    registry: stores.RegistryUrl,
    blobs: stores.BlobFolder,
    by: stores.By = None,
    json: JsonFlag = False,
) -> None:
    """Change a tenant's weight; running services follow within a second."""
    from lorafleet.registry import Registry

    with Registry.open(registry, blobs) as store:
        tenant = store.set_tenant_weight(name, value, by=stores.operator(by))
    if json:
        print_json({"name": tenant.name, "weight": tenant.weight, "created_at": tenant.created_at})
    else:
        typer.echo(f"{tenant.name}  {tenant.weight:g}")


@tenants.command("list")
def list_(registry: stores.RegistryUrl, blobs: stores.BlobFolder, json: JsonFlag = False) -> None:
    """List the tenants."""
    from lorafleet.registry import Registry

    with Registry.open(registry, blobs) as store:
        found = store.tenants()
    if json:
        print_json([{"name": t.name, "weight": t.weight, "created_at": t.created_at} for t in found])
    else:
        print_table(["name", "weight"], [(t.name, t.weight) for t in found])


@database.command()
def upgrade(registry: stores.RegistryUrl, json: JsonFlag = False) -> None:
    """Bring a database to this version's tables; creates a SQLite file that is missing."""
    from lorafleet.registry import schema

    revision = schema.upgrade(registry)
    if json:
        print_json({"revision": revision})
    else:
        typer.echo(f"at revision {revision}")


@database.command()
def check(registry: stores.RegistryUrl, json: JsonFlag = False) -> None:
    """Compare a database with this version's tables; exits with 1 where they differ."""
    from lorafleet.registry import schema

    differences = schema.check(registry)
    if json:
        print_json({"ok": not differences, "differences": differences})
    else:
        for line in differences or ["the database is up to date"]:
            typer.echo(line)
    if differences:
        raise typer.Exit(1)


@database.command()
def gc(
    registry: stores.RegistryUrl,
    blobs: stores.BlobFolder,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Spare weights that were stored later than this ago, such as 1h.")
    ] = "1h",
    retired: Annotated[
        str | None,
        typer.Option(
            metavar="AGE",
            help="Also the weights of versions that have been retired or quarantined for so long, such as 30d. Such a "
            "version cannot be restored.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")] = False,
    by: stores.By = None,
    json: JsonFlag = False,
) -> None:
    """Delete weights that no version, alias, update or running engine needs; safe at any time."""
    from lorafleet.registry import Registry

    with Registry.open(registry, blobs) as store:
        found = store.collect_garbage(
            older_than_s=stores.seconds("--older-than", older_than),
            retired_older_than_s=None if retired is None else stores.seconds("--retired", retired),
            dry_run=dry_run,
            by=stores.operator(by),
        )
    if json:
        print_json({"dry_run": dry_run, **asdict(found)})
        return
    for reference in found.purged:
        typer.echo(f"{'would purge' if dry_run else 'purged'} {reference}")
    verb = "would be deleted" if dry_run else "deleted"
    typer.echo(f"{len(found.deleted)} weights, {found.size_bytes / 1e6:.1f} MB, {verb}")
