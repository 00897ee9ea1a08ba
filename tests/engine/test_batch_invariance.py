"""What a request computes does not depend on who else is there: 500 pairs of prompt and mix, alone and together."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.adapters import LoraAdapter
from lorafleet.engine import Engine
from tests.engine.bases import logits_of, to_length

PAIRS, TOKENS = 500, 12
# Where the two most likely tokens are closer than this, rounding may decide.
TIE = 1e-4


def pairs() -> list[tuple[list[int], dict[str, float]]]:
    """Distinct, seeded: prompts of 1 to 60 tokens, up to three adapters, weights in steps of 1/64."""
    rng = random.Random(0)
    found: dict[tuple[Any, ...], tuple[list[int], dict[str, float]]] = {}
    while len(found) < PAIRS:
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 60))]
        mix = {name: rng.randint(-64, 96) / 64 for name in rng.sample("abc", rng.randint(0, 3))}
        found[tuple(prompt), tuple(sorted(mix.items()))] = prompt, mix
    return list(found.values())


@torch.no_grad()
def gap(plain_model: Callable[[], Any], folders: dict[str, Path], mix: dict[str, float], tokens: list[int]) -> float:
    """Between the two largest logits after ``tokens``, of the base with the mix merged in."""
    model = plain_model()
    for name, weight in mix.items():
        LoraAdapter.load(folders[name]).merge_into(model, weight)
    first, second = logits_of(model, tokens)[-1].topk(2).values.tolist()
    return float(first - second)


@pytest.fixture(scope="module")
def alone(base_folder: Path, adapters: dict[str, Path]) -> list[list[int]]:
    """What each pair gives when nobody else is there."""
    engine = loaded(base_folder, adapters)
    return [
        # A salt of its own: nothing that another pair has computed is reused.
        engine.submit(prompt, mix=mix, sampling=to_length(TOKENS), salt=str(number)).result().token_ids
        for number, (prompt, mix) in enumerate(pairs())
    ]


def loaded(base_folder: Path, adapters: dict[str, Path], **limits: Any) -> Engine:
    engine = Engine.load(base_folder, dtype="float32", max_sequences=32, **limits)
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    return engine


@pytest.mark.parametrize("crowded", [False, True], ids=["roomy", "short of memory"])
def test_greedy_tokens_are_the_same_alone_and_in_any_batch(
    base_folder: Path,
    adapters: dict[str, Path],
    plain_model: Callable[[], Any],
    alone: list[list[int]],
    crowded: bool,
) -> None:
    limits: dict[str, Any] = {"kv_tokens": 512, "max_batch_tokens": 48} if crowded else {}
    engine = loaded(base_folder, adapters, **limits)
    prompts, mixes = [list(each) for each in zip(*pairs(), strict=True)]
    together = engine.generate(prompts, mixes=mixes, sampling=to_length(TOKENS))
    if crowded:
        assert engine.stats().preemptions_total > 0
    for number, (prompt, mix, batched) in enumerate(zip(prompts, mixes, together, strict=True)):
        for place, (one, other) in enumerate(zip(alone[number], batched.token_ids, strict=True)):
            if one != other:
                tokens = prompt + alone[number][:place]
                assert gap(plain_model, adapters, mix, tokens) < TIE, f"pair {number}, token {place}"
                break
