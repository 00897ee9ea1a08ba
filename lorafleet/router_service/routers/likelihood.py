"""The likelihood router: the adapters that explain the prompt best answer it.

With a uniform prior over the candidates c and the bare base, and ``L_c = Σ_t log p_c(x_t | x_<t)`` over the prompt:

    p(c | x) ∝ exp(L_c / T)

The tokens of a text are not independent evidence of its domain, so that the plain posterior (T = 1) is sure of itself
long before it is right; T > 1 tempers it. The top k share the route in proportion to their posterior, in 1/64 steps.
The base competes like any other candidate, and what it wins is left out of the mix: an adapter with 48/64 beside a base
with 16/64 runs at weight 0.75.

Candidates are compared by what they predict, not by the size of their factors, so that ranks may differ and nothing is
trained: an adapter takes part from the moment it is live. The cost is one prefill of at most ``WINDOW`` tokens for each
candidate, all in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from lorafleet.errors import InvalidInputError
from lorafleet.router_service.routers.types import BASE, Candidate, Pool, Prompt, Route, Score, Scored

WINDOW: Final = 128
"""Tokens of the prompt that are scored: its last ones, which are the nearest to what is to be written."""
TEMPERATURE: Final = 4.0
TOP_K: Final = 2
STEPS: Final = 64


@dataclass(frozen=True)
class Likelihood:
    """A :class:`~.types.Router`."""

    runs_model: ClassVar[bool] = True
    reads_cards: ClassVar[bool] = False

    def __call__(self, prompt: Prompt, pool: Pool, score: Score) -> Route:
        return likelihood(prompt.tokens, pool.candidates, score)


def likelihood(prompt: Sequence[int], candidates: Sequence[Candidate], score: Score) -> Route:
    """Scores every candidate and the base on the prompt's window and mixes the best."""
    window = [*prompt[:1], *prompt[1:][-(WINDOW - 1) :]]
    if len(window) < 2:
        raise InvalidInputError("the text to route has no tokens, expected at least one; send some text")
    if not candidates:
        return Route({}, (Scored(BASE, 0.0, 1.0, 1.0),), "the tenant has no live adapters: the base answers")
    # In digest order: equal mixes are then equal to the letter, whatever order the candidates came in.
    digests = [BASE, *sorted(candidate.digest for candidate in candidates)]
    mixes = [{digest: 1.0} if digest != BASE else {} for digest in digests]
    totals = [math.fsum(values) for values in score(window, mixes)]
    probabilities, weights = posterior_weights(totals)
    tokens = len(window) - 1
    scores = tuple(
        sorted(
            (
                Scored(d, total / tokens, p, w)
                for d, total, p, w in zip(digests, totals, probabilities, weights, strict=True)
            ),
            key=lambda scored: (-scored.score, scored.digest),
        )
    )
    mix = {digest: w for digest, w in zip(digests, weights, strict=True) if digest != BASE and w > 0}
    return Route(mix, scores, reason_in_words(scores, {c.digest: c.reference for c in candidates}, tokens))


def posterior_weights(
    log_likelihoods: Sequence[float], *, temperature: float = TEMPERATURE, top_k: int = TOP_K, steps: int = STEPS
) -> tuple[list[float], list[float]]:
    """Posterior probabilities, and the weights of the ``top_k`` best in multiples of ``1/steps``; both sum to 1.

    ``log_likelihoods``: total nats of one text under each candidate. A candidate whose sum is not finite gets nothing;
    where that leaves nobody, InvalidInputError is raised. Ties go to the earlier candidate. Steps are given out by
    largest remainder, so that no weight is off by a whole step.
    """
    usable = [value if math.isfinite(value) else -math.inf for value in log_likelihoods]
    best = max(usable, default=-math.inf)
    if best == -math.inf:
        raise InvalidInputError(
            "no candidate and not even the base gives the text a finite likelihood; it cannot be routed"
        )
    powers = [math.exp((value - best) / temperature) for value in usable]
    total = math.fsum(powers)
    probabilities = [power / total for power in powers]

    chosen = sorted(range(len(usable)), key=lambda i: (-usable[i], i))[:top_k]
    kept = math.fsum(probabilities[i] for i in chosen)
    exact = {i: probabilities[i] / kept * steps for i in chosen}
    units = {i: math.floor(exact[i]) for i in chosen}
    for i in sorted(chosen, key=lambda i: (units[i] - exact[i], i))[: steps - sum(units.values())]:
        units[i] += 1
    return probabilities, [units.get(i, 0) / steps for i in range(len(usable))]


def reason_in_words(scores: Sequence[Scored], references: dict[str, str], tokens: int) -> str:
    """One line: who answers with what share, and by how much the best of them beats the base."""
    names = {BASE: "the base", **references}
    shares = " and ".join(f"{names[s.digest]} at {s.weight:g}" for s in scores if s.weight > 0)
    base = next(s.score for s in scores if s.digest == BASE)
    over = f"over {tokens} token{'s' if tokens != 1 else ''}"
    best = scores[0]
    if best.digest == BASE:
        return f"no adapter explains the text better than the base {over} ({-base:.3f} nats a token): {shares}"
    gain = best.score - base
    return f"{names[best.digest]} explains the text {gain:.3f} nats a token better than the base {over}: {shares}"
