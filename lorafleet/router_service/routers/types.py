"""What a router is given and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, Self

from lorafleet.router_service.routers.lexical import Document, Index

BASE = ""
"""The digest that stands for the bare base among the candidates."""


@dataclass(frozen=True)
class Candidate:
    """An adapter version that the caller may use."""

    digest: str
    reference: str
    """For the reason in words: ``TENANT/ADAPTER:VERSION``."""
    card: str = ""
    """What its version says of itself: a README. Empty where it says nothing, and for routers that read none."""

    @property
    def name(self) -> str:
        """The adapter's, without its tenant's and the version's number."""
        return self.reference.partition("/")[2].rpartition(":")[0]


@dataclass(frozen=True)
class Pool:
    """Distinct digests in order, with what routers look up in all of them together."""

    candidates: tuple[Candidate, ...]

    @classmethod
    def of(cls, candidates: Iterable[Candidate]) -> Self:
        return cls(tuple(sorted(candidates, key=lambda candidate: candidate.digest)))

    @cached_property
    def index(self) -> Index:
        """Of the candidates' names and cards, in their order; made when it is first asked for."""
        return Index([Document(candidate.name, candidate.card) for candidate in self.candidates])

    @cached_property
    def references(self) -> Mapping[str, str]:
        """Digest → reference."""
        return {candidate.digest: candidate.reference for candidate in self.candidates}


class Prompt(Protocol):
    """What is to be routed, in the form that a router reads; made when it is asked for."""

    @property
    def text(self) -> str: ...

    @property
    def tokens(self) -> Sequence[int]:
        """Token ids, opened by end-of-text."""
        ...


class Scored(NamedTuple):
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
    """The candidates that were considered and the base, best first."""
    reason: str


Score = Callable[[Sequence[int], Sequence[Mapping[str, float]]], list[list[float]]]
"""``score(token_ids, mixes)``: for each mix the log-likelihood in nats of the tokens from the second on."""


class Router(Protocol):
    """Decides which candidates answer a prompt. Stateless, so that nothing is to be retrained when adapters change."""

    @property
    def runs_model(self) -> bool:
        """Whether it calls ``score``: what it scores has to be in the engine, and is counted against a quota."""
        ...

    @property
    def reads_cards(self) -> bool:
        """Whether candidates need their cards."""
        ...

    def __call__(self, prompt: Prompt, pool: Pool, score: Score) -> Route: ...
