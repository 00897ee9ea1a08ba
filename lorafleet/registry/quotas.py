"""How much of a quota is left, in fixed windows of time.

Windows start at multiples of their length, so that services that know nothing of one another agree on them. A tenant
may use one minute's quota at its end and the next one's right after it: at most twice the quota in any 60 s.

Services do not ask for each request. They take blocks, of what is left at most, and give back what they did not use:
with blocks of n requests, a minute costs one transaction in n requests, and a service that dies keeps what it held
until the window ends, and nothing beyond.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lorafleet.errors import QuotaExceededError
from lorafleet.registry.records import Amount, Quota, Window

MINUTE_S, DAY_S = 60, 86400


class Limit(NamedTuple):
    """So much of one field of :class:`Amount` in a window."""

    name: str
    of: str
    window: Window
    most: int


def window(period_s: int, now: float) -> Window:
    return Window(period_s, math.floor(now / period_s) * period_s)


def windows(quota: Quota, now: float) -> list[Window]:
    """The windows that count at a time: the minute, the day (which is what stays on record), and the budget's."""
    periods = {MINUTE_S, DAY_S} | ({quota.budget_period_s} if quota.budget_period_s is not None else set())
    return [window(period_s, now) for period_s in sorted(periods)]


def limits(quota: Quota, now: float) -> Iterator[Limit]:
    """Those limits of a quota that are of a window."""
    minute = window(MINUTE_S, now)
    if quota.requests_per_minute is not None:
        yield Limit("requests_per_minute", "requests", minute, quota.requests_per_minute)
    if quota.tokens_per_minute is not None:
        yield Limit("tokens_per_minute", "tokens", minute, quota.tokens_per_minute)
    if quota.budget_tokens is not None and quota.budget_period_s is not None:
        yield Limit("budget_tokens", "tokens", window(quota.budget_period_s, now), quota.budget_tokens)


def block(
    quota: Quota, taken: Mapping[Window, Amount], now: float, *, wanted: Amount, least: Amount = Amount(1, 1)
) -> Amount:
    """As much of ``wanted`` as every limit leaves, given what is ``taken`` in each window.

    QuotaExceededError where that is less than ``least`` of either: with the seconds until every limit that is in the
    way has a new window, or None where one is lower than ``least`` and no time helps. A block of nothing is never
    refused: it is how use goes on record that no limit held back.
    """
    given = {"requests": wanted.requests, "tokens": wanted.tokens}
    in_the_way: list[Limit] = []
    for limit in limits(quota, now):
        left = max(0, limit.most - getattr(taken.get(limit.window, Amount(0, 0)), limit.of))
        given[limit.of] = min(given[limit.of], left)
        if left < getattr(least, limit.of):
            in_the_way.append(limit)
    if in_the_way:
        last = max(in_the_way, key=lambda limit: limit.window.ends_at)
        never = [limit for limit in in_the_way if limit.most < getattr(least, limit.of)]
        if never:
            raise QuotaExceededError(
                f"{never[0].name} is {never[0].most}, and the request needs {getattr(least, never[0].of)}; "
                "ask for less, or for a higher quota"
            )
        after = last.window.ends_at - now
        raise QuotaExceededError(f"{last.name} of {last.most} is used up; try again in {math.ceil(after)} s", after)
    return Amount(**given)


def settled(held: Amount, used: Amount) -> Amount:
    """What settling a block adds to what is taken: less than zero is given back, more is what was used beyond it."""
    return Amount(used.requests - held.requests, used.tokens - held.tokens)
