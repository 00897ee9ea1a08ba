"""``lorafleet adapter …`` on a registry and on a server: the same commands, the same results, the same registry."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.adapters_client import CHUNK_BYTES
from lorafleet.engine import Engine
from lorafleet.registry.records import NewExpert
from lorafleet.router_service.server import Server, ServerConfig
from tests.relays import Relay
from tests.test_cli import Command, Store, adapters, base, lorafleet
from tests.waiting import wait_until

__all__ = ["adapters", "base", "lorafleet"]


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[Engine]:
    torch.set_num_threads(1)
    with Engine.load(base, dtype="float32", max_sequences=2) as engine:
        yield engine


@pytest.fixture
def local(tmp_path: Path, engine: Engine) -> Store:
    return filled(tmp_path / "local", engine)


@pytest.fixture
def remote(tmp_path: Path, engine: Engine) -> Iterator[Store]:
    """A registry that is reached over a server alone: its options are those of the connection."""
    store = filled(tmp_path / "remote", engine)
    with store.open() as registry:
        key = registry.create_key("acme", scopes=["adapters:read", "adapters:write"]).token
        server = Server(engine, registry, ServerConfig(uploads=tmp_path / "uploads", drain_s=0.0))
        server.start()
        store.options = ["--server", server.address, "--api-key", key]
        yield store
        server.stop()


def filled(folder: Path, engine: Engine) -> Store:
    folder.mkdir()
    store = Store(folder)
    with store.open() as registry:
        registry.create_tenant("acme")
        registry.register_base("small-base", engine.base_digest, architecture="LlamaForCausalLM", parameters=1)
    return store


def life(lorafleet: Command, store: Store, adapters: dict[str, Path], base: Path, out: Path) -> list[Any]:
    """What every command answers, and what the registry holds in the end; without times, and who it was."""
    (adapters["low"] / "README.md").write_bytes("# Größe\r\n".encode())
    with store.open() as registry:
        federation = registry.create_federation("acme", "fed", base="small-base", settings={})
        parents = ("sha256:" + "1" * 64, "sha256:" + "2" * 64)
        expert = NewExpert("shared", LoraAdapter.load(adapters["high"]), rule="exact", parents=parents, members=1)
        registry.commit_round(registry.open_round(federation, 1), [expert], report={})
    said: list[Any] = []

    def run(line: str, *paths: str | Path, status: int = 0) -> None:
        out, err = lorafleet("adapter", *line.split(), *paths, *store.options, status=status)
        # The server of this process writes its log to the same place.
        said.append((out, [told for told in err.splitlines() if told.startswith("error:")]))

    try:
        run("import acme/sql --licence MIT --json", adapters["low"], "--base", base)
        run("import acme/sql", adapters["high"], "--base", base)
        run("promote acme/sql:1 --json")
        run("promote acme/sql:2", status=1)
        run("evaluate acme/sql:1 --loss 2.5 --tokens 100")
        run("evaluate acme/sql:2 --loss 2.25 --tokens 100 --json")
        run("promote acme/sql:2 --json")
        run("promote acme/sql@champion --alias canary")
        run("rollback acme/sql --json")
        run("quarantine acme/sql:2 --json")
        run("show acme/sql:2", status=1)
        run("restore acme/sql:2")
        run("retire acme/sql:1", status=1)
        run("show acme/sql --json")
        run("show acme/sql@canary")
        run("show acme/shared:1")
        run("show acme/shared:1 --json")
        run("list --tenant acme --json")
        run("export acme/sql --json", "--out", out)
    finally:
        (adapters["low"] / "README.md").unlink()
    with store.open() as registry:
        said.append([(e.action, e.subject, e.details) for e in registry.audit("acme") if e.action != "key.create"])
        said.append(registry.aliases("acme", "sql"))
    return said


def timeless(said: Any) -> str:
    return re.sub(r"created_at\W+[0-9.]+", "created_at", json.dumps(said))


def test_every_command_says_and_does_the_same_on_both(
    lorafleet: Command, local: Store, remote: Store, adapters: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    here = life(lorafleet, local, adapters, base, out)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files["README.md"] == "# Größe\r\n".encode()
    for path in out.iterdir():
        path.unlink()
    shown, listed = here[-5][0], here[-4][0]
    assert "1" * 64 in shown and "1" * 64 not in listed and '"parent_count": 2' in listed
    assert '"members": 1' in shown and '"members": 1' in listed
    assert timeless(life(lorafleet, remote, adapters, base, out)) == timeless(here)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert LoraAdapter.load(out).digest == LoraAdapter.load(adapters["low"]).digest


def test_an_import_that_does_not_fit_is_refused_before_anything_is_sent(
    lorafleet: Command, remote: Store, adapters: dict[str, Path]
) -> None:
    command = ("adapter", "import", "acme/low", adapters["low"], "--base", "tiny", *remote.options)
    assert "name the base that it was trained on" in lorafleet(*command, status=1)[1].replace("name its own", "")
    assert lorafleet.json("adapter", "list", *remote.options) == []


@pytest.mark.process
def test_an_import_that_was_killed_goes_on_where_it_stopped(lorafleet: Command, remote: Store, tmp_path: Path) -> None:
    draw, folder = torch.Generator().manual_seed(0), tmp_path / "wide"
    wide = LoraAdapter({"m": LoraPair(torch.randn(4, 2**17, generator=draw), torch.randn(2**17, 4, generator=draw))})
    wide.save(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())  # 4 MiB
    server, options, stored = remote.options[1], remote.options[2:], tmp_path / "uploads"

    def command(relay: Relay) -> list[str]:
        return ["adapter", "import", "acme/sql", str(folder), "--server", relay.address, *options]

    with Relay(server, most=size // 2) as relay:
        client = subprocess.Popen([sys.executable, "-m", "lorafleet.cli", *command(relay)], stderr=subprocess.DEVNULL)
        try:
            assert relay.full.wait(60.0)
            wait_until(lambda: any(path.stat().st_size >= CHUNK_BYTES for path in stored.glob("*/*/files/*")))
        finally:
            client.kill()
            client.wait()
    with remote.open() as registry:
        assert registry.adapters("acme") and registry.versions("acme", "sql") == []
    with Relay(server) as relay:
        assert lorafleet.json(*command(relay))["reference"] == "acme/sql:1"
    # At least one message came whole before. Half of all was let through: so much may have come, and no more.
    assert size // 2 - CHUNK_BYTES < relay.sent < size - CHUNK_BYTES // 2
    with remote.open() as registry:
        assert [version.digest for version in registry.versions("acme", "sql")] == [wide.digest]


def test_where_a_command_works_is_said_once(lorafleet: Command, local: Store, remote: Store) -> None:
    show = ("adapter", "show", "acme/sql")
    for places in ([], ["--registry", local.url], ["--blobs", "b"], [*local.options, *remote.options]):
        assert "--server" in lorafleet(*show, *places, status=2)[1]
    retire = ("adapter", "retire", "acme/sql:1", "--by", "ada")
    assert "--by is for --registry" in lorafleet(*retire, *remote.options, status=2)[1]
    assert "--tenant is needed" in lorafleet("adapter", "list", *local.options, status=2)[1]
    assert "--api-key" in lorafleet(*show, *remote.options[:2], status=2)[1]
    for verb in ("retire", "quarantine", "restore"):
        assert "expected TENANT/ADAPTER:VERSION" in lorafleet("adapter", verb, "acme/sql", *local.options, status=2)[1]
