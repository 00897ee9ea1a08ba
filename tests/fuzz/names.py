"""Hostile names at every place where a name comes in: nothing outside of the registry's folder is read or written.

::

    python -m tests.fuzz.names --cases 10000 [--seed N] [--registry postgresql://…/EMPTY]

Names are drawn of what escapes elsewhere: ways up, absolute paths (of a file that lies beside the registry, and of a
whole adapter there), encodings of both, URLs, NUL, line ends, halves of surrogate pairs, digests with paths in them,
and any text. They go in as names, references, digests, tokens, paths and fields of the registry's methods, of the
command line in this process, of HTTP's paths and bodies, and of every string of every message of the gRPC services.

Python reports each file that it opens, lists, makes, renames or removes to a hook (PEP 578), in all threads. Beyond the
registry's folder only code may be read. What libraries open without Python (safetensors, SQLite) is not reported; they
are given paths that Python made. Errors have to be of the package's own kinds, and no answer is an internal error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from typer.testing import CliRunner

from lorafleet.cli import app
from lorafleet.engine import Engine
from lorafleet.errors import LorafleetError
from lorafleet.registry import Quota, Registry, UpdateRecord, schema
from lorafleet.registry.references import parse_reference
from lorafleet.router_service.server import Server, ServerConfig
from tests.registry.conftest import make_adapter
from tests.router_service.models import random_adapter, write_base

SECRET = "what nobody may see"
SERVICES = ("lorafleet.router.v1.RouterService", "lorafleet.registry.v1.AdapterService")


# What is watched


_PATHS = {
    "open": 1, "os.listdir": 1, "os.scandir": 1, "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1,
    "os.link": 2, "os.symlink": 2, "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "sqlite3.connect": 1,
    "shutil.rmtree": 1, "shutil.move": 2, "shutil.copyfile": 2, "tempfile.mkstemp": 1, "tempfile.mkdtemp": 1,
}  # fmt: skip
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen")
_MIGRATIONS = Path(schema.__file__).parent / "migrations"
"""Looked through each time that a registry is opened."""
_CODE = re.compile(r".*\.(py|pyc|pyi|so[.0-9]*)(\.\d+)?")


class Watch:
    """What Python does to files while it is on, in all threads but the one that draws the names, and in that one while
    a name is tried. A hook cannot be taken away, so that there is one for the process.
    """

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.escapes: list[str] = []
        self._hooked = False
        self._passed_over = threading.local()

    @contextmanager
    def on(self, inside: Path) -> Iterator[None]:
        if not self._hooked:
            sys.addaudithook(self._heard)
            self._hooked = True
        self._passed_over.here = True
        self.inside, self.escapes = inside, []
        try:
            yield
        finally:
            self.inside = None

    @contextmanager
    def trying(self) -> Iterator[None]:
        self._passed_over.here = False
        try:
            yield
        finally:
            self._passed_over.here = True

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None or getattr(self._passed_over, "here", False):
            return
        self._passed_over.here = True  # what follows is the watch's own
        try:
            if event in _PROGRAMS:
                self.escapes.append(f"{event} {arguments!r}")
            for path in arguments[: _PATHS.get(event, 0)]:
                if not isinstance(path, int) and path is not None and not self._is_fine(event, os.fsdecode(path)):
                    self.escapes.append(f"{event} {path!r}")
        finally:
            self._passed_over.here = False

    def _is_fine(self, event: str, path: str) -> bool:
        assert self.inside is not None
        full = os.path.abspath(path)
        if Path(full).is_relative_to(self.inside):
            return True
        if event == "os.scandir" and Path(full).is_relative_to(_MIGRATIONS):
            return True
        return event == "open" and (bool(_CODE.fullmatch(full)) or full.startswith(("/proc/", "/dev/", "/sys/")))


WATCH = Watch()


# Names


def hostile(outside: Path) -> st.SearchStrategy[str]:
    """Texts that mean a path somewhere, parts of such, and any others."""
    secret, adapter = outside / "secret.txt", outside / "adapter"
    whole = [
        str(secret), str(adapter), f"../{outside.name}/secret.txt", f"../../../../..{secret}", f"file://{secret}",
        f"acme/../{outside.name}", f"acme/sql:1/../../../../{outside.name}/adapter", f"acme/sql@../{outside.name}",
        "sha256:" + f"../../../../{outside.name}/adapter".ljust(64, "/"), "sha256:" + "0" * 64, "sha256:" + "A" * 64,
        "sha256:../" + "a" * 61, "s3://bucket/key", "http://127.0.0.1:1/x", "acme/sql", "acme/sql:1",
        "acme/sql@champion", "acme/sql:0", "acme/sql:-1", "acme/sql:" + "9" * 30, "acme/sql:1\n", "\ud800",
        "a" * 100_000, "é/…", "CON",
        "$(touch x)", "`id`", "'; DROP TABLE tenants; --", "{0.__class__}", "%s%n", "", " ", ".", "..", "/", "~",
        "~root", "--help", "-x", "\x00", "acme\x00/sql", "acme/sql\x00.toml", "．．/", "\u202eacme",
    ]  # fmt: skip
    pieces = [
        "..", "/", "\\", "../", "..\\", "%2e%2e%2f", "%2f", "%00", "%", "\x00", "\n", "\r\n", "~", "//", "/./", ":",
        "@", "acme", "sql", "sha256:", "lf_", "lfi_", "_", "a", "0", " ", "\ud83d", "é", outside.name, "secret.txt",
        "adapter_config.json", "incoming", "pepper", "registry.db",
    ]  # fmt: skip
    joined = st.lists(st.sampled_from(pieces), min_size=1, max_size=12).map("".join)
    anything = st.text(st.characters(), max_size=40)
    named = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
    return st.one_of(st.sampled_from(whole), joined, joined, anything, named)


# Where they go


@dataclass(frozen=True)
class Site:
    """A registry with one tenant and adapter, served; and beside its folder, what must not be reached."""

    folder: Path
    url: str
    registry: Registry
    server: Server
    token: str

    @property
    def options(self) -> list[str]:
        return ["--registry", self.url, "--blobs", str(self.folder / "blobs")]


@contextmanager
def site(url: str | None) -> Iterator[tuple[Site, Path]]:
    """The site, and the folder beside it; ``url`` is of an empty database, SQLite's unless it is given."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorafleet-names-")))
        inside, outside = made / "registry", made / "outside"
        outside.mkdir()
        (outside / "secret.txt").write_text(SECRET)
        base = write_base(made / "base")
        weights = random_adapter(base, rank=2, seed=0)
        weights.save(outside / "adapter")
        url = url or f"sqlite:///{inside / 'registry.db'}"
        registry = stack.enter_context(Registry.open(url, inside / "blobs"))
        engine = stack.enter_context(Engine.load(base, dtype="float32", max_sequences=4, max_batch_tokens=64))
        registry.register_base("small", engine.base_digest, architecture="L", parameters=1)
        registry.create_tenant("acme")
        registry.create_adapter("acme", "sql", base="small")
        registry.add_version("acme", "sql", weights)
        registry.create_federation("acme", "fed", base="small", settings={})
        token = registry.create_key("acme", scopes=("admin",)).token
        server = Server(
            engine, registry, ServerConfig(http_address="127.0.0.1:0", drain_s=0.0, uploads=inside / "uploads")
        )
        server.start()
        stack.callback(server.stop)
        yield Site(inside, url, registry, server, token), outside


