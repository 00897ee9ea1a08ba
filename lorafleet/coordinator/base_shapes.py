"""The linear layers of a base and their shapes, without its weights: the coordinator checks, it does not run."""

from __future__ import annotations

from pathlib import Path

import torch

from lorafleet.coordinator.validation import ModuleShapes


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
