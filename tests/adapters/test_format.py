"""Folders in PEFT's format: what peft writes is read as peft computes it, or refused with the reason."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorafleet.adapters import LoraAdapter
from lorafleet.adapters.format import READ, REFUSED, WITHOUT_EFFECT
from lorafleet.errors import AdapterFormatError, LorafleetError, NotFoundError

LAYERS, HIDDEN, INNER = 2, 16, 24
Q = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def tuned(**settings: Any) -> Any:
    """A model by peft with random factors."""
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]} | settings)
    return randomised(get_peft_model(base(), config))


def randomised(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def logits_of(model: Any) -> torch.Tensor:
    """``[1, 6, 20]``"""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([[3, 1, 4, 1, 5, 9]])).logits
    return logits


def set_in_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tuned().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain_folder: Path, tmp_path: Path) -> Path:
    """One of its own, to be damaged."""
    return Path(shutil.copytree(plain_folder, tmp_path / "adapter"))


def test_every_field_of_pefts_configuration_is_read_or_refused_or_without_effect() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields - (READ | WITHOUT_EFFECT | set(REFUSED)) == set()
    assert not READ & WITHOUT_EFFECT and not set(REFUSED) & (READ | WITHOUT_EFFECT)
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert variants <= set(REFUSED)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 0},
        {"lora_alpha": -3, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7}, "alpha_pattern": {"v_proj": 5}},
        {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "o_proj"]},
        {"target_modules": r".*\.1\..*(q|down)_proj"},
        {"layers_to_transform": 1, "layers_pattern": "layers", "lora_dropout": 0.5},
        {"ensure_weight_tying": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "mica"},
    ],
    ids=str,
)
def test_what_is_read_is_what_peft_adds_to_the_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    tuned(**settings).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path)
    expected = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    found = LoraAdapter.load(tmp_path)
    assert set(found.modules) == set(expected)
    for path, delta in expected.items():
        torch.testing.assert_close(found.delta(path), delta)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora"])
def test_adapter_that_changed_the_base_is_read_once_peft_has_made_it_an_update_of_the_base(
    how: str, tmp_path: Path
) -> None:
    model: Any = get_peft_model(
        base(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=how)
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = how
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterFormatError, match=f"init_lora_weights is '{how}', which changes the base's own weights"):
        LoraAdapter.load(tmp_path / "raw")
    model.save_pretrained(tmp_path / "update", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    merged = base()
    LoraAdapter.load(tmp_path / "update").merge_into(merged)
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora is set: DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set: whole trained modules"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set: trained token embeddings"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices is set"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*of linear layers; embeddings"),
        ({"target_modules": ["lm_head"]}, "lm_head.*whole layers are not supported"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters is set: adapted bare"),
        ({"lora_bias": True}, "lora_bias is set: a bias on B"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"bias": "lora_only"}, "bias is 'lora_only', expected 'none'"),
        ({"use_qalora": True}, "use_qalora is set: QA-LoRA's inputs are pooled"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set: activated LoRA"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication is set: a base with replicated layers"),
        ({"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)}, "velora_config is set"),
        ({"kasa_config": peft.tuners.lora.config.KasaConfig()}, "kasa_config is set: KaSA changes the base's own"),
        ({"monteclora_config": peft.tuners.lora.config.MontecloraConfig()}, "monteclora_config is set"),
        (
            {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(["q_proj"], nblocks=4, match_strict=False)},
            "use_bdlora is set: block-diagonal factors",
        ),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga', which changes the base's own weights"),
    ],
    ids=str,
)
def test_what_peft_computes_otherwise_is_refused_with_the_reason(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    if settings.get("init_lora_weights") == "lora_ga":
        settings = settings | {"lora_ga_config": peft.LoraGAConfig()}
    tuned(**settings).save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match=reason):
        LoraAdapter.load(tmp_path)


@pytest.mark.parametrize("changes", [
    {"init_lora_weights": "corda"}, {"init_lora_weights": "loftq"}, {"arrow_config": {"top_k": 2}},
    {"a_field_of_tomorrow": True},
])  # fmt: skip
def test_what_peft_cannot_make_here_is_refused_by_its_name(changes: dict[str, Any], folder: Path) -> None:
    set_in_config(folder, **changes)
    with pytest.raises(AdapterFormatError, match="|".join(changes)):
        LoraAdapter.load(folder)


@pytest.mark.parametrize("changes", [
    {"a_field_of_tomorrow": None}, {"a_field_of_tomorrow": False}, {"unsloth_fixed": True}, {"lora_dropout": 0.1},
    {"megatron_config": {}}, {"auto_mapping": {"parent_library": "elsewhere"}}, {"revision": "main"},
])  # fmt: skip
def test_what_changes_nothing_is_taken(changes: dict[str, Any], folder: Path, plain_folder: Path) -> None:
    set_in_config(folder, **changes)
    assert LoraAdapter.load(folder).digest == LoraAdapter.load(plain_folder).digest


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "LOHA"),
        (peft.LoKrConfig(target_modules=["q_proj"]), "LOKR"),
        (peft.VeraConfig(target_modules=["q_proj"], r=4), "VERA"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "ADALORA"),
        (peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0), "OFT"),
        (peft.RandLoraConfig(target_modules=["q_proj"], r=4), "RANDLORA"),
        (peft.LNTuningConfig(target_modules=["input_layernorm"]), "LN_TUNING"),
        (peft.PromptTuningConfig(num_virtual_tokens=2), "PROMPT_TUNING"),
        (peft.PrefixTuningConfig(num_virtual_tokens=2), "PREFIX_TUNING"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_kinds_of_adapters_are_refused_by_name(config: Any, kind: str, tmp_path: Path) -> None:
    config.task_type = "CAUSAL_LM"
    get_peft_model(base(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match=f"found peft_type '{kind}', expected 'LORA'"):
        LoraAdapter.load(tmp_path)


def with_config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: set_in_config(folder, **changes)


def with_text(text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def with_tensor(key: str, tensor: torch.Tensor) -> Callable[[Path], object]:
    return with_tensors(lambda tensors: tensors.update({key: tensor}))


def cut(keep: float) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / WEIGHTS, int((folder / WEIGHTS).stat().st_size * keep))


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), NotFoundError, "adapter_config.json is missing"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), NotFoundError, "safetensors is missing"),
    "no folder": (shutil.rmtree, NotFoundError, "is missing"),
    "weights are a folder": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()), NotFoundError, "is missing"),
    "a pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), AdapterFormatError, "a pickle, which"),
    "several parts": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model-00001-of-00002.safetensors"),
        AdapterFormatError, "one of several parts"),
    "empty weights": (cut(0), AdapterFormatError, "damaged or truncated"),
    "half a header": (cut(0.01), AdapterFormatError, "damaged or truncated"),
    "half the weights": (cut(0.5), AdapterFormatError, "damaged or truncated"),
    "all weights but the end": (cut(0.999), AdapterFormatError, "damaged or truncated"),
    "no tensors": (with_tensors(dict.clear), AdapterFormatError, "holds no tensors"),
    "no JSON": (with_text("{"), AdapterFormatError, "is not JSON"),
    "no text": (with_text(b"\xff\xfe{}"), AdapterFormatError, "is not JSON"),
    "endless nesting": (with_text('{"a":' + "[" * 100_000), AdapterFormatError, "is not JSON"),
    "endless digits": (with_text('{"r": ' + "9" * 5000 + "}"), AdapterFormatError, "is not JSON"),
    "no object": (with_text('["LORA"]'), AdapterFormatError, "holds a list"),
    "no type": (with_config(peft_type=None), AdapterFormatError, "found peft_type None"),
    "alpha NaN": (with_config(lora_alpha=float("nan")), AdapterFormatError, "found nan by r, lora_alpha"),
    "alpha infinite": (with_config(lora_alpha=float("inf")), AdapterFormatError, "found inf by r, lora_alpha"),
    "alpha too large": (with_config(lora_alpha=10**400), AdapterFormatError, "expected a number"),
    "alpha overflows": (with_config(lora_alpha=1e300), AdapterFormatError, "found NaN or infinity"),
    "alpha a text": (with_config(lora_alpha="16"), AdapterFormatError, "found '16' by r, lora_alpha"),
    "alpha true": (with_config(lora_alpha=True), AdapterFormatError, "found True by r, lora_alpha"),
    "alpha null": (with_config(lora_alpha=None), AdapterFormatError, "found None by r, lora_alpha"),
    "alpha pattern NaN": (with_config(alpha_pattern={"q_proj": float("nan")}), AdapterFormatError, "alpha_pattern"),
    "no expression": (with_config(alpha_pattern={"(": 1}), AdapterFormatError, r"alpha_pattern: .*'\(': expected"),
    "pattern is a list": (with_config(rank_pattern=["q_proj"]), AdapterFormatError, "expected regular expressions"),
    "rank 0": (with_config(r=0), AdapterFormatError, "has rank 4, r or rank_pattern says 0"),
    "another rank": (with_config(r=8), AdapterFormatError, "has rank 4, r or rank_pattern says 8"),
    "another rank by pattern": (with_config(rank_pattern={"v_proj": 2}), AdapterFormatError, "v_proj has rank 4"),
    "factors of rank 0": (
        with_tensors(lambda t: t.update({A: torch.zeros(0, HIDDEN), B: torch.zeros(HIDDEN, 0)})),
        AdapterFormatError, r"has A \[0, 16\] and B \[16, 0\]"),
    "factors that do not fit": (with_tensor(A, torch.zeros(3, HIDDEN)), AdapterFormatError, r"A \[3, 16\] and B"),
    "a vector": (with_tensor(A, torch.zeros(HIDDEN)), AdapterFormatError, r"A \[16\] and B"),
    "three dimensions": (with_tensor(B, torch.zeros(1, HIDDEN, 4)), AdapterFormatError, r"B \[1, 16, 4\]"),
    "half a pair": (with_tensors(lambda t: t.pop(B)), AdapterFormatError, "has only factor A"),
    "a pair twice": (
        with_tensor(A.removeprefix("base_model.model."), torch.zeros(4, HIDDEN)), AdapterFormatError, "A of .* twice"),
    "integers": (with_tensor(A, torch.zeros(4, HIDDEN, dtype=torch.int8)), AdapterFormatError, "torch.int8, expected"),
    "NaN": (with_tensor(A, torch.full((4, HIDDEN), float("nan"))), AdapterFormatError, "found NaN or infinity"),
    "infinity": (with_tensor(B, torch.full((HIDDEN, 4), float("-inf"))), AdapterFormatError, "found NaN or infinity"),
    "another tensor": (with_tensor("lm_head.weight", torch.zeros(2)), AdapterFormatError, "found tensor 'lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_folders_are_refused_with_what_was_found(
    damage: tuple[Callable[[Path], object], type[Exception], str], folder: Path
) -> None:
    change, error, words = damage
    change(folder)
    with pytest.raises(error, match=words) as raised:
        LoraAdapter.load(folder)
    assert isinstance(raised.value, LorafleetError)
    assert re.search(re.escape(str(folder)), str(raised.value))


@pytest.mark.parametrize("named", ["../../../etc/passwd", "/etc/passwd", "https://example.com/base", "someone/model"])
def test_the_base_that_a_configuration_names_is_never_looked_for(
    named: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    set_in_config(folder, base_model_name_or_path=named)
    assert LoraAdapter.load(folder).base == named


def test_adapter_stays_as_it_was_read_while_its_file_is_overwritten(folder: Path) -> None:
    adapter = LoraAdapter.load(folder)
    before = {path: (pair.a.clone(), pair.b.clone()) for path, pair in adapter.modules.items()}
    size = (folder / WEIGHTS).stat().st_size
    with (folder / WEIGHTS).open("r+b") as file:  # as `cp` does
        file.write(b"\x01" * size)
    for path, (a, b) in before.items():
        assert torch.equal(adapter.modules[path].a, a) and torch.equal(adapter.modules[path].b, b)
