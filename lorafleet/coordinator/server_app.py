"""The Flower ServerApp: opens the registry, attaches to Ray, and runs the round loop over Flower's Grid."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from lorafleet.adapters.base_shapes import base_shapes
from lorafleet.assets import base_digest, base_path
from lorafleet.coordinator.flower_control import SuperLinkControl
from lorafleet.coordinator.flower_grid import FlowerTransport
from lorafleet.coordinator.lease import FederationLease
from lorafleet.coordinator.parts import Parts
from lorafleet.coordinator.rounds import run_federation
from lorafleet.coordinator.settings import CoordinatorConfig, check_terms
from lorafleet.coordinator.tree import LocalReducer, RayReducer
from lorafleet.registry import Registry

log = logging.getLogger(__name__)

# The first round waits this long for the members that are registered.
JOIN_TIMEOUT_S = 90.0
# Later rounds wait this long for nodes that have just come: they ask for work every 3 s, and a query starts a process.
REFRESH_TIMEOUT_S = 10.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry point of a run; ``federation`` in the run config is the path of its TOML file on this machine."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("lorafleet").setLevel(logging.INFO)
    config = CoordinatorConfig.load(Path(str(context.run_config["federation"])))
    settings = config.federation
    base = base_path(settings.base)
    digest = base_digest(base)
    registry = Registry.open(config.registry, config.blobs)
    control = SuperLinkControl(config.superlink, insecure=config.insecure, root_certificates=config.root_certificates)
    memory = config.reduce_memory_mb * 10**6
    reducer = (
        LocalReducer(memory_bytes=memory)
        if config.ray_address == "local"
        else RayReducer(config.ray_address, memory_bytes=memory)
    )
    try:
        federation = registry.federation(settings.tenant, settings.name)
        members = registry.members(federation)
        # Once more: the file may have changed since it was submitted.
        check_terms(config, digest, federation, {member.key: member.tenant for member in members})
        transport = FlowerTransport(
            grid,
            expected=[member.key for member in members if member.revoked_at is None],
            join_timeout_s=JOIN_TIMEOUT_S,
            refresh_timeout_s=REFRESH_TIMEOUT_S,
            order_timeout_s=settings.deadline_s,
            public_keys=lambda: {member.key: member.public_key for member in registry.members(federation)},
            node_keys=control.node_keys,
        )
        with FederationLease(registry, federation) as lease:
            log.info(
                "process %d holds the lease on %s, token %d, as %s",
                os.getpid(), federation.reference, lease.token, lease.owner,
            )  # fmt: skip
            parts = Parts(
                registry,
                transport,
                reducer,
                digest,
                base_shapes(base),
                check_lease=lease.check,
                token=lease.token,
                owner=lease.owner,
            )
            run_federation(settings, federation, parts)
    finally:
        if isinstance(reducer, RayReducer):
            reducer.close()
        control.close()
        registry.close()
