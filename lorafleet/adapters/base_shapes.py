"""The linear layers of a base and their shapes, without its weights: for checking adapters where no base runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lorafleet.adapters.lora import LoraAdapter
from lorafleet.errors import BaseMismatchError

ModuleShapes = Mapping[str, tuple[int, int]]
"""Path of every linear layer of the base → (d_out, d_in)."""


def base_shapes(path: Path) -> ModuleShapes:
    """Path of every linear layer that LoRA may adapt → (d_out, d_in); the model is built on the meta device.

    The output projection over the vocabulary is left out: it is tied to the embedding in many bases.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":  # GPT-2 keeps [d_in, d_out]
            d_in, d_out = module.weight.shape
            shapes[name] = (d_out, d_in)
    return shapes


def check_fits(adapter: LoraAdapter, shapes: ModuleShapes) -> None:
    """Raises BaseMismatchError where a module is not the base's, or of another shape."""
    for path, (a, b) in adapter.modules.items():
        check_module_fits(path, b.shape[0], a.shape[1], shapes)


def check_module_fits(path: str, d_out: int, d_in: int, shapes: ModuleShapes) -> None:
    """The same for one module."""
    if path not in shapes:
        raise BaseMismatchError(f"the adapter changes {path!r}, which is no linear layer of this base: name its own")
    if (d_out, d_in) != tuple(shapes[path]):
        raise BaseMismatchError(
            f"{path}: the adapter is for {d_in} → {d_out}, this base has {shapes[path][1]} → {shapes[path][0]}: name "
            "the base that it was trained on"
        )
