"""Quotas: the sums alone, and blocks that several services take from one database."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from lorafleet.errors import InvalidInputError, NotFoundError, QuotaExceededError, grpc_status
from lorafleet.registry import NewExpert, Quota, Registry, quotas
from lorafleet.registry.records import Amount, Window
from tests.registry.conftest import Clock, make_adapter
from tests.registry.test_concurrency import at_once

DAY_S = 86400
MINUTE = Window(60, 960)  # of the clock's 1000 s
DAY = Window(DAY_S, 0)


# The sums


def test_windows_start_at_multiples_of_their_length() -> None:
    assert quotas.window(60, 1000.0) == MINUTE and MINUTE.ends_at == 1020
    assert quotas.window(60, 959.999) == Window(60, 900) and quotas.window(60, 1020.0) == Window(60, 1020)
    assert quotas.windows(Quota(), 1000.0) == [MINUTE, DAY]
    assert quotas.windows(Quota(budget_tokens=1, budget_period_s=600), 1000.0) == [MINUTE, Window(600, 600), DAY]
    assert quotas.windows(Quota(budget_tokens=1, budget_period_s=DAY_S), 1000.0) == [MINUTE, DAY]


def test_a_block_is_what_every_limit_leaves() -> None:
    quota = Quota(requests_per_minute=10, tokens_per_minute=500, budget_tokens=1000, budget_period_s=DAY_S)
    wanted = Amount(8, 400)
    assert quotas.block(quota, {}, 1000.0, wanted=wanted) == wanted
    assert quotas.block(quota, {MINUTE: Amount(7, 0)}, 1000.0, wanted=wanted) == (3, 400)
    assert quotas.block(quota, {MINUTE: Amount(0, 450), DAY: Amount(0, 960)}, 1000.0, wanted=wanted) == (8, 40)
    assert quotas.block(Quota(), {MINUTE: Amount(10**9, 10**9)}, 1000.0, wanted=wanted) == wanted


@pytest.mark.parametrize(
    ("taken", "now", "after", "said"),
    [
        ({MINUTE: Amount(10, 0)}, 1000.0, 20.0, "requests_per_minute of 10"),
        ({MINUTE: Amount(10, 0)}, 1019.75, 0.25, "try again in 1 s"),
        ({MINUTE: Amount(0, 500)}, 1000.0, 20.0, "tokens_per_minute of 500"),
        ({MINUTE: Amount(0, 700)}, 1000.0, 20.0, "tokens_per_minute of 500"),
        ({DAY: Amount(0, 1000)}, 1000.0, 85400.0, "budget_tokens of 1000"),
        ({MINUTE: Amount(10, 0), DAY: Amount(0, 1000)}, 1000.0, 85400.0, "budget_tokens of 1000"),
    ],
)
def test_what_is_over_is_told_when_it_may_be_tried_again(
    taken: dict[Window, Amount], now: float, after: float, said: str
) -> None:
    quota = Quota(requests_per_minute=10, tokens_per_minute=500, budget_tokens=1000, budget_period_s=DAY_S)
    with pytest.raises(QuotaExceededError, match=said) as caught:
        quotas.block(quota, taken, now, wanted=Amount(5, 100))
    assert caught.value.retry_after_s == pytest.approx(after)
    assert grpc_status(caught.value) == "RESOURCE_EXHAUSTED"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.retry_after_s) == (str(caught.value), caught.value.retry_after_s)
    # And then it may.
    later = now + after
    assert quotas.block(quota, taken, later, wanted=Amount(5, 100)) == (5, 100)


def test_what_no_time_helps_is_told_so() -> None:
    with pytest.raises(QuotaExceededError, match="tokens_per_minute is 500, and the request needs 501") as caught:
        quotas.block(Quota(tokens_per_minute=500), {}, 1000.0, wanted=Amount(1, 600), least=Amount(1, 501))
    assert caught.value.retry_after_s is None
    with pytest.raises(QuotaExceededError) as caught:
        quotas.block(Quota(requests_per_minute=0), {}, 1000.0, wanted=Amount(1, 1))
    assert caught.value.retry_after_s is None


def test_settling_gives_back_what_was_not_used_and_counts_what_was_used_beyond() -> None:
    assert quotas.settled(Amount(10, 500), Amount(4, 120)) == (-6, -380)
    assert quotas.settled(Amount(1, 100), Amount(1, 130)) == (0, 30)


@pytest.mark.parametrize(
    "limits",
    [{"requests_per_minute": -1}, {"tokens_per_minute": 1.5}, {"adapters": 2**63}, {"budget_tokens": 5},
     {"budget_period_s": 3600}, {"budget_tokens": 5, "budget_period_s": 59}],
    ids=str,
)  # fmt: skip
def test_limits_that_make_no_sense_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        Quota(**limits)


# A registry's


def taken(registry: Registry, tenant: str = "acme") -> dict[Window, Amount]:
    return {use.window: use.taken for use in registry.usage(tenant)}


def test_a_quota_is_kept_and_replaced(registry: Registry) -> None:
    assert registry.quota("acme") == Quota()
    full = Quota(1, 2, 3, 4, 5, 60)
    before = registry.revision()
    registry.set_quota("acme", full, by="ada")
    assert registry.quota("acme") == full and registry.quota("rival") == Quota() and registry.revision() > before
    registry.set_quota("acme", Quota(requests_per_minute=0))
    assert registry.quota("acme") == Quota(requests_per_minute=0)
    with pytest.raises(NotFoundError):
        registry.set_quota("ghost", full)
    entry = next(entry for entry in registry.audit("acme") if entry.action == "quota.set")
    assert (entry.by, entry.details["budget_period_s"]) == ("ada", 60)


def test_a_block_is_taken_used_and_given_back(registry: Registry, clock: Clock) -> None:
    registry.set_quota("acme", Quota(requests_per_minute=10, tokens_per_minute=1000))
    block = registry.lease_usage("acme", requests=8, tokens=600)
    assert (block.requests, block.tokens, block.ends_at) == (8, 600, 1020.0)
    assert taken(registry) == {MINUTE: (8, 600), DAY: (8, 600)}
    rest = registry.lease_usage("acme", requests=8, tokens=600)
    assert (rest.requests, rest.tokens) == (2, 400)
    with pytest.raises(QuotaExceededError) as caught:
        registry.lease_usage("acme", requests=1, tokens=1)
    assert caught.value.retry_after_s == 20.0
    # One of the two is settled in the next minute, where its use does not count.
    registry.settle_usage(block, requests=3, prompt_tokens=100, generated_tokens=50)
    assert taken(registry)[MINUTE] == (5, 550)
    clock.now = 1021.0
    registry.settle_usage(rest, requests=2, prompt_tokens=350, generated_tokens=150)
    minute, day = registry.usage("acme")
    assert (minute.window, minute.taken) == (MINUTE, (5, 650)) and day.taken == (5, 650)
    assert (day.requests, day.prompt_tokens, day.generated_tokens) == (5, 450, 200)
    assert registry.lease_usage("acme", requests=10, tokens=1000).requests == 10
    assert taken(registry, "rival") == {}


def test_use_that_no_limit_held_back_goes_on_record_in_an_overdrawn_window(registry: Registry) -> None:
    registry.set_quota("acme", Quota(requests_per_minute=10, tokens_per_minute=100))
    block = registry.lease_usage("acme", requests=1, tokens=100)
    registry.settle_usage(block, requests=1, prompt_tokens=100, generated_tokens=150)
    nothing = registry.lease_usage("acme", requests=0, tokens=0)
    assert (nothing.requests, nothing.tokens) == (0, 0)
    requests = registry.lease_usage("acme", requests=3, tokens=50, least_tokens=0)
    assert (requests.requests, requests.tokens) == (3, 0)
    with pytest.raises(QuotaExceededError, match="tokens_per_minute of 100"):
        registry.lease_usage("acme", requests=0, tokens=1)
    registry.settle_usage(nothing, requests=2, prompt_tokens=30, generated_tokens=20)
    minute = registry.usage("acme")[0]
    assert (minute.requests, minute.prompt_tokens, minute.generated_tokens) == (3, 130, 170)


def test_a_block_is_settled_once_and_only_by_its_tenant(registry: Registry) -> None:
    block = registry.lease_usage("acme", requests=5, tokens=100)
    registry.settle_usage(replace(block, tenant="rival"), requests=1, prompt_tokens=1, generated_tokens=1)
    for _ in range(2):
        registry.settle_usage(block, requests=1, prompt_tokens=10, generated_tokens=5)
    assert taken(registry) == {MINUTE: (1, 15), DAY: (1, 15)} and taken(registry, "rival") == {}


def test_a_budget_lasts_for_its_period(registry: Registry, clock: Clock) -> None:
    registry.set_quota("acme", Quota(budget_tokens=100, budget_period_s=3600))
    registry.lease_usage("acme", requests=1, tokens=70)
    clock.now += 600
    assert registry.lease_usage("acme", requests=1, tokens=70).tokens == 30
    with pytest.raises(QuotaExceededError) as caught:
        registry.lease_usage("acme", requests=1, tokens=70)
    assert caught.value.retry_after_s == 2000.0
    # A new budget has windows of its own, and blocks settle where they were taken.
    registry.set_quota("acme", Quota(budget_tokens=100, budget_period_s=7200))
    assert registry.lease_usage("acme", requests=1, tokens=70).tokens == 70
    clock.now = 3600.0
    registry.set_quota("acme", Quota(budget_tokens=100, budget_period_s=3600))
    assert registry.lease_usage("acme", requests=1, tokens=70).tokens == 70


def test_a_request_that_needs_more_than_is_left_takes_nothing(registry: Registry) -> None:
    registry.set_quota("acme", Quota(tokens_per_minute=100))
    registry.lease_usage("acme", requests=1, tokens=60)
    with pytest.raises(QuotaExceededError):
        registry.lease_usage("acme", requests=1, tokens=60, least_tokens=41)
    assert registry.lease_usage("acme", requests=1, tokens=60, least_tokens=40).tokens == 40
    for amounts in ({"requests": -1, "tokens": 1}, {"requests": 1, "tokens": -1}):
        with pytest.raises(InvalidInputError):
            registry.lease_usage("acme", **amounts)
    with pytest.raises(InvalidInputError):
        registry.settle_usage(registry.lease_usage("rival", requests=1, tokens=1), requests=-1, prompt_tokens=0,
                              generated_tokens=0)  # fmt: skip


def test_services_share_a_quota_to_the_last_request(registry: Registry, url: str, folder: Path, clock: Clock) -> None:
    registry.set_quota("acme", Quota(requests_per_minute=50, tokens_per_minute=500))

    with Registry.open(url, folder / "blobs", clock=clock) as second:

        def serve(index: int) -> int:
            store, served = (registry, second)[index % 2], 0
            while True:
                try:
                    block = store.lease_usage("acme", requests=7, tokens=70, least_tokens=10)
                except QuotaExceededError:
                    return served
                used = min(block.requests, block.tokens // 10, 3)
                store.settle_usage(block, requests=used, prompt_tokens=4 * used, generated_tokens=6 * used)
                served += used

        served = at_once(serve, threads=6)
    # Whoever came while others held the rest gave up; nobody served beyond, and what was served is on record.
    (day,) = (use for use in registry.usage("acme") if use.window == DAY)
    assert sum(served) == day.requests == day.taken.requests <= 50
    assert day.taken.tokens == 10 * day.requests == day.prompt_tokens + day.generated_tokens


def test_minutes_are_forgotten_after_a_day_and_days_are_not(registry: Registry, clock: Clock) -> None:
    for minute in range(3):
        clock.now = 1000.0 + 60 * minute
        left = registry.lease_usage("acme", requests=1, tokens=1)
    clock.now = 1000.0 + 60 + DAY_S
    registry.lease_usage("acme", requests=1, tokens=1)
    kept = [Window(60, 1080), Window(60, 87420), DAY, Window(DAY_S, DAY_S)]
    assert list(taken(registry)) == kept
    registry.settle_usage(left, requests=1, prompt_tokens=1, generated_tokens=0)
    clock.now += 120
    registry.lease_usage("acme", requests=1, tokens=1)
    assert [window for window in taken(registry) if window.period_s == 60] == [Window(60, 87420), Window(60, 87540)]
    assert [use.window for use in registry.usage("acme", since=DAY_S) if use.window.period_s == DAY_S] == [
        Window(DAY_S, DAY_S)
    ]
    # What was never settled is forgotten with its minute; that changes nothing.
    registry.settle_usage(left, requests=9, prompt_tokens=9, generated_tokens=9)
    assert next(use.requests for use in registry.usage("acme") if use.window == DAY) == 1


def test_a_tenant_owns_as_many_adapters_as_it_may(registry: Registry) -> None:
    registry.set_quota("acme", Quota(adapters=2))
    registry.create_adapter("acme", "first", base="tiny")

    def create(index: int) -> bool:
        try:
            registry.create_adapter("acme", f"more-{index}", base="tiny")
        except QuotaExceededError as error:
            assert error.retry_after_s is None
            return False
        return True

    assert sum(at_once(create, threads=6)) == 1
    registry.create_adapter("rival", "first", base="tiny")
    federation = registry.create_federation("acme", "fed", base="tiny", settings={})
    opened = registry.open_round(federation, 1)
    registry.commit_round(opened, [NewExpert("shared", make_adapter(0), "exact")], report={})
    assert len(registry.adapters("acme")) == 3
