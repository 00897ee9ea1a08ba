"""Attention by block tables: the tables and what is read off torch on any machine, the kernels on a GPU.

The steps are those of test_attention.py, against the same plain attention; without a GPU the reference decodes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorafleet.engine.attention import Span, StepAttention
from lorafleet.engine.block_attention import (
    BlockAttention,
    BlockTables,
    activated_flash_attention,
    host_tables,
    varlen_parameters,
    varlen_serves,
)
from lorafleet.engine.block_pages import BlockPages
from lorafleet.engine.kv_pages import PAGE_TOKENS, KvPages
from tests.engine.test_attention import HEADS, KV_HEADS, PAGES, SCALE, SIZE, STEPS, plain_attention

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
BFLOAT16_TOLERANCE = 2e-2


def cache_of(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> BlockPages:
    return BlockPages(layers=2, kv_heads=KV_HEADS, head_dim=SIZE, pages=PAGES, device=device, dtype=dtype)


class Sequences:
    """True keys and values of whole sequences, and pages that hold what came before the step, NaN elsewhere."""

    def __init__(self, spans: list[Span], cache: KvPages, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.spans, self.cache = spans, cache
        self.whole = [torch.randn(2, s.stop, KV_HEADS, SIZE, generator=generator).to(device, dtype) for s in spans]
        owned = sorted({page for span in spans for page in span.pages})
        for layer in cache.keys + cache.values:
            layer[:] = math.nan
            layer[owned] = 1e4  # as left by an earlier owner
        for (pages, start, _), (keys, values) in zip(spans, self.whole, strict=True):
            for position in range(start):
                page, offset = pages[position // PAGE_TOKENS], position % PAGE_TOKENS
                cache.keys[1][page, :, offset], cache.values[1][page, :, offset] = keys[position], values[position]
        tokens = sum(s.stop - s.start for s in spans)
        self.query = torch.randn(tokens, HEADS, SIZE, generator=generator).to(device, dtype)
        self.key, self.value = (
            torch.cat([w[i, s.start : s.stop] for s, w in zip(spans, self.whole, strict=True)]) for i in (0, 1)
        )

    def expected(self, *, window: int | None, softcap: float | None) -> Tensor:
        parts = self.query.float().split([s.stop - s.start for s in self.spans])
        return torch.cat(
            [
                plain_attention(q, keys.float(), values.float(), start=s.start, window=window, softcap=softcap)
                for q, (keys, values), s in zip(parts, self.whole, self.spans, strict=True)
            ]
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 20, 33, 500])
@pytest.mark.parametrize("spans", STEPS.values(), ids=STEPS)
def test_a_step_gives_what_plain_attention_gives(
    spans: list[Span], window: int | None, softcap: float | None, device: str
) -> None:
    on = torch.device(device)
    cache = cache_of(on)
    sequences = Sequences(spans, cache, on, torch.float32)
    step = BlockAttention(spans, cache=cache, device=on, dtype=torch.float32)
    for _ in range(2):  # layers share what the first one made
        out = step(1, sequences.query, sequences.key, sequences.value, scale=SCALE, window=window, softcap=softcap)
    torch.testing.assert_close(out, sequences.expected(window=window, softcap=softcap), rtol=1e-4, atol=1e-5)
    assert cache.keys[0].isnan().any(), "a step writes to its own layer"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("spans", STEPS.values(), ids=STEPS)
def test_a_gpu_gives_in_bfloat16_what_the_page_wise_products_give(spans: list[Span], window: int | None) -> None:
    cuda, kind = torch.device("cuda"), torch.bfloat16
    settings = {"layers": 2, "kv_heads": KV_HEADS, "head_dim": SIZE, "pages": PAGES, "device": cuda, "dtype": kind}
    plain, blocks = (
        Sequences(spans, KvPages(**settings), cuda, kind),
        Sequences(spans, BlockPages(**settings), cuda, kind),
    )
    for keys in plain.cache.keys + plain.cache.values:
        keys.nan_to_num_(1.0)  # the page-wise products want pages without NaN
    assert isinstance(blocks.cache, BlockPages)
    steps = (
        StepAttention(spans, cache=plain.cache, device=cuda, dtype=kind),
        BlockAttention(spans, cache=blocks.cache, device=cuda, dtype=kind),
    )
    expected, found = (
        step(1, plain.query, plain.key, plain.value, scale=SCALE, window=window).float() for step in steps
    )
    torch.testing.assert_close(found, expected, rtol=BFLOAT16_TOLERANCE, atol=BFLOAT16_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 20])
def test_varlen_attn_reads_block_tables_as_we_write_them(window: int | None) -> None:
    """With pages of 256 tokens, which torch's own kernel takes, whatever the engine's are."""
    if not varlen_serves(varlen_parameters(), activated=None, head_dim=64, dtype=torch.bfloat16, page_tokens=256):
        pytest.skip("this torch's varlen_attn has no block tables")
    from torch.nn.attention.varlen import varlen_attn

    cuda = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 6, 256, 2, 64, generator=generator).to(cuda, torch.bfloat16)
    query = torch.randn(6, 4, 64, generator=generator).to(cuda, torch.bfloat16)
    bounds = torch.tensor([0, 1, 2, 6], dtype=torch.int32, device=cuda)
    lengths = torch.tensor([300, 5, 260], dtype=torch.int32, device=cuda)
    table = torch.tensor([[4, 1], [0, 0], [3, 5]], dtype=torch.int32, device=cuda)
    found = varlen_attn(
        query, keys, values, bounds, torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), 4, 512,
        scale=SCALE, window_size=(-1 if window is None else window - 1, 0), enable_gqa=True, seqused_k=lengths,
        block_table=table, num_splits=1,
    )  # fmt: skip
    assert isinstance(found, Tensor)
    for sequence, (start, stop) in enumerate(((299, 300), (4, 5), (256, 260))):
        first, last = bounds[sequence : sequence + 2].tolist()
        k, v = (rows[table[sequence].long()].flatten(0, 1)[:stop].float() for rows in (keys, values))
        for row in range(first, last):
            seen = start + row - first + 1
            begin = 0 if window is None else max(0, seen - window)
            for head in range(4):
                scores = k[begin:seen, head // 2] @ query[row, head].float() * SCALE
                expected = scores.softmax(0) @ v[begin:seen, head // 2]
                torch.testing.assert_close(
                    found[row, head].float(), expected, rtol=BFLOAT16_TOLERANCE, atol=BFLOAT16_TOLERANCE
                )


def test_tables_name_slots_lengths_pages_and_bounds() -> None:
    tables = host_tables([Span([7, 2, 9], 40, 41), Span([5], 0, 3)], filled_to=0, spare_page=64)
    assert tables.slots.tolist() == [2 * PAGE_TOKENS + 8, 5 * PAGE_TOKENS, 5 * PAGE_TOKENS + 1, 5 * PAGE_TOKENS + 2]
    assert tables.lengths.tolist() == [41, 3]
    assert tables.table.tolist() == [[7, 2], [5, 64]]
    assert tables.first_token.tolist() == [0, 1, 4]
    assert tables.first_key.tolist() == [0, 41, 44]
    assert {tensor.dtype for tensor in tables[1:]} == {torch.int32} and tables.slots.dtype == torch.int64


def test_rows_that_fill_a_step_up_lie_in_the_spare_page_alone() -> None:
    tables = host_tables([Span([0, 1], 33, 34)], filled_to=3, spare_page=64)
    assert tables.slots.tolist() == [PAGE_TOKENS + 1, 64 * PAGE_TOKENS, 64 * PAGE_TOKENS]
    assert tables.lengths.tolist() == [34, 1, 1]
    assert tables.table.tolist() == [[0, 1], [64, 64], [64, 64]]
    assert tables.first_token.tolist() == [0, 1, 2, 3]


def test_tables_are_filled_again_in_place() -> None:
    def host(*stops: int) -> object:
        return host_tables([Span([4, 5, 6, 7], stop - 1, stop) for stop in stops], filled_to=2, spare_page=64)

    tables = BlockTables(host(100), device=CPU, most_pages=4)  # type: ignore[arg-type]
    addresses = [t.data_ptr() for t in (tables.table, tables.slots, tables.lengths, tables.first_token)]
    tables.fill(host(1, 40))  # type: ignore[arg-type]
    assert tables.lengths.tolist() == [1, 40]
    assert tables.table[:, :2].tolist() == [[4, 64], [4, 5]]
    assert [t.data_ptr() for t in (tables.table, tables.slots, tables.lengths, tables.first_token)] == addresses


def test_a_step_over_given_tables_is_computed_as_one_over_spans() -> None:
    spans = [Span([3, 9], 40, 41), Span([5], 2, 3)]
    cache = cache_of()
    sequences = Sequences(spans, cache, CPU, torch.float32)
    tables = BlockTables(host_tables(spans, filled_to=4, spare_page=cache.spare_page), device=CPU, most_pages=6)
    query, key, value = (
        torch.cat([rows, torch.zeros(2, *rows.shape[1:])]) for rows in (sequences.query, sequences.key, sequences.value)
    )
    step = BlockAttention((), cache=cache, device=CPU, dtype=torch.float32, tables=tables)
    out = step(1, query, key, value, scale=SCALE)
    torch.testing.assert_close(out[:2], sequences.expected(window=None, softcap=None), rtol=1e-4, atol=1e-5)
    assert out[2:].isfinite().all()


NEEDED = {"scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits", "query"}


@pytest.mark.parametrize(
    ("parameters", "activated", "head_dim", "dtype", "page_tokens", "serves"),
    [
        (NEEDED, None, 128, torch.bfloat16, 256, True),
        (NEEDED, None, 128, torch.bfloat16, 32, False),  # torch's own kernel: multiples of 256
        (NEEDED, "FA3", 128, torch.bfloat16, 32, True),
        (NEEDED, "FA4", 128, torch.bfloat16, 256, False),  # not looked at
        (NEEDED, None, 128, torch.float32, 256, False),
        (NEEDED, None, 100, torch.bfloat16, 256, False),
        (NEEDED, None, 264, torch.bfloat16, 256, False),
        (NEEDED - {"block_table"}, "FA3", 128, torch.bfloat16, 256, False),  # torch 2.11
        (set(), None, 128, torch.bfloat16, 256, False),
    ],
)
def test_varlen_attn_serves_where_its_signature_and_its_kernel_allow(
    parameters: set[str], activated: str | None, head_dim: int, dtype: torch.dtype, page_tokens: int, serves: bool
) -> None:
    found = varlen_serves(parameters, activated=activated, head_dim=head_dim, dtype=dtype, page_tokens=page_tokens)
    assert found is serves


def test_this_torch_is_asked_what_it_has() -> None:
    assert isinstance(varlen_parameters(), frozenset)
    if torch.__version__ >= "2.13":
        assert varlen_parameters() >= NEEDED
    assert activated_flash_attention() is None


def test_a_cpu_is_not_supported() -> None:
    assert not BlockAttention.supports(CPU)
