"""What a router is given and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

BASE = ""
"""The digest that stands for the bare base among the candidates."""


@dataclass(frozen=True)
class Candidate:
    """An adapter version that the caller may use."""

    digest: str
    reference: str
    """For the reason in words: ``TENANT/ADAPTER:VERSION``."""


@dataclass(frozen=True)
class Scored:
    """One candidate after scoring; ``digest`` is :data:`BASE` for the bare base."""

    digest: str
    score: float
    """What the router ranks by; higher is better."""
    probability: float
    weight: float
    """Its share of the route, in 1/64 steps; the base's share is what the mix leaves out of 1."""


@dataclass(frozen=True)
class Route:
    """A router's answer."""

    mix: Mapping[str, float]
    """Digest → weight; the base is never in it."""
    scores: tuple[Scored, ...]
    """All candidates and the base, best first."""
    reason: str


Score = Callable[[Sequence[int], Sequence[Mapping[str, float]]], list[list[float]]]
"""``score(token_ids, mixes)``: for each mix the log-likelihood in nats of the tokens from the second on."""


class Router(Protocol):
    """Decides which candidates answer a prompt. Stateless, so that nothing is to be retrained when adapters change."""

    def __call__(self, prompt: Sequence[int], candidates: Sequence[Candidate], score: Score) -> Route:
        """``prompt``: token ids, opened by end-of-text; ``candidates``: distinct digests."""
        ...
