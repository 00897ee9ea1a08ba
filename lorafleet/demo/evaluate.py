"""Held-out loss as a caller sees it: every figure comes from the running service, over gRPC.

A text is cut into windows; the first part of a window is a prompt that the router may see, and all losses are counted
on the part that follows. Base, single experts and routed mixtures are therefore scored on the same tokens, and the
router never sees the tokens that it is judged by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from lorafleet.api_client import RouteDecision, RouterClient

# About 270 tokens a window on the demo's texts; a third of them is prompt.
WINDOW_CHARACTERS = 900
PROMPT_CHARACTERS = 300
# Texts that the tokenizer knows badly are cut here: they have to fit into a context of 512 tokens.
MAX_WINDOW_TOKENS = 400
# The service scores what is in flight in one batch.
CALLS_AT_ONCE = 8


class Window(NamedTuple):
    prompt: str
    text: str
    """The prompt and what follows it."""
    skip: int
    """Tokens of the prompt: not counted."""


class Loss(NamedTuple):
    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


@dataclass(frozen=True)
class Routed:
    loss: Loss
    weights: Mapping[str, float]
    """Adapter (``TENANT/NAME``, or ``base``) → mean weight over the domain's windows."""


def windows(folder: Path, tokenizer: Tokenizer, limit: int) -> list[Window]:
    """At most ``limit`` windows of a folder's ``*.txt`` files, spread evenly over them; cut at line ends."""
    found = []
    for path in sorted(folder.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        for start in range(0, len(text) - WINDOW_CHARACTERS, WINDOW_CHARACTERS):
            piece = text[start : start + WINDOW_CHARACTERS]
            offsets = tokenizer.encode(piece).offsets
            piece = piece[: offsets[min(MAX_WINDOW_TOKENS, len(offsets)) - 1][1]]
            cut = piece.rfind("\n", PROMPT_CHARACTERS // 2, PROMPT_CHARACTERS) + 1 or PROMPT_CHARACTERS
            found.append(Window(piece[:cut], piece, len(tokenizer.encode(piece[:cut]).ids)))
    return [found[i * len(found) // limit] for i in range(min(limit, len(found)))] if len(found) > limit else found


def score(client: RouterClient, chosen: Sequence[Window], mixes: Sequence[Mapping[str, float]]) -> list[Loss]:
    """The loss of each window after its prompt, under its mix (reference → weight)."""

    def one(window: Window, mix: Mapping[str, float]) -> Loss:
        answer = client.generate(window.text, mix=dict(mix), max_tokens=0, prompt_logprobs=True)
        # The engine opens every prompt with end-of-text, so that the first logprob is that of the first token.
        counted = answer.prompt_logprobs[window.skip :]
        return Loss(-sum(counted), len(counted))

    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        return list(pool.map(one, chosen, mixes))


def total(losses: Sequence[Loss]) -> Loss:
    return Loss(sum(loss.nats for loss in losses), sum(loss.tokens for loss in losses))


def domain_loss(client: RouterClient, chosen: Sequence[Window], mix: Mapping[str, float]) -> Loss:
    """One domain under one mix for all its windows; ``{}`` is the bare base."""
    return total(score(client, chosen, [mix] * len(chosen)))


def routed_loss(client: RouterClient, chosen: Sequence[Window]) -> Routed:
    """One domain with the mixture that the router picks for each window from its prompt."""
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        decisions = list(pool.map(lambda window: client.route(window.prompt), chosen))
    losses = score(client, chosen, [{c.reference: c.weight for c in decision.mix} for decision in decisions])
    return Routed(total(losses), mean_weights(decisions))


def mean_weights(decisions: Sequence[RouteDecision]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for decision in decisions:
        for component in decision.mix:
            name = component.reference.partition(":")[0]
            weights[name] = weights.get(name, 0.0) + component.weight / len(decisions)
        weights["base"] = weights.get("base", 0.0) + (1 - sum(c.weight for c in decision.mix)) / len(decisions)
    return weights
