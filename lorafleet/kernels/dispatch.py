"""The dict of kernel paths, and which one runs: the cheapest, says a cost model that was fitted to measurements."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from lorafleet.errors import UnknownNameError
from lorafleet.kernels.cost_model import Call, Coefficients, CostModel, Segment
from lorafleet.kernels.dense import mixture_dense, mixture_dense_float32
from lorafleet.kernels.packing import PackedGroup
from lorafleet.kernels.plan import Plan
from lorafleet.kernels.reference import mixture_reference
from lorafleet.kernels.segmented import mixture_segmented
from lorafleet.kernels.tiles import mixture_tiles


class MixturePath(Protocol):
    """``y [T, Σ d_out] += Σ_k g[t,k] B_k (A_k x)``, in place, for one group; ``x [T, d_in]``."""

    def __call__(self, y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None: ...


def mixture_triton(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """:func:`lorafleet.kernels.triton.mixture_triton`; Triton is loaded when it is first used."""
    from lorafleet.kernels.triton import mixture_triton as run

    run(y, x, group, plan)


# For machines that nobody has measured. On the workloads of `measure.workloads` its choices took 1.014 times the best
# path's time on average in bfloat16 (at worst 1.5), the dense path alone 1.44 (3.9); in float32 1.014 (1.5) and 1.8
# (8.0). Median error of a prediction 11 to 27%.
DEFAULT_MODEL = CostModel(
    {
        "dense bfloat16": Coefficients(19.4, 68.4, 912.0),
        "dense_float32 bfloat16": Coefficients(5.08, 58.2, 7649.0),
        "segmented bfloat16": Coefficients(24.4, 81.1, 882.0),
        "dense float32": Coefficients(3.29, 29.1, 4915.0),
        "segmented float32": Coefficients(4.81, 35.9, 3871.0),
        "dense bfloat16/float32": Coefficients(5.23, 40.1, 7458.0),
        "segmented bfloat16/float32": Coefficients(4.45, 63.5, 8630.0),
    },
    "cpu",
    {"processor": "one core of an Intel Xeon with AMX, shared", "torch": "2.13.0", "date": "2026-11-22"},
)


def without_measurements(tokens: int, adapters: int) -> str:
    """The path for a bank with pools where no model was fitted: Triton's, but for prompts with few adapters.

    Triton's takes two launches for a group and reads the pages in place. The dense one takes up to six, copies the
    active rows together whenever they change and multiplies each token with all of them, but by the library's best
    kernels, which is what many tokens gain from. The limits are guesses: from 64 tokens on Triton's path works on
    larger blocks; rows of more than 16 adapters are mostly rows that a token has no use for.
    """
    return "dense" if tokens > 64 and adapters <= 16 else "triton"


class Dispatcher:
    """A path that hands each call to the cheapest one.

    Decided once for a plan and a shape of group, so that the layers of a model decide together.
    """

    def __init__(self, models: Mapping[str, CostModel]) -> None:
        """``models`` by device type; on a device without one the dense path runs, or Triton's by a rule."""
        self.models = dict(models)

    def __call__(self, y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
        PATHS[self.choose(x, group, plan)](y, x, group, plan)

    def choose(self, x: Tensor, group: PackedGroup, plan: Plan) -> str:
        key = (self, group.shape, group.layout, group.dtype, x.dtype)
        return plan.once(key, lambda: self._choose(x, group, plan))

    def _choose(self, x: Tensor, group: PackedGroup, plan: Plan) -> str:
        if group.tiled is not None and x.dtype == torch.bfloat16:
            return "tiles"  # which takes each block's own adapters, as few as any other path, without a copy
        with_triton = group.pooled is not None and x.device.type == "cuda"
        model = self.models.get(x.device.type)
        if model is None:
            return without_measurements(plan.tokens, len(plan.active)) if with_triton else "dense"
        candidates = ["dense", "segmented"]
        if group.dtype != torch.float32:
            candidates.append("dense_float32")
        if with_triton:
            candidates.append("triton")
        return model.cheapest(call_of(x, group, plan), candidates)


def call_of(x: Tensor, group: PackedGroup, plan: Plan) -> Call:
    """What the cost of this call depends on; read from host tables alone."""
    d_in, d_outs, rows = group.shape
    layout = group.layout
    segments = tuple(
        Segment(sum(plan.runs[index].tokens for index in runs), sum(layout.rows_of[adapter] for adapter in adapters))
        for (adapters, _), runs in plan.adapter_sets(layout.owners).items()
    )
    names = [str(dtype).removeprefix("torch.") for dtype in (x.dtype, group.dtype)]
    dtype = names[0] if names[0] == names[1] else "/".join(names)
    return Call(d_in, d_outs, rows, plan.tokens, segments, plan.exact_in_bfloat16, dtype)


PATHS: dict[str, MixturePath] = {
    "reference": mixture_reference,
    "dense": mixture_dense,
    "dense_float32": mixture_dense_float32,
    "segmented": mixture_segmented,
    "tiles": mixture_tiles,
    "triton": mixture_triton,
    "auto": Dispatcher({"cpu": DEFAULT_MODEL}),
}
DEFAULT_PATH = "auto"


def mixture_path(name: str = DEFAULT_PATH, *, model: CostModel | None = None) -> MixturePath:
    """The path of that name; raises UnknownNameError, which lists the known ones.

    ``model`` takes the place of the shipped one where ``name`` is "auto".
    """
    if name not in PATHS:
        raise UnknownNameError("kernel path", name, PATHS)
    if name == "auto" and model is not None:
        return Dispatcher({model.device: model})
    return PATHS[name]


def paths_on(device: torch.device | str) -> tuple[str, ...]:
    """The names of the paths that run on a device, whatever the bank: Triton's needs CUDA and an installed Triton.

    Without the tiled path, which needs a bank with tiles.
    """
    with_triton = torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is not None
    return tuple(name for name in PATHS if name != "tiles" and (name != "triton" or with_triton))
