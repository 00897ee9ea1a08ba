"""Decoding steps as captured CUDA graphs: one replay in the place of some hundred launches.

A graph belongs to a bucket of sequences and to a kind of step: without adapters, with mixtures, with routed tokens. A
step of fewer sequences is filled up with rows that lie in the page that belongs to nobody; their results are dropped.
Graphs are captured when a bucket is first used. Steps with prompts, mixtures that cannot be captured, and buckets whose
capture failed are computed as they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from lorafleet.engine.attention import Span
from lorafleet.engine.block_attention import BlockAttention, BlockTables, host_tables, refill
from lorafleet.engine.block_pages import BlockPages
from lorafleet.engine.mixture_linear import MixtureContext
from lorafleet.kernels import Bank, Packing, Plan

if TYPE_CHECKING:  # it loads Triton
    from lorafleet.kernels.captured import CapturedMixture

logger = logging.getLogger(__name__)

Kind: TypeAlias = Literal["base", "mixed", "routed"]
Compute: TypeAlias = Callable[[Tensor, Tensor, BlockAttention], Tensor]
"""Token ids and positions ``[1, T]``, and the step's attention → hidden states ``[T, hidden]``."""

# Beyond this a bucket for every eighth sequence: a step that is filled up computes at most seven rows for nobody.
_SMALL_BUCKETS = (1, 2, 4, 8)


def buckets(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24, 32, … and ``most``."""
    return (*(b for b in (*_SMALL_BUCKETS, *range(16, most, 8)) if b < most), most)


def bucket_for(sequences: int, most: int) -> int | None:
    """The smallest bucket that holds so many; None where there is none."""
    return next((bucket for bucket in buckets(most) if bucket >= sequences > 0), None)


def kind_of(plan: Plan | None) -> Kind:
    """``plan`` is None where no token has an adapter."""
    if plan is None:
        return "base"
    return "mixed" if plan.routing is None else "routed"


class Captured(NamedTuple):
    out: Tensor
    """what the step gave; each replay writes it anew"""
    replay: Callable[[], None]


class Capture(Protocol):
    """Turns a step that reads and writes fixed addresses into one that can be replayed."""

    def __call__(self, step: Callable[[], Tensor]) -> Captured: ...


class CudaCapture:
    """Captures on a stream of its own; all graphs share one pool of memory, as they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Captured:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # compiles kernels, and makes what is made once
                step()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that load adapters go on meanwhile, with calls that a capture of their own would forbid.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = step()
        return Captured(out, graph.replay)


@dataclass
class _Graph:
    tokens: Tensor
    """``[1, B]`` int64"""
    positions: Tensor
    """``[1, B]`` int64"""
    tables: BlockTables
    mixture: CapturedMixture | None
    captured: Captured


class StepGraphs:
    """Belongs to the stepping thread."""

    def __init__(
        self,
        *,
        compute: Compute,
        cache: BlockPages,
        bank: Bank,
        context: MixtureContext,
        capture: Capture,
        device: torch.device,
        dtype: torch.dtype,
        max_sequences: int,
        most_pages: int,
    ) -> None:
        """``most_pages``: of the longest sequence. Steps with adapters are captured where the bank has pools."""
        self._compute, self._cache, self._bank, self._context, self._capture = compute, cache, bank, context, capture
        self._device, self._dtype = device, dtype
        self._max_sequences, self._most_pages = max_sequences, most_pages
        self._graphs: dict[tuple[int, Kind], _Graph | None] = {}
        self._refused: set[str] = set()
        self.replays_total = 0

    def run(
        self,
        spans: Sequence[Span],
        tokens: Sequence[int],
        positions: Sequence[int],
        *,
        packing: Packing | None,
        plan: Plan | None,
    ) -> Tensor | None:
        """Hidden states ``[T, hidden]`` of one token of each span, until the next call; None where it is no such step,
        or one that has to be computed without a graph."""
        kind, bucket = kind_of(plan), bucket_for(len(spans), self._max_sequences)
        if bucket is None or any(span.stop - span.start != 1 for span in spans):
            return None
        if plan is not None and not self._bank.pools:
            return None
        graph = self._graph(bucket, kind)
        if graph is None:
            return None
        if graph.mixture is not None:
            assert plan is not None and packing is not None
            try:
                graph.mixture.load(plan, packing)
            except ValueError as error:
                self._refuse(f"a step with adapters is computed without a graph: {error}")
                return None
        count = len(spans)
        graph.tables.fill(host_tables(spans, filled_to=bucket, spare_page=self._cache.spare_page))
        refill(graph.tokens[0, :count], torch.tensor(tokens))
        refill(graph.positions[0, :count], torch.tensor(positions))
        graph.captured.replay()
        self.replays_total += 1
        return graph.captured.out[:count]

    def _graph(self, bucket: int, kind: Kind) -> _Graph | None:
        key = bucket, kind
        if key not in self._graphs:
            try:
                self._graphs[key] = self._make(bucket, kind)
            except Exception as error:  # a model or a library that cannot be captured still computes
                logger.warning("steps of %d sequences (%s) stay without a graph: %s", bucket, kind, error)
                self._graphs[key] = None
        return self._graphs[key]

    def _make(self, bucket: int, kind: Kind) -> _Graph:
        began, before = time.monotonic(), self._reserved_bytes()
        device = self._device
        idle = host_tables((), filled_to=bucket, spare_page=self._cache.spare_page)
        tables = BlockTables(idle, device=device, most_pages=self._most_pages)
        tokens, positions = torch.zeros(2, 1, bucket, dtype=torch.int64, device=device)
        step = BlockAttention((), cache=self._cache, device=device, dtype=self._dtype, tables=tables)
        context, mixture = self._context, None
        held = context.path, context.packing, context.plan
        try:
            if kind == "base":
                context.set(None, None)
            else:
                from lorafleet.kernels.captured import CapturedMixture

                mixture = CapturedMixture(self._bank, tokens=bucket, routed=kind == "routed")
                context.path = mixture
                context.set(*mixture.stand_ins())
            captured = self._capture(lambda: self._compute(tokens, positions, step))
        finally:
            context.path = held[0]
            context.set(held[1], held[2])
        logger.info(
            "captured a step of %d sequences (%s) in %.2f s; it takes %.0f MB of %s",
            bucket, kind, time.monotonic() - began, (self._reserved_bytes() - before) / 1e6, device,
        )  # fmt: skip
        return _Graph(tokens, positions, tables, mixture, captured)

    def _reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else 0

    def _refuse(self, reason: str) -> None:
        """Said once for each reason."""
        if reason not in self._refused:
            self._refused.add(reason)
            logger.warning("%s", reason)
