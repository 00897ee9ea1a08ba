"""Attention over pages against plain attention of each sequence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorafleet.engine.attention import Span, StepAttention
from lorafleet.engine.kv_pages import PAGE_TOKENS, KvPages, pages_for

HEADS, KV_HEADS, SIZE, PAGES = 6, 2, 8, 64
SCALE = 0.3


def cache_of(pages: int = PAGES) -> KvPages:
    return KvPages(
        layers=2, kv_heads=KV_HEADS, head_dim=SIZE, pages=pages, device=torch.device("cpu"), dtype=torch.float32
    )


def plain_attention(
    query: Tensor, keys: Tensor, values: Tensor, *, start: int, window: int | None, softcap: float | None
) -> Tensor:
    """One sequence, ``query [n, H, D]`` at positions ``start…``, ``keys``/``values`` ``[L, K, D]``; by the formula."""
    out = torch.empty_like(query)
    for i in range(query.shape[0]):
        last = start + i + 1
        first = 0 if window is None else max(0, last - window)
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            scores = keys[first:last, kv] @ query[i, head] * SCALE
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[i, head] = scores.softmax(0) @ values[first:last, kv]
    return out


def at(first_page: int, start: int, stop: int, *, stride: int = 1) -> Span:
    """A span whose pages are ``first_page``, ``first_page + stride``, … of the pool."""
    return Span([(first_page + stride * n) % PAGES for n in range(pages_for(stop))], start, stop)


STEPS = {
    "one sequence decodes": [at(0, 4, 5)],
    "first tokens": [at(3, 0, 1), at(1, 0, 1)],
    "the pool's lower end": [at(0, 40, 41), at(2, 30, 31), at(3, 70, 71)],
    "pages far apart and backwards": [at(60, 100, 101, stride=-7), at(20, 30, 31), at(40, 12, 13)],
    "page borders": [at(0, 31, 32), at(1, 32, 33), at(3, 63, 64), at(5, 64, 65)],
    "a whole prompt": [at(2, 0, 17)],
    "prompts of one length": [at(2, 0, 40), at(4, 0, 40), at(6, 0, 40), at(8, 0, 7)],
    "a later chunk": [at(2, 9, 47)],
    "one token after a chunk": [at(2, 33, 34), at(9, 31, 70)],
    "decode and chunks together": [at(30, 200, 201), at(0, 7, 8), at(10, 0, 39), at(20, 5, 81)],
}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 20, 33, 500])
@pytest.mark.parametrize("spans", STEPS.values(), ids=STEPS)
def test_step_gives_what_plain_attention_gives(spans: list[Span], window: int | None, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = cache_of()
    whole = [torch.randn(2, s.stop, KV_HEADS, SIZE, generator=generator) for s in spans]
    for layer in cache.keys + cache.values:
        layer[:] = 1e4  # stale numbers wherever nothing is written below
    for (pages, start, _), (keys, values) in zip(spans, whole, strict=True):
        for position in range(start):
            page, offset = pages[position // PAGE_TOKENS], position % PAGE_TOKENS
            cache.keys[1][page, :, offset], cache.values[1][page, :, offset] = keys[position], values[position]
    query = torch.randn(sum(s.stop - s.start for s in spans), HEADS, SIZE, generator=generator)
    step = StepAttention(spans, cache=cache, device=torch.device("cpu"), dtype=torch.float32)
    key, value = (torch.cat([w[i, s.start : s.stop] for s, w in zip(spans, whole, strict=True)]) for i in (0, 1))
    for _ in range(2):  # the second layer to come finds masks that the first has made
        out = step(1, query, key, value, scale=SCALE, window=window, softcap=softcap)
    first = 0
    for (_, start, stop), (keys, values) in zip(spans, whole, strict=True):
        last = first + stop - start
        expected = plain_attention(query[first:last], keys, values, start=start, window=window, softcap=softcap)
        torch.testing.assert_close(out[first:last], expected, rtol=1e-4, atol=1e-5)
        first = last


def test_sequences_that_share_pages_are_attended_each_on_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    cache = cache_of(8)
    shared = torch.randn(2, PAGE_TOKENS, KV_HEADS, SIZE, generator=generator)
    cache.keys[0][3], cache.values[0][3] = shared[0].transpose(0, 1), shared[1].transpose(0, 1)
    spans = [Span([3, page], PAGE_TOKENS, PAGE_TOKENS + 1) for page in (1, 0, 2)]
    query, key, value = (torch.randn(3, heads, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    step = StepAttention(spans, cache=cache, device=torch.device("cpu"), dtype=torch.float32)
    out = step(0, query, key, value, scale=SCALE)
    for token in range(3):
        keys, values = torch.cat([shared[0], key[token : token + 1]]), torch.cat([shared[1], value[token : token + 1]])
        expected = plain_attention(query[token : token + 1], keys, values, start=PAGE_TOKENS, window=None, softcap=None)
        torch.testing.assert_close(out[token : token + 1], expected, rtol=1e-4, atol=1e-5)


def test_stale_nan_in_a_page_that_nobody_owns_reaches_nobody() -> None:
    cache = cache_of(8)
    spans = [Span([page], 4, 5) for page in (0, 1, 3, 4)]
    cache.keys[0][2], cache.values[0][2] = math.nan, math.nan  # amid the pages that are read as they lie
    ones = torch.ones(4, KV_HEADS, SIZE)
    step = StepAttention(spans, cache=cache, device=torch.device("cpu"), dtype=torch.float32)
    assert step(0, torch.ones(4, HEADS, SIZE), ones, ones, scale=SCALE).isfinite().all()


def test_pages_that_get_a_new_owner_are_clean() -> None:
    cache = cache_of(4)
    for layer in cache.keys + cache.values:
        layer[:] = math.nan
    cache.clear([1, 3])
    for layer in cache.keys + cache.values:
        assert layer[[1, 3]].count_nonzero() == 0
        assert layer[[0, 2]].isnan().all()
