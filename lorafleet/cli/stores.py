"""What several commands share: opening a registry, registering a base, reading NAME=VALUE arguments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.errors import NotFoundError

if TYPE_CHECKING:
    from lorafleet.adapters import LoraAdapter
    from lorafleet.registry import Registry
    from lorafleet.registry.records import Base, Version

RegistryUrl = Annotated[
    str, typer.Option("--registry", metavar="URL", help="sqlite:///FILE or postgresql://USER@HOST/DATABASE.")
]
BlobFolder = Annotated[
    Path, typer.Option("--blobs", metavar="DIR", help="The folder that holds the registry's weights.")
]


def register_base(registry: Registry, name_or_path: str) -> Base:
    """The base's record; the base is registered where it is new."""
    from lorafleet.assets import describe_base

    found = describe_base(name_or_path)
    return registry.register_base(
        found.name, found.digest, architecture=found.architecture, parameters=found.parameters
    )


def import_weights(
    registry: Registry, tenant: str, name: str, weights: LoraAdapter, *, base: Base, base_folder: str, licence: str = ""
) -> Version:
    """The next version of an adapter, which is made where it is new; BaseMismatchError where it is for another base."""
    from lorafleet.adapters.base_shapes import base_shapes, check_fits
    from lorafleet.assets import base_path

    check_fits(weights, base_shapes(base_path(base_folder)))
    try:
        adapter = registry.adapter(tenant, name)
    except NotFoundError:
        adapter = registry.create_adapter(tenant, name, base=base.digest)
    return registry.add_version(tenant, adapter.name, weights, licence=licence)


def named_values(arguments: list[str], *, form: str) -> list[tuple[str, str]]:
    """Splits ``NAME=VALUE`` arguments; a usage error says the form that was expected."""
    pairs: list[tuple[str, str]] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"found {argument!r}, expected {form}")
        pairs.append((name, value))
    return pairs
