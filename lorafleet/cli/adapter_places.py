"""Where ``lorafleet adapter …`` works: on a registry that this machine reaches, or on a server's, over gRPC.

Both do the same things and give the same rows, which are what ``--json`` prints.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from lorafleet.cli import connection, stores

if TYPE_CHECKING:
    from lorafleet.adapters_client import AdapterClient, Progress, RemoteVersion
    from lorafleet.registry import Registry
    from lorafleet.registry.records import Version

Row = dict[str, Any]


class Adapters(Protocol):
    """What the commands do, wherever that is."""

    def import_(self, name: str, folder: Path, *, base: str | None, licence: str, base_licence: str) -> Row: ...

    def versions(self, tenant: str | None) -> list[Row]: ...

    def show(self, reference: str) -> Row: ...

    def export(self, reference: str, out: Path) -> Row: ...

    def promote(self, reference: str, alias: str, *, force: bool) -> Row: ...

    def rollback(self, tenant: str, adapter: str, alias: str) -> Row: ...

    def retire(self, reference: str) -> Row: ...

    def quarantine(self, reference: str) -> Row: ...

    def restore(self, reference: str) -> Row: ...

    def evaluate(self, reference: str, *, loss: float, tokens: int) -> Row: ...


class LocalAdapters:
    """On a registry; ``by`` goes into its audit."""

    def __init__(self, registry: Registry, by: str) -> None:
        self._registry, self._by = registry, by

    def import_(self, name: str, folder: Path, *, base: str | None, licence: str, base_licence: str) -> Row:
        if base is None:
            raise typer.BadParameter("--base is needed: without a server nobody knows what the adapter is for")
        tenant, adapter = stores.adapter_name(name)
        record = stores.register_base(self._registry, base, licence=base_licence)
        card = _read_card(folder)
        version = self._registry.import_version(
            tenant, adapter, folder, base=record.digest, licence=licence, card=card, by=self._by
        )
        return _row(version)

    def versions(self, tenant: str | None) -> list[Row]:
        if tenant is None:
            raise typer.BadParameter("--tenant is needed with --registry: whose adapters?")
        rows = []
        for adapter in self._registry.adapters(tenant):
            aliases = self._registry.aliases(tenant, adapter.name)
            for version in self._registry.versions(tenant, adapter.name):
                rows.append({**_row(version), "aliases": _names(aliases, version)})
        return rows

    def show(self, reference: str) -> Row:
        registry = self._registry
        version = registry.resolve(reference)
        return {
            **_row(version),
            "base_licence": registry.base(version.base_digest).licence,
            "aliases": self._aliases(version),
            "parents": _parents(version),
            "evaluations": registry.evaluations(version),
            "card": registry.card(version),
        }

    def export(self, reference: str, out: Path) -> Row:
        from lorafleet.adapters.format import CARD_NAME

        version = self._registry.resolve(reference)
        self._registry.load(version).save(out)
        (out / CARD_NAME).unlink(missing_ok=True)  # an earlier version's: it would be taken for this one's
        if card := self._registry.card(version):
            (out / CARD_NAME).write_bytes(card.encode())
        return {"reference": version.reference, "digest": version.digest, "folder": str(out)}

    def promote(self, reference: str, alias: str, *, force: bool) -> Row:
        registry = self._registry
        done = registry.promote(registry.resolve(reference), alias, force=force, by=self._by)
        return {"reference": done.version.reference, **done._asdict()} | {"version": done.version.number}

    def rollback(self, tenant: str, adapter: str, alias: str) -> Row:
        number = self._registry.rollback(tenant, adapter, alias, by=self._by)
        return {"reference": f"{tenant}/{adapter}:{number}", "alias": alias}

    def retire(self, reference: str) -> Row:
        return _row(self._registry.retire(self._numbered(reference), by=self._by))

    def quarantine(self, reference: str) -> Row:
        changed, aliases = self._registry.quarantine(self._numbered(reference), by=self._by)
        return {**_row(changed), "aliases": aliases}

    def restore(self, reference: str) -> Row:
        return _row(self._registry.restore(self._numbered(reference), by=self._by))

    def evaluate(self, reference: str, *, loss: float, tokens: int) -> Row:
        version = self._numbered(reference)
        self._registry.evaluate(version, loss=loss, tokens=tokens, by=self._by)
        return {"reference": version.reference, "loss": loss, "tokens": tokens}

    def _numbered(self, reference: str) -> Version:
        """In whatever state."""
        from lorafleet.registry.references import parse_reference

        parsed = parse_reference(reference)
        assert parsed.number is not None, "commands check that first, wherever they work"
        return self._registry.version(parsed.tenant, parsed.adapter, parsed.number)

    def _aliases(self, version: Version) -> list[str]:
        return _names(self._registry.aliases(version.tenant, version.adapter), version)


class RemoteAdapters:
    """On a server, as the tenant of an API key."""

    def __init__(self, client: AdapterClient) -> None:
        self._client = client

    def import_(self, name: str, folder: Path, *, base: str | None, licence: str, base_licence: str) -> Row:
        if base_licence:
            raise typer.BadParameter("--base-licence is for --registry: a server's bases are its operator's")
        known_as = "" if base is None else _checked_base(base, folder)
        with _bar(f"sending {folder.name}") as progress:
            return _row(self._client.upload(name, folder, base=known_as, licence=licence, progress=progress))

    def versions(self, tenant: str | None) -> list[Row]:
        adapters = self._client.adapters(tenant or "")
        return [
            {**_row(version), "aliases": version.aliases}
            for adapter in adapters
            for version in self._client.versions(adapter.name)
        ]

    def show(self, reference: str) -> Row:
        found = self._client.version(reference)
        return {
            **_row(found.version),
            "base_licence": found.base_licence,
            "aliases": list(found.version.aliases),
            "parents": _parents(found.version),
            "evaluations": list(found.evaluations),
            "card": found.card,
        }

    def export(self, reference: str, out: Path) -> Row:
        with _bar(f"fetching {reference}") as progress:
            version = self._client.download(reference, out, progress=progress)
        return {"reference": version.reference, "digest": version.digest, "folder": str(out)}

    def promote(self, reference: str, alias: str, *, force: bool) -> Row:
        done = self._client.promote(reference, alias, force=force)
        said = {field.name: getattr(done, field.name) for field in fields(done)}
        return {"reference": done.version.reference, **said} | {"version": done.version.number}

    def rollback(self, tenant: str, adapter: str, alias: str) -> Row:
        number = self._client.rollback(f"{tenant}/{adapter}", alias)
        return {"reference": f"{tenant}/{adapter}:{number}", "alias": alias}

    def retire(self, reference: str) -> Row:
        return _row(self._client.retire(reference))

    def quarantine(self, reference: str) -> Row:
        done = self._client.quarantine(reference)
        return {**_row(done.version), "aliases": done.aliases}

    def restore(self, reference: str) -> Row:
        return _row(self._client.restore(reference))

    def evaluate(self, reference: str, *, loss: float, tokens: int) -> Row:
        self._client.evaluate(reference, loss=loss, tokens=tokens)
        return {"reference": reference, "loss": loss, "tokens": tokens}


@dataclass(frozen=True)
class Place:
    """The options that say where a command works, as they were given."""

    registry: Annotated[
        str | None, typer.Option("--registry", metavar="URL", help="sqlite:///FILE or postgresql://USER@HOST/DATABASE.")
    ] = None
    blobs: Annotated[str | None, typer.Option("--blobs", metavar=stores.BLOBS_METAVAR, help=stores.BLOBS_HELP)] = None
    server: Annotated[
        str | None,
        typer.Option("--server", metavar="HOST:PORT", help="A server's gRPC address, instead of a registry."),
    ] = None
    api_key: connection.ApiKey = None
    api_key_file: connection.ApiKeyFile = None
    tls_ca: connection.TlsAuthority = None
    tls_cert: connection.TlsCertificate = None
    tls_key: connection.TlsKey = None
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="How long each call to a server may take.")
    ] = 120.0

    @contextmanager
    def open(self, *, by: str | None = None) -> Iterator[Adapters]:
        """The registry, or the connection; a usage error unless the options name one of the two."""
        if (self.server is None) == (self.registry is None) or (self.registry is None) != (self.blobs is None):
            raise typer.BadParameter("give --registry and --blobs, or --server")
        if self.registry is not None and self.blobs is not None:
            from lorafleet.registry import Registry

            with Registry.open(self.registry, self.blobs) as registry:
                yield LocalAdapters(registry, stores.operator(by))
            return
        assert self.server is not None
        if by is not None:
            raise typer.BadParameter("--by is for --registry: a server's audit has the id of the key")
        with connection.adapter_client(
            self.server,
            api_key=self.api_key,
            api_key_file=self.api_key_file,
            tls_ca=self.tls_ca,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            timeout=self.timeout,
        ) as client:
            yield RemoteAdapters(client)


def with_place(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command Place's options, in the place of its parameter ``place``."""
    signature = inspect.signature(command, eval_str=True)
    options = inspect.signature(Place, eval_str=True).parameters
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "place"]
    parameters += options.values()

    @functools.wraps(command)
    def run(**said: Any) -> None:
        place = Place(**{name: said.pop(name) for name in options})
        command(**said, place=place)

    # What Typer reads; keywords, as an option with a default may stand before one without.
    shown = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def _row(version: Version | RemoteVersion) -> Row:
    made = version.lineage
    lineage = None
    if made is not None:
        lineage = {name: getattr(made, name) for name in ("federation", "round", "rule", "parent_count", "members")}
    return {
        "reference": version.reference,
        "digest": version.digest,
        "base": version.base_digest,
        "rank": version.rank,
        "parameters": version.parameters,
        "state": version.state,
        "created_at": version.created_at,
        "licence": version.licence,
        "lineage": lineage,
    }


