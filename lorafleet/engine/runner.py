"""One forward pass over the tokens of a step: packed inputs, attention over the cache, gates, and the logits needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lorafleet.engine.attention import Attention, Span, StepAttention
from lorafleet.engine.block_attention import BlockAttention
from lorafleet.engine.block_pages import BlockPages
from lorafleet.engine.graphs import Capture, StepGraphs
from lorafleet.engine.kv_pages import KvPages
from lorafleet.engine.mixture_linear import MixtureContext
from lorafleet.engine.model import LoadedBase
from lorafleet.engine.residency import Residency
from lorafleet.engine.sampling import TokenLogprob, choose, logprobs_of
from lorafleet.engine.scheduler import ScheduledRun
from lorafleet.engine.tile_attention import TileAttention
from lorafleet.engine.tile_pages import TilePages
from lorafleet.kernels import Bank, Packing, Plan, Run
from lorafleet.native import logprobs as native_logprobs

# Rows of logits held at once while a prompt is scored: 256 rows of a 150 000-token vocabulary are 150 MB.
_SCORE_ROWS = 256


class Outcome(NamedTuple):
    """What one run of a step gave."""

    token: int | None
    """the next token; None in the middle of a prompt, or where nothing is to be generated"""
    logprob: float | None
    """nats; None unless asked for"""
    prompt_logprobs: list[float]
    """nats, of the prompt tokens that the run's rows predict; empty unless asked for"""
    finite: bool
    """False where the logits hold NaN or infinity, and no token means anything"""
    top_logprobs: Sequence[TokenLogprob] = ()
    """the most likely tokens; empty unless asked for"""


