"""The share of the processors' time that others on the host had."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from lorafleet.bench.neighbours import Neighbours


def times(user: float, steal: float, idle: float) -> SimpleNamespace:
    return SimpleNamespace(user=user, nice=0.0, system=1.0, irq=0.0, softirq=0.0, idle=idle, steal=steal)


def test_a_lap_tells_what_others_had_of_the_time_that_was_wanted_since_the_last_one() -> None:
    looks = iter([times(10, 5, 0), times(16, 7, 100), times(16, 7, 200), times(17, 10, 200)])
    neighbours = Neighbours(lambda: next(looks))
    assert neighbours.share() == pytest.approx(2 / 8)
    assert neighbours.share() is None  # nothing ran
    assert neighbours.share() == pytest.approx(3 / 4)


def test_nothing_is_told_where_the_system_does_not_count_it() -> None:
    assert Neighbours(lambda: SimpleNamespace(user=1.0, idle=1.0)).share() is None


def test_here_it_is_a_share() -> None:
    neighbours = Neighbours()
    while (share := neighbours.share()) is None and hasattr(psutil.cpu_times(), "steal"):
        sum(range(10**6))
    assert share is None or 0.0 <= share <= 1.0
