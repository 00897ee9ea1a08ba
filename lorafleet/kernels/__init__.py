"""Multi-LoRA kernels: ``y[t] += Σ_k g[t,k] B_k (A_k x[t])`` for any ranks and any mixture, in one call a group."""

from lorafleet.kernels.bank import Bank, GroupSpec, ModuleSpec, Page
from lorafleet.kernels.cost_model import CostModel
from lorafleet.kernels.dispatch import DEFAULT_PATH, PATHS, MixturePath, mixture_path, paths_on
from lorafleet.kernels.packing import PackedGroup, PackedModule, Packing, RowLayout
from lorafleet.kernels.plan import Mix, Plan, Run, TokenRoute

__all__ = [
    "DEFAULT_PATH",
    "PATHS",
    "Bank",
    "CostModel",
    "GroupSpec",
    "Mix",
    "MixturePath",
    "ModuleSpec",
    "PackedGroup",
    "PackedModule",
    "Packing",
    "Page",
    "Plan",
    "RowLayout",
    "Run",
    "TokenRoute",
    "mixture_path",
    "paths_on",
]
