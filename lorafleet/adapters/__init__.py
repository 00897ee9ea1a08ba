"""LoRA adapters: maths in factor space, and PEFT's folder format."""

from lorafleet.adapters.factor_space import LoraPair
from lorafleet.adapters.lora import LoraAdapter, weighted_sum

__all__ = ["LoraAdapter", "LoraPair", "weighted_sum"]
