"""A bound on the calls that run at the same time, and a door that closes before a shutdown."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from lorafleet.errors import InvalidInputError, OverloadedError, UnavailableError

KEPT: Final = 4
"""A quarter of the places is not for whoever comes first."""


@dataclass(eq=False)
class _Tenant:
    weight: float
    running: int = 0


class Admission:
    """Counts calls in and out. Thread-safe.

    The last quarter of the places is shared among the tenants that call at the moment, by their weights: into it a call
    is let in only while its tenant has fewer calls than its part of that quarter. So a tenant that floods holds at most
    three quarters, or what its part is where that is more, and one that comes with a few calls finds a place. Nothing
    is lost by that: many more calls are let in than the engine computes at a time.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise InvalidInputError(f"found a limit of {limit} calls at the same time, expected at least 1")
        self._limit = limit
        self._kept = limit // KEPT
        self._changed = threading.Condition()
        self._running = 0
        self._tenants: dict[str, _Tenant] = {}
        """those with calls"""
        self.closed = threading.Event()
        """Set once nobody enters any more."""

    @property
    def running(self) -> int:
        return self._running

    def enter(self, tenant: str = "", weight: float = 1.0) -> None:
        """Raises UnavailableError when closed and OverloadedError when full; otherwise ``leave`` must follow."""
        with self._changed:
            if self.closed.is_set():
                raise UnavailableError(
                    "the server is shutting down; call another one, or this one again after its restart"
                )
            if self._running >= self._limit:
                raise OverloadedError(
                    f"{self._running} calls are running, which is all that run at once here; try again later"
                )
            mine = self._tenants.get(tenant) or _Tenant(weight)
            mine.weight = weight
            others = sum(other.weight for other in self._tenants.values() if other is not mine)
            part = self._kept * weight / (weight + others)
            if self._running >= self._limit - self._kept and mine.running >= part:
                raise OverloadedError(
                    f"{mine.running} of your calls are running, and what is left here is for other callers; try again "
                    "when one of yours has ended"
                )
            mine.running += 1
            self._tenants[tenant] = mine
            self._running += 1

    def leave(self, tenant: str = "") -> None:
        with self._changed:
            mine = self._tenants[tenant]
            mine.running -= 1
            if not mine.running:
                del self._tenants[tenant]
            self._running -= 1
            if not self._running:
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody enters from now on."""
        with self._changed:
            self.closed.set()

    def wait_idle(self, *, timeout_s: float) -> bool:
        """Waits until no call runs; False when that takes longer than ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running == 0, timeout_s)
