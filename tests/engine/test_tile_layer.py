"""Bases in tiles against transformers' own code in float32, adapters merged in.

The yardstick is transformers' own code in bfloat16 on the same weights: log-probabilities may be at most 1.5 times as
far from float32's (RMS over all tokens; measured 0.5 to 1.0), which is the contract of the mixture's kernels. A window
that is one token too wide, a forgotten bias or an adapter's rows in the wrong place cost 10 times as much and more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.engine import Engine, SamplingParams, TokenMix
from lorafleet.engine.fused_layer import FusedLayer
from lorafleet.engine.kv_pages import KvPages
from lorafleet.engine.model import CHECKED_ARCHITECTURES, WINDOWED_ARCHITECTURES
from lorafleet.engine.tile_layer import TileLayer
from lorafleet.engine.tile_pages import TilePages
from tests.engine.bases import SMALL, logits_of, save_base
from tests.native.marks import needs_tiles

pytestmark = needs_tiles

MOST = 1.5
WINDOW = 24
# The widths are such that tiles fit; q's is not the hidden one.
FITTING: dict[str, Any] = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "max_position_embeddings": 320,
    "initializer_range": 0.1,
}
# Of one token to several pages of 32 and several chunks of 48, in one batch.
PROMPTS = [[(i * i * 7 + i * j + 3 * j) % 256 for i in range(n)] for j, n in enumerate((2, 33, 64, 150, 260))]
MIXES: list[dict[str, float]] = [{"a": 1.0}, {"a": 0.7, "b": 0.3}, {}, {"a": 0.7, "b": 0.3}, {"b": -0.5}]
SCORED = SamplingParams(max_tokens=0, prompt_logprobs=True)

Score = Callable[[Sequence[Sequence[int]]], Tensor]


class Models(NamedTuple):
    """One base: the engine in bfloat16, and transformers' own model with a mix merged in."""

    folder: Path
    engine: Engine
    adapters: dict[str, LoraAdapter]

    def plain(self, mix: Mapping[str, float], dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager")
        for name, weight in mix.items():
            self.adapters[name].merge_into(model, weight)
        return model.to(dtype).eval()

    def errors_of_plain(self, prompts: Sequence[Sequence[int]], mixes: Sequence[Mapping[str, float]]) -> Exact:
        exact, error = [], []
        models: dict[tuple[tuple[str, float], ...], tuple[Any, Any]] = {}
        for prompt, mix in zip(prompts, mixes, strict=True):
            key = tuple(mix.items())
            if key not in models:
                models[key] = self.plain(mix, torch.float32), self.plain(mix, torch.bfloat16)
            exact.append(scores_of(models[key][0], prompt))
            error.append(scores_of(models[key][1], prompt) - exact[-1])
        return Exact(exact, rms(torch.cat(error)))


class Exact(NamedTuple):
    scores: list[Tensor]
    """log-probabilities (nats) of each prompt's tokens 2…n in float32"""
    error: float
    """RMS of transformers' in bfloat16"""


def scores_of(model: Any, tokens: Sequence[int]) -> Tensor:
    logprobs = logits_of(model, tokens).float().log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def engine_scores(engine: Engine, prompts: Sequence[Sequence[int]], mixes: Sequence[Any]) -> list[Tensor]:
    found = engine.generate(prompts, mixes=mixes, sampling=SCORED)
    return [torch.tensor(generation.prompt_logprobs) for generation in found]


def adapter_of(engine: Engine, *, rank: int, seed: int, alpha: float) -> LoraAdapter:
    """Random factors for all modules, scaled as rsLoRA does: by alpha / √r; with a gate for each group."""
    generator = torch.Generator().manual_seed(seed)
    pairs, gates = {}, {}
    for group in engine._base.groups:
        gates[group.modules[0].path] = torch.randn(group.d_in, generator=generator) / group.d_in**0.5
        for path, d_out in group.modules:
            a = torch.randn(rank, group.d_in, generator=generator) / group.d_in**0.5
            pairs[path] = LoraPair(a, torch.randn(d_out, rank, generator=generator) * alpha / rank**0.5)
    return LoraAdapter(pairs, gates=gates)


def load(folder: Path, dtype: str = "bfloat16") -> Engine:
    return Engine.load(folder, dtype=dtype, max_sequences=4, max_batch_tokens=48, kv_tokens=1024)


def models_of(folder: Path, architecture: str, *, window: int | None = None, **settings: Any) -> Models:
    """A random base, and two adapters of ranks 5 and 16 in an engine on it."""
    if window is not None:
        settings |= {"sliding_window": window, "use_sliding_window": True}
    config = AutoConfig.for_model(architecture, **FITTING | settings)
    if window is None and architecture == "mistral":
        config.sliding_window = None
    if window is not None and hasattr(config, "layer_types"):
        config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases begin as zeros and norms as ones: one that is forgotten, or another's, would not be seen.
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    save_base(model.bfloat16(), folder)
    engine = load(folder)
    adapters = {
        "a": adapter_of(engine, rank=5, seed=1, alpha=0.3),
        "b": adapter_of(engine, rank=16, seed=2, alpha=0.3),
    }
    for name, adapter in adapters.items():
        engine.add_adapter(name, adapter)
    return Models(folder, engine, adapters)


FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama"},
    "llama, biases everywhere": {"architecture": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, heads of 64": {"architecture": "llama", "head_dim": 64, "num_key_value_heads": 1},
    "mistral": {"architecture": "mistral"},
    "mistral, window": {"architecture": "mistral", "window": WINDOW},
    "qwen2": {"architecture": "qwen2"},
    "qwen2, windows": {"architecture": "qwen2", "window": WINDOW},
    "qwen3": {"architecture": "qwen3"},
    "qwen3, windows": {"architecture": "qwen3", "window": WINDOW},
}


@pytest.fixture(scope="module", params=FAMILY.values(), ids=FAMILY)
def tiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return models_of(tmp_path_factory.mktemp("tiled"), **request.param)


def layers_of(engine: Engine) -> list[Any]:
    path = CHECKED_ARCHITECTURES[engine._base.model.config.model_type]
    return list(engine._base.model.get_submodule(path))


def test_its_layers_are_computed_in_tiles(tiled: Models) -> None:
    assert tiled.engine._base.tiled
    assert tiled.engine._base.tiled_attention
    assert all(type(layer) is TileLayer for layer in layers_of(tiled.engine))
    assert type(tiled.engine._runner._cache) is TilePages


def check_scores(models: Models, prompts: Sequence[Sequence[int]] = PROMPTS) -> None:
    """One batch of all prompts and mixes, in chunks."""
    exact = models.errors_of_plain(prompts, MIXES)
    found = engine_scores(models.engine, prompts, MIXES)
    assert rms(torch.cat(found) - torch.cat(exact.scores)) <= MOST * exact.error
    # Each on its own, too, so that a short one is not lost among the others; of a single token the error is anything.
    for one, expected in zip(found[1:], exact.scores[1:], strict=True):
        assert rms(one - expected) <= 2 * MOST * exact.error


def test_scores_are_as_near_to_float32_as_transformers_are(tiled: Models) -> None:
    check_scores(tiled)


def test_mixes_that_are_taken_for_others_would_be_seen(tiled: Models) -> None:
    """What the test above can tell apart: the weights of two adapters swapped, or one adapter forgotten."""
    exact = tiled.errors_of_plain(PROMPTS[2:3], [{"a": 0.7, "b": 0.3}])
    for mix in ({"a": 0.3, "b": 0.7}, {"a": 0.7}):
        (found,) = engine_scores(tiled.engine, PROMPTS[2:3], [mix])
        assert rms(found - exact.scores[0]) > 10 * exact.error


def test_a_request_alone_gets_what_it_gets_in_company(tiled: Models) -> None:
    """Without adapters the same bits, also beside tokens that have some. With them, sums are taken in another order
    where other adapters lie between."""
    together = engine_scores(tiled.engine, PROMPTS, MIXES)
    exact = tiled.errors_of_plain(PROMPTS, MIXES)
    for prompt, mix, found, expected in zip(PROMPTS, MIXES, together, exact.scores, strict=True):
        (alone,) = engine_scores(tiled.engine, [prompt], [mix])
        if not mix:
            assert torch.equal(alone, found)
        elif len(prompt) > 2:
            assert rms(alone - expected) <= 2 * MOST * exact.error


def test_decoded_tokens_have_the_scores_that_float32_gives_them(tiled: Models) -> None:
    """Token by token, in one batch of mixes, over the edge of a page; and each is the best, or as good within error."""
    prompts = [prompt[:60] for prompt in PROMPTS]
    found = tiled.engine.generate(
        prompts, mixes=MIXES, sampling=SamplingParams(max_tokens=40, ignore_eos=True, logprobs=True)
    )
    texts = [prompt + generation.token_ids for prompt, generation in zip(prompts, found, strict=True)]
    exact = tiled.errors_of_plain(texts, MIXES)
    errors, gaps = [], []
    for prompt, mix, text, generation, scores in zip(prompts, MIXES, texts, found, exact.scores, strict=True):
        assert generation.logprobs is not None
        errors.append(torch.tensor(generation.logprobs) - scores[len(prompt) - 1 :])
        best = logits_of(tiled.plain(mix, torch.float32), text).log_softmax(-1).amax(-1)[:-1]
        gaps.append((best - scores)[len(prompt) - 1 :])
    assert rms(torch.cat(errors)) <= MOST * exact.error
    # Two logits, each within 5 of those errors, as one of 200 tokens may be.
    assert torch.cat(gaps).max() <= 10 * exact.error
    assert torch.cat(gaps).count_nonzero() <= 0.05 * 200


def test_tokens_are_routed_by_what_the_layers_products_read(tiled: Models) -> None:
    """The gates see the input after the norm, which the kernel computes. Both adapters are chosen: where one of two
    is, rounding may choose the other."""
    mix = TokenMix(("a", "b"), top_k=2, temperature=0.3)
    float32 = load(tiled.folder, "float32")
    for name, adapter in tiled.adapters.items():
        float32.add_adapter(name, adapter)
    routed, exact = (torch.cat(engine_scores(e, PROMPTS, [mix] * len(PROMPTS))) for e in (tiled.engine, float32))
    halves = tiled.errors_of_plain(PROMPTS, [{"a": 0.5, "b": 0.5}] * len(PROMPTS))
    assert rms(routed - exact) <= MOST * halves.error
    assert rms(exact - torch.cat(halves.scores)) > 10 * halves.error  # the routes are not halves


# ---- where only some of it fits


class Part(NamedTuple):
    settings: dict[str, Any]
    tiled: bool
    tiled_attention: bool


PARTS = {
    "no tiles for a width of 48": Part({"hidden_size": 48, "head_dim": 12, "intermediate_size": 80}, False, False),
    "no tiles for an intermediate width of 80": Part({"intermediate_size": 80}, False, False),
    "no tiles for heads of 16": Part({"head_dim": 16}, True, False),
    "another activation than silu": Part({"hidden_act": "gelu"}, True, True),
}


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_base_that_fits_in_part_is_computed_by_the_other_layer(part: Part, architecture: str, tmp_path: Path) -> None:
    models = models_of(tmp_path, architecture, **part.settings)
    base = models.engine._base
    assert (base.tiled, base.tiled_attention) == (part.tiled, part.tiled_attention)
    assert all(type(layer) is FusedLayer for layer in layers_of(models.engine))
    assert type(models.engine._runner._cache) is (TilePages if part.tiled_attention else KvPages)
    check_scores(models)


# ---- transformers' own layers over tiles

OTHERS = [name for name in CHECKED_ARCHITECTURES if name not in ("llama", "mistral", "qwen2", "qwen3")]
WIDE = {"hidden_size": 128}  # four heads of 32: some architectures have no others
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 320, "num_key_value_heads": 4},
    "gpt_neox": {"num_key_value_heads": 4, "rotary_pct": 0.5},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 128, "init_std": 0.1, "num_key_value_heads": 4},
    # With these caps scores and logits of a small random model are bent.
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 32},
}


@pytest.mark.parametrize(
    ("architecture", "window"),
    [(name, None) for name in OTHERS] + [(name, WINDOW) for name in WINDOWED_ARCHITECTURES if name in OTHERS],
)
def test_other_layers_compute_on_tiles_what_they_are(architecture: str, window: int | None, tmp_path: Path) -> None:
    models = models_of(tmp_path, architecture, window=window, **WIDE | OWN.get(architecture, {}))
    assert models.engine._base.tiled
    assert models.engine._base.tiled_attention
    assert all(type(layer).__module__.startswith("transformers.") for layer in layers_of(models.engine))
    check_scores(models)
