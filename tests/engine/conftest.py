"""One random Llama for the session, engines on it, and adapters made by peft."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from lorafleet.engine import Engine
from tests.engine.bases import ALL_LINEAR, SMALL, save_base


@pytest.fixture(autouse=True, scope="session")
def quiet_and_small() -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped heads, float32."""
    torch.manual_seed(0)
    return save_base(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def plain_model(base_folder: Path) -> Callable[[], Any]:
    """Gives a fresh copy of the base in plain transformers."""
    return lambda: AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()


@pytest.fixture
def engine(base_folder: Path) -> Iterator[Engine]:
    """Without its thread; small limits, so that prompts are cut into chunks and requests have to wait."""
    engine = Engine.load(base_folder, dtype="float32", max_sequences=4, max_batch_tokens=16)
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def make_adapter(plain_model: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_adapter(seed, **LoraConfig)``: a folder written by peft, both factors random."""

    def make(seed: int, **config: Any) -> Path:
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR} | config
        model = get_peft_model(plain_model(), LoraConfig(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        folder = tmp_path_factory.mktemp(f"adapter{seed}")
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def adapters(make_adapter: Callable[..., Path]) -> dict[str, Path]:
    """Three adapters of different ranks and modules."""
    return {
        "a": make_adapter(1, r=4),
        "b": make_adapter(2, r=16, target_modules=["q_proj", "v_proj", "down_proj"]),
        "c": make_adapter(3, r=1, lora_alpha=4),
    }
