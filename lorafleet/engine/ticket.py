"""The caller's end of a submitted request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from lorafleet.engine.request import Generation, TokenChunk

Advance: TypeAlias = Callable[[Callable[[], bool], float | None], bool]
"""``(ready, timeout_s)``"""


class Times(NamedTuple):
    """When a request came to what, by ``time.monotonic``; None for what has not been."""

    submitted: float
    started: float | None
    """its first tokens were computed in the step that began then; the first time, where it gave its memory up"""
    first_token: float | None
    ended: float | None


class Ticket:
    """Follows one request; every method may be called from any thread.

    While no background thread steps the engine, whoever waits on a ticket does the stepping.
    """

    def __init__(self, *, advance: Advance, cancel: Callable[[Ticket], None]) -> None:
        """``advance`` makes one engine step and says True, or says False where a background thread steps.

        Where nothing can be computed before an adapter is loaded it waits for that too, at most ``timeout_s`` and not
        longer than until ``ready``.
        """
        self._advance, self._cancel = advance, cancel
        self._condition = threading.Condition()
        self._chunks: list[TokenChunk] = []
        self._generation: Generation | None = None
        self._error: BaseException | None = None
        self._listeners: list[Callable[[], None]] = []
        self._submitted = time.monotonic()
        self._started: float | None = None
        self._first_token: float | None = None
        self._ended: float | None = None

    @property
    def done(self) -> bool:
        return self._generation is not None or self._error is not None

    @property
    def times(self) -> Times:
        return Times(self._submitted, self._started, self._first_token, self._ended)

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` now, and from the engine's thread after every chunk and at the end; never twice at a time.

        For who waits on many tickets without a thread for each. A background thread has to step the engine; the
        listener holds it up, so that it has to be quick, and must not raise.
        """
        with self._condition:
            if not self.done:
                self._listeners.append(listener)
            listener()

    def chunks(self, start: int = 0) -> list[TokenChunk]:
        """Those that are there, from number ``start`` on; does not wait."""
        return self._chunks[start:]

    def stream(self) -> Iterator[TokenChunk]:
        """The chunks from the first one on, as they come; ends with the request, raises its error if it failed."""
        seen = 0
        while True:
            # `seen` is bound anew in every turn and the wait ends before the next.
            self._wait(lambda seen=seen: len(self._chunks) > seen or self.done, timeout_s=None)  # type: ignore[misc]
            fresh = self._chunks[seen:]
            seen += len(fresh)
            yield from fresh
            if self.done and seen == len(self._chunks):
                if self._error is not None:
                    raise self._error
                return

    def result(self, timeout_s: float | None = None) -> Generation:
        """The finished request; raises its error if it failed, TimeoutError if it is not done in time (it goes on)."""
        if not self._wait(lambda: self.done, timeout_s=timeout_s):
            raise TimeoutError(f"the request is not done after {timeout_s} s; it goes on, cancel() ends it")
        if self._error is not None:
            raise self._error
        assert self._generation is not None
        return self._generation

    def cancel(self) -> None:
        """End the request; its result has finish reason "cancelled" and what was generated until then."""
        if not self.done:  # without the engine's lock, which a step may hold: most callers leave when they have it all
            self._cancel(self)

    def _wait(self, ready: Callable[[], bool], *, timeout_s: float | None) -> bool:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not ready():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            if not self._advance(ready, left):
                with self._condition:
                    self._condition.wait_for(ready, timeout=left)
        return True

    # The engine's end.

    def start(self, now: float) -> None:
        """A step that computes some of it begins; only the first one counts."""
        if self._started is None:
            self._started = now

    def put(self, chunk: TokenChunk) -> None:
        with self._condition:
            if self._first_token is None:
                self._first_token = time.monotonic()
            self._chunks.append(chunk)
            self._changed()

    def finish(self, generation: Generation) -> None:
        with self._condition:
            self._generation = generation
            self._end()

    def fail(self, error: BaseException) -> None:
        with self._condition:
            self._error = error
            self._end()

    def _end(self) -> None:
        self._ended = time.monotonic()
        self._changed()
        # Most know their ticket: a cycle for each request would lie in memory until a full garbage collection.
        self._listeners.clear()

    def _changed(self) -> None:
        self._condition.notify_all()
        for listener in self._listeners:
            listener()
