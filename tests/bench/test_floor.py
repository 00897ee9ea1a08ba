"""The floor's maths, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from lorafleet.bench.floor import Work, adapter_bytes, adapter_operations, base_bytes, base_operations, floor_s, work
from lorafleet.bench.requests import ASKS, Ask, rank_of
from lorafleet.bench.shapes import SHAPES, Load, Shape

# q 4→4, k 4→2, v 4→2, o 4→4, gate 4→6, up 4→6, down 6→4: 16 + 8 + 8 + 16 + 24 + 24 + 24 = 120 weights a layer, and
# inputs plus outputs of 8 + 6 + 6 + 8 + 10 + 10 + 10 = 58.
SMALL = Shape(
    name="small", hidden=4, layers=2, mlp=6, heads=2, kv_heads=1, vocabulary=10,
    load=Load(requests=2, prompt_tokens=3, new_tokens=1),
)  # fmt: skip


def test_base_bytes_are_the_weights_that_a_step_reads() -> None:
    # (2 layers · (120 + two norms of 4) + the last norm of 4 + an output layer of 10 · 4) · 2 bytes
    assert base_bytes(SMALL) == (2 * 128 + 4 + 40) * 2 == 600


def test_base_bytes_of_shape_s() -> None:
    # 12 · (2 · 768² + 2 · 256 · 768 + 3 · 2048 · 768 + 2 · 768) + 768 + 8192 · 768 weights of 2 bytes
    assert base_bytes(SHAPES["S"]) == 163_616_256


def test_adapter_bytes_count_both_factors_of_every_projection() -> None:
    assert adapter_bytes(SMALL, [1, 3]) == 4 * 58 * 2 * 2 == 928
    assert adapter_bytes(SMALL, []) == 0


def test_base_operations_are_linears_attention_and_one_row_of_logits() -> None:
    # A layer: 3 tokens · 120 weights · 2, and 4 · 4 dimensions · (1 + 2 + 3) for attention; logits: 10 · 4 · 2.
    assert base_operations(SMALL, prompt_tokens=3) == 2 * (720 + 96) + 80 == 1712


def test_adapter_operations_grow_with_the_rank() -> None:
    assert adapter_operations(SMALL, prompt_tokens=3, rank=2) == 2 * 3 * 2 * 2 * 58 == 1392


def test_work_reads_a_shared_adapter_once_and_multiplies_with_it_for_each_request() -> None:
    asks = [Ask({"a": 1.0}), Ask({"a": 0.3, "b": 0.7})]
    found = work(SMALL, asks, {"a": 1, "b": 3})
    assert found == Work(
        base_bytes=600, adapter_bytes=928, base_operations=2 * 1712, adapter_operations=2 * 3 * (1 + 4) * 2 * 58
    )


def test_a_routed_adapter_counts_for_its_share_of_the_tokens() -> None:
    found = work(SMALL, [Ask(routed=("a", "b"), top_k=1)] * 2, {"a": 1, "b": 3})
    assert found.adapter_bytes == 928  # read whole, whoever uses it
    assert found.adapter_operations == 2 * adapter_operations(SMALL, prompt_tokens=3, rank=(1 + 3) / 2)


def test_the_floor_scales_decode_by_bytes_and_prefill_by_operations() -> None:
    one = Work(base_bytes=600, adapter_bytes=300, base_operations=1000.0, adapter_operations=100.0)
    assert floor_s(one, base_prefill_s=2.0, base_decode_s=4.0) == pytest.approx(4.0 * 1.5 + 2.0 * 1.1)


def test_the_floor_without_adapters_is_the_base() -> None:
    assert floor_s(work(SMALL, [Ask()] * 2, {}), base_prefill_s=2.0, base_decode_s=4.0) == 6.0


def test_floor_of_the_eight_adapters_on_shape_s() -> None:
    asks = ASKS["single"](SHAPES["S"].load)
    found = work(SHAPES["S"], asks, {name: rank_of(name) for ask in asks for name in ask.uses})
    # Ranks of 240 together, 12 layers, inputs and outputs of 13 568, 2 bytes; a mean rank of 30 for each token.
    assert found.adapter_bytes == 240 * 12 * 13_568 * 2 == 78_151_680
    assert found.adapter_operations == 32 * 128 * 2 * 30 * 12 * 13_568
    assert found.adapter_bytes / found.base_bytes == pytest.approx(0.478, abs=1e-3)