Target = Callable[[Site, str, str], None]
"""Takes two names; raises AssertionError where the answer is none that it may be."""


def _method(call: Callable[[Registry, str, str], object]) -> Target:
    def target(site: Site, one: str, other: str) -> None:
        with suppress(LorafleetError):
            call(site.registry, one, other)

    return target


def _update(one: str, other: str) -> UpdateRecord:
    return UpdateRecord(one, 1, False, other, "", 1, 1, 1, {}, None)


REGISTRY: dict[str, Callable[[Registry, str, str], object]] = {
    "create_tenant": lambda r, one, _: r.create_tenant(one, by=_),
    "tenant": lambda r, one, _: r.tenant(one),
    "register_base": lambda r, one, other: r.register_base(one, other, architecture=one, parameters=1, licence=other),
    "base": lambda r, one, _: r.base(one),
    "create_adapter": lambda r, one, other: r.create_adapter("acme", one, base=other),
    "create_adapter on a base": lambda r, one, other: r.create_adapter(one, other, base="small"),
    "adapter": lambda r, one, other: r.adapter(one, other),
    "adapters": lambda r, one, _: r.adapters(one),
    "add_version": lambda r, one, other: r.add_version("acme", one, make_adapter(0), licence=other, card=other),
    "versions": lambda r, one, other: r.versions(one, other),
    "version": lambda r, one, other: r.version(one, other, 1),
    "set_alias": lambda r, one, other: r.set_alias("acme", "sql", one, 1, by=other),
    "aliases": lambda r, one, other: r.aliases(one, other),
    "promote": lambda r, one, other: r.promote(r.resolve("acme/sql"), one, force=True, by=other),
    "rollback": lambda r, one, other: r.rollback("acme", one, other),
    "resolve": lambda r, one, _: r.resolve(one),
    "parse_reference": lambda _r, one, _: parse_reference(one),
    "load_digest": lambda r, one, _: r.load_digest(one),
    "live": lambda r, one, _: r.live(one),
    "grant": lambda r, one, other: r.grant("acme", "sql", to=one, by=other),
    "revoke_grant": lambda r, one, other: r.revoke_grant(one, other, to=one),
    "grants": lambda r, one, other: r.grants(one, other),
    "create_key": lambda r, one, other: r.create_key("acme", name=one, scopes=[other], by=one),
    "add_key": lambda r, one, other: r.add_key("acme", one, name=other),
    "keys": lambda r, one, _: r.keys(one),
    "revoke_key": lambda r, one, other: r.revoke_key("acme", one, by=other),
    "authenticate": lambda r, one, _: r.authenticate(one),
    "set_quota": lambda r, one, other: r.set_quota(one, Quota(), by=other),
    "quota": lambda r, one, _: r.quota(one),
    "lease_usage": lambda r, one, _: r.lease_usage(one, requests=1, tokens=1),
    "usage": lambda r, one, _: r.usage(one),
    "audit": lambda r, one, _: r.audit(one),
    "create_federation": lambda r, one, other: r.create_federation("acme", one, base="small", settings={"a": other}),
    "create_federation by": lambda r, one, other: r.create_federation("acme", one, base="small", settings={}, by=other),
    "federation": lambda r, one, other: r.federation(one, other),
    "set_federation_state": lambda r, one, other: r.set_federation_state(
        r.federation("acme", "fed"), "active", by=one, reason=other
    ),
    "add_member": lambda r, one, other: r.add_member(r.federation("acme", "fed"), one, tenant="acme", public_key=other),
    "add_member by": lambda r, one, other: r.add_member(r.federation("acme", "fed"), one, tenant="acme", by=other),
    "revoke_member": lambda r, one, other: r.revoke_member(r.federation("acme", "fed"), one, by=other),
    "invite": lambda r, one, _: r.invite(r.federation("acme", "fed"), tenant=one, for_s=1.0),
    "invite by": lambda r, one, _: r.invite(r.federation("acme", "fed"), tenant="acme", for_s=1.0, by=one),
    "accept_invitation": lambda r, one, other: r.accept_invitation(one, key=other, public_key=one),
    "accept_invitation as": lambda r, one, other: r.accept_invitation(
        r.invite(r.federation("acme", "fed"), tenant="acme", for_s=1.0).token, key=one, by=other
    ),
    "withdraw_invitation": lambda r, one, other: r.withdraw_invitation(r.federation("acme", "fed"), one, by=other),
    "take_lease": lambda r, one, _: r.take_lease(r.federation("acme", "fed"), one, for_s=1.0),
    "record_update": lambda r, one, other: r.record_update(
        r.open_round(r.federation("acme", "fed"), 1), _update(one, other)
    ),
    "record_evaluation": lambda r, one, _: r.record_evaluation(r.resolve("acme/sql"), member=one, loss=1.0, tokens=1),
}

