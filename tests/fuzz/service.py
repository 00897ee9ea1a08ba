"""A real service on loopback for cases of any kind: a small base with a short context, two tenants, both doors."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafleet.engine import Engine
from lorafleet.registry import Registry
from lorafleet.router_service.server import Server, ServerConfig
from tests.router_service.models import random_adapter, write_base

CONTEXT_TOKENS = 64
"""What one request may generate at most, and what all share: long answers show nothing that short ones do not."""
OWN = ("acme/digits", "acme/digits:1", "acme/digits@champion", "base", "auto", "")
NOT_OWN = ("rival/secret", "acme/nothing", "nobody/nothing", "acme/digits:9", "acme/digits@gone")


@dataclass(frozen=True)
class Service:
    server: Server
    engine: Engine
    token: str
    """Of acme, for everything but the metrics."""
    metrics_token: str

    @property
    def url(self) -> str:
        return f"http://{self.server.http_address}"

    def check_unharmed(self) -> None:
        """Nothing of what was asked is left behind, and none of it was a fault of the engine's."""
        assert self.server.wait_idle(timeout_s=30.0), "calls go on that nobody waits for"
        stats = self.engine.stats()
        assert stats.requests_failed_total == 0, f"{stats.requests_failed_total} requests failed in the engine"
        assert (stats.requests_running, stats.requests_waiting, stats.kv_pages_in_use) == (0, 0, 0)


@contextmanager
def running() -> Iterator[Service]:
    """One service, until the block is left."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lorafleet-fuzz-") as name:
        folder = Path(name)
        base = write_base(folder / "base")
        with (
            Engine.load(
                base, dtype="float32", max_sequences=8, max_batch_tokens=64, kv_tokens=CONTEXT_TOKENS
            ) as engine,
            Registry.open(f"sqlite:///{folder / 'registry.db'}", folder / "blobs") as registry,
        ):
            registry.register_base("small", engine.base_digest, architecture="LlamaForCausalLM", parameters=1)
            for seed, (tenant, adapter) in enumerate([("acme", "digits"), ("acme", "letters"), ("rival", "secret")]):
                if seed != 1:
                    registry.create_tenant(tenant)
                registry.create_adapter(tenant, adapter, base=engine.base_digest)
                registry.add_version(tenant, adapter, random_adapter(base, rank=2 + seed, seed=seed))
            token = registry.create_key("acme", scopes=("admin",)).token
            metrics_token = registry.create_key("acme", scopes=("metrics",)).token
            config = ServerConfig(http_address="127.0.0.1:0", drain_s=0.0)
            server = Server(engine, registry, config)
            server.start()
            try:
                yield Service(server, engine, token, metrics_token)
            finally:
                server.stop()
