"""Decoding's attention in Triton against the reference.

Run by test_triton_attention.py in a process of its own: in Triton's interpreter, which has to be chosen before Triton
is first imported, or on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lorafleet.engine.block_attention import decode_reference
from lorafleet.engine.triton_attention import INTERPRETED, decode_in_pages, splits_for, store_in_pages

DEVICE = "cpu" if INTERPRETED else "cuda"
SCALE = 0.3
LENGTHS = [1, 31, 32, 33, 64, 65, 130]


def check(
    lengths: Sequence[int],
    *,
    heads: int = 6,
    kv_heads: int = 2,
    size: int = 16,
    page: int = 32,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """Against the reference; NaN wherever no sequence has a token. The result, for more to be said of it."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    table = torch.full((len(lengths), max(counts) + 1), sum(counts), dtype=torch.int32)
    keys, values = torch.randn(2, sum(counts) + 2, page, kv_heads, size, generator=generator)
    used = torch.zeros(sum(counts) + 2, page, dtype=torch.bool)
    for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = torch.tensor([order.pop() for _ in range(count)])
        table[sequence, :count] = own
        used[own] = (torch.arange(count * page) < length).view(count, page)
    keys[~used], values[~used] = float("nan"), float("nan")
    whole = torch.randn(len(lengths), heads + 3, size, generator=generator).to(DEVICE, dtype)
    query = whole[:, 1 : heads + 1]  # rows lie among others, as those of q, k and v do
    arguments = (
        query, keys.to(DEVICE, dtype), values.to(DEVICE, dtype), table.to(DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    found = decode_in_pages(*arguments, scale=SCALE, window=window, softcap=softcap, splits=splits)
    expected = decode_reference(*arguments, scale=SCALE, window=window, softcap=softcap)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)
    assert found.shape == query.shape and found.dtype == dtype
    return found


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 20, 64, 500])
def test_it_gives_what_the_reference_gives(window: int | None, softcap: float | None, splits: int) -> None:
    check(LENGTHS, window=window, softcap=softcap, splits=splits)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (17, 1), (32, 2), (6, 3)])
def test_it_is_right_for_every_way_to_share_heads(heads: int, kv_heads: int) -> None:
    check([40, 3], heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("size", [8, 16, 20, 64, 80, 128])
def test_it_is_right_at_every_head_size(size: int) -> None:
    check([40, 3], size=size, splits=2)


@pytest.mark.parametrize("page", [16, 32, 48, 256])
def test_it_is_right_at_every_size_of_a_page(page: int) -> None:
    check([1, 100, 300], page=page)


@pytest.mark.parametrize("splits", [1, 4])
def test_it_is_right_in_bfloat16(splits: int) -> None:
    check(LENGTHS, size=64, dtype=torch.bfloat16, splits=splits)


def test_large_scores_do_not_overflow() -> None:
    keys = torch.full((1, 32, 1, 16), 100.0, device=DEVICE)
    keys[0, 3] = 200.0
    values = torch.arange(32.0, device=DEVICE)[None, :, None, None].expand(1, 32, 1, 16).contiguous()
    query = torch.full((1, 1, 16), 100.0, device=DEVICE)
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([20], dtype=torch.int32, device=DEVICE)
    for splits in (1, 4):
        out = decode_in_pages(query, keys, values, table, lengths, scale=1.0, splits=splits)
        assert out.flatten().tolist() == [3.0] * 16


def test_results_are_the_same_bits_every_time_and_in_every_batch() -> None:
    together = check(LENGTHS, splits=4)
    assert torch.equal(together, check(LENGTHS, splits=4))
    # Alone, with the pages that it has in the batch: a sequence is cut by its own length.
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 8, 32, 2, 16, generator=generator).to(DEVICE)
    query = torch.randn(2, 6, 16, generator=generator).to(DEVICE)
    table = torch.tensor([[0, 3, 5, 1], [2, 4, 6, 7]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([100, 128], dtype=torch.int32, device=DEVICE)
    both = decode_in_pages(query, keys, values, table, lengths, scale=SCALE, splits=4)
    alone = decode_in_pages(query[:1], keys, values, table[:1], lengths[:1], scale=SCALE, splits=4)
    assert torch.equal(both[:1], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_stored_where_the_slots_say(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 10, 12, generator=generator).to(DEVICE, dtype)
    key, value = qkv[:, 4:7], qkv[:, 7:10]
    keys, values = torch.full((2, 4, 32, 3, 12), 7.0, device=DEVICE, dtype=dtype)
    slots = torch.tensor([33, 127, 0], device=DEVICE)
    store_in_pages(key, value, keys, values, slots)
    for rows, pages in ((key, keys), (value, values)):
        flat = pages.view(-1, 3, 12)
        assert torch.equal(flat[slots], rows)
        rest = torch.ones(flat.shape[0], dtype=torch.bool, device=DEVICE)
        rest[slots] = False
        assert bool((flat[rest] == 7.0).all())


def test_a_checker_that_forgot_the_last_token_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker on a wrong kernel: one that sees a token less."""
    right = decode_in_pages

    def blind(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, **rest: object) -> Tensor:
        return right(query, keys, values, table, (lengths - 1).clamp_min(1), **rest)  # type: ignore[arg-type]

    monkeypatch.setitem(globals(), "decode_in_pages", blind)
    with pytest.raises(AssertionError):
        check(LENGTHS)


@pytest.mark.parametrize(
    ("sequences", "kv_heads", "multiprocessors", "splits"),
    [(1, 8, 132, 16), (8, 8, 132, 4), (16, 8, 132, 2), (64, 8, 132, 1), (1, 1, 1, 2), (1, 4, 1, 1), (4, 8, 132, 8)],
)
def test_few_sequences_are_cut_into_parts(sequences: int, kv_heads: int, multiprocessors: int, splits: int) -> None:
    assert splits_for(sequences, kv_heads=kv_heads, multiprocessors=multiprocessors) == splits


@pytest.mark.skipif(INTERPRETED, reason="captures a CUDA graph")
def test_a_captured_call_is_replayed_with_other_tables() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 8, 32, 2, 16, generator=generator).to(DEVICE)
    query = torch.randn(2, 6, 16, generator=generator).to(DEVICE)
    table = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    lengths = torch.ones(2, dtype=torch.int32, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    for _ in range(2):  # compiles before it captures
        decode_in_pages(query, keys, values, table, lengths, scale=SCALE)
    with torch.cuda.graph(graph):
        out = decode_in_pages(query, keys, values, table, lengths, scale=SCALE)
    for rows, stops in (([[0, 3, 5, 1], [2, 4, 6, 7]], [100, 128]), ([[6, 6, 6, 6], [1, 0, 0, 0]], [7, 32])):
        table.copy_(torch.tensor(rows))
        lengths.copy_(torch.tensor(stops))
        graph.replay()
        torch.testing.assert_close(out, decode_reference(query, keys, values, table, lengths, scale=SCALE))
