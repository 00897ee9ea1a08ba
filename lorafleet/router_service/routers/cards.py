"""The cards router: the adapters that say most of the text in their names and model cards answer it. Runs no model.

Each candidate's name and README are scored against the text by BM25 (:mod:`.lexical`), a sum of weights of evidence.
It stands for a log-odds, as a likelihood does, and is turned into weights in the same way: p(c | x) ∝ exp(score_c / T),
the top k share the route in 1/64 steps. The base is a candidate that always knows ``LEAST`` of the text: whoever knows
less is left out, and where nobody knows more the base answers.

It knows what an adapter says of itself, and nothing of what it does: a version without a card is found by its name
alone. What it costs depends on the text and on how many cards share its words, not on the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from lorafleet.errors import InvalidInputError
from lorafleet.router_service.routers.likelihood import posterior_weights
from lorafleet.router_service.routers.types import BASE, Pool, Prompt, Route, Score, Scored

WINDOW: Final = 512
"""Characters of the text that are looked at: its last ones, about as many as the likelihood router's tokens."""
LEAST: Final = 0.05
"""Share of the text's weight that the base is taken to know."""
TEMPERATURE: Final = 1.0
SHOWN: Final = 8
"""Candidates that are told at most, beside the base: who shares next to nothing with the text is of no interest, and to
write a hundred of them takes longer than to find them."""


@dataclass(frozen=True)
class Cards:
    """A :class:`~.types.Router`."""

    runs_model: ClassVar[bool] = False
    reads_cards: ClassVar[bool] = True

    def __call__(self, prompt: Prompt, pool: Pool, score: Score) -> Route:
        return by_cards(prompt.text, pool)


def by_cards(text: str, pool: Pool) -> Route:
    """Scores are shares of the text's weight, from 0 to 1; candidates that share nothing with the text are left out."""
    if not text:
        raise InvalidInputError("the text to route is empty, expected some words; send some text")
    if not pool.candidates:
        return Route({}, (Scored(BASE, 0.0, 1.0, 1.0),), "the tenant has no live adapters: the base answers")
    match = pool.index.match(text[-WINDOW:], most=SHOWN)
    base = LEAST * match.most
    # Who knows less than the base has no part, lest a word that everybody says share a route. The best come first, and
    # so do candidates of equal scores in the order of their digests.
    ahead = sum([score > base for _, score in match.best])
    evidence = [base, *[score for _, score in match.best[:ahead]]]
    (of_base, weight_of_base), *won = zip(*posterior_weights(evidence, temperature=TEMPERATURE), strict=True)
    won += [(0.0, 0.0)] * (len(match.best) - ahead)
    scored = [
        Scored(pool.candidates[number].digest, score / match.most, probability, weight)
        for (number, score), (probability, weight) in zip(match.best, won, strict=True)
    ]
    mix = {one.digest: one.weight for one in scored[:ahead] if one.weight > 0}
    scored.insert(ahead, Scored(BASE, LEAST, of_base, weight_of_base))
    said = pool.index.shared(match, match.best[0][0]) if match.best else []
    return Route(mix, tuple(scored), reason_in_words(scored, pool, said))


def reason_in_words(scored: Sequence[Scored], pool: Pool, said: Sequence[str]) -> str:
    """One line: who answers with what share, and for which of the text's words."""
    named, best = pool.references, scored[0]
    shares = " and ".join(
        [f"{named.get(one.digest, 'the base')} at {one.weight:g}" for one in scored if one.weight > 0]
    )
    if best.digest == BASE:
        cards = f"{len(pool.candidates)} model card{'s' if len(pool.candidates) != 1 else ''}"
        return f"none of {cards} has more than {LEAST:.0%} of what the text says: {shares}"
    quoted = f" ({', '.join(map(repr, said))})" if said else ""
    return f"the name and card of {named[best.digest]} have {best.score:.0%} of what the text says{quoted}: {shares}"
