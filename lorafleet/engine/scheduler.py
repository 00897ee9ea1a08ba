"""Which tokens are computed in the next step: continuous batching with chunked prefill over paged memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Final, NamedTuple

from lorafleet.engine.fair_queue import FairQueue, Flow
from lorafleet.engine.kv_pages import PAGE_TOKENS, pages_for
from lorafleet.engine.page_allocator import PageAllocator
from lorafleet.engine.prefix import Prefixes, next_key, root_key
from lorafleet.engine.request import Request
from lorafleet.engine.step_cost import StepCost
from lorafleet.engine.tiers import Claim

# So many waiting requests for each that may run are looked at: their adapters are fetched, and they may pass others.
LOOKAHEAD = 4
# In whole steps of tokens: what a tenant with few requests may be served in a burst, ahead of the others.
LEAD_STEPS: Final = 16
# In whole steps of tokens, too: what "lately" is. Some 350 requests, so that of twenty tenants that ask for the same
# none has half as much again; on a small CPU 20 s, too long to wait for where one tenant wants every place.
WINDOW_STEPS: Final = 64
# How much longer tenants with many requests may make a step of those with few. As these then have more there at a time,
# and so longer steps again, each of them takes up to 1.5 times as long where a step's cost rises fast.
SLOWDOWN: Final = 1.15
# So many steps after one of those with few, a step of the others takes at most so many times as long as one token: who
# comes back waits for its end. On a CPU (1.2 ms + 0.3 ms a sequence) those are a quarter of 64 sequences, at 85 % of
# their speed; on a GPU all of them.
PAUSE_STEPS: Final = 256
PAUSE_SLOWDOWN: Final = 4.0


class ScheduledRun(NamedTuple):
    """Tokens ``[start, stop)`` of a request."""

    request: Request
    start: int
    stop: int

    @property
    def cost(self) -> int:
        """A token for each that is computed, and one more for each that is generated."""
        generates = self.request.max_new > 0 and self.stop == len(self.request.tokens)
        return self.stop - self.start + generates


class Scheduler:
    """Fair among tenants, first come, first served within one. Not thread-safe: the engine holds its lock around calls.

    Decoding sequences go first, one token each, so that a long prompt never stops those that already talk; what is
    left of the budget goes to prompts in the order of their coming. A request is admitted when there are pages for all
    of its tokens and its adapters are on the device. Where a sequence grows and no page is left, the one that was
    admitted last of the tenant with most pages for its weight gives its pages up and waits in front of its tenant's
    others; what it had generated is computed again, as a prompt.

    Requests whose adapters are there pass those whose adapters are not. Where the first one waits for room on the
    device they might keep it from ever starting: as many as run at a time may pass it, then nobody behind it.

    **Tenants.** The order is that of :class:`FairQueue`; what a step computes is charged when it is scheduled, and what
    is found in the cache is not. That alone does not help a tenant that uses little against one that floods: it would
    find all places taken, and share each step with as many sequences as run at a time. So, where some tenants have far
    more requests for their weight than the others, and want every place or were served more lately
    (:meth:`FairQueue.heavy`):

    - Those with few are scheduled first. The heavy ones add what makes the step at most ``SLOWDOWN`` times as long as
      it would be without them, by :class:`StepCost`, and one sequence in any case. For that a place is kept, but where
      one runs at a time, and where they had ``LEAD_STEPS`` whole steps more than the others. Their sequences pause for
      some steps, and keep their pages. Where a step costs much the same with few sequences or many, all go on. For a
      while (``PAUSE_STEPS``) after those with few have gone, steps of heavy ones are bounded, too.
    - Where all places are taken, a tenant with fewer sequences than its part of ``max_sequences`` may start another, up
      to twice as many in all; a step computes ``max_sequences`` of them.
    - Where pages are missing for a request of a light tenant, sequences of heavy ones give theirs up.
    - A tenant with few requests that was served ``LEAD_STEPS`` whole steps more than another one loses all that, until
      the others have had as much.

    With one tenant, or among tenants with much the same, none of this holds anything back. Simulated with 2 ms a step
    and 0.25 ms a sequence (64 at most), half of a share then has a 95th percentile of 1.2 times what it has alone, and
    0.4 of the tokens are computed that a flood alone would have; with 20 ms a step whatever it holds 1.04 times, and
    0.8. With the counters alone it was 7 times, and 1.05 (``tests/engine/test_scheduler_fairness.py``; ``lorafleet
    bench fairness`` measures the service itself).
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
        self._passes: dict[Request, int] = {}
        """how many went before a first one that waits for room"""
        self._queue = FairQueue(window=WINDOW_STEPS * max_batch_tokens)
        self._expecting = False
        self._pause, self._held_back = PAUSE_STEPS, set[str]()
        """steps since the last one in which tenants were held back, and who that was"""
        self._cost = StepCost()
        self._running: list[Request] = []
        self.preemptions_total = 0
        self.prefix_tokens_total = 0
        """prompt tokens that were found in the cache"""

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that have pages."""
        return len(self._running)

    def requests(self) -> list[Request]:
        """All that are not done, running ones first."""
        return [*self._running, *self._queue.ahead(len(self._queue))]

    def waiting_for(self, digests: Collection[str]) -> list[Request]:
        """Waiting requests that need one of these adapters."""
        return [r for r in self._queue.ahead(len(self._queue)) if not set(digests).isdisjoint(r.mix.held)]

    def add(self, request: Request) -> None:
        self._queue.add(request)
        if len(self._queue) <= self._lookahead:  # fetched while the step that runs goes on
            self._look_ahead()

    def schedule(self) -> list[ScheduledRun]:
        """The runs of the next step, one-token runs first; empty when nothing can be done."""
        self._look_ahead()
        lead = LEAD_STEPS * self._budget
        heavy = self._queue.heavy(lead, flood=self._max_sequences)
        step = _Step(
            tokens=self._budget,
            sequences=self._max_sequences,
            heavy=heavy,
            kept=bool(heavy) and self._max_sequences > 1 and self._queue.lead(heavy) <= lead,
        )
        self._pause += 1
        if step.heavy:
            self._pause, self._held_back = 0, step.heavy
        elif self._pause < PAUSE_STEPS and all(flow.tenant in self._held_back for flow in self._queue.flows):
            step.bound(self._cost, PAUSE_SLOWDOWN * self._cost.seconds(sequences=1, tokens=1))
        self._go_on(step, [request for request in self._running if request.tenant not in step.heavy])
        self._start(step, lambda flow: flow.tenant not in step.heavy)
        step.kept = 0
        if step.heavy and step.runs:
            step.bound(self._cost, SLOWDOWN * self._cost.seconds(sequences=len(step.runs), tokens=step.tokens))
        if step.heavy:
            self._go_on(step, [request for request in self._running if request.tenant in step.heavy])
            self._start(step, lambda flow: flow.tenant in step.heavy)
        return sorted(step.runs, key=lambda run: run.stop - run.start > 1)

    def took(self, runs: Sequence[ScheduledRun], seconds: float) -> None:
        """How long a step took, for the next ones."""
        self._cost.observe(sequences=len(runs), tokens=sum(run.stop - run.start for run in runs), seconds=seconds)

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
            self._queue.end(request)
            self._unclaim(request)
        else:
            self._queue.remove(request)
        self._passes.pop(request, None)
        self._give_up(request)

    def _look_ahead(self) -> None:
        # Two hundred requests for the bare base would take as long as the rest of the schedule.
        if self._queue.needing or self._expecting:
            self._expect(list(self._queue.ahead(self._lookahead)))
            self._expecting = self._queue.needing > 0

    # One step

    def _go_on(self, step: _Step, requests: Sequence[Request]) -> None:
        """Running requests go on: decoding ones first, those of the tenant that had least before others."""
        counters = {flow.tenant: flow.counter for flow in self._queue.flows}
        for request in sorted(requests, key=lambda r: (r.pending > 1, counters[r.tenant])):
            room = step.room()
            if room and request.pages:  # it may have given them up to one before it
                count = min(request.pending, room)
                if self._hold(step, request, request.computed + count):
                    self._compute(step, request, count)

    def _start(self, step: _Step, among: Callable[[Flow], bool]) -> None:
        """Waiting requests of these flows start while there is room."""
        while (room := step.room()) and (admitted := self._admit(step, among)) is not None:
            self._compute(step, admitted, min(admitted.pending, room))

    def _compute(self, step: _Step, request: Request, count: int) -> None:
        run = ScheduledRun(request, request.computed, request.computed + count)
        step.add(run)
        self._queue.charge(request.tenant, run.cost)

    # Admission

    def _admit(self, step: _Step, among: Callable[[Flow], bool]) -> Request | None:
        """The first waiting request of these flows that can start, with all of its pages and adapters."""
        has_place = self._places()
        order = self._queue.ahead(self._lookahead, lambda flow: among(flow) and has_place(flow))
        for index, request in enumerate(order if not step.barred else ()):
            claim = self._claim(request)
            if claim != "claimed":
                self._queue.hold_up(request)
                if index == 0 and claim == "full" and step.first in (None, request):
                    step.first = request
                    step.barred = self._passes.get(request, 0) >= self._max_sequences
                    if step.barred:
                        return None
                continue
            if not self._find_room(step, request):
                self._unclaim(request)
                step.barred = True  # others are not let past it: they might keep it from ever starting
                return None
            if step.first is request:
                step.first = None
            elif step.first is not None:
                self._passes[step.first] = self._passes.get(step.first, 0) + 1
            self._passes.pop(request, None)
            self._queue.start(request)
            self._running.append(request)
            self.prefix_tokens_total += request.computed
            held = self._hold(step, request, len(request.tokens))
            assert held
            return request
        return None

    def _places(self) -> Callable[[Flow], bool]:
        """Which flows may have one more sequence."""
        if len(self._running) < self._max_sequences:
            return lambda flow: True
        flows = self._queue.flows
        if len(flows) == 1 or len(self._running) >= 2 * self._max_sequences:
            return lambda flow: False
        each = self._max_sequences / sum(flow.weight for flow in flows)
        return lambda flow: flow.running < max(1, math.floor(each * flow.weight))

    def _find_room(self, step: _Step, request: Request) -> bool:
        """Whether there are pages for all of the request's tokens; it has those of its prefix then."""
        needed = pages_for(len(request.tokens))
        if self._prefixes.takes_room and needed > self._pages.available and not self._make_room(step, request, needed):
            return False  # told first: a request that waits would look its prefix up, and copy it, in every step
        self._find_prefix(request)
        missing = needed - len(request.pages)
        if missing > self._pages.available and not self._make_room(step, request, missing):
            self._give_up(request)
            return False
        return True

    def _make_room(self, step: _Step, request: Request, pages: int) -> bool:
        """Whether so many pages can be had, where sequences of heavy tenants give theirs up to one that is not."""
        heavy = [] if request.tenant in step.heavy else [r for r in self._running if r.tenant in step.heavy]
        if self._pages.available + sum(len(other.pages) for other in heavy) < pages:
            return False
        while self._pages.available < pages and heavy:
            last = self._last_of_most(step, heavy)
            heavy.remove(last)
            self._preempt(step, last)
        return self._pages.available >= pages  # pages that others share do not come free

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

    # Pages

    def _hold(self, step: _Step, request: Request, tokens: int) -> bool:
        """Make the request's pages hold so many tokens; False where it had to give them up instead."""
        fresh: list[int] = []
        while len(request.pages) < pages_for(tokens):
            page = self._pages.take()
            if page is not None:
                request.pages.append(page)
                fresh.append(page)
                continue
            last = self._last_of_most(step, self._running)
            self._preempt(step, last)
            if last is request:
                return False
        self._clear(fresh)
        return True

    def _last_of_most(self, step: _Step, running: Sequence[Request]) -> Request:
        """The one admitted last of the tenant with most pages for its weight; of heavy tenants where there are any."""
        pages: dict[str, float] = {}
        for request in running:
            pages[request.tenant] = pages.get(request.tenant, 0.0) + len(request.pages) / request.weight
        most = max(pages, key=lambda tenant: (tenant in step.heavy, pages[tenant]))
        return next(request for request in reversed(running) if request.tenant == most)

    def _preempt(self, step: _Step, request: Request) -> None:
        for run in step.drop(request):
            self._queue.charge(request.tenant, -run.cost)
        self._running.remove(request)
        self._queue.put_back(request)
        self._unclaim(request)
        self._give_up(request)
        self.preemptions_total += 1

    def _give_up(self, request: Request) -> None:
        for page in request.pages:
            self._pages.release(page)
        request.pages, request.page_keys, request.computed = [], [], 0


