"""Attention of one packed step over the engine's own cache, called by transformers through its attention interface.

Tokens of a step stand in one row: first one token of every decoding sequence, then the chunks of prefilling ones.
Shapes: T tokens, H query heads, K key/value heads, G = H / K, D head size, L cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lorafleet.engine.kv_cache import KvCache

ATTENTION_NAME = "lorafleet"

# Decoding sequences share one call over padded lengths unless padding would more than double the tokens read. A call
# of its own for a sequence costs about as much as this many padded tokens (15 µs against 50 ns a token, 4 heads of 64).
_CALL_COST_TOKENS = 256


class Span(NamedTuple):
    """The tokens ``[start, stop)`` of the sequence in ``slot``, computed in this step."""

    slot: int
    start: int
    stop: int


class _Decode(NamedTuple):
    """One token of each of several sequences, in one call over the slots ``[0, slots)``."""

    tokens: int
    slots: int
    length: int
    slot_of_token: Tensor | None
    """``[tokens]`` int64; None where token i is in slot i"""
    mask: Tensor
    """``[slots, 1, 1, length]``, 0 or -inf"""


class _Chunk(NamedTuple):
    """Neighbouring tokens ``[first, last)`` of the step, one sequence, a call of its own."""

    first: int
    last: int
    slot: int
    length: int
    mask: Tensor | None
    """``[last - first, length]``, 0 or -inf; None where the chunk begins its sequence (causal) or is one token (all)"""


class StepAttention:
    """Where this step's keys and values go and which of them each token sees. Built once, used by every layer."""

    def __init__(self, spans: Sequence[Span], *, cache: KvCache, device: torch.device, dtype: torch.dtype) -> None:
        """``spans`` in token order, those of one decoding token first; the cache holds room for all."""
        self.cache = cache
        index: list[int] = []
        for slot, start, stop in spans:
            index.extend(range(slot * cache.capacity + start, slot * cache.capacity + stop))
        self.index = torch.tensor(index, device=device)
        decoding = 0
        while decoding < len(spans) and spans[decoding].stop - spans[decoding].start == 1:
            decoding += 1
        self.decode = _shared_decode(spans[:decoding], device=device, dtype=dtype)
        self.chunks: list[_Chunk] = []
        first = decoding if self.decode is not None else 0
        for slot, start, stop in spans[first:]:
            count = stop - start
            mask = None
            if start > 0 and count > 1:
                seen = torch.arange(stop, device=device) <= torch.arange(start, stop, device=device)[:, None]
                mask = torch.zeros(count, stop, device=device, dtype=dtype).masked_fill_(~seen, float("-inf"))
            self.chunks.append(_Chunk(first, first + count, slot, stop, mask))
            first += count

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """``query [T, H, D]``, ``key``/``value`` ``[T, K, D]`` → ``[T, H, D]``."""
        cache = self.cache
        cache.write(layer, self.index, key, value)
        keys, values = cache.keys[layer], cache.values[layer]
        if self.decode is not None and not self.chunks:
            return _attend_decode(self.decode, query, keys, values, scale=scale)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if self.decode is not None:
            tokens = self.decode.tokens
            out[:tokens] = _attend_decode(self.decode, query[:tokens], keys, values, scale=scale)
        grouped = query.shape[1] != keys.shape[2]
        for first, last, slot, length, mask in self.chunks:
            done = scaled_dot_product_attention(
                query[first:last].transpose(0, 1)[None],
                keys[slot, :length].transpose(0, 1)[None],
                values[slot, :length].transpose(0, 1)[None],
                attn_mask=mask,
                is_causal=mask is None and last - first > 1,
                scale=scale,
                enable_gqa=grouped,
            )
            out[first:last] = done[0].transpose(0, 1)
        return out


def _shared_decode(spans: Sequence[Span], *, device: torch.device, dtype: torch.dtype) -> _Decode | None:
    if not spans:
        return None
    slots = max(span.slot for span in spans) + 1
    length = max(span.stop for span in spans)
    if slots * length > 2 * sum(span.stop for span in spans) + _CALL_COST_TOKENS * len(spans):
        return None
    # A slot that no token of this step asks for sees its first token, so that no row of the softmax is empty.
    seen = torch.ones(slots, dtype=torch.int64)
    slot_of_token = torch.tensor([span.slot for span in spans])
    seen[slot_of_token] = torch.tensor([span.stop for span in spans])
    hidden = torch.arange(length) >= seen[:, None]
    mask = torch.zeros(slots, 1, 1, length, dtype=dtype).masked_fill_(hidden[:, None, None], float("-inf"))
    in_order = all(span.slot == token for token, span in enumerate(spans)) and slots == len(spans)
    return _Decode(
        len(spans), slots, length, None if in_order else slot_of_token.to(device), mask.to(device, non_blocking=True)
    )


def _attend_decode(step: _Decode, query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
    """The G query heads of one key/value head stand as G queries, so that keys and values are read once."""
    tokens, heads, size = query.shape
    kv_heads = keys.shape[2]
    grouped = query.reshape(tokens, kv_heads, heads // kv_heads, size)
    if step.slot_of_token is not None:
        by_slot = grouped.new_zeros(step.slots, *grouped.shape[1:])
        grouped = by_slot.index_copy_(0, step.slot_of_token, grouped)
    out = scaled_dot_product_attention(
        grouped,
        keys[: step.slots, : step.length].transpose(1, 2),
        values[: step.slots, : step.length].transpose(1, 2),
        attn_mask=step.mask,
        scale=scale,
    )
    if step.slot_of_token is not None:
        out = out.index_select(0, step.slot_of_token)
    return out.reshape(tokens, heads, size)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step: StepAttention,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: ``query [1, H, T, D]``, ``key``/``value`` ``[1, K, T, D]`` → ``[1, T, H, D]``.

    ``step`` comes through the model's keyword arguments.
    """
    assert attention_mask is None and sliding_window is None, "this base was let through the checks by mistake"
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = step(layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), scale=scaling)
    return out[None], None


AttentionInterface.register(ATTENTION_NAME, attention_forward)