# Each opens the registry anew, which takes a tenth of a second: a few commands for each kind of argument. The options
# --registry, --blobs, --out, --data and the like mean files of the operator's, and so does what ends with .toml.
COMMANDS = (
    ["adapter", "show", "--", "ONE"], ["adapter", "list", "--tenant", "ONE"], ["adapter", "retire", "--", "ONE"],
    ["adapter", "export", "--out", "OUT", "--", "ONE"], ["adapter", "promote", "--alias", "ONE", "acme/sql:1"],
    ["tenant", "create", "--by", "ONE", "--", "TWO"], ["key", "create", "--tenant", "ONE", "--name", "TWO"],
    ["key", "revoke", "--tenant", "acme", "--", "ONE"], ["grant", "add", "--to", "ONE", "--", "TWO"],
    ["quota", "show", "--tenant", "ONE"], ["audit", "list", "--tenant", "ONE"],
    ["federation", "status", "--", "ONE"], ["federation", "withdraw", "--", "acme/fed", "ONE"],
)  # fmt: skip


def _command(words: list[str]) -> Target:
    def target(site: Site, one: str, other: str) -> None:
        if "federation" in words and one.endswith(".toml"):
            return
        given = {"ONE": one, "TWO": other, "OUT": str(site.folder / "exported")}
        options = [*words[:2], *site.options, *(given.get(word, word) for word in words[2:])]
        done = CliRunner().invoke(app, options, obj=argparse.Namespace(debug=False))
        if done.exception is not None and not isinstance(done.exception, SystemExit | LorafleetError):
            raise AssertionError(f"{options} ended with {done.exception!r}") from done.exception
        assert SECRET not in done.output

    return target


