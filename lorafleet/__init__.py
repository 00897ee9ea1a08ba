"""lorafleet: LoRA experts trained where the data lives, mixed and served to every tenant from one base model."""

__version__ = "0.1.0"
