"""The floor of an adapter row: the least that its adapters must add to our own bare base.

A step of decoding reads the base's weights and the rows of the adapters that are active; a prefill multiplies with
them. So a row cannot be faster than

    decode_s(base) · (1 + adapter bytes / base bytes)  +  prefill_s(base) · (1 + adapter operations / base operations)

unless its kernels use the machine better than the base's own. Adapter rows count in the dtype of the base, each
distinct adapter once a step. Everything here is computed from shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lorafleet.bench.requests import Ask
from lorafleet.bench.shapes import BYTES_PER_WEIGHT, Shape, projections


class Work(NamedTuple):
    """What a row's adapters add to what the base does."""

    base_bytes: int
    """weights that one step of decoding reads"""
    adapter_bytes: int
    """rows of the distinct adapters that are active"""
    base_operations: float
    """of prefilling all prompts; a multiplication and an addition are two"""
    adapter_operations: float


def base_bytes(shape: Shape) -> int:
    """Bytes of the weights that one step reads: layers, norms and output layer; of the embedding only single rows."""
    layer = sum(p.d_out * p.d_in for p in projections(shape)) + 2 * shape.hidden
    return BYTES_PER_WEIGHT * (shape.layers * layer + shape.hidden + shape.vocabulary * shape.hidden)


def adapter_bytes(shape: Shape, ranks: Sequence[int]) -> int:
    """Bytes of both factors of adapters of these ranks, on all projections of all layers."""
    return BYTES_PER_WEIGHT * sum(ranks) * shape.layers * sum(p.d_out + p.d_in for p in projections(shape))


def base_operations(shape: Shape, *, prompt_tokens: int) -> float:
    """Of prefilling one prompt: linear layers for each token, causal attention, the output layer for the last token."""
    linear = 2 * prompt_tokens * sum(p.d_out * p.d_in for p in projections(shape))
    # Token t attends to t others, 2 operations for its scores and 2 for the sum, over all heads' dimensions.
    attention = 4 * shape.heads * shape.head_dim * prompt_tokens * (prompt_tokens + 1) // 2
    return float(shape.layers * (linear + attention) + 2 * shape.vocabulary * shape.hidden)


def adapter_operations(shape: Shape, *, prompt_tokens: int, rank: float) -> float:
    """Of prefilling one prompt whose tokens use adapters of this rank together, beside the base's."""
    return 2.0 * prompt_tokens * rank * shape.layers * sum(p.d_out + p.d_in for p in projections(shape))


def work(shape: Shape, asks: Sequence[Ask], ranks: Mapping[str, int]) -> Work:
    """The work of a row whose requests ask this; ``ranks`` of all adapters that they use."""
    tokens = shape.load.prompt_tokens
    active = {name for ask in asks for name in ask.uses}
    per_request = [sum(share * ranks[name] for name, share in ask.uses.items()) for ask in asks]
    return Work(
        base_bytes=base_bytes(shape),
        adapter_bytes=adapter_bytes(shape, [ranks[name] for name in active]),
        base_operations=len(asks) * base_operations(shape, prompt_tokens=tokens),
        adapter_operations=sum(adapter_operations(shape, prompt_tokens=tokens, rank=rank) for rank in per_request),
    )


def floor_s(work: Work, *, base_prefill_s: float, base_decode_s: float) -> float:
    """Seconds below which a row with this work cannot come, by our own times of the bare base."""
    decode = base_decode_s * (1 + work.adapter_bytes / work.base_bytes)
    return decode + base_prefill_s * (1 + work.adapter_operations / work.base_operations)
