"""Whose request is next: fair queueing among tenants by the virtual token counter.

Sheng et al. 2024, "Fairness in Serving Large Language Models" (https://arxiv.org/abs/2401.00588), Algorithm 2, with
weights. Each tenant has a counter, which grows by what is computed for it divided by its weight; the next request is
the first one of the tenant whose counter is smallest. A tenant that comes back with nothing queued is lifted to the
smallest counter of the others that are served, or of the last one that was, so that nobody saves up what was not used.
Between two tenants that always have something queued the difference stays bounded by a constant (the paper's Theorem
4.8).

So counters do not tell who floods: a tenant that comes and goes is level with the one that floods each time. What tells
them apart is how much they want at a time, and have been served lately (:meth:`FairQueue.heavy`). One of the two is not
enough. Tenants that ask for the same differ by chance in what they want at a time, and where all wait, ever more: held
back for that, they would wait longer still: what waits after a burst would never be less again, at 80 % of the capacity
(``tests/engine/test_scheduler_fairness.py``).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from lorafleet.engine.request import Request

MOST_IDLE: Final = 1024
"""Counters kept of tenants that have nothing here; beyond it the smallest half is forgotten."""
HEAVY: Final = 1.5
CHANCE: Final = 3.0
"""A tenant is heavy with more requests than so many times the average, and so many standard deviations of a count that
comes about by chance (Poisson's, of one more): beside one with 1 request those with 6, beside one with 16 with 37."""


@dataclass(eq=False)
class Flow:
    """One tenant's requests, and how much was computed for it."""

    tenant: str
    counter: float
    """tokens : weight"""
    weight: float = 1.0
    waiting: deque[Request] = field(default_factory=deque)
    running: int = 0
    held_up: bool = False
    """Its first request waits for an adapter, and none of it runs: not for its turn."""

    @property
    def requests(self) -> int:
        return len(self.waiting) + self.running

    @property
    def demand(self) -> float:
        """requests : weight"""
        return self.requests / self.weight


class FairQueue:
    """First come, first served within a tenant. Not thread-safe: the engine holds its lock around every call.

    ``request.tenant`` is a name that means nothing here; requests with the same one are one flow, with the weight of
    the last that came. A request is added, then started or removed; a started one ends, or is put back.
    """

    def __init__(self, window: float) -> None:
        """``window``: tokens of all tenants that "lately" is."""
        self._window = window
        self._served: dict[str, tuple[float, float]] = {}
        """tenant → tokens : weight, and ``_total`` when that was so; the last to be served last"""
        self._total = 0.0
        """tokens of all tenants"""
        self._flows: dict[str, Flow] = {}
        """of those that have requests"""
        self._idle: dict[str, float] = {}
        """counters above the floor of those that have none"""
        self._floor = 0.0
        """nobody comes back with less; never falls"""
        self._waiting = 0
        self.needing = 0
        """waiting requests that need adapters"""

    def __len__(self) -> int:
        """Waiting requests."""
        return self._waiting

    @property
    def remembered(self) -> int:
        """Tenants whose counters are kept."""
        return len(self._flows) + len(self._idle)

    @property
    def flows(self) -> list[Flow]:
        """Of the tenants that have requests here."""
        return list(self._flows.values())

    def counter(self, tenant: str) -> float:
        """What a tenant had, divided by its weight; the floor for one that is not known."""
        flow = self._flows.get(tenant)
        return flow.counter if flow is not None else self._idle.get(tenant, self._floor)

    def ahead(self, most: int, among: Callable[[Flow], bool] = lambda flow: True) -> Iterator[Request]:
        """The next requests of these flows, at most so many, in the order in which they would start.

        That order takes prompts for computed; what will be generated is not known yet. Where not all are asked for,
        none has more than its part: one with hundreds that wait for adapters would hide everybody behind it.
        """
        flows = [flow for flow in self._flows.values() if flow.waiting and among(flow)]
        each = None if most >= self._waiting else max(1, most // max(1, len(flows)))
        heap = [(flow.counter, place, flow.weight, islice(flow.waiting, each)) for place, flow in enumerate(flows)]
        heapq.heapify(heap)
        while heap and most > 0:
            counter, place, weight, requests = heap[0]
            request = next(requests, None)
            if request is None:
                heapq.heappop(heap)
                continue
            heapq.heapreplace(heap, (counter + request.pending / weight, place, weight, requests))
            most -= 1
            yield request

    def heavy(self, lead: float, *, flood: int) -> set[str]:
        """Tenants that others need not wait for: all but the light ones; nobody where there are no light ones.

        Light are the one with fewest requests : weight, and each next one that has not far more than the average of
        those before it; and of the others those that have less than ``flood`` requests, and were not served far more
        than these, lately. But for those that had ``lead`` more than the tenant that had least, however few requests
        they have at a time. ``flood`` is of requests whatever the weight: places are what a step has.
        """
        flows = sorted((flow for flow in self._flows.values() if not flow.held_up), key=lambda flow: flow.demand)
        few = self._with_few(flows)
        if few == len(flows):
            return set()
        served = HEAVY * sum(self.lately(flow.tenant) for flow in flows[:few]) / few
        many = [flow for flow in flows[few:] if flow.requests >= flood or self.lately(flow.tenant) > served]
        if not many:
            return set()
        least = min(flow.counter for flow in flows)
        heavy = {flow.tenant for flow in many} | {flow.tenant for flow in flows if flow.counter > least + lead}
        return heavy if len(heavy) < len(flows) else set()

    def lead(self, tenants: Collection[str]) -> float:
        """How far the one of these that had least is ahead of the one of the others that had least; negative: behind.

        Without those that wait for adapters; infinite where there are none of one kind.
        """
        least = {True: math.inf, False: math.inf}
        for flow in self._flows.values():
            if not flow.held_up:
                among = flow.tenant in tenants
                least[among] = min(least[among], flow.counter)
        return least[True] - least[False] if least[False] < math.inf else math.inf

    def lately(self, tenant: str) -> float:
        """What a tenant was served : weight; of what lies ``window`` tokens of all tenants back, 1 : e counts."""
        tokens, at = self._served.get(tenant, (0.0, 0.0))
        return tokens * math.exp((at - self._total) / self._window)

    @staticmethod
    def _with_few(flows: Sequence[Flow]) -> int:
        """How many of those in the order of their demand have not far more than those before them."""
        total = 0.0
        for before, flow in enumerate(flows):
            average = total / before if before else math.inf
            if flow.demand > HEAVY * average + CHANCE * math.sqrt(average * flow.weight + 1) / flow.weight:
                return before
            total += flow.demand
        return len(flows)

    def add(self, request: Request) -> None:
        """Behind all others of its tenant."""
        flow = self._flows.get(request.tenant)
        if flow is None:
            counter = max(self._idle.pop(request.tenant, self._floor), self._floor)
            flow = self._flows[request.tenant] = Flow(request.tenant, counter)
        flow.weight = request.weight
        if not flow.waiting:
            self._lift(flow)
        flow.waiting.append(request)
        self._count(request, 1)

    def start(self, request: Request) -> None:
        """A waiting request runs from now on."""
        flow = self._flows[request.tenant]
        if flow.held_up:
            self._lift(flow)  # what others had meanwhile was not taken from it
        flow.held_up = False
        flow.waiting.remove(request)
        flow.running += 1
        self._count(request, -1)

    def put_back(self, request: Request) -> None:
        """A running request waits again, in front of its tenant's others."""
        flow = self._flows[request.tenant]
        flow.running -= 1
        flow.waiting.appendleft(request)
        self._count(request, 1)

    def hold_up(self, request: Request) -> None:
        """A waiting request's adapters are not there; where nothing of its tenant runs, others need not wait for it."""
        flow = self._flows[request.tenant]
        flow.held_up = not flow.running

    def end(self, request: Request) -> None:
        """A running request is over."""
        self._flows[request.tenant].running -= 1
        self._drop_idle(request.tenant)

    def remove(self, request: Request) -> bool:
        """Forget a waiting request; False where it does not wait here."""
        flow = self._flows.get(request.tenant)
        if flow is None or request not in flow.waiting:
            return False
        flow.waiting.remove(request)
        self._count(request, -1)
        self._drop_idle(request.tenant)
        return True

    def charge(self, tenant: str, tokens: int) -> None:
        """Count what a step computes for a tenant that has requests here."""
        flow = self._flows[tenant]
        flow.counter += tokens / flow.weight
        self._total += tokens
        lately = self.lately(tenant)
        self._served.pop(tenant, None)
        self._served[tenant] = (lately + tokens / flow.weight, self._total)
        if len(self._served) > MOST_IDLE:
            del self._served[next(iter(self._served))]

    def _count(self, request: Request, more: int) -> None:
        self._waiting += more
        if request.mix.gates:
            self.needing += more

    def _lift(self, flow: Flow) -> None:
        # Of those that run: one that waits for an adapter only, or for what a request before it needs, is no measure.
        others = [other.counter for other in self._flows.values() if other.running and other is not flow]
        if others:
            self._floor = max(self._floor, min(others))
        flow.counter = max(flow.counter, self._floor)

    def _drop_idle(self, tenant: str) -> None:
        flow = self._flows[tenant]
        if flow.waiting or flow.running:
            return
        del self._flows[tenant]
        if not any(other.running for other in self._flows.values()):
            self._floor = max(self._floor, flow.counter)
        if flow.counter > self._floor:
            self._idle[tenant] = flow.counter
        if len(self._idle) > MOST_IDLE:
            # Who is forgotten comes back at the floor: raised, so that nobody gains by that.
            counters = sorted(self._idle.values())
            self._floor = max(self._floor, counters[len(counters) // 2])
            self._idle = {name: counter for name, counter in self._idle.items() if counter > self._floor}
