"""Tokens that are routed among adapters by the adapters' own gates, against the formula in plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafleet.adapters import LoraAdapter
from lorafleet.engine import Engine, TokenMix
from lorafleet.errors import InvalidInputError, NotFoundError
from tests.engine.bases import PROMPTS, greedy, to_length

NAMES = ("a", "b", "c")


def with_gates(engine: Engine, folder: Path, seed: int) -> LoraAdapter:
    """The adapter with a random gate vector for each group of modules that it changes."""
    adapter, generator = LoraAdapter.load(folder), torch.Generator().manual_seed(seed)
    gates = {}
    for group in engine._base.groups:
        changed = [module.path for module in group.modules if module.path in adapter.modules]
        if changed:
            gates[changed[0]] = torch.randn(group.d_in, generator=generator) * 0.5
    return LoraAdapter(adapter.modules, adapter.base, gates=gates)


def route_by_hand(engine: Engine, model: Any, adapters: dict[str, LoraAdapter], mix: TokenMix) -> None:
    """Hooks on a plain model that add Σ_k g_k B_k A_k x, with g a softmax over the best gates of each group."""

    def hook(path: str, first: dict[str, str]) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
        def add(module: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = args[0]
            names = sorted(first, key=lambda name: adapters[name].digest)
            logits = torch.stack([x @ adapters[name].gates[first[name]] for name in names], -1)
            best = logits.topk(min(mix.top_k, len(names)), -1)
            gates = torch.zeros_like(logits).scatter(-1, best.indices, (best.values / mix.temperature).softmax(-1))
            for index, name in enumerate(names):
                if path in adapters[name].modules:
                    a, b = adapters[name].modules[path]
                    y = y + gates[..., index, None] * (x @ a.T @ b.T)
            return y

        return add

    for group in engine._base.groups:
        paths = [module.path for module in group.modules]
        first = {
            name: next(path for path in paths if path in adapters[name].modules)
            for name in mix.adapters
            if any(path in adapters[name].modules for path in paths)
        }
        for path in paths:
            model.get_submodule(path).register_forward_hook(hook(path, first))


@pytest.fixture
def gated(engine: Engine, adapters: dict[str, Path]) -> dict[str, LoraAdapter]:
    found = {name: with_gates(engine, adapters[name], seed) for seed, name in enumerate(NAMES)}
    for name, adapter in found.items():
        engine.add_adapter(name, adapter)
    return found


@pytest.mark.parametrize("mix", [TokenMix(NAMES), TokenMix(("a", "c"), top_k=1), TokenMix(NAMES, 3, 0.3)])
def test_routed_tokens_are_those_of_the_formula(
    engine: Engine, gated: dict[str, LoraAdapter], plain_model: Callable[[], Any], mix: TokenMix
) -> None:
    model = plain_model()
    route_by_hand(engine, model, gated, mix)
    routed = engine.generate(PROMPTS[:3], mixes=[mix] * 3, sampling=to_length(8))
    assert [g.token_ids for g in routed] == [greedy(model, prompt, 8) for prompt in PROMPTS[:3]]
    assert routed[0].mix == {}
    assert routed[0].digests == {name: gated[name].digest for name in mix.adapters}


def test_routed_and_mixed_requests_share_a_batch(engine: Engine, gated: dict[str, LoraAdapter]) -> None:
    mixes: list[Any] = [TokenMix(NAMES), {"a": 0.5, "b": 0.5}, None, TokenMix(("b", "c"), 1)]
    together = engine.generate(PROMPTS[:4], mixes=mixes, sampling=to_length(10))
    for prompt, mix, found in zip(PROMPTS, mixes, together, strict=False):
        assert engine.generate([prompt], mixes=[mix], sampling=to_length(10))[0].token_ids == found.token_ids


def test_prefix_of_another_route_is_not_used(engine: Engine, gated: dict[str, LoraAdapter]) -> None:
    prompt = [5] * 70
    for mix in (TokenMix(NAMES, 1), TokenMix(NAMES, 2, 0.5), TokenMix(("a", "b")), TokenMix(NAMES)):
        engine.generate([prompt], mixes=[mix], sampling=to_length(2))
    assert engine.stats().prefix_tokens_total == 0
    engine.generate([prompt], mixes=[TokenMix(tuple(reversed(NAMES)))], sampling=to_length(2))
    assert engine.stats().prefix_tokens_total == 64


@pytest.mark.parametrize(
    ("mix", "error", "words"),
    [
        (TokenMix(("a", "nobody")), NotFoundError, "nobody"),
        (TokenMix(()), InvalidInputError, "without adapters"),
        (TokenMix(NAMES, 0), InvalidInputError, "top_k"),
        (TokenMix(NAMES, 1, 0.0), InvalidInputError, "temperature"),
        (TokenMix(("a", "plain")), InvalidInputError, "plain: found no gates"),
    ],
)
def test_routes_that_cannot_be_are_refused(
    engine: Engine,
    gated: dict[str, LoraAdapter],
    adapters: dict[str, Path],
    mix: TokenMix,
    error: type[Exception],
    words: str,
) -> None:
    engine.add_adapter("plain", adapters["a"])
    with pytest.raises(error, match=words):
        engine.submit([1, 2], mix=mix)
    engine.remove_adapter("plain")
    assert len(engine.adapters()) == 3