def _http(site: Site, head: str, body: bytes = b"") -> None:
    """One request as bytes, with a key; any answer but an internal error, or none where it is no HTTP."""
    host, _, port = str(site.server.http_address).rpartition(":")
    lines = (
        f"{head} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {site.token}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=60.0) as connection:
        answer = b""
        with suppress(ConnectionError):
            connection.sendall(lines.encode("utf-8", "surrogatepass") + body)
            while found := connection.recv(65536):
                answer += found
    status = re.match(rb"HTTP/1.1 (\d{3})", answer)
    assert status is None or int(status[1]) < 500, answer
    assert SECRET.encode() not in answer


def _mix(site: Site, one: str, other: str) -> None:
    body = {"model": "base", "mix": {one: 1.0, other: 0.5}, "prompt": "a", "max_tokens": 1}
    _http(site, "POST /v1/completions", json.dumps(body).encode())


def _messages() -> Iterator[tuple[str, Descriptor, bool]]:
    """Path, request and whether requests stream, of every method of the services that there are."""
    for service in SERVICES:
        with suppress(KeyError):
            for method in Default().FindServiceByName(service).methods:
                yield f"/{service}/{method.name}", method.input_type, method.client_streaming


def _filled(kind: Descriptor, one: str, other: str, *, depth: int = 0) -> Message:
    """A message with the names in all of its strings, maps and bytes; of a oneof the last member stays."""
    message: Message = message_factory.GetMessageClass(kind)()
    for number, field in enumerate(kind.fields):
        text = (one if number % 2 == 0 else other).encode("utf-8", "replace").decode()
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["key"].type == FieldDescriptor.TYPE_STRING:
                with suppress(TypeError, ValueError):
                    getattr(message, field.name)[text] = 1
        elif field.type == FieldDescriptor.TYPE_MESSAGE and depth < 3:
            below = _filled(field.message_type, one, other, depth=depth + 1)
            if field.is_repeated:
                getattr(message, field.name).add().CopyFrom(below)
            else:
                getattr(message, field.name).CopyFrom(below)
        elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            value = text if field.type == FieldDescriptor.TYPE_STRING else text.encode()
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
    return message


_NOT_TOLD = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}


