"""The dict of kernel paths, and which one runs."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lorafleet.errors import UnknownNameError
from lorafleet.kernels.bank import PackedGroup
from lorafleet.kernels.dense import mixture_dense
from lorafleet.kernels.plan import Plan
from lorafleet.kernels.reference import mixture_reference


class MixturePath(Protocol):
    """``y [T, Σ d_out] += Σ_k g[t,k] B_k (A_k x)``, in place, for one group; ``x [T, d_in]``."""

    def __call__(self, y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None: ...


PATHS: dict[str, MixturePath] = {"reference": mixture_reference, "dense": mixture_dense}
DEFAULT_PATH = "dense"


def mixture_path(name: str = DEFAULT_PATH) -> MixturePath:
    """The path of that name; raises UnknownNameError, which lists the known ones."""
    if name not in PATHS:
        raise UnknownNameError("kernel path", name, PATHS)
    return PATHS[name]
