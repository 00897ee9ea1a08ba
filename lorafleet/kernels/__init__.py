"""Multi-LoRA kernels: ``y[t] += Σ_k g[t,k] B_k (A_k x[t])`` for any ranks and any mixture, in one call a group."""

from lorafleet.kernels.bank import Bank, GroupSpec, ModuleSpec, PackedGroup, PackedModule, Packing, RowLayout
from lorafleet.kernels.dispatch import DEFAULT_PATH, PATHS, MixturePath, mixture_path
from lorafleet.kernels.plan import Mix, Plan, Run

__all__ = [
    "DEFAULT_PATH",
    "PATHS",
    "Bank",
    "GroupSpec",
    "Mix",
    "MixturePath",
    "ModuleSpec",
    "PackedGroup",
    "PackedModule",
    "Packing",
    "Plan",
    "RowLayout",
    "Run",
    "mixture_path",
]
