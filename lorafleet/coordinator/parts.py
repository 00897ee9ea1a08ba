"""What the round loop works with: everything that touches the world, so that a test can replace it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorafleet.adapters.base_shapes import ModuleShapes
from lorafleet.coordinator.transport import Transport
from lorafleet.coordinator.tree import Reducer
from lorafleet.registry import Registry

FAILPOINTS = (
    "round opened", "orders sent", "replies received", "update written", "round complete", "experts made",
    "round committed",
)  # fmt: skip
"""Where the loop says that it is, right behind what the name says."""


@dataclass(frozen=True)
class Parts:
    registry: Registry
    transport: Transport
    reducer: Reducer
    base_digest: str
    shapes: ModuleShapes
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    entropy: Callable[[int], bytes] = secrets.token_bytes
    """So many secret bytes; what central noise is drawn from."""
    groups: Callable[[int], Mapping[str, str]] | None = None
    """Round number → assignment, in the place of clustering: for runs that have to differ in something else only."""
    check_lease: Callable[[], None] = lambda: None
    """Raises UnavailableError where another coordinator has the federation by now; asked before long work."""
    token: int | None = None
    """The fencing token of the lease that this run holds: the registry refuses what an earlier holder writes."""
    owner: str = ""
    """Of that lease: who commits rounds, for the registry's audit."""
    failpoint: Callable[[str], None] = lambda name: None
    """Called with each of FAILPOINTS as the loop passes it; a test kills the process here."""
