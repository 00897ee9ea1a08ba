"""Are generated tokens the greedy ones of a reference model?"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NEAR_TIE = 1e-4
"""Two float32 computations of logits may order tokens differently that are closer than this."""


class Mismatch(NamedTuple):
    position: int
    """of the generated token"""
    found: int
    expected: int
    gap: float
    """by how much the reference prefers what was expected"""


def first_mismatch(logits: Tensor, tokens: list[int]) -> Mismatch | None:
    """The first token that the reference would not have chosen.

    ``logits [n, V]`` float32: the reference's for each of the n tokens, given those before it. That all n are its
    choice says the same as that its own greedy generation gives them. A token within ``NEAR_TIE`` of the best one
    counts as the best.
    """
    best = logits.max(dim=-1)
    for position, token in enumerate(tokens):
        gap = float(best.values[position] - logits[position, token])
        if not gap < NEAR_TIE:  # NaN is a mismatch too
            return Mismatch(position, token, int(best.indices[position]), gap)
    return None


def changed(logits: Tensor, other: Tensor) -> int:
    """How many of the n choices differ between two models' ``logits [n, V]``."""
    return int((logits.argmax(dim=-1) != other.argmax(dim=-1)).sum())
