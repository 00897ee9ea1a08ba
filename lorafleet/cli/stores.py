"""What several commands share: opening a registry, registering a base, reading NAME=VALUE arguments."""

from __future__ import annotations

import getpass
import re
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorafleet.registry import Registry
    from lorafleet.registry.records import Base

RegistryUrl = Annotated[
    str, typer.Option("--registry", metavar="URL", help="sqlite:///FILE or postgresql://USER@HOST/DATABASE.")
]
BLOBS_METAVAR = "DIR|URL"
BLOBS_HELP = "The registry's weights: a folder, or s3://BUCKET/PREFIX (gs://, az://)."
BlobFolder = Annotated[str, typer.Option("--blobs", metavar=BLOBS_METAVAR, help=BLOBS_HELP)]


TenantName = Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose.")]
By = Annotated[str | None, typer.Option(metavar="NAME", help="Who does it, for the audit. (default: your user's name)")]

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def operator(by: str | None) -> str:
    """Who does it: the name given, or that of the user of this process."""
    if by is not None:
        return by
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return ""


def seconds(option: str, duration: str) -> int:
    """``30d`` → 2592000; a usage error where it is no whole number above 0 with a unit."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhdw])", duration)
    if found is None:
        raise typer.BadParameter(f"{option}: found {duration!r}, expected a number with s, m, h, d or w, such as 30d")
    return int(found[1]) * _UNITS_S[found[2]]


def adapter_name(text: str) -> tuple[str, str]:
    """Tenant and adapter of ``TENANT/ADAPTER``; a usage error for an alias or a version."""
    from lorafleet.registry.references import parse_reference

    reference = parse_reference(text)
    if reference.alias or reference.number:
        raise typer.BadParameter(f"found {text!r}, expected TENANT/ADAPTER, without an alias or a version")
    return reference.tenant, reference.adapter


def register_base(registry: Registry, name_or_path: str, *, licence: str = "") -> Base:
    """The base's record; the base is registered where it is new, and a licence where there was none."""
    from lorafleet.adapters.base_shapes import base_shapes
    from lorafleet.assets import describe_base

    found = describe_base(name_or_path)
    return registry.register_base(
        found.name,
        found.digest,
        architecture=found.architecture,
        parameters=found.parameters,
        licence=licence,
        shapes=base_shapes(found.path),
    )


def named_values(arguments: list[str], *, form: str) -> list[tuple[str, str]]:
    """Splits ``NAME=VALUE`` arguments; a usage error says the form that was expected."""
    pairs: list[tuple[str, str]] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"found {argument!r}, expected {form}")
        pairs.append((name, value))
    return pairs
