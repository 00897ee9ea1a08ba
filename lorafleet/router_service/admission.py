"""A bound on the calls that run at the same time, and a door that closes before a shutdown."""

from __future__ import annotations

import threading

from lorafleet.errors import InvalidInputError, OverloadedError, UnavailableError


class Admission:
    """Counts calls in and out. Thread-safe."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise InvalidInputError(f"found a limit of {limit} calls at the same time, expected at least 1")
        self._limit = limit
        self._changed = threading.Condition()
        self._running = 0
        self.closed = threading.Event()
        """Set once nobody enters any more."""

    @property
    def running(self) -> int:
        return self._running

    def enter(self) -> None:
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
            self._running += 1

    def leave(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody enters from now on."""
        with self._changed:
            self.closed.set()

    def wait_idle(self, *, timeout_s: float) -> bool:
        """Waits until no call runs; False when that takes longer than ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running == 0, timeout_s)
