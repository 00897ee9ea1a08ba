"""Which tokens are computed in the next step: continuous batching with chunked prefill over paged memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import NamedTuple

from lorafleet.engine.kv_pages import PAGE_TOKENS, pages_for
from lorafleet.engine.page_allocator import PageAllocator
from lorafleet.engine.prefix import Prefixes, next_key, root_key
from lorafleet.engine.request import Request
from lorafleet.engine.tiers import Claim

# So many waiting requests for each that may run are looked at: their adapters are fetched, and they may pass others.
LOOKAHEAD = 4


class ScheduledRun(NamedTuple):
    """Tokens ``[start, stop)`` of a request."""

    request: Request
    start: int
    stop: int


class Scheduler:
    """First come, first served. Not thread-safe: the engine holds its lock around every call.

    Decoding sequences go first, one token each, so that a long prompt never stops those that already talk; what is
    left of the budget goes to prompts in the order of their coming. A request is admitted when there are pages for all
    of its tokens and its adapters are on the device. Where a sequence grows and no page is left, the one that was
    admitted last gives its pages up and waits in front of the others; what it had generated is computed again, as a
    prompt.

    Requests whose adapters are there pass those whose adapters are not. Where the first one waits for room on the
    device they might keep it from ever starting: as many as run at a time may pass it, then nobody.
    """

    def __init__(
        self,
        pages: PageAllocator,
        prefixes: Prefixes,
        *,
        max_sequences: int,
        max_batch_tokens: int,
        claim: Callable[[Request], Claim] = lambda request: "claimed",
        unclaim: Callable[[Request], None] = lambda request: None,
        expect: Callable[[Sequence[Request]], None] = lambda waiting: None,
        clear: Callable[[list[int]], None] = lambda pages: None,
    ) -> None:
        """``claim`` keeps a request's adapters on the device while it runs, until ``unclaim``, or says why not yet.

        ``expect`` is told who waits, in order, so that their adapters can be fetched. ``clear``: zero new pages.
        """
        self._pages, self._prefixes = pages, prefixes
        self._budget, self._max_sequences = max_batch_tokens, max_sequences
        self._claim, self._unclaim, self._expect, self._clear = claim, unclaim, expect, clear
        self._lookahead = LOOKAHEAD * max_sequences
        self._passes = 0  # of requests that went before a first one that waits for room
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self.preemptions_total = 0
        self.prefix_tokens_total = 0
        """prompt tokens that were found in the cache"""

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def requests(self) -> list[Request]:
        """All that are not done, running ones first."""
        return [*self._running, *self._waiting]

    def waiting_for(self, digests: Collection[str]) -> list[Request]:
        """Waiting requests that need one of these adapters."""
        return [request for request in self._waiting if not set(digests).isdisjoint(request.mix.held)]

    def add(self, request: Request) -> None:
        self._waiting.append(request)
        if len(self._waiting) <= self._lookahead:  # fetched while the step that runs goes on
            self._look_ahead()

    def schedule(self) -> list[ScheduledRun]:
        """The runs of the next step, one-token runs first; empty when nothing can be done."""
        self._look_ahead()
        budget = self._budget
        runs: list[ScheduledRun] = []
        # Decoding ones first; both in the order of their admission.
        for request in sorted(self._running, key=lambda r: r.pending > 1):
            if budget and request.pages:  # it may have given them up to one before it
                count = min(request.pending, budget)
                if self._hold(request, request.computed + count):
                    runs.append(ScheduledRun(request, request.computed, request.computed + count))
                    budget -= count
        runs = [run for run in runs if run.request.pages]
        while budget and len(self._running) < self._max_sequences and (admitted := self._admit()) is not None:
            count = min(admitted.pending, budget)
            runs.append(ScheduledRun(admitted, admitted.computed, admitted.computed + count))
            budget -= count
        return sorted(runs, key=lambda run: run.stop - run.start > 1)

    def computed(self, request: Request) -> None:
        """Publish the pages that the tokens computed so far have filled."""
        for page in range(len(request.page_keys), min(request.computed // PAGE_TOKENS, len(request.pages))):
            before = request.page_keys[-1] if request.page_keys else root_key(request.mix.gates, request.salt)
            key = next_key(before, request.tokens[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS])
            request.page_keys.append(key)
            self._prefixes.publish(request.pages[page], key)

    def remove(self, request: Request) -> None:
        """Forget a request that is done and free its pages; one that is not here is ignored."""
        if request in self._running:
            self._running.remove(request)
            self._unclaim(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        self._give_up(request)

    def _look_ahead(self) -> None:
        self._expect(list(islice(self._waiting, self._lookahead)))

    def _admit(self) -> Request | None:
        """The first waiting request that can start, with all of its pages and adapters."""
        passing = False  # one that waits for room
        for index, request in enumerate(islice(self._waiting, self._lookahead)):
            claim = self._claim(request)
            if claim != "claimed":
                if index == 0 and claim == "full":
                    if self._passes >= self._max_sequences:
                        return None
                    passing = True
                continue
            if not self._find_room(request):
                self._unclaim(request)
                return None  # others are not let past it: they might keep it from ever starting
            del self._waiting[index]
            if index == 0:
                self._passes = 0
            self._passes += passing
            self._running.append(request)
            self.prefix_tokens_total += request.computed
            held = self._hold(request, len(request.tokens))
            assert held
            return request
        return None

    def _find_room(self, request: Request) -> bool:
        """Whether there are pages for all of the request's tokens; it has those of its prefix then."""
        needed = pages_for(len(request.tokens))
        if self._prefixes.takes_room and needed > self._pages.available:
            return False  # told first: a request that waits would look its prefix up, and copy it, in every step
        self._find_prefix(request)
        if needed - len(request.pages) > self._pages.available:
            self._give_up(request)
            return False
        return True

    def _find_prefix(self, request: Request) -> None:
        """Take the published pages that the request begins with; at least one token is left to compute."""
        if request.sampling.prompt_logprobs:
            return  # every prompt token's logits are asked for
        before = root_key(request.mix.gates, request.salt)
        for first in range(0, request.pending - PAGE_TOKENS, PAGE_TOKENS):
            before = next_key(before, request.tokens[first : first + PAGE_TOKENS])
            page = self._prefixes.find(before)
            if page is None:
                break
            request.pages.append(page)
            request.page_keys.append(before)
        request.computed = len(request.pages) * PAGE_TOKENS

    def _hold(self, request: Request, tokens: int) -> bool:
        """Make the request's pages hold so many tokens; False where it had to give them up instead."""
        fresh: list[int] = []
        while len(request.pages) < pages_for(tokens):
            page = self._pages.take()
            if page is not None:
                request.pages.append(page)
                fresh.append(page)
                continue
            last = self._running[-1]
            self._running.remove(last)
            self._waiting.appendleft(last)
            self._unclaim(last)
            self._give_up(last)
            self.preemptions_total += 1
            if last is request:
                return False
        self._clear(fresh)
        return True

    def _give_up(self, request: Request) -> None:
        for page in request.pages:
            self._pages.release(page)
        request.pages, request.page_keys, request.computed = [], [], 0
