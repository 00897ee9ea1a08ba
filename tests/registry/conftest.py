"""One registry per test, on SQLite and on a private PostgreSQL server; adapters made from a seed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.errors import UnavailableError
from lorafleet.registry import Registry, schema

# Hundreds of durable writes take minutes on a slow disk and tell nothing more than on a file system in memory.
_IN_MEMORY = Path("/dev/shm")
FOLDER = _IN_MEMORY if _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free > 512 * 2**20 else None

BASE_DIGEST = "sha256:" + "ba5e" * 16
OTHER_BASE_DIGEST = "sha256:" + "07e7" * 16
T = TypeVar("T")
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def make_adapter(seed: int, *, rank: int = 3, base: str = "") -> LoraAdapter:
    """Random factors, 8 inputs and 6 outputs a module."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        path: LoraPair(torch.randn(rank, 8, generator=generator), torch.randn(6, rank, generator=generator))
        for path in MODULES
    }
    return LoraAdapter(pairs, base)


def again(call: Callable[[], T], *, for_s: float = 30.0) -> T:
    """What a call gives once nobody is deleting its weights any more."""
    until = time.monotonic() + for_s
    while True:
        try:
            return call()
        except UnavailableError as error:
            if "being deleted" not in str(error) or time.monotonic() > until:
                raise


class Clock:
    """A clock that stands still unless it is told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class PostgresServer:
    """A server of our own in a private folder, reached over a unix socket in it."""

    binaries: Path
    folder: Path
    as_user: dict[str, Any]

    def run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self.binaries / program, *arguments],
            cwd=self.folder,
            env={"LC_ALL": "C.UTF-8", "PATH": os.defpath},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            **self.as_user,
        )
        assert done.returncode == 0, done.stdout

    def control(self, action: str) -> None:
        options = f"-c listen_addresses='' -k {self.folder} -c fsync=off -c max_connections=60"
        mode = [] if action == "start" else ["-m", "immediate"]
        # To a file: a server that inherits a pipe would keep its reader waiting.
        self.run("pg_ctl", "-D", "data", "-l", "log", "-w", "-s", "-o", options, *mode, action)

    def url(self, schema: str) -> str:
        """Of an empty schema: a database of its own would be a thousand files a test."""
        with psycopg.connect(host=str(self.folder), user="postgres", dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}".encode())
        return f"postgresql://postgres@/postgres?host={self.folder}&options=-csearch_path%3D{schema}"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    if not found and not on_path:
        pytest.skip("no PostgreSQL server binaries (initdb) on this machine")
    binaries = found[-1].parent if found else Path(str(on_path)).resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="lorafleet-postgres-", dir=FOLDER))
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        import pwd

        users = {entry.pw_name: entry for entry in pwd.getpwall()}
        user = users.get("postgres") or users.get("nobody")
        if user is None:
            pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres or nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    server = PostgresServer(binaries, folder, as_user)
    try:
        server.run("initdb", "-D", "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        server.control("start")
        try:
            yield server
        finally:
            server.control("stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty one, for a database and its blobs."""
    with tempfile.TemporaryDirectory(prefix="lorafleet-registry-", dir=FOLDER) as made:
        yield Path(made)


_schemas = count()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, folder: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{folder / 'made' / 'registry.db'}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.url(f"test_{next(_schemas)}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def migrated() -> Iterator[Path]:
    """A SQLite file at this version's tables: it is copied at once, migrations take a tenth of a second each time."""
    with tempfile.TemporaryDirectory(prefix="lorafleet-migrated-", dir=FOLDER) as made:
        file = Path(made) / "registry.db"
        schema.upgrade(f"sqlite:///{file}")
        yield file


@pytest.fixture
def registry(url: str, folder: Path, clock: Callable[[], float], migrated: Path) -> Iterator[Registry]:
    """With the bases ``tiny`` and ``other``, and the tenants ``acme`` and ``rival``."""
    if url.startswith("sqlite:///"):
        file = Path(url.removeprefix("sqlite:///"))
        file.parent.mkdir()
        shutil.copyfile(migrated, file)
    with Registry.open(url, folder / "blobs", clock=clock) as opened:
        opened.register_base("tiny", BASE_DIGEST, architecture="LlamaForCausalLM", parameters=1000)
        opened.register_base("other", OTHER_BASE_DIGEST, architecture="LlamaForCausalLM", parameters=1000)
        opened.create_tenant("acme")
        opened.create_tenant("rival", weight=2.0)
        yield opened