def _call(path: str, kind: Descriptor, streams: bool) -> Target:
    def target(site: Site, one: str, other: str) -> None:
        with grpc.insecure_channel(site.server.address) as channel:
            metadata = (("authorization", f"Bearer {site.token}"),)
            request = _filled(kind, one, other)
            try:
                if streams:
                    answers = channel.stream_stream(path, lambda m: m.SerializeToString())(
                        iter([request]), metadata=metadata, timeout=60.0
                    )
                else:
                    answers = channel.unary_stream(path, lambda m: m.SerializeToString())(
                        request, metadata=metadata, timeout=60.0
                    )
                assert all(SECRET.encode() not in answer for answer in answers)
            except grpc.RpcError as error:
                assert error.code() not in _NOT_TOLD, error

    return target


def targets() -> dict[str, tuple[Target, int]]:
    """Name → what takes the names, and how often of a hundred draws."""
    found: dict[str, tuple[Target, int]] = {name: (_method(call), 20) for name, call in REGISTRY.items()}
    found |= {" ".join(words[:2]): (_command(list(words)), 1) for words in COMMANDS}
    found |= {
        "GET": (lambda site, one, _: _http(site, f"GET {one}"), 60),
        "a model's path": (lambda site, one, _: _http(site, f"GET /v1/models/{one}"), 60),
        "a method": (lambda site, one, other: _http(site, f"{one} /v1/models{other}"), 20),
        "a header": (lambda site, one, _: _http(site, f"GET /v1/models HTTP/1.1\r\nx-request-id: {one}\r\nx: "), 20),
        "a mix": (_mix, 60),
    }
    found |= {path: (_call(path, kind, streams), 10) for path, kind, streams in _messages()}
    return found


def main(cases: int, *, seed: int, url: str | None = None) -> dict[str, int]:
    """Run so many cases, and give how many each target had; AssertionError, with the names, at the first that fails."""
    counted: dict[str, int] = {}
    with site(url) as (here, outside):
        places = targets()
        chosen = st.sampled_from([name for name, (_, weight) in places.items() for _ in range(weight)])

        def run(place: str, one: str, other: str) -> None:
            with WATCH.trying():
                places[place][0](here, one, other)
            assert WATCH.escapes == [], f"{place} with {one!r} and {other!r}: {WATCH.escapes}"
            counted[place] = counted.get(place, 0) + 1

        for place in places:  # what is imported or opened once, before anybody watches
            places[place][0](here, "acme", "sql")
        before = _listing(outside.parent, here.folder)
        names = hostile(outside)
        tried = given(chosen, names, names)(run)
        checks = list(HealthCheck)
        options = settings(
            max_examples=cases, deadline=None, database=None, suppress_health_check=checks, phases=[Phase.generate]
        )
        with WATCH.on(here.folder):
            seeded(seed)(options(tried))()
        assert _listing(outside.parent, here.folder) == before
    return counted


def _listing(folder: Path, without: Path) -> dict[str, bytes]:
    """Every file of a folder but for those of one below it, with what it holds."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(without))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--registry", metavar="URL", help="of an empty database (default: a SQLite file)")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    found = main(options.cases, seed=options.seed, url=options.registry)
    print(f"{sum(found.values())} cases over {len(found)} places: nothing was reached that is not the registry's")
