"""How a row is timed, with a clock of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from lorafleet.bench.timing import Runner, Timing, measure

PROMPTS = ([[1], [2]], [[3], [4]], [[5], [6]])


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def runner(clock: Clock, log: list[str], *, lost: int = 0) -> Runner:
    """Takes a second for a batch's prefill and two for each further token."""

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        log.append(f"{list(prompts)} {new_tokens}")
        clock.now += 1.0 + 2.0 * (new_tokens - 1)
        return [[0] * (new_tokens - lost) for _ in prompts]

    def note(word: str) -> Callable[[], None]:
        return lambda: log.append(word)

    return Runner(run, note("reset"), note("close"))


def test_one_warm_up_then_the_prefill_then_the_whole_with_other_prompts_each() -> None:
    clock, log = Clock(), list[str]()
    found = measure(runner(clock, log), PROMPTS, new_tokens=3, clock=clock)
    assert found == Timing(tokens=6, total_s=5.0, prefill_s=1.0)
    assert log == ["[[1], [2]] 3", "reset", "[[3], [4]] 1", "reset", "[[5], [6]] 3", "close"]


def test_the_device_is_waited_for_before_the_clock_is_read() -> None:
    clock, log = Clock(), list[str]()

    def synchronise() -> None:  # what was queued takes a quarter of a second
        clock.now += 0.25

    found = measure(runner(clock, log), PROMPTS, new_tokens=3, clock=clock, synchronise=synchronise)
    assert found == Timing(tokens=6, total_s=5.25, prefill_s=1.25)


def test_a_run_that_gives_too_few_tokens_has_no_time_and_is_closed() -> None:
    clock, log = Clock(), list[str]()
    with pytest.raises(RuntimeError, match=r"found \[2, 2\] new tokens, expected 3"):
        measure(runner(clock, log, lost=1), PROMPTS, new_tokens=3, clock=clock)
    assert log[-1] == "close"
