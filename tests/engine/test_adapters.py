"""Adapters and mixtures: what they compute, and what happens when they come and go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.engine import Engine
from lorafleet.errors import BaseMismatchError, InvalidInputError, NotFoundError
from tests.engine.bases import ALL_LINEAR, PROMPTS, greedy, to_length

PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "rank 1": {"r": 1, "lora_alpha": 3},
    "attention only": {"r": 8, "target_modules": ["q_proj", "o_proj"]},
    "rank pattern": {"r": 4, "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.down_proj": 2}},
    "alpha pattern": {"r": 4, "alpha_pattern": {"v_proj": 1, "up_proj": 32}},
    "rank-stabilised": {"r": 9, "use_rslora": True, "rank_pattern": {"k_proj": 2}},
    "some layers": {"r": 4, "layers_to_transform": [1]},
}


@pytest.mark.parametrize("config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_one_adapter_at_weight_one_gives_pefts_tokens(
    engine: Engine, plain_model: Callable[[], Any], make_adapter: Callable[..., Path], config: dict[str, Any]
) -> None:
    folder = make_adapter(11, **config)
    engine.add_adapter("x", folder)
    model = PeftModel.from_pretrained(plain_model(), folder).eval()
    got = engine.generate(PROMPTS[:3], mixes=[{"x": 1.0}] * 3, sampling=to_length(12))
    for prompt, generation in zip(PROMPTS, got, strict=False):
        assert generation.token_ids == greedy(model, prompt, 12)
    bare = engine.generate(PROMPTS[:3], sampling=to_length(12))
    assert [g.token_ids for g in bare] != [g.token_ids for g in got]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_adapter_saved_in_another_dtype_gives_the_tokens_that_peft_reads_from_it(
    engine: Engine, plain_model: Callable[[], Any], make_adapter: Callable[..., Path], dtype: torch.dtype
) -> None:
    folder = make_adapter(12)
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights)
    engine.add_adapter("x", folder)
    model = PeftModel.from_pretrained(plain_model(), folder).eval()
    for prompt in PROMPTS[:2]:
        found = engine.generate([prompt], mixes=[{"x": 1.0}], sampling=to_length(12))
        assert found[0].token_ids == greedy(model, prompt, 12)


MIXES: list[dict[str, float]] = [
    {"a": 1.0},
    {},
    {"a": 0.5, "b": 0.5},
    {"a": -1.0, "b": 2.0, "c": 8.0},
    {"c": 0.75, "b": 0.0},
]


def merged(model: nn.Module, adapters: dict[str, Path], mix: dict[str, float]) -> nn.Module:
    for name, weight in mix.items():
        LoraAdapter.load(adapters[name]).merge_into(model, weight)
    return model


def test_different_mixtures_in_one_batch_give_the_tokens_of_merged_models(
    engine: Engine, plain_model: Callable[[], Any], adapters: dict[str, Path]
) -> None:
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    got = engine.generate(PROMPTS, mixes=MIXES, sampling=to_length(12))
    for prompt, mix, generation in zip(PROMPTS, MIXES, got, strict=True):
        assert generation.token_ids == greedy(merged(plain_model(), adapters, mix), prompt, 12), mix
        assert generation.mix == {name: weight for name, weight in mix.items() if weight}
        assert generation.digests == {name: LoraAdapter.load(adapters[name]).digest for name in generation.mix}


def test_a_mixtures_tokens_do_not_depend_on_the_others_in_the_batch(engine: Engine, adapters: dict[str, Path]) -> None:
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    together = engine.generate(PROMPTS, mixes=MIXES, sampling=to_length(12))
    for prompt, mix, generation in zip(PROMPTS, MIXES, together, strict=True):
        assert engine.generate([prompt], mixes=[mix], sampling=to_length(12))[0].token_ids == generation.token_ids


def test_two_names_of_the_same_weights_add_up(engine: Engine, adapters: dict[str, Path]) -> None:
    engine.add_adapter("one", adapters["a"])
    engine.add_adapter("two", adapters["a"])
    both, single, none = engine.generate(
        [[1, 2, 3]] * 3,
        mixes=[{"one": 0.25, "two": 0.5}, {"one": 0.75}, {"one": 1.0, "two": -1.0}],
        sampling=to_length(10),
    )
    assert both.token_ids == single.token_ids
    assert none.token_ids == engine.generate([[1, 2, 3]], sampling=to_length(10))[0].token_ids


def test_a_replaced_adapter_serves_new_requests_while_old_ones_finish_on_theirs(
    engine: Engine, adapters: dict[str, Path]
) -> None:
    first = engine.add_adapter("x", adapters["a"])
    expected_old = engine.generate([PROMPTS[0]], mixes=[{"x": 1.0}], sampling=to_length(20))[0]
    old = engine.submit(PROMPTS[0], mix={"x": 1.0}, sampling=to_length(20))
    stream = old.stream()
    for _ in range(5):
        next(stream)
    second = engine.add_adapter("x", adapters["b"])
    new = engine.submit(PROMPTS[0], mix={"x": 1.0}, sampling=to_length(20)).result()
    assert old.result().token_ids == expected_old.token_ids
    assert old.result().digests == {"x": first}
    assert new.digests == {"x": second}
    assert new.token_ids != expected_old.token_ids
    assert engine.adapters() == {"x": second}


def test_a_removed_adapter_serves_requests_in_flight_and_no_new_ones(engine: Engine, adapters: dict[str, Path]) -> None:
    engine.add_adapter("x", adapters["a"])
    expected = engine.generate([PROMPTS[0]], mixes=[{"x": 1.0}], sampling=to_length(20))[0]
    running = engine.submit(PROMPTS[0], mix={"x": 1.0}, sampling=to_length(20))
    next(running.stream())
    waiting = engine.submit(PROMPTS[0], mix={"x": 1.0}, sampling=to_length(20))
    engine.remove_adapter("x")
    with pytest.raises(NotFoundError, match="no adapter 'x' is loaded"):
        engine.submit(PROMPTS[0], mix={"x": 1.0})
    assert running.result().token_ids == waiting.result().token_ids == expected.token_ids
    assert engine.adapters() == {}


def test_weights_leave_with_their_last_holder(engine: Engine, adapters: dict[str, Path]) -> None:
    engine.add_adapter("x", adapters["a"])
    engine.add_adapter("y", adapters["a"])
    engine.remove_adapter("x")
    assert engine.stats().adapters_on_host == 1
    ticket = engine.submit([1], mix={"y": 1.0}, sampling=to_length(3))
    engine.remove_adapter("y")
    assert engine.stats().adapters_on_device == 1
    ticket.result()
    stats = engine.stats()
    assert (stats.adapters_on_device, stats.adapters_on_host, stats.adapters_on_disk) == (0, 0, 0)
    assert (stats.adapter_device_bytes, stats.adapter_host_bytes) == (0, 0)


def test_the_same_weights_again_change_nothing(engine: Engine, adapters: dict[str, Path]) -> None:
    assert engine.add_adapter("x", adapters["a"]) == engine.add_adapter("x", LoraAdapter.load(adapters["a"]))
    assert engine.generate([[1]], mixes=[{"x": 1.0}], sampling=to_length(1))[0].digests == engine.adapters()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 8.001, -9.0, "1", True, None])
def test_weights_that_are_no_number_of_size_at_most_eight_are_refused(
    engine: Engine, adapters: dict[str, Path], weight: Any
) -> None:
    engine.add_adapter("x", adapters["a"])
    with pytest.raises(InvalidInputError, match="the weight of 'x' is"):
        engine.submit([1], mix={"x": weight})


def test_an_unknown_adapter_is_not_found_even_at_weight_zero(engine: Engine) -> None:
    with pytest.raises(NotFoundError, match="no adapter 'ghost'"):
        engine.submit([1], mix={"ghost": 0.0})
    with pytest.raises(NotFoundError, match="no adapter 'ghost'"):
        engine.remove_adapter("ghost")


def pair(d_in: int, d_out: int, *, value: float = 0.1) -> LoraPair:
    return LoraPair(torch.full((2, d_in), value), torch.full((d_out, 2), value))


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("adapter", "error", "words"),
    [
        (LoraAdapter({"model.layers.9.self_attn.q_proj": pair(48, 48)}), BaseMismatchError, "does not have"),
        (LoraAdapter({Q: pair(32, 48)}), BaseMismatchError, "the adapter is for 32 → 48, this base has 48 → 48"),
        (LoraAdapter({Q: pair(48, 48)}, base="sha256:other"), BaseMismatchError, "made for base sha256:other"),
        (LoraAdapter({"lm_head": pair(48, 257)}), InvalidInputError, "only linear layers of the decoder's layers"),
        (LoraAdapter({"model.norm": pair(48, 48)}), BaseMismatchError, "expected a linear layer"),
    ],
)
def test_adapters_that_do_not_fit_the_base_are_refused(
    engine: Engine, adapters: dict[str, Path], adapter: LoraAdapter, error: type[Exception], words: str
) -> None:
    digest = engine.add_adapter("x", adapters["a"])
    with pytest.raises(error, match=words):
        engine.add_adapter("x", adapter)
    assert engine.adapters() == {"x": digest}


def test_an_adapter_that_names_this_base_by_digest_is_taken(engine: Engine) -> None:
    adapter = LoraAdapter({Q: pair(48, 48)}, base=engine.base_digest)
    assert engine.add_adapter("x", adapter) == adapter.digest


def test_an_adapter_that_overflows_fails_its_own_requests_only(engine: Engine, adapters: dict[str, Path]) -> None:
    engine.add_adapter("good", adapters["a"])
    modules = {f"model.layers.0.mlp.{name}": pair(48, 80, value=1e30) for name in ("gate_proj", "up_proj")}
    engine.add_adapter("bad", LoraAdapter(modules))
    alone = engine.generate(PROMPTS[:2], mixes=[{"good": 1.0}, {}], sampling=to_length(20))
    before = [
        engine.submit(prompt, mix=mix, sampling=to_length(20))
        for prompt, mix in zip(PROMPTS, ({"good": 1.0}, {}), strict=False)
    ]
    bad = [engine.submit([5, 6, 7], mix={"bad": 1.0}, sampling=to_length(20)) for _ in range(2)]
    # Takes over the cache slot of a request that left NaN there.
    after = engine.submit(PROMPTS[0], mix={"good": 1.0}, sampling=to_length(20))
    for ticket in bad:
        with pytest.raises(InvalidInputError, match="not finite"):
            ticket.result()
    assert [ticket.result().token_ids for ticket in before] == [g.token_ids for g in alone]
    assert after.result().token_ids == alone[0].token_ids
    assert engine.stats().requests_failed_total == 2


def test_adapting_every_linear_is_what_the_bank_covers(engine: Engine) -> None:
    paths = {module.path for group in engine._base.groups for module in group.modules}
    assert {path.rpartition(".")[2] for path in paths} == set(ALL_LINEAR)
    assert len(paths) == 3 * len(ALL_LINEAR)
    assert len(engine._base.groups) == 3 * 4
