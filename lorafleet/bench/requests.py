"""What the requests of our rows ask of the engine, and which adapters they make it use."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lorafleet.bench.shapes import Load

RANKS = (8, 16, 32, 64, 8, 16, 32, 64)
"""Of the eight adapters."""
EIGHT = tuple(f"a{number}" for number in range(len(RANKS)))
MANY_RANK = 8
ZIPF_SEED = 5
EVEN = tuple(f"e{number}" for number in range(64))
"""Adapters of rank 16; the first eight of them, or all."""
UNEVEN = tuple(f"u{number}" for number in range(64))
"""Adapters of the ranks of the eight, in turn."""
EVEN_RANK = 16


@dataclass(frozen=True)
class Ask:
    """One request beside its prompt: a mix, or adapters among which each token is routed."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """adapter → weight; empty for the bare base, and where tokens are routed"""
    routed: tuple[str, ...] = ()
    top_k: int = 0
    """how many of the ``routed`` adapters a token gets"""

    @property
    def uses(self) -> dict[str, float]:
        """Adapter → share of the request's tokens that it is computed for; equal shares where tokens are routed."""
        return dict.fromkeys(self.weights, 1.0) or {name: self.top_k / len(self.routed) for name in self.routed}


def many_name(number: int) -> str:
    return f"m{number}"


def zipf(draws: int, *, names: int, exponent: float, seed: int) -> list[int]:
    """Numbers from 0 to ``names - 1``; number k comes with a probability that goes with ``1 / (k + 1)^exponent``."""
    weights = [1.0 / (number + 1) ** exponent for number in range(names)]
    return random.Random(seed).choices(range(names), weights, k=draws)


def _base(load: Load) -> list[Ask]:
    return [Ask()] * load.requests


def _single(load: Load) -> list[Ask]:
    return [Ask({EIGHT[i % 8]: 1.0}) for i in range(load.requests)]


def _mix2(load: Load) -> list[Ask]:
    return [Ask({EIGHT[i % 8]: 0.7, EIGHT[(i + 1) % 8]: 0.3}) for i in range(load.requests)]


def _pairs(names: tuple[str, ...]) -> Callable[[Load], list[Ask]]:
    """Two neighbours of these for each request, in turn."""
    count = len(names)
    return lambda load: [Ask({names[i % count]: 0.7, names[(i + 1) % count]: 0.3}) for i in range(load.requests)]


def _token_top2(load: Load) -> list[Ask]:
    return [Ask(routed=EIGHT, top_k=2)] * load.requests


def _many(load: Load) -> list[Ask]:
    drawn = zipf(load.requests, names=load.registered, exponent=1.0, seed=ZIPF_SEED)
    return [Ask({many_name(number): 1.0}) for number in drawn]


ASKS: dict[str, Callable[[Load], list[Ask]]] = {
    "base": _base,
    "base_alone": _base,
    "single": _single,
    "mix2": _mix2,
    "mix2_even8": _pairs(EVEN[:8]),
    "mix2_even64": _pairs(EVEN),
    "mix2_uneven64": _pairs(UNEVEN),
    "token_top2": _token_top2,
    "many": _many,
    "many_cold": _many,
}


def adapter_ranks() -> dict[str, int]:
    """Name → rank of the eight adapters."""
    return dict(zip(EIGHT, RANKS, strict=True))


def rank_of(name: str) -> int:
    """The rank of any adapter of the benchmark."""
    ranks = adapter_ranks() | dict.fromkeys(EVEN, EVEN_RANK) | {u: RANKS[i % 8] for i, u in enumerate(UNEVEN)}
    return ranks.get(name, MANY_RANK)
