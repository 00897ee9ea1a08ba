"""What this service's engine has, told to the registry, so that garbage collection leaves it.

A hold is written before weights are loaded, for many digests at a time, and ends by itself ten minutes after a service
that died. Renewing is the watcher's work: a request writes one only for a version that the engine does not have yet.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection

from lorafleet.errors import LorafleetError
from lorafleet.registry import Registry

LASTS_S = 600.0
RENEWED_S = 150.0
"""After so long; three renewals may fail."""

_log = logging.getLogger(__name__)


class Holds:
    """One service's; thread-safe."""

    def __init__(self, registry: Registry, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._clock = registry, clock
        self._service = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._renewed_at = clock()

    def take(self, digests: Collection[str]) -> None:
        """Hold these, too, before they are loaded; writes nothing for those that are held already."""
        with self._lock:
            new = set(digests) - self._held
            if new:
                self._registry.hold(self._service, new, for_s=LASTS_S)
                self._held |= new

    def renew(self, needed: Callable[[], Collection[str]]) -> None:
        """Hold what is needed, and nothing else, for another while; writes only where that is due.

        What is asked for after the look at what is needed is taken after this, anew.
        """
        if self._clock() - self._renewed_at < RENEWED_S:
            return
        with self._lock:
            digests = set(needed())
            self._registry.hold(self._service, digests, for_s=LASTS_S)
            self._registry.release(self._service, keep=digests)
            self._held = digests
            self._renewed_at = self._clock()

    def release(self) -> None:
        """Let go of everything; where that fails, the holds end by themselves."""
        try:
            self._registry.release(self._service)
        except LorafleetError as error:
            _log.warning("what this service held ends by itself in %g s: %s", LASTS_S, error)
