"""Keys and values in tiles: what is shared, given up and computed again changes no token."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.engine import Engine
from lorafleet.engine.kv_pages import PAGE_TOKENS
from tests.engine.bases import SMALL, save_base, to_length
from tests.native.marks import needs_tiles

pytestmark = needs_tiles

FITTING = {**SMALL, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
LONG = [3, 1, 4, 1, 5, 9, 2, 6] * (3 * PAGE_TOKENS // 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its widths and heads fit tiles."""
    torch.manual_seed(0)
    return save_base(LlamaForCausalLM(LlamaConfig(**FITTING)), tmp_path_factory.mktemp("tiled"))


def load(base: Path, **options: int) -> Engine:
    """An engine in bfloat16 with an adapter "a" of ranks 5 and 20."""
    engine = Engine.load(base, dtype="bfloat16", **options)
    assert engine._base.tiled_attention
    generator = torch.Generator().manual_seed(1)
    pairs = {
        f"model.layers.{layer}.{module}": LoraPair(
            torch.randn(rank, d_in, generator=generator) / 8, torch.randn(d_out, rank, generator=generator) / rank
        )
        for layer in range(3)
        for module, rank, d_in, d_out in (("self_attn.q_proj", 5, 64, 64), ("mlp.down_proj", 20, 96, 64))
    }
    engine.add_adapter("a", LoraAdapter(pairs, base=engine.base_digest))
    return engine


def test_shared_prefix_is_computed_once_and_changes_no_token(base: Path) -> None:
    engine = load(base)
    prompts, mixes = [[*LONG, 1], [*LONG, 2]], [{"a": 0.5}] * 2
    first = engine.generate(prompts, mixes=mixes, sampling=to_length(12))
    before = engine.stats()
    again = engine.generate(prompts, mixes=mixes, sampling=to_length(12))
    after = engine.stats()
    assert [g.token_ids for g in again] == [g.token_ids for g in first]
    assert after.prefix_tokens_total - before.prefix_tokens_total == 2 * 3 * PAGE_TOKENS
    assert engine.generate(prompts, sampling=to_length(12))[0].token_ids != first[0].token_ids


def test_more_load_than_memory_waits_and_every_request_gets_its_tokens(base: Path) -> None:
    prompts = [[n + 1] * (10 + 9 * n) for n in range(8)]
    mixes = [{"a": 1.0} if n % 2 else {} for n in range(8)]
    roomy = load(base)
    tight = load(base, kv_tokens=5 * PAGE_TOKENS, max_sequences=6, max_batch_tokens=32)
    expected = roomy.generate(prompts, mixes=mixes, sampling=to_length(50))
    found = tight.generate(prompts, mixes=mixes, sampling=to_length(50))
    assert [g.token_ids for g in found] == [g.token_ids for g in expected]
    assert tight.stats().preemptions_total > 0
    assert tight.stats().kv_pages_in_use == 0


def test_a_page_with_a_new_owner_holds_nothing_of_the_last_one(base: Path) -> None:
    engine = load(base, kv_tokens=4 * PAGE_TOKENS, max_sequences=1)
    cache = engine._runner._cache
    for rows in (*cache.keys, *cache.values):
        rows.fill_(float("nan"))
    found = engine.generate([[7, *LONG[:39]]], sampling=to_length(8, logprobs=True))[0]
    assert all(map(math.isfinite, found.logprobs))
