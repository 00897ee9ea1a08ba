"""The segmented path: tokens that need the same adapters together, each against those adapters' rows alone.

Best for prefill and for many active adapters: where the dense path multiplies every token with every active row, this
one costs Σ_segments T_s R_s. Segments are sets of adapters, not adapters: a mixture's rows are one matrix, and y is
read and written once however many adapters it has. Inside a segment, weights and routed gates are the dense path's.
"""

from __future__ import annotations

from torch import Tensor

from lorafleet.kernels.dense import mixture_dense
from lorafleet.kernels.packing import PackedGroup
from lorafleet.kernels.plan import Plan


def mixture_segmented(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """Same signature and result as :func:`lorafleet.kernels.reference.mixture_reference`."""
    if plan.routing is not None:
        plan.check_routes(group.layout)  # before anything is written
    for adapters, tokens, part in plan.segments(group.layout.owners):
        rows = group.subset(adapters)
        if isinstance(tokens, slice):
            mixture_dense(y[tokens], x[tokens], rows, part)
        else:
            y_s = y.index_select(0, tokens)
            mixture_dense(y_s, x.index_select(0, tokens), rows, part)
            y.index_copy_(0, tokens, y_s)