def _parents(version: Version | RemoteVersion) -> list[str]:
    """Digests of what it was made of; a row of a list has their number only, as they may be 10,000."""
    return [] if version.lineage is None else list(version.lineage.parents)


def _names(aliases: Mapping[str, int], version: Version) -> list[str]:
    """Those of its adapter's that stand for a version."""
    return [alias for alias, number in aliases.items() if number == version.number]


def _checked_base(base: str, folder: Path) -> str:
    """The digest of a base that is on this machine, once the adapter is known to fit it; else the name as it is."""
    from lorafleet.errors import NotFoundError

    try:
        from lorafleet.assets import describe_base

        found = describe_base(base)
    except NotFoundError:
        return base
    from lorafleet.adapters.base_shapes import base_shapes, check_module_fits
    from lorafleet.adapters.streaming import AdapterReader

    known = base_shapes(found.path)
    for path, shape in AdapterReader(folder).shapes.items():  # of headers: the server reads the values
        check_module_fits(path, shape.d_out, shape.d_in, known)
    return found.digest


@contextmanager
def _bar(words: str) -> Iterator[Progress | None]:
    """A bar of bytes on stderr; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(words, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _read_card(folder: Path) -> str:
    """A folder's README.md, byte for byte; empty where there is none."""
    from lorafleet.adapters.format import CARD_NAME
    from lorafleet.errors import InvalidInputError
    from lorafleet.registry.cards import LONGEST

    path = folder / CARD_NAME
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        read = file.read(LONGEST + 1)
    try:
        # What is too long may be cut within a character, and is refused for its length.
        return read.decode() if len(read) <= LONGEST else read.decode("utf-8", "replace")
    except UnicodeDecodeError:
        raise InvalidInputError(f"{path} is not UTF-8; convert it, or move it away") from None
