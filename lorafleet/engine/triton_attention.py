"""Decoding's attention over pages, in Triton: each query head of one new token against all tokens of its sequence.

Flash decoding with an online softmax in float32 (arXiv 1805.02867; split over the keys as in arXiv 2311.01282). A
program takes one sequence, one key/value head and one part of the sequence: the G query heads of that head share what
it reads. How a sequence is cut depends on its own length and on the number of parts alone, never on its neighbours in
the batch, and the parts are summed in order: no atomics, the same bits every time. Nothing is read on the host, and the
grid depends on the number of sequences alone, so that a launch can be captured and replayed with other tables.

Shapes: B sequences, H query heads, K key/value heads, G = H / K, D head size, J pages of the widest table, P tokens of
a page. :func:`lorafleet.engine.block_attention.decode_reference` is the plain form.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# Untuned: nothing has run on a GPU yet. 16 is the smallest block that matrix units multiply. A tile of keys has at most
# so many bytes: one of keys and one of values, three of each on their way, fit into the memory of a multiprocessor.
_SMALLEST, _LARGEST_N, _TILE_BYTES = 16, 64, 16 << 10
# Programs wanted for each multiprocessor, and the most parts that one sequence is cut into for them.
_PROGRAMS_EACH, _MOST_SPLITS = 2, 16
_NO_WINDOW = 1 << 30


@triton.jit
def store_kernel(
    key,
    value,
    keys,
    values,
    slots,
    key_row,
    key_head,
    value_row,
    value_head,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys and values of one token, ``[K, D]``, into its slot of the pages."""
    token = tl.program_id(0)
    slot = tl.load(slots + token).to(tl.int64)
    element = tl.arange(0, BLOCK)
    inside = element < WIDTH
    head, d = element // D, element % D
    k = tl.load(key + token.to(tl.int64) * key_row + head * key_head + d, mask=inside)
    v = tl.load(value + token.to(tl.int64) * value_row + head * value_head + d, mask=inside)
    tl.store(keys + slot * WIDTH + element, k, mask=inside)
    tl.store(values + slot * WIDTH + element, v, mask=inside)


# Tables of other widths are no other program: none is compiled amid requests because of them.
@triton.jit(do_not_specialize=["table_row"])
def decode_kernel(
    query,
    keys,
    values,
    table,
    lengths,
    out,
    parts,
    peaks,
    sums,
    query_row,
    query_head,
    table_row,
    scale,
    softcap,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPPED: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
):
    """One part of one sequence for the G query heads of one key/value head."""
    sequence, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    per_kv: tl.constexpr = HEADS // KV_HEADS
    length = tl.load(lengths + sequence)
    first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_N) * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    g, d = tl.arange(0, GROUP), tl.arange(0, BLOCK_D)
    head = kv * per_kv + g
    live = (g < per_kv)[:, None] & (d < D)[None, :]
    q_at = query + sequence.to(tl.int64) * query_row + head[:, None] * query_head + d[None, :]
    q = tl.load(q_at, mask=live, other=0.0).to(DOT)
    peak = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    mixed = tl.zeros((GROUP, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = n < end  # at least its first one: no row of scores is without a finite number
        page = tl.load(table + sequence.to(tl.int64) * table_row + n // PAGE, mask=there, other=0).to(tl.int64)
        row = ((page * PAGE + n % PAGE) * KV_HEADS + kv) * D
        k = tl.load(keys + row[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(q, k.to(DOT), input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))  # c · tanh(s / c)
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        fade = tl.exp(peak - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(values + row[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(DTYPE).to(DOT), v.to(DOT), input_precision="ieee")
        peak = higher
    place = sequence.to(tl.int64) * HEADS + head
    if SPLITS == 1:
        mixed = mixed / total[:, None]
        tl.store(out + place[:, None] * D + d[None, :], mixed.to(out.dtype.element_ty), mask=live)
    else:
        at = place * SPLITS + split
        tl.store(parts + at[:, None] * D + d[None, :], mixed, mask=live)
        tl.store(peaks + at, peak, mask=g < per_kv)
        tl.store(sums + at, total, mask=g < per_kv)


@triton.jit
def combine_kernel(parts, peaks, sums, out, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """The parts of one sequence and query head; one that had no token weighs nothing."""
    place = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    at = place * SPLITS + s
    peak = tl.load(peaks + at)
    weights = tl.exp(peak - tl.max(peak, 0))
    part = tl.load(parts + at[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    total = tl.sum(weights * tl.load(sums + at), 0)
    mixed = tl.sum(weights[:, None] * part, 0) / total
    tl.store(out + place * D + d, mixed.to(out.dtype.element_ty), mask=d < D)


INTERPRETED = type(decode_kernel).__name__ == "InterpretedFunction"
"""whether TRITON_INTERPRET=1 was set when this module was imported: kernels run on the CPU, slowly"""


def splits_for(sequences: int, *, kv_heads: int, multiprocessors: int) -> int:
    """Into how many parts sequences are cut: a power of two, so many that a device of that size has work."""
    wanted = _PROGRAMS_EACH * multiprocessors // max(1, sequences * kv_heads)
    return 1 << (max(1, min(wanted, _MOST_SPLITS)).bit_length() - 1)


def block_n(size: int, itemsize: int) -> int:
    """Tokens of one turn: a power of two."""
    row_bytes: int = triton.next_power_of_2(size) * itemsize
    return max(_SMALLEST, min(_LARGEST_N, _TILE_BYTES // row_bytes))


def store_in_pages(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """``key``/``value`` ``[T, K, D]`` into ``keys``/``values`` ``[pages, P, K, D]``, at ``slots [T]``."""
    tokens, kv_heads, size = key.shape
    key, value = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (key, value))
    width = kv_heads * size
    store_kernel[(tokens,)](
        key, value, keys, values, slots, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        WIDTH=width, D=size, BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip


def decode_in_pages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """Same signature and result as :func:`lorafleet.engine.block_attention.decode_reference`.

    ``splits``: the parts of a sequence, a power of two; None for as many as the device wants.
    """
    sequences, heads, size = query.shape
    _, page, kv_heads, _ = keys.shape
    query = query if query.stride(2) == 1 else query.contiguous()
    if splits is None:
        splits = splits_for(sequences, kv_heads=kv_heads, multiprocessors=_multiprocessors(query.device))
    out = torch.empty(sequences, heads, size, device=query.device, dtype=query.dtype)
    scratch = sequences * heads * splits if splits > 1 else 0
    parts = torch.empty(scratch * size, device=query.device)
    peaks, sums = torch.empty(2, scratch, device=query.device)
    dtype = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[query.dtype]
    block_d = max(_SMALLEST, triton.next_power_of_2(size))
    decode_kernel[(sequences, kv_heads, splits)](
        query, keys, values, table, lengths, out, parts, peaks, sums,
        query.stride(0), query.stride(1), table.stride(0),
        scale, 1.0 if softcap is None else softcap, _NO_WINDOW if window is None else window,
        HEADS=heads, KV_HEADS=kv_heads, D=size, PAGE=page,
        GROUP=max(_SMALLEST, triton.next_power_of_2(heads // kv_heads)), BLOCK_D=block_d,
        BLOCK_N=block_n(size, query.dtype.itemsize),
        SPLITS=splits, CAPPED=softcap is not None, DTYPE=dtype,
        # The interpreter multiplies the bits of bfloat16 as whole numbers (3.9); float32 holds its products exactly.
        DOT=tl.float32 if INTERPRETED else dtype,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(sequences * heads,)](parts, peaks, sums, out, D=size, BLOCK_D=block_d, SPLITS=splits)
    return out


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
