"""Which adapters leave a tier that is full: pure functions of what is known about each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Candidate(NamedTuple):
    """What could leave a tier."""

    key: str
    size_bytes: int
    uses: float
    """decayed"""
    waiting: int
    """requests that wait for it"""


def decayed(uses: float, *, elapsed_s: float, half_life_s: float) -> float:
    """So many uses, counted after so long."""
    return float(uses * 0.5 ** (elapsed_s / half_life_s))


def score(candidate: Candidate) -> float:
    """What a byte of it is worth in its tier."""
    return (candidate.uses + candidate.waiting) / max(1, candidate.size_bytes)


def choose_evictions(candidates: Iterable[Candidate], *, needed_bytes: int) -> list[str] | None:
    """Keys to evict for so many bytes, lowest score first; None where all of them together are too small.

    One that was chosen stays after all where those behind it free enough without it.
    """
    chosen: list[Candidate] = []
    free = 0
    for candidate in sorted(candidates, key=lambda c: (score(c), c.key)):
        if free >= needed_bytes:
            break
        chosen.append(candidate)
        free += candidate.size_bytes
    if free < needed_bytes:
        return None
    for candidate in reversed(chosen):
        if free - candidate.size_bytes >= needed_bytes:
            chosen.remove(candidate)
            free -= candidate.size_bytes
    return [candidate.key for candidate in chosen]
