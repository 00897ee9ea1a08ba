"""How every row is timed, ours and the peers' alike: one warm-up, the prefill alone, then the whole generation.

Standard library only: vLLM's process, in an environment without lorafleet, loads this file too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Timing(NamedTuple):
    """One child's figures."""

    tokens: int
    """generated in ``total_s``"""
    total_s: float
    """from the submission of the first request to the last token of the last one"""
    prefill_s: float
    """the same number of other prompts of the same lengths, with one new token each"""


def nothing() -> None:
    """In place of a hook that is not needed."""


class Runner(NamedTuple):
    """A row, loaded and ready."""

    run: Callable[[Sequence[Sequence[int]], int], Sequence[Sequence[int]]]
    """prompts and a number of new tokens → the new tokens of each prompt"""
    reset: Callable[[], None] = nothing
    """called before each timed part, outside of it"""
    close: Callable[[], None] = nothing
    """called at the end, after an error too"""


def measure(
    runner: Runner,
    prompts: Any,
    *,
    new_tokens: int,
    clock: Callable[[], float],
    synchronise: Callable[[], None] = nothing,
) -> Timing:
    """Time a runner, and close it.

    ``prompts``: those of the warm-up, of the prefill and of the whole run. ``synchronise`` waits for the device, and is
    called before the clock is read. Raises RuntimeError where a request did not get exactly as many tokens as it
    should: its time would mean something else.
    """

    def timed(batch: Sequence[Sequence[int]], tokens: int) -> float:
        synchronise()
        began = clock()
        out = runner.run(batch, tokens)
        synchronise()
        took = clock() - began
        found = [len(each) for each in out]
        if found != [tokens] * len(batch):
            raise RuntimeError(f"found {found} new tokens, expected {tokens} for each of {len(batch)} requests")
        return took

    warm_up, prefill, whole = prompts
    try:
        timed(warm_up, new_tokens)
        runner.reset()
        prefill_s = timed(prefill, 1)
        runner.reset()
        total_s = timed(whole, new_tokens)
    finally:
        runner.close()
    return Timing(len(whole) * new_tokens, total_s, prefill_s)
