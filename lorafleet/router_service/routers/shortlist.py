"""The two-stage router: model cards name a few candidates, the model decides among them.

Scoring every candidate by the model costs a prefill each, which is right for tens of them. Retrieving some by what is
cheap and ranking those by what is good is how large libraries are routed (LAG, arXiv 2507.05346, does both in factor
space): here the first stage is :mod:`.cards`, the second :mod:`.likelihood`, and the cost is at most ``SHORT`` + 1
prefills however many adapters there are. BM25 is evidence in nats: whose card is ``FAR`` behind the best one is not
worth a prefill. What the first stage does not find is lost: where no card has a word of the text, the base answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

from lorafleet.router_service.routers.cards import WINDOW
from lorafleet.router_service.routers.likelihood import likelihood
from lorafleet.router_service.routers.types import BASE, Pool, Prompt, Route, Score, Scored

SHORT: Final = 4
"""Candidates that the model scores; as few as these are all scored, whatever their cards say."""
FAR: Final = 7.0
"""Nats behind the best card: by the cards alone less than a thousandth of its odds."""


@dataclass(frozen=True)
class Shortlist:
    """A :class:`~.types.Router`."""

    runs_model: ClassVar[bool] = True
    reads_cards: ClassVar[bool] = True

    def __call__(self, prompt: Prompt, pool: Pool, score: Score) -> Route:
        if len(pool.candidates) <= SHORT:
            return likelihood(prompt.tokens, pool.candidates, score)
        best = pool.index.match(prompt.text[-WINDOW:], most=SHORT).best
        among = f"of {len(pool.candidates)} model cards"
        if prompt.text and not best:
            reason = f"none {among} shares a word with the text: the base at 1"
            return Route({}, (Scored(BASE, 0.0, 1.0, 1.0),), reason)
        near = [pool.candidates[number] for number, evidence in best if evidence > best[0][1] - FAR]
        route = likelihood(prompt.tokens, near, score)
        are = "is" if len(near) == 1 else "are"
        return replace(route, reason=f"{among} {len(near)} {are} near the text; {route.reason}")
