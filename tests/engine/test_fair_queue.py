"""The queue among tenants by itself: order, lifting, forgetting."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from lorafleet.engine.fair_queue import MOST_IDLE, FairQueue
from lorafleet.engine.request import Request, ResolvedMix
from tests.engine.bases import to_length


def request(tenant: str, tokens: int = 4, weight: float = 1.0) -> Request:
    return Request(
        [1] * tokens, mix=ResolvedMix(), sampling=to_length(9), max_new=9, decode=str, tenant=tenant, weight=weight
    )


def order(queue: FairQueue) -> str:
    return "".join(waiting.tenant for waiting in queue.ahead(len(queue)))


def serve(queue: FairQueue, tenant: str, tokens: int) -> None:
    """One request of a tenant, from its coming to its end."""
    served = request(tenant)
    queue.add(served)
    queue.start(served)
    queue.charge(tenant, tokens)
    queue.end(served)


def test_tenants_take_turns_by_what_their_prompts_take_and_each_ones_requests_keep_their_order() -> None:
    queue = FairQueue(window=1000)
    requests = [request(tenant, tokens) for tenant, tokens in (("a", 10), ("a", 9), ("a", 8), ("b", 25), ("b", 5))]
    for each in requests:
        queue.add(each)
    assert list(queue.ahead(9)) == [requests[place] for place in (0, 3, 1, 2, 4)]
    assert list(queue.ahead(2)) == [requests[0], requests[3]]


def test_who_has_hundreds_waiting_hides_nobody() -> None:
    queue = FairQueue(window=1000)
    for tenant, count in (("a", 40), ("b", 3), ("c", 3)):
        for _ in range(count):
            queue.add(request(tenant))
    queue.charge("b", 10**6)
    queue.charge("c", 10**6)
    assert Counter(ahead.tenant for ahead in queue.ahead(15)) == {"a": 5, "b": 3, "c": 3}
    assert len(list(queue.ahead(46))) == 46


def test_a_tenant_of_three_times_the_weight_is_next_three_times_as_often() -> None:
    queue = FairQueue(window=1000)
    for tenant, weight in (("a", 1.0), ("b", 3.0)):
        for _ in range(6):
            queue.add(request(tenant, 6, weight))
    assert order(queue)[:8] in ("abbbabbb", "abbbbabb")


def test_who_comes_back_is_level_with_the_least_of_those_that_are_served() -> None:
    queue = FairQueue(window=1000)
    serve(queue, "b", 10)
    for tenant, tokens in (("a", 1000), ("c", 1500)):
        running = request(tenant)
        queue.add(running)
        queue.start(running)
        queue.charge(tenant, tokens)
    queue.add(request("b"))
    assert queue.counter("b") == queue.counter("a") < queue.counter("c")


def test_a_tenant_that_waits_is_not_lifted() -> None:
    queue = FairQueue(window=1000)
    running = request("a")
    queue.add(running)
    queue.start(running)
    queue.add(request("b"))
    queue.charge("a", 50)
    queue.add(request("b"))
    assert queue.counter("b") == 0


def test_who_comes_to_an_empty_queue_is_level_with_the_last_that_left() -> None:
    queue = FairQueue(window=1000)
    serve(queue, "a", 1000)
    queue.add(request("b"))
    assert queue.counter("b") == 1000
    queue.add(request("a"))
    assert order(queue) in ("ab", "ba")


def test_a_tenant_that_had_more_than_its_share_comes_back_with_that() -> None:
    queue = FairQueue(window=1000)
    running = request("a")
    queue.add(running)
    queue.start(running)
    queue.charge("a", 100)
    serve(queue, "b", 5000)
    queue.add(request("b"))
    assert queue.counter("b") == 5100


def test_waiting_for_an_adapter_saves_nothing_up() -> None:
    queue = FairQueue(window=1000)
    running, held_up = request("a"), request("b")
    queue.add(running)
    queue.add(held_up)
    queue.start(running)
    queue.hold_up(held_up)
    queue.charge("a", 1000)
    queue.start(held_up)
    assert queue.counter("b") == queue.counter("a") == 1000


def heavy(
    counts: dict[str, int],
    *,
    weights: dict[str, float] | None = None,
    served: dict[str, int] | None = None,
    flood: int = 1000,
) -> set[str]:
    """Among tenants with so many requests each; served as much as that would take, where nothing else is said."""
    queue = FairQueue(window=1e9)
    for tenant, count in counts.items():
        for _ in range(count):
            queue.add(request(tenant, weight=(weights or {}).get(tenant, 1.0)))
        queue.charge(tenant, (served or counts)[tenant])
    return queue.heavy(1e9, flood=flood)


def test_heavy_are_those_with_far_more_requests_for_their_weight_than_the_others() -> None:
    assert heavy({}) == heavy({"flood": 190}) == set()
    assert heavy({"flood": 190, "quiet": 3}) == {"flood"}
    assert heavy({"a": 20, "b": 18}) == heavy({"a": 3, "b": 1}) == set()
    assert heavy({"a": 100, "b": 60, "quiet": 2}) == {"a", "b"}
    assert heavy({"a": 40, "b": 10}, weights={"a": 4.0}) == set()
    assert heavy({"a": 10, "b": 10}, weights={"a": 4.0}) == {"b"}


def test_what_chance_makes_of_tenants_that_ask_for_the_same_is_not_heavy() -> None:
    assert heavy({"a": 8, "b": 4, "c": 2, "d": 1}) == set()
    assert heavy({"a": 36, "b": 16}) == set() != heavy({"a": 37, "b": 16})
    rng = random.Random(4)
    for _ in range(200):
        drawn = Counter(rng.choices(range(20), k=180))
        assert heavy({str(tenant): count for tenant, count in drawn.items()}) == set(), drawn


def test_who_was_not_served_more_than_the_others_is_not_heavy_however_much_it_wants() -> None:
    assert heavy({"a": 190, "b": 3}, served={"a": 100, "b": 100}) == set()
    assert heavy({"a": 190, "b": 3}, served={"a": 151, "b": 100}) == {"a"}
    assert heavy({"a": 190, "b": 190, "c": 3}, served={"a": 200, "b": 100, "c": 100}) == {"a"}
    assert heavy({"a": 190, "b": 3}, served={"a": 599, "b": 100}, weights={"a": 4.0}) == set()


def test_who_wants_every_place_is_heavy_before_it_was_served_anything() -> None:
    assert heavy({"a": 64, "b": 3}, served={"a": 0, "b": 100}, flood=64) == {"a"}
    assert heavy({"a": 63, "b": 3}, served={"a": 0, "b": 100}, flood=64) == set()
    assert heavy({"a": 90, "b": 80}, served={"a": 0, "b": 100}, flood=64) == set()


def test_what_was_served_is_forgotten_with_what_others_are_served_but_not_by_leaving() -> None:
    queue = FairQueue(window=1000)
    serve(queue, "a", 100)
    assert queue.lately("a") == pytest.approx(100) and queue.lately("b") == 0
    for _ in range(10):
        serve(queue, "b", 100)
    assert queue.lately("a") == pytest.approx(100 / math.e)
    assert 500 < queue.lately("b") < 700


def test_a_tenant_with_few_requests_that_had_far_more_is_no_lighter_until_the_others_had_as_much() -> None:
    queue = FairQueue(window=100)
    for tenant, count in (("flood", 50), ("few", 2)):
        for _ in range(count):
            queue.add(request(tenant))
    queue.charge("few", 1000)
    for _ in range(5):
        queue.charge("flood", 100)
    assert queue.lately("flood") > 10 * queue.lately("few")
    assert queue.heavy(499.0, flood=1000) == set()
    assert queue.heavy(500.0, flood=1000) == {"flood"}


def test_a_request_that_is_put_back_goes_before_its_tenants_others() -> None:
    queue = FairQueue(window=1000)
    first, second = request("a"), request("a")
    for each in (first, second):
        queue.add(each)
    queue.start(first)
    queue.put_back(first)
    assert list(queue.ahead(2)) == [first, second]
    assert queue.remove(first) and not queue.remove(first)
    assert (list(queue.ahead(2)), len(queue)) == ([second], 1)


def test_counters_of_who_has_nothing_are_forgotten_and_nobody_gains_by_it() -> None:
    queue = FairQueue(window=1000)
    running = request("a")
    queue.add(running)
    queue.start(running)  # with the least, so that the others' counters are above the floor
    had = {}
    for number in range(3 * MOST_IDLE):
        tenant = str(number)
        serve(queue, tenant, 10 + number % 7)
        had[tenant] = queue.counter(tenant)
        assert queue.remembered <= MOST_IDLE + 2
    assert all(queue.counter(tenant) >= counter for tenant, counter in had.items())
