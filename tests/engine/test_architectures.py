"""Every architecture on the list against transformers' own forward pass; others are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2MoeConfig

from lorafleet.adapters import LoraAdapter
from lorafleet.engine import Engine
from lorafleet.engine.model import CHECKED_ARCHITECTURES, WINDOWED_ARCHITECTURES, check_supported
from lorafleet.errors import InvalidInputError, NotFoundError
from tests.engine.bases import EOS, PROMPTS, SMALL, greedy, save_base, to_length

GPT2 = {"vocab_size": 257, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 160, "initializer_range": 0.2}


OPT = {"vocab_size": 257, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
       "max_position_embeddings": 160, "word_embed_proj_dim": 48, "init_std": 0.2}  # fmt: skip
# Scores and logits of a small random model are small: with these caps they are bent.
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 12}
WINDOW = 24


def small_model(architecture: str, folder: Path, window: int | None = None) -> Any:
    settings: dict[str, Any] = SMALL | {"head_dim": 12}
    if architecture in ("gpt2", "opt"):
        settings = {"gpt2": GPT2, "opt": OPT}[architecture] | {"eos_token_id": EOS, "bos_token_id": None}
    if architecture == "gpt_neox":
        settings = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"} | {"rotary_pct": 0.5}
    if architecture == "gemma2":
        settings |= CAPS
    if window is not None:
        settings |= {"sliding_window": window, "use_sliding_window": True}
    config = AutoConfig.for_model(architecture, **settings)
    if window is None and architecture == "mistral":
        config.sliding_window = None
    if window is not None and hasattr(config, "layer_types"):
        config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they begin as zeros, and one that is forgotten would not be seen
                parameter.normal_(std=0.2)
    save_base(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("architecture", "window"),
    [(name, None) for name in CHECKED_ARCHITECTURES] + [(name, WINDOW) for name in WINDOWED_ARCHITECTURES],
)
def test_greedy_tokens_with_and_without_an_adapter_are_transformers_own(
    architecture: str, window: int | None, tmp_path: Path
) -> None:
    model = small_model(architecture, tmp_path / "base", window)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.eval()

    engine = Engine.load(tmp_path / "base", dtype="float32", max_sequences=4, max_batch_tokens=16)
    engine.add_adapter("x", tmp_path / "adapter")
    assert set(LoraAdapter.load(tmp_path / "adapter").modules) == {
        m.path for g in engine._base.groups for m in g.modules
    }
    prompts = PROMPTS[:3]
    with_adapter = engine.generate(prompts, mixes=[{"x": 1.0}] * 3, sampling=to_length(8))
    bare = engine.generate(prompts, sampling=to_length(8))
    for prompt, adapted, plain in zip(prompts, with_adapter, bare, strict=True):
        assert adapted.token_ids == greedy(tuned, prompt, 8)
        with tuned.disable_adapter():
            assert plain.token_ids == greedy(tuned, prompt, 8)


def with_window(config: Any) -> Any:
    config.sliding_window = 64
    return config


def with_kind(config: Any) -> Any:
    config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    return config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: Qwen2MoeConfig(), "'qwen2_moe' model; checked architectures are: .*llama"),
        (lambda: with_window(LlamaConfig(**SMALL)), "sliding_window 64.*not checked for 'llama'"),
        (lambda: with_kind(LlamaConfig(**SMALL)), "layers of the kinds .*chunked_attention"),
        (
            lambda: LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "rotary embeddings of type 'dynamic'",
        ),
        (lambda: LlamaConfig(**SMALL, quantization_config={"quant_method": "awq"}), "quantised"),
    ],
)
def test_bases_that_would_be_computed_wrongly_are_refused(config: Callable[[], Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        check_supported(config())


def test_a_base_without_a_tokenizer_is_refused(base_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((base_folder / name).read_bytes())
    with pytest.raises(NotFoundError, match="no tokenizer that can be loaded"):
        Engine.load(tmp_path, dtype="float32")