class ModelRunner:
    """Computes steps; changes the cache, never a request."""

    def __init__(
        self,
        base: LoadedBase,
        *,
        cache: KvPages | TilePages,
        residency: Residency,
        context: MixtureContext,
        device: torch.device,
    ) -> None:
        self._base, self._cache, self._residency, self._context = base, cache, residency, context
        self._device = device
        # oneDNN's bfloat16 product carries one token's NaN to the token before it where the inner size is no multiple
        # of 32 (found with 31, 80 and 100, from 17 tokens on).
        self._leaks = device.type == "cpu" and base.dtype == torch.bfloat16 and not base.tiled
        self._logprobs_of = native_logprobs.logprobs_of if base.tiled else logprobs_of
        self._plan: Plan | None = None
        self._packing: Packing | None = None
        self._graphs: StepGraphs | None = None

    def use_graphs(self, bank: Bank, capture: Capture, *, max_sequences: int, most_pages: int) -> None:
        """Replay decoding steps from now on, of at most so many sequences of at most so many pages."""
        assert isinstance(self._cache, BlockPages)
        self._graphs = StepGraphs(
            compute=self._hidden, cache=self._cache, bank=bank, context=self._context, capture=capture,
            device=self._device, dtype=self._base.dtype, max_sequences=max_sequences, most_pages=most_pages,
        )  # fmt: skip

    def run(self, runs: Sequence[ScheduledRun]) -> list[Outcome]:
        """Compute the tokens of the runs, one-token runs first; one outcome for each.

        Nothing but the cache, and the generators of sampled requests, has changed: after an error the same runs can
        be computed again.
        """
        hidden = self._forward(runs)
        if self._leaks and len(runs) > 1 and not bool(torch.isfinite(hidden).all()):
            # Before anything is drawn: whoever called computes them one by one.
            raise FloatingPointError("the hidden states of these requests are not finite")
        talking: dict[int, int] = {}  # run → its last row, where that row predicts a new token
        prompt_logprobs = self._score_prompts(runs, hidden)
        row = 0
        for index, (request, start, stop) in enumerate(runs):
            row += stop - start
            if stop == len(request.tokens):
                talking[index] = row - 1
        finite = [all(map(math.isfinite, scores)) for scores in prompt_logprobs]
        outcomes = [Outcome(None, None, *both) for both in zip(prompt_logprobs, finite, strict=True)]
        if not talking:
            return outcomes
        rows = list(talking.values())
        requests = [runs[index].request for index in talking]
        choice = choose(
            self._logits(hidden if len(rows) == hidden.shape[0] else hidden[rows]),
            [request.sampling for request in requests],
            [request.generator for request in requests],
            histories=[request.history for request in requests],
            eos=self._base.eos,
        )
        for place, index in enumerate(talking):
            outcomes[index] = Outcome(
                choice.tokens[place],
                choice.logprobs[place],
                prompt_logprobs[index],
                finite[index] and choice.finite[place],
                choice.top_logprobs[place],
            )
        return outcomes

    def _forward(self, runs: Sequence[ScheduledRun]) -> Tensor:
        """Hidden states ``[T, hidden]`` of all tokens of the runs, in order."""
        tokens: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for request, start, stop in runs:
            tokens.extend(request.tokens[start:stop])
            positions.extend(range(start, stop))
            spans.append(Span(request.pages, start, stop))
        self._set_gates(runs)
        try:
            if self._graphs is not None:
                packing, plan = self._context.packing, self._context.plan
                replayed = self._graphs.run(spans, tokens, positions, packing=packing, plan=plan)
                if replayed is not None:
                    return replayed
            ids, places = (torch.tensor([numbers], device=self._device) for numbers in (tokens, positions))
            return self._hidden(ids, places, self._attention(spans))
        finally:
            self._context.set(None, None)

    def _attention(self, spans: Sequence[Span]) -> Attention:
        if isinstance(self._cache, TilePages):
            return TileAttention(spans, cache=self._cache)
        if isinstance(self._cache, BlockPages):
            return BlockAttention(spans, cache=self._cache, device=self._device, dtype=self._base.dtype)
        return StepAttention(spans, cache=self._cache, device=self._device, dtype=self._base.dtype)

    def _hidden(self, ids: Tensor, places: Tensor, step: Attention) -> Tensor:
        """Token ids and positions ``[1, T]`` → hidden states ``[T, hidden]``."""
        return self._base.decoder(ids, places, step)

    def _logits(self, hidden: Tensor) -> Tensor:
        """``[N, hidden]`` → ``[N, vocabulary]`` float32"""
        logits = self._base.head(hidden).float()
        cap = self._base.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _score_prompts(self, runs: Sequence[ScheduledRun], hidden: Tensor) -> list[list[float]]:
        """For each run the log-probabilities (nats) of the prompt tokens that its rows predict, if asked.

        All rows of a step go through the output layer together: five prompts of 100 tokens one by one took longer there
        than in the five layers of a small base.
        """
        rows: list[int] = []
        predicted: list[int] = []
        counts: list[int] = []
        row = 0
        for request, start, stop in runs:
            count = min(stop, request.prompt_tokens - 1) - start if request.sampling.prompt_logprobs else 0
            counts.append(max(0, count))
            rows.extend(range(row, row + counts[-1]))
            predicted.extend(request.tokens[start + 1 : start + 1 + counts[-1]])
            row += stop - start
        scores: list[float] = []
        for first in range(0, len(rows), _SCORE_ROWS):
            chosen = torch.tensor(rows[first : first + _SCORE_ROWS], device=self._device)
            tokens = torch.tensor(predicted[first : first + _SCORE_ROWS], device=self._device)
            scores += self._logprobs_of(self._logits(hidden[chosen]), tokens).tolist()
        ends = list(accumulate(counts))
        return [scores[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def _set_gates(self, runs: Sequence[ScheduledRun]) -> None:
        """Decoding batches repeat their mixes step after step, so the last plan is kept while it fits."""
        needed = {digest for run in runs for digest in run.request.mix.held}
        if not needed:
            self._plan = self._packing = None  # which would keep rows of adapters that may leave
            return
        packing = self._residency.pack(needed)
        mixes = tuple(Run(run.request.mix.gates, run.stop - run.start) for run in runs)
        plan = self._plan
        if plan is None or packing is not self._packing or plan.runs != mixes:
            plan = Plan(mixes, packing.keys, device=self._device)
            self._plan, self._packing = plan, packing
        self._context.set(packing, plan)
