"""Quotas and blocks of use against a model of plain dicts: whatever is taken, nothing is given twice or lost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lorafleet.errors import QuotaExceededError
from lorafleet.registry import Quota, Registry
from lorafleet.registry.records import Amount, UsageBlock
from tests.registry.conftest import Clock
from tests.registry.machines import outcome, run

MINUTE, BUDGET, DAY = 60, 300, 86_400
START = DAY - 200.0
"""Of every run, so that one depends on nothing but what is drawn; the end of the day is within reach."""
amounts = st.builds(Amount, st.integers(0, 6), st.integers(0, 60))


@dataclass(frozen=True)
class Taken:
    block: UsageBlock
    windows: tuple[tuple[int, float], ...]


class Machine(RuleBasedStateMachine):
    """One tenant of its own, whose time goes on by up to half a minute."""

    def __init__(self, registry: Registry, clock: Clock, run: int) -> None:
        super().__init__()
        self.registry, self.clock, self.tenant = registry, clock, f"tenant-{run}"
        clock.now = START
        registry.create_tenant(self.tenant)
        self.quota = Quota()
        self.taken: Counter[tuple[int, float, str]] = Counter()
        """Length and start of a window, and of what."""
        self.used: Counter[tuple[int, float, str]] = Counter()
        self.seen: set[tuple[int, float]] = set()
        self.open: list[Taken] = []

    @rule(
        requests=st.sampled_from([None, 0, 5, 20]),
        tokens=st.sampled_from([None, 100, 1000]),
        budget=st.sampled_from([None, 150, 2000]),
    )
    def agree(self, requests: int | None, tokens: int | None, budget: int | None) -> None:
        self.quota = Quota(
            requests_per_minute=requests,
            tokens_per_minute=tokens,
            budget_tokens=budget,
            budget_period_s=None if budget is None else BUDGET,
        )
        self.registry.set_quota(self.tenant, self.quota)
        assert self.registry.quota(self.tenant) == self.quota

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(wanted=amounts, least=amounts)
    def take(self, wanted: Amount, least: Amount) -> None:
        least = Amount(min(least.requests, wanted.requests), min(least.tokens, wanted.tokens))
        lengths = [MINUTE, *[BUDGET] * (self.quota.budget_tokens is not None), DAY]
        windows = tuple((length, math.floor(self.clock.now / length) * length) for length in lengths)
        left = {"requests": wanted.requests, "tokens": wanted.tokens}
        for window, of, most in (
            (windows[0], "requests", self.quota.requests_per_minute),
            (windows[0], "tokens", self.quota.tokens_per_minute),
            (windows[1], "tokens", self.quota.budget_tokens),
        ):
            if most is not None:
                left[of] = min(left[of], max(0, most - self.taken[*window, of]))
        given = outcome(
            lambda: self.registry.lease_usage(
                self.tenant,
                requests=wanted.requests,
                tokens=wanted.tokens,
                least_requests=least.requests,
                least_tokens=least.tokens,
            )
        )
        if left["requests"] < least.requests or left["tokens"] < least.tokens:
            assert given is QuotaExceededError
            return
        assert (given.requests, given.tokens) == (left["requests"], left["tokens"])
        self.seen |= set(windows)
        self.open.append(Taken(given, windows))
        for window in windows:
            for of, value in left.items():
                self.taken[*window, of] += value

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0, 9), used=amounts, again=st.booleans())
    def settle(self, pick: int, used: Amount, again: bool) -> None:
        """With what was used, which may be more than was taken; a second time changes nothing."""
        done = self.open.pop(pick % len(self.open))
        prompt = used.tokens // 3
        for _ in range(1 + again):
            self.registry.settle_usage(
                done.block, requests=used.requests, prompt_tokens=prompt, generated_tokens=used.tokens - prompt
            )
        for window in done.windows:
            for of, value in (("requests", used.requests), ("tokens", used.tokens)):
                self.taken[*window, of] += value - getattr(done.block, of)
                self.used[*window, of] += value

    @invariant()
    def what_is_on_record_is_what_was_taken_and_used(self) -> None:
        found = {
            (each.window.period_s, each.window.starts_at): (
                each.taken,
                each.requests,
                each.prompt_tokens + each.generated_tokens,
            )
            for each in self.registry.usage(self.tenant)
        }
        for window in self.seen:
            taken, requests, tokens = found[window]
            assert taken == Amount(self.taken[*window, "requests"], self.taken[*window, "tokens"])
            assert (requests, tokens) == (self.used[*window, "requests"], self.used[*window, "tokens"])


@pytest.fixture
def runs() -> Iterator[int]:
    return count()


def test_any_order_of_blocks_is_counted_as_a_model_counts_it(
    registry: Registry, clock: Clock, runs: Iterator[int]
) -> None:
    run(lambda: Machine(registry, clock, next(runs)), examples=6)


@pytest.mark.long
def test_many_orders_of_blocks_are_counted_as_a_model_counts_them(
    registry: Registry, clock: Clock, runs: Iterator[int]
) -> None:
    run(lambda: Machine(registry, clock, next(runs)), examples=40, steps=60, drawn=True)
