"""What a request's tokens so far do to its next logits: repetition, presence and frequency penalties, and biases.

Repetition: CTRL, https://arxiv.org/abs/1909.05858, section 4.1: the logit x of a token that was seen, in the prompt or
since, becomes x / θ; and, as in transformers, x · θ where x < 0, so that θ > 1 never makes a token likelier.
Presence and frequency, as in OpenAI's API: x − c · frequency − [c > 0] · presence, where c is how often the token was
generated. Biases are added at the end.

For one token all of it is ``where(x < 0, x · factor, x / factor) + addend``. A request keeps factor and addend for the
tokens that have any, and changes one entry a generated token; a step gathers and scatters those entries alone.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor


class TokenHistory:
    """The tokens of one request, as far as its next logits depend on them."""

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
    ) -> None:
        self._repetition, self._presence, self._frequency = repetition_penalty, presence_penalty, frequency_penalty
        self._bias = dict(logit_bias or {})
        self._counts: dict[int, int] = {}  # token → how often it was generated
        self.generated = 0
        """tokens generated so far"""
        seen = set(prompt) if repetition_penalty != 1.0 else set()
        self.tokens = array("q", [*self._bias, *sorted(seen - self._bias.keys())])
        """the tokens whose logits change, each one once"""
        self.factors = array("f", [repetition_penalty if token in seen else 1.0 for token in self.tokens])
        self.addends = array("f", [self._bias.get(token, 0.0) for token in self.tokens])
        self._places = {token: place for place, token in enumerate(self.tokens)}
        self._penalises = repetition_penalty != 1.0 or presence_penalty != 0.0 or frequency_penalty != 0.0

    def add(self, token: int) -> None:
        """Count a generated token."""
        self.generated += 1
        if not self._penalises:
            return
        count = self._counts[token] = self._counts.get(token, 0) + 1
        addend = self._bias.get(token, 0.0) - self._presence - self._frequency * count
        place = self._places.setdefault(token, len(self.tokens))
        if place == len(self.tokens):
            self.tokens.append(token)
            self.factors.append(self._repetition)
            self.addends.append(addend)
        else:
            self.factors[place], self.addends[place] = self._repetition, addend


def penalised(logits: Tensor, histories: Sequence[TokenHistory]) -> Tensor:
    """``logits [N, V]`` after penalties and biases, one history a row. Tokens beyond the vocabulary are passed over."""
    tokens, factors, addends = array("q"), array("f"), array("f")
    for history in histories:
        tokens.extend(history.tokens)
        factors.extend(history.factors)
        addends.extend(history.addends)
    if not tokens:
        return logits
    index, within = _flat_index(tokens, [len(history.tokens) for history in histories], vocabulary=logits.shape[1])
    factor, addend = torch.frombuffer(factors, dtype=torch.float32), torch.frombuffer(addends, dtype=torch.float32)
    if within is not None:
        factor, addend = factor[within], addend[within]
    index, factor, addend = (values.to(logits.device) for values in (index, factor, addend))
    old = logits.flatten().gather(0, index)
    new = torch.where(old < 0, old * factor, old / factor) + addend
    return logits.flatten().scatter(0, index, new).view_as(logits)


def without(logits: Tensor, tokens: Sequence[Collection[int]]) -> Tensor:
    """``logits [N, V]`` with −∞ for a row's ``tokens``. Those beyond the vocabulary are passed over."""
    joined = array("q")
    for row in tokens:
        joined.extend(row)
    if not joined:
        return logits
    index, _ = _flat_index(joined, [len(row) for row in tokens], vocabulary=logits.shape[1])
    return logits.flatten().index_fill(0, index.to(logits.device), -math.inf).view_as(logits)


def _flat_index(tokens: array[int], lengths: Sequence[int], *, vocabulary: int) -> tuple[Tensor, Tensor | None]:
    """Row after row, where each token's logit lies in the flat ``[N · V]``; and which tokens are in the vocabulary.

    The second is None where all are, which is the rule. A token beyond it must not become an index: on a GPU that
    ends the process's use of the device for all requests.
    """
    ids = torch.frombuffer(tokens, dtype=torch.int64)
    index = (torch.arange(len(lengths)) * vocabulary).repeat_interleave(torch.tensor(lengths)) + ids
    if int(ids.max()) < vocabulary:
        return index, None
    within = ids < vocabulary
    return index[within], within
