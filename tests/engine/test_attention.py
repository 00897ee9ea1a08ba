"""Attention over the cache against plain attention of each sequence, and the cache's own rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafleet.engine.attention import Span, StepAttention
from lorafleet.engine.kv_cache import KvCache

HEADS, KV_HEADS, SIZE = 6, 2, 8


def cache_of(*, slots: int = 6, max_tokens: int = 300) -> KvCache:
    return KvCache(
        layers=2,
        kv_heads=KV_HEADS,
        head_dim=SIZE,
        slots=slots,
        max_tokens=max_tokens,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, *, start: int) -> Tensor:
    """One sequence, ``query [n, H, D]`` at positions ``start…``, ``keys``/``values`` ``[L, K, D]``; by the formula."""
    out = torch.empty_like(query)
    for i in range(query.shape[0]):
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            seen = start + i + 1
            scores = keys[:seen, kv] @ query[i, head] * 0.3
            out[i, head] = scores.softmax(0) @ values[:seen, kv]
    return out


STEPS = {
    "one sequence decodes": [Span(0, 4, 5)],
    "slots in order": [Span(0, 4, 5), Span(1, 30, 31), Span(2, 0, 1)],
    "slots out of order with gaps": [Span(5, 4, 5), Span(1, 30, 31), Span(3, 12, 13)],
    "lengths too different for one call": [Span(0, 0, 1), Span(1, 2, 3), Span(5, 290, 291)],
    "a whole prompt": [Span(2, 0, 17)],
    "a later chunk": [Span(2, 9, 17)],
    "decode and chunks together": [Span(3, 20, 21), Span(0, 7, 8), Span(1, 0, 9), Span(4, 5, 11)],
}


@pytest.mark.parametrize("spans", STEPS.values(), ids=STEPS)
def test_step_gives_what_plain_attention_gives(spans: list[Span]) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = cache_of()
    cache.reserve(300)
    whole = {s.slot: torch.randn(2, s.stop, KV_HEADS, SIZE, generator=generator) for s in spans}
    for layer in cache.keys + cache.values:
        layer[:, :] = 1e4  # stale numbers wherever nothing is written below
    for slot, start, _ in spans:
        cache.keys[1][slot, :start], cache.values[1][slot, :start] = whole[slot][0, :start], whole[slot][1, :start]
    query = torch.randn(sum(s.stop - s.start for s in spans), HEADS, SIZE, generator=generator)
    step = StepAttention(spans, cache=cache, device=torch.device("cpu"), dtype=torch.float32)
    key, value = (torch.cat([whole[s.slot][i, s.start : s.stop] for s in spans]) for i in (0, 1))
    out = step(1, query, key, value, scale=0.3)
    first = 0
    for slot, start, stop in spans:
        last = first + stop - start
        expected = plain_attention(query[first:last], *whole[slot], start=start)
        torch.testing.assert_close(out[first:last], expected, rtol=1e-4, atol=1e-5)
        first = last


def test_the_cache_grows_and_keeps_what_it_holds() -> None:
    cache = cache_of(max_tokens=300)
    before = torch.randn(5, KV_HEADS, SIZE, generator=torch.Generator().manual_seed(0))
    cache.write(1, torch.arange(5) + 2 * cache.capacity, before, -before)
    small = cache.capacity
    cache.reserve(small + 1)
    assert cache.capacity == 2 * small
    cache.reserve(300)
    assert cache.capacity == 300
    assert torch.equal(cache.keys[1][2, :5], before)
    assert torch.equal(cache.values[1][2, :5], -before)
    assert cache.keys[0].count_nonzero() == 0


def test_slots_are_given_lowest_first_and_come_back_clean() -> None:
    cache = cache_of(slots=3)
    assert [cache.allocate() for _ in range(3)] == [0, 1, 2]
    assert cache.free_slots == 0
    nan = torch.full((4, KV_HEADS, SIZE), float("nan"))
    cache.write(0, torch.arange(4) + cache.capacity, nan, nan)
    cache.release(2, tokens=0)
    cache.release(1, tokens=4)
    assert cache.allocate() == 1
    assert not cache.keys[0].isnan().any()
    assert not cache.values[0].isnan().any()
