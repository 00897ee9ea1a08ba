"""What a request asks of sampling, and the choice of next tokens for a batch of rows.

Each request draws one uniform number a token from a generator of its own, and the token is read off the inverse
cumulative distribution. So a seeded request's tokens do not depend on who else is in the batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorafleet.errors import InvalidInputError

# How many of the largest logits are looked at before a full sort, where only top_p cuts.
_TOP_P_FIRST_LOOK = 256


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen; checked when made (InvalidInputError)."""

    max_tokens: int = 128
    """0 only scores the prompt and needs ``prompt_logprobs``"""
    temperature: float = 0.0
    """0 takes the most likely token"""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all"""
    seed: int | None = None
    """None draws a new one for every request"""
    stop: Sequence[str] = ()
    """texts that end the generation; the text that comes back ends before them"""
    ignore_eos: bool = False
    logprobs: bool = False
    """log-probabilities (nats) of the generated tokens, before temperature and cuts"""
    prompt_logprobs: bool = False
    """log-probabilities (nats) of the prompt's tokens 2…n"""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        for name, expected, holds in (
            ("max_tokens", "an integer of at least 0", _is_int(self.max_tokens) and self.max_tokens >= 0),
            (
                "max_tokens",
                "at least 1, or 0 with prompt_logprobs to score a prompt",
                self.max_tokens != 0 or self.prompt_logprobs,
            ),
            ("temperature", "a finite number of at least 0", _is_number(self.temperature) and self.temperature >= 0),
            ("top_p", "a number above 0 and at most 1", _is_number(self.top_p) and 0 < self.top_p <= 1),
            ("top_k", "an integer of at least 0 (0 keeps all)", _is_int(self.top_k) and self.top_k >= 0),
            ("seed", "an integer or None", self.seed is None or _is_int(self.seed)),
            ("stop", "texts that are not empty", all(isinstance(text, str) and text for text in self.stop)),
        ):
            if not holds:
                raise InvalidInputError(f"sampling: found {name} {getattr(self, name)!r}, expected {expected}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Choice(NamedTuple):
    """One entry a row."""

    tokens: list[int]
    logprobs: list[float]
    """nats under the model's own distribution; empty where no row asked"""
    finite: list[bool]
    """False where the logits hold NaN or +infinity: no token of such a row means anything"""


def choose(logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[random.Random]) -> Choice:
    """The next token of every row of ``logits [N, V]`` float32."""
    peak, best = logits.max(dim=-1)
    sampled = [row for row, p in enumerate(params) if p.temperature > 0]
    if sampled:
        best[sampled] = _sample(
            logits[sampled] if len(sampled) < len(params) else logits,
            peak[sampled, None],
            [params[row] for row in sampled],
            [generators[row].random() for row in sampled],
        )
    logprobs: list[float] = []
    if any(p.logprobs for p in params):
        logprobs = logprobs_of(logits, best).tolist()
    return Choice(best.tolist(), logprobs, [math.isfinite(value) for value in peak.tolist()])


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """``[N]`` log-probabilities (nats) of ``tokens [N]`` under ``logits [N, V]``."""
    return logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=-1)


def _sample(logits: Tensor, peak: Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> Tensor:
    """``[N]`` token ids from ``logits [N, V]``, their row maxima ``peak [N, 1]`` and one uniform number a row.

    The running sum goes in the order of the vocabulary, cut or not, so that a row's token depends on that row alone.
    float64, so that the tail of a large vocabulary is not lost in it.
    """
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=logits.device)[:, None]
    u = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None]
    weights = ((logits.double() - peak) / temperature).nan_to_num_(nan=-math.inf).exp_()
    cut = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    if cut:
        rows = weights[cut]
        least = _least_kept(rows, [params[row] for row in cut])
        weights[cut] = rows.masked_fill_(rows < least, 0.0)
    running = weights.cumsum(dim=-1)
    index = torch.searchsorted(running, u * running[:, -1:], right=True)
    return index.squeeze(1).clamp_max(logits.shape[1] - 1)


def _least_kept(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """``[N, 1]``, the smallest of ``weights [N, V]`` that top_k and then top_p keep; equal ones stay with it.

    top_p counts the share of what top_k kept, and the token that crosses the border stays.
    """
    kept = _largest(weights, params)
    running = kept.cumsum(dim=-1)
    ranks = torch.arange(kept.shape[1], device=weights.device)
    limit = torch.tensor([p.top_k or weights.shape[1] for p in params], device=weights.device)[:, None]
    last = (limit - 1).clamp_max(kept.shape[1] - 1)
    total = torch.where(limit < weights.shape[1], running.gather(1, last), weights.sum(dim=-1, keepdim=True))
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=weights.device)[:, None]
    keep = (ranks < limit) & ((running - kept < top_p * total) | (ranks == 0))
    return kept.gather(1, keep.sum(dim=-1, keepdim=True) - 1)


def _largest(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The largest of ``weights [N, V]``, falling, as many as any row's cut can reach."""
    look = max(p.top_k or _TOP_P_FIRST_LOOK for p in params)
    if look < weights.shape[1]:
        kept = weights.topk(look, dim=-1).values
        shares = (kept.sum(dim=-1) / weights.sum(dim=-1)).tolist()
        if all(p.top_k > 0 or share >= p.top_p for p, share in zip(params, shares, strict=True)):
            return kept
    return weights.sort(dim=-1, descending=True).values
