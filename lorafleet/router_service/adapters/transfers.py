"""A bound on the calls that move weights, and an end to those that do not move.

Each of them has a thread, and may run for as long as its deadline allows: without a bound a few slow callers would hold
all threads, without an end those who send nothing. They are no calls in the sense of ``Admission``: a server that stops
does not wait for them, as they go on elsewhere or later, but for the work of one that makes a version
(``GrpcServer.stop``).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lorafleet.errors import CallsFullError


@dataclass(frozen=True)
class TransferLimits:
    calls: int = 16
    """At the same time, of all tenants."""
    tenant_calls: int = 4
    idle_s: float = 30.0
    """Without a byte in either direction."""


@dataclass(eq=False)
class Transfer:
    """One call; who runs it says when something has moved."""

    cancel: Callable[[], object]
    clock: Callable[[], float]
    moved_at: float = field(init=False)
    busy: bool = False
    """While the server works, and nobody can move anything."""

    def __post_init__(self) -> None:
        self.moved()

    def moved(self) -> None:
        self.moved_at = self.clock()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside the block it is not the caller who is waited for."""
        self.busy = True
        try:
            yield
        finally:
            self.moved()
            self.busy = False


class Transfers:
    """Counts calls in and out. Thread-safe."""

    def __init__(self, limits: TransferLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._lock = threading.Lock()
        self._tenants: Counter[str] = Counter()
        self._running: set[Transfer] = set()

    @contextmanager
    def enter(self, tenant: str, cancel: Callable[[], object]) -> Iterator[Transfer]:
        """Raises CallsFullError when full; ``cancel`` ends the call where nothing moves."""
        transfer = Transfer(cancel, self._clock)
        with self._lock:
            if self._tenants[tenant] >= self._limits.tenant_calls or len(self._running) >= self._limits.calls:
                raise CallsFullError(
                    f"found {self._tenants[tenant]} calls of this tenant that move weights and {len(self._running)} in "
                    f"all, expected less than {self._limits.tenant_calls} and {self._limits.calls}; try again later"
                )
            self._tenants[tenant] += 1
            self._running.add(transfer)
        try:
            yield transfer
        finally:
            with self._lock:
                self._running.discard(transfer)
                self._tenants[tenant] -= 1
                if not self._tenants[tenant]:
                    del self._tenants[tenant]

    def end_idle(self) -> None:
        """Cancels the calls in which nothing has moved for too long."""
        before = self._clock() - self._limits.idle_s
        with self._lock:
            idle = [transfer for transfer in self._running if transfer.moved_at < before and not transfer.busy]
        for transfer in idle:
            transfer.cancel()