class _Step:
    """What the next step computes, while it is put together."""

    def __init__(self, *, tokens: int, sequences: int, heavy: set[str], kept: bool) -> None:
        self.heavy = heavy
        """tenants that may slow it down by so much"""
        self.runs: list[ScheduledRun] = []
        self._tokens_left, self._sequences_left = tokens, sequences
        self.tokens = 0
        self.first: Request | None = None
        """the first waiting one, where it waits for room on the device"""
        self.barred = False
        """nobody starts any more"""
        self.kept = int(kept)
        """places and tokens that are not for those with few requests: many such tenants could fill every step"""
        self._cost: StepCost | None = None
        self._most_s = 0.0
        self._least = 0

    def room(self) -> int:
        """Tokens that one more run may have."""
        room = self._tokens_left - self.kept if self._sequences_left > self.kept else 0
        if self._cost is not None:
            within = self._cost.tokens_within(self._most_s, sequences=len(self.runs) + 1)
            if within is not None:
                room = min(room, max(within - self.tokens, self._least))
        return room

    def add(self, run: ScheduledRun) -> None:
        self.runs.append(run)
        self.tokens += run.stop - run.start
        self._tokens_left -= run.stop - run.start
        self._sequences_left -= 1
        self._least = 0

    def drop(self, request: Request) -> list[ScheduledRun]:
        """Without a request that gave its pages up; what it had in the step is free for others."""
        dropped = [run for run in self.runs if run.request is request]
        for run in dropped:
            self.runs.remove(run)
            self.tokens -= run.stop - run.start
            self._tokens_left += run.stop - run.start
            self._sequences_left += 1
        return dropped

    def bound(self, cost: StepCost, seconds: float) -> None:
        """From now on runs are added while the step takes so long at most, and one in any case."""
        self._cost, self._most_s, self._least = cost, seconds, PAGE_TOKENS
