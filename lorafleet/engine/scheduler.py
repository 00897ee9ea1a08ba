"""Which tokens are computed in the next step: continuous batching with chunked prefill under a token budget."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from lorafleet.engine.kv_cache import KvCache
from lorafleet.engine.request import Request


class ScheduledRun(NamedTuple):
    """Tokens ``[start, stop)`` of a request."""

    request: Request
    start: int
    stop: int


class Scheduler:
    """First come, first served. Not thread-safe: the engine holds its lock around every call.

    Decoding sequences go first, one token each, so that a long prompt never stops those that already talk; what is
    left of the budget goes to prompts in the order of their coming. A request is admitted when a cache slot is free,
    and keeps it until it ends.
    """

    def __init__(self, cache: KvCache, *, max_batch_tokens: int) -> None:
        self._cache, self._budget = cache, max_batch_tokens
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def requests(self) -> list[Request]:
        """All that are not done, running ones first."""
        return [*self._running, *self._waiting]

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def schedule(self) -> list[ScheduledRun]:
        """The runs of the next step, one-token runs first; empty when there is nothing to do."""
        budget = self._budget
        singles: list[ScheduledRun] = []
        chunks: list[ScheduledRun] = []
        prefilling: list[Request] = []
        for request in self._running:
            if request.pending > 1:
                prefilling.append(request)
            elif budget > 0:
                singles.append(ScheduledRun(request, request.computed, request.computed + 1))
                budget -= 1
        while budget > 0:
            if prefilling:
                request = prefilling.pop(0)
            elif self._waiting and self._cache.free_slots:
                request = self._waiting.popleft()
                request.slot = self._cache.allocate()
                self._running.append(request)
            else:
                break
            count = min(request.pending, budget)
            budget -= count
            (singles if count == 1 else chunks).append(
                ScheduledRun(request, request.computed, request.computed + count)
            )
        return singles + chunks

    def remove(self, request: Request) -> None:
        """Forget a request that is done and free its slot; one that is not here is ignored."""
        if request in self._running:
            self._running.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        if request.slot is not None:
            # All that a step may have written, also one that failed.
            self._cache.release(request.slot, tokens=min(len(request.tokens), self._cache.capacity))
            request.slot = None
