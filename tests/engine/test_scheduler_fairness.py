"""The scheduler among tenants, on steps that compute nothing and take a modelled time."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafleet.engine import Engine
from lorafleet.engine.kv_pages import PAGE_TOKENS
from lorafleet.engine.page_allocator import PageAllocator
from lorafleet.engine.prefix import SharedPrefixes
from lorafleet.engine.request import Request, ResolvedMix
from lorafleet.engine.scheduler import LEAD_STEPS, PAUSE_SLOWDOWN, PAUSE_STEPS, SLOWDOWN, ScheduledRun, Scheduler
from lorafleet.engine.tiers import Claim
from lorafleet.errors import InvalidInputError
from tests.engine.bases import to_length

StepTime = Callable[[int, int], float]


def steep(sequences: int, tokens: int) -> float:
    """Seconds of a step on a small base behind a busy door: each sequence costs nearly what the first one does."""
    return 2e-3 + 2.5e-4 * sequences + 2e-5 * tokens


def flat(sequences: int, tokens: int) -> float:
    """On a device that reads all weights in every step."""
    return 2e-2 + 1e-5 * sequences + 1e-6 * tokens


class Machine:
    """Steps of a scheduler; a token comes wherever one is due."""

    def __init__(
        self,
        *,
        pages: int = 4000,
        max_sequences: int = 8,
        max_batch_tokens: int = 64,
        step_time: StepTime = steep,
        claim: Callable[[Request], Claim] = lambda request: "claimed",
    ) -> None:
        self.pages = PageAllocator(pages)
        self.scheduler = Scheduler(
            self.pages,
            SharedPrefixes(self.pages),
            max_sequences=max_sequences,
            max_batch_tokens=max_batch_tokens,
            claim=claim,
        )
        self.step_time = step_time
        self.now = 0.0
        self.served: Counter[str] = Counter()
        self.ended: dict[Request, float] = {}
        self._fresh = 0

    def add(self, tenant: str, *, prompt: int = 8, new: int = 8, weight: float = 1.0) -> Request:
        self._fresh += 1  # so that no prefix is found
        request = Request(
            [self._fresh] * prompt,
            mix=ResolvedMix(),
            sampling=to_length(new),
            max_new=new,
            decode=str,
            tenant=tenant,
            weight=weight,
        )
        self.scheduler.add(request)
        return request

    def step(self) -> list[ScheduledRun]:
        runs = self.scheduler.schedule()
        seconds = self.step_time(len(runs), sum(run.stop - run.start for run in runs))
        self.now += seconds
        for run in runs:
            request = run.request
            self.served[request.tenant] += run.cost
            request.computed = run.stop
            if run.stop == len(request.tokens):
                request.tokens.append(0)
            if request.generated >= request.max_new:
                self.scheduler.remove(request)
                self.ended[request] = self.now
            else:
                self.scheduler.computed(request)
        if runs:
            self.scheduler.took(runs, seconds)
        return runs


def tenants_of(runs: Sequence[ScheduledRun]) -> Counter[str]:
    return Counter(run.request.tenant for run in runs)


lengths = st.tuples(st.integers(1, 60), st.integers(1, 30))


@settings(max_examples=25, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=6), st.lists(lengths, min_size=1, max_size=6), st.sampled_from([1, 2, 5]))
def test_two_tenants_that_always_wait_differ_by_a_constant_whatever_their_lengths(
    of_a: list[tuple[int, int]], of_b: list[tuple[int, int]], weight: int
) -> None:
    machine = Machine(max_sequences=4)
    weights = {"a": 1.0, "b": float(weight)}
    # Theorem 4.8 of the paper: what runs at a time, at its longest, on either side; and the lead of whoever has less.
    bound = 2 * 4 * (60 + 2 * 30) + LEAD_STEPS * 64
    for step in range(400):
        for tenant, each in (("a", of_a), ("b", of_b)):
            while sum(request.tenant == tenant for request in machine.scheduler.requests()) < 9:
                prompt, new = each[step % len(each)]
                machine.add(tenant, prompt=prompt, new=new, weight=weights[tenant])
        machine.step()
        assert abs(machine.served["a"] - machine.served["b"] / weight) <= bound, f"step {step}"


@pytest.mark.parametrize("step_time", [steep, flat])
@pytest.mark.parametrize("long", [8, 64])
def test_tenants_are_served_by_their_weights(step_time: StepTime, long: int) -> None:
    machine = Machine(step_time=step_time)
    for _ in range(1200):
        machine.add("a", prompt=8, new=8, weight=1.0)
        machine.add("b", prompt=long, new=8, weight=3.0)
    for step in range(1000):
        if step == 300:  # what a tenant may be ahead by is behind them
            machine.served.clear()
        machine.step()
    assert tenants_of(run for run in machine.step()).keys() == {"a", "b"}
    assert machine.served["b"] / machine.served["a"] == pytest.approx(3.0, rel=0.15)


def test_every_step_computes_all_that_it_can_for_one_tenant() -> None:
    machine = Machine(max_sequences=8)
    for _ in range(20):
        machine.add("a", prompt=4, new=30)
    assert len(machine.step()) == 8
    for _ in range(20):
        assert len(machine.step()) == 8
        assert machine.scheduler.running == 8


@pytest.mark.parametrize("step_time", [steep, flat])
def test_there_is_no_idle_step_while_something_waits_and_every_request_ends(step_time: StepTime) -> None:
    machine, rng = Machine(step_time=step_time, pages=40), random.Random(3)
    requests = []
    for _ in range(2500):
        if len(requests) < 300 and rng.random() < 0.3:
            tenant = rng.choice("aaaabc")
            requests.append(machine.add(tenant, prompt=rng.randint(1, 70), new=rng.randint(1, 40)))
        assert machine.step() or not machine.scheduler.requests()
    assert len(requests) == 300 and machine.ended.keys() == set(requests)
    assert machine.pages.in_use == 0


def test_a_tenant_that_floods_still_goes_on_in_every_step() -> None:
    machine = Machine(max_sequences=8)
    for _ in range(40):
        machine.add("flood", prompt=8, new=40)
    for _ in range(100):
        machine.step()
    for _ in range(4):
        machine.add("quiet", prompt=8, new=60)
    for _ in range(40):
        assert tenants_of(machine.step())["flood"] >= 1


@pytest.mark.parametrize(("quiet", "prompt", "new"), [(12, 8, 8), (4, 60, 2)])  # all of the places; all of the tokens
def test_a_tenant_that_floods_goes_on_beside_as_many_others_as_fill_a_step(quiet: int, prompt: int, new: int) -> None:
    machine = Machine(max_sequences=8)
    for _ in range(40):
        machine.add("flood", prompt=8, new=40)
    running: dict[int, Request] = {}
    idle = 0
    for _ in range(100):
        for number in range(quiet):
            if number not in running or running[number] in machine.ended:
                running[number] = machine.add(f"quiet {number}", prompt=prompt, new=new)
        runs = machine.step()
        assert len(runs) <= 8
        idle = 0 if tenants_of(runs)["flood"] else idle + 1
        assert idle <= 1


def alike(tenants: int, machine: Machine, rng: random.Random) -> None:
    machine.add(f"tenant {rng.randrange(tenants)}", prompt=rng.randint(32, 128), new=rng.randint(8, 40))


def tokens_per_second(tenants: int, outstanding: int, step_time: StepTime) -> float:
    """With always so many requests, of any tenant."""
    machine, rng = Machine(max_sequences=64, max_batch_tokens=1024, step_time=step_time), random.Random(1)
    began = 0.0
    for step in range(1500):
        while machine.scheduler.running + machine.scheduler.waiting < outstanding:
            alike(tenants, machine, rng)
        machine.step()
        if step == 500:
            machine.served.clear()
            began = machine.now
    return machine.served.total() / (machine.now - began)


# Of two tenants with 180 requests one may come to have nearly all, and is then what a flood is.
@pytest.mark.parametrize("step_time", [steep, flat])
@pytest.mark.parametrize(("tenants", "outstanding"), [(2, 64), (20, 64), (20, 180)])
def test_tenants_that_ask_for_the_same_get_as_much_together_as_one_would(
    tenants: int, outstanding: int, step_time: StepTime
) -> None:
    found = tokens_per_second(tenants, outstanding, step_time)
    assert found >= 0.95 * tokens_per_second(1, outstanding, step_time)


def test_a_flood_is_held_back_from_its_first_step_on_though_it_was_served_nothing_before() -> None:
    machine = Machine(max_sequences=8, step_time=steep)
    for turn in range(200):
        if turn % 40 == 0:
            for _ in range(turn // 40 + 1):  # steps of several sizes, to learn from
                machine.add("quiet", prompt=4, new=40)
        machine.step()
    machine.add("quiet", prompt=4, new=60)
    machine.step()
    for _ in range(40):
        machine.add("flood", prompt=4, new=40)
    for _ in range(30):
        found = tenants_of(machine.step())
        assert found["quiet"] == 1 and 1 <= found["flood"] <= 4


def there_at_four_fifths(tenants: int, *, waiting: int = 0, seconds: float = 40.0) -> list[int]:
    """How many requests are there in each step, at 80 % of the capacity; so many from the beginning on."""
    rate = 0.8 * tokens_per_second(1, 180, steep) / (80 + 24 + 1)  # a request's tokens, on average
    machine, rng = Machine(max_sequences=64, max_batch_tokens=1024, step_time=steep), random.Random(1)
    for _ in range(waiting):
        alike(tenants, machine, rng)
    due, there = 0.0, []
    while machine.now < seconds:
        while due <= machine.now:
            alike(tenants, machine, rng)
            due += rng.expovariate(rate)
        if not machine.step():
            machine.now = due
        there.append(machine.scheduler.running + machine.scheduler.waiting)
    return there


def test_what_waits_goes_down_again_at_four_fifths_of_the_capacity() -> None:
    """Were less computed the more waits, a burst would never be over."""
    assert there_at_four_fifths(20, waiting=200)[-1] < 150


def test_of_twenty_tenants_that_ask_for_the_same_little_more_waits_than_of_one() -> None:
    one, twenty = (statistics.median(there_at_four_fifths(tenants)) for tenants in (1, 20))
    assert twenty <= 1.5 * one < 64


def test_requests_whose_adapters_are_not_there_stop_nobody_else() -> None:
    machine = Machine(claim=lambda request: "loading" if request.tenant == "blocked" else "claimed")
    for _ in range(500):
        machine.add("served")
    for _ in range(50):
        machine.step()
    for _ in range(40):  # more than are looked at: four for each place
        machine.add("blocked")
    for _ in range(200):
        assert machine.step()


def test_a_quiet_tenant_starts_in_the_next_step_though_all_places_are_taken() -> None:
    machine = Machine(max_sequences=8, max_batch_tokens=64)
    for _ in range(40):
        machine.add("flood", prompt=60, new=40)
    for _ in range(60):
        machine.step()
    request = machine.add("quiet", prompt=20, new=20)
    runs = machine.step()
    assert request in [run.request for run in runs] and len(runs) <= 8
    assert machine.scheduler.preemptions_total == 0
    took = 1
    while request not in machine.ended:
        machine.step()
        took += 1
    assert took == 20  # a token in every step


@pytest.mark.parametrize(("step_time", "most"), [(steep, 4), (flat, 8)])
def test_others_slow_a_step_down_by_so_much_and_all_go_on_where_that_costs_nothing(
    step_time: StepTime, most: int
) -> None:
    machine = Machine(max_sequences=8, step_time=step_time)
    for turn in range(6):  # steps of all sizes, to learn from
        for _ in range(9 * (turn + 1)):
            machine.add("flood", prompt=4, new=10 + turn)
        for _ in range(100):
            machine.step()
    for _ in range(120):
        machine.add("flood", prompt=4, new=40)
    for _ in range(30):
        machine.step()
    machine.add("quiet", prompt=4, new=30)
    machine.step()
    for _ in range(28):
        runs = machine.step()
        found = tenants_of(runs)
        assert found["quiet"] == 1 and 1 <= found["flood"] <= most
        assert step_time(len(runs), len(runs)) <= 1.1 * SLOWDOWN * step_time(1, 1)
        if step_time is flat:
            assert len(runs) == 8
    machine.step()
    for _ in range(PAUSE_STEPS - 2):  # it may come back
        runs = machine.step()
        assert step_time(len(runs), len(runs)) <= 1.1 * PAUSE_SLOWDOWN * step_time(1, 1)
    machine.step()
    machine.step()
    assert len(machine.step()) == 8


def test_among_tenants_every_request_gets_the_tokens_that_it_gets_alone(engine: Engine) -> None:
    prompts = [[7 * n + 1, 3, n] * (1 + n % 5) for n in range(16)]
    alone = [result.token_ids for result in engine.generate(prompts, sampling=to_length(12))]
    tickets = [
        engine.submit(prompt, sampling=to_length(12), tenant="quiet" if n % 8 == 7 else "flood", salt=str(n))
        for n, prompt in enumerate(prompts)
    ]
    assert [ticket.result().token_ids for ticket in tickets] == alone


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), True, "1"])
def test_a_weight_that_is_no_number_above_zero_is_refused(engine: Engine, weight: Any) -> None:
    with pytest.raises(InvalidInputError, match="weight"):
        engine.submit([1], tenant="a", weight=weight)
    with pytest.raises(InvalidInputError, match="tenant"):
        engine.submit([1], tenant=cast(Any, 7))


def test_pages_come_from_the_tenant_that_is_furthest_over_its_share() -> None:
    machine = Machine(pages=8, max_sequences=8, max_batch_tokens=8 * PAGE_TOKENS)
    flood = [machine.add("flood", prompt=PAGE_TOKENS - 2, new=2 * PAGE_TOKENS) for _ in range(60)]
    for _ in range(1100):
        machine.step()
    assert machine.scheduler.preemptions_total > 0
    before = machine.scheduler.preemptions_total
    request = machine.add("quiet", prompt=3 * PAGE_TOKENS, new=PAGE_TOKENS)
    assert machine.pages.available < 3
    runs = machine.step()
    assert request in [run.request for run in runs]
    assert machine.scheduler.preemptions_total > before
    waiting = [r for r in machine.scheduler.requests() if not r.pages]
    assert {r.tenant for r in waiting} == {"flood"}
    assert [r for r in waiting if r in flood] == sorted(waiting, key=flood.index)  # in their order, as before
    while request not in machine.ended:
        machine.step()
        assert request.pages or request in machine.ended


def test_within_one_tenant_who_was_admitted_last_gives_up_its_pages_and_is_first_again() -> None:
    machine = Machine(pages=4, max_sequences=4, max_batch_tokens=4 * PAGE_TOKENS)
    requests = [machine.add("a", prompt=PAGE_TOKENS - 1, new=2 * PAGE_TOKENS) for _ in range(5)]
    machine.step()
    machine.step()
    machine.step()
    assert machine.scheduler.preemptions_total > 0
    assert machine.scheduler.requests()[0] is requests[0]
    assert machine.scheduler.requests()[-1] is requests[-1]
    while len(machine.ended) < 5:
        machine.step()
    assert next(iter(machine.ended)) is requests[0]


def test_what_is_found_in_the_cache_is_not_charged() -> None:
    machine = Machine(max_batch_tokens=8 * PAGE_TOKENS)
    first = machine.add("a", prompt=4 * PAGE_TOKENS + 3, new=2)
    machine.step()
    machine.step()
    assert machine.served["a"] == 4 * PAGE_TOKENS + 3 + 1 + 2
    again = machine.add("a", prompt=4 * PAGE_TOKENS + 3, new=1)
    again.tokens[:] = first.tokens[: again.prompt_tokens]
    machine.step()
    assert again in machine.ended and machine.served["a"] == 4 * PAGE_TOKENS + 3 + 1 + 2 + 3 + 1


def test_no_tenant_passes_an_earlier_one_that_waits_for_room_on_the_device_forever() -> None:
    places: list[Request] = []

    def claim(request: Request) -> Claim:
        if request.tenant == "quiet":
            return "full" if any(r not in machine.ended for r in places) else "claimed"
        places.append(request)
        return "claimed"

    machine = Machine(max_sequences=4, claim=claim)
    for _ in range(12):
        machine.add("flood", new=20)
    machine.step()
    request = machine.add("quiet", new=20)
    for _ in range(200):
        if machine.scheduler.waiting < 6:
            machine.add("flood", new=20)
        machine.step()
    assert request in machine.ended


def quiet_latencies(*, flood: bool, step_time: StepTime, long: int, seed: int = 5) -> tuple[list[float], float]:
    """Of a tenant that uses a quarter of the capacity, by Poisson arrivals; and how many tokens a second all got."""
    rng, drawn = random.Random(seed), random.Random(seed)
    machine = Machine(max_sequences=64, max_batch_tokens=1024, step_time=step_time)
    while flood and machine.now < 5.0:  # it has been there for a while
        while machine.scheduler.waiting < 128:
            machine.add("flood", prompt=rng.randint(32, long), new=rng.randint(16, 64))
        machine.step()
    full = step_time(64, 64) / 64  # seconds a token costs in a full batch
    rate = 0.25 / ((40 + 1) * full + 144 * 0.02 * full)
    arrivals, now, began = [], machine.now, machine.now
    machine.served.clear()
    for _ in range(120):
        now += drawn.expovariate(rate)
        arrivals.append((now, drawn.randint(32, 256), drawn.randint(16, 64)))
    quiet: dict[Request, float] = {}
    while len(quiet) < len(arrivals) or not machine.ended.keys() >= quiet.keys():
        while flood and machine.scheduler.waiting < 128:
            machine.add("flood", prompt=rng.randint(32, long), new=rng.randint(16, 64))
        for at, prompt, new in arrivals[len(quiet) :]:
            if at <= machine.now:
                quiet[machine.add("quiet", prompt=prompt, new=new)] = at
        if not machine.step():
            machine.now = max(machine.now, arrivals[len(quiet)][0])
    latencies = [machine.ended[request] - at for request, at in quiet.items()]
    return latencies, machine.served.total() / (machine.now - began)


@pytest.mark.parametrize(("step_time", "kept"), [(steep, 0.35), (flat, 0.75)])
@pytest.mark.parametrize("long", [256, 400])
def test_half_of_ones_share_takes_at_most_twice_as_long_beside_a_flood_that_goes_on(
    step_time: StepTime, kept: float, long: int
) -> None:
    alone, _ = quiet_latencies(flood=False, step_time=step_time, long=long)
    beside, together = quiet_latencies(flood=True, step_time=step_time, long=long)
    assert sorted(beside)[int(0.95 * 120)] <= 2 * sorted(alone)[int(0.95 * 120)]
    assert together >= kept * flood_alone(step_time, long)


def flood_alone(step_time: StepTime, long: int) -> float:
    """Its tokens a second."""
    machine, rng = Machine(max_sequences=64, max_batch_tokens=1024, step_time=step_time), random.Random(5)
    while machine.now < 10.0:
        while machine.scheduler.waiting < 128:
            machine.add("flood", prompt=rng.randint(32, long), new=rng.randint(16, 64))
        machine.step()
    return machine.served.total() / machine.now
