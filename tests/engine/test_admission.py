"""Whom the scheduler lets start, and when it gives an adapter back."""

from __future__ import annotations

from collections import Counter

from lorafleet.engine.kv_pages import PAGE_TOKENS
from lorafleet.engine.page_allocator import PageAllocator
from lorafleet.engine.prefix import SharedPrefixes
from lorafleet.engine.request import Request, ResolvedMix
from lorafleet.engine.scheduler import Scheduler
from lorafleet.engine.tiers import Claim
from tests.engine.bases import to_length


def scheduled(scheduler: Scheduler) -> list[int]:
    """First tokens of what runs in the next step."""
    return [run.request.tokens[0] for run in scheduler.schedule()]


def bare_request(token: int) -> Request:
    return Request(
        [token], mix=ResolvedMix(), sampling=to_length(9), max_new=9, decode=lambda tokens: "".join(map(chr, tokens))
    )


def test_only_so_many_pass_a_first_request_that_waits_for_room_but_any_number_one_that_loads() -> None:
    state: Claim = "full"
    claims: list[int] = []

    def claim(request: Request) -> Claim:
        if request.tokens[0] == 0:
            return state
        claims.append(request.tokens[0])
        return "claimed"

    pages = PageAllocator(50)
    scheduler = Scheduler(pages, SharedPrefixes(pages), max_sequences=3, max_batch_tokens=8, claim=claim)
    requests = [bare_request(token) for token in range(8)]
    for request in requests:
        scheduler.add(request)
    assert scheduled(scheduler) == [1, 2, 3]
    for request in requests[1:4]:
        scheduler.remove(request)
    assert scheduled(scheduler) == []
    state = "loading"
    assert scheduled(scheduler) == [4, 5, 6]
    state = "claimed"
    scheduler.remove(requests[4])
    assert 0 in scheduled(scheduler)


def test_claims_are_given_back_at_the_end_at_preemption_and_where_pages_are_missing() -> None:
    claimed: Counter[int] = Counter()

    def claim(request: Request) -> Claim:
        claimed[request.tokens[0]] += 1
        return "claimed"

    pages = PageAllocator(2)
    scheduler = Scheduler(
        pages,
        SharedPrefixes(pages),
        max_sequences=4,
        max_batch_tokens=4 * PAGE_TOKENS,
        claim=claim,
        unclaim=lambda request: claimed.subtract([request.tokens[0]]),
    )
    first, second, third = (bare_request(token) for token in (1, 2, 3))
    for request in (first, second, third):
        scheduler.add(request)
    assert scheduled(scheduler) == [1, 2]
    assert claimed == {1: 1, 2: 1, 3: 0}
    first.computed = PAGE_TOKENS
    first.tokens += [9] * PAGE_TOKENS  # needs a second page: the other one's
    scheduler.schedule()
    assert scheduler.preemptions_total == 1
    assert claimed == {1: 1, 2: 0, 3: 0}
    scheduler.remove(first)
    scheduler.remove(third)
    assert claimed == {1: 0, 2: 0, 3: 0}
