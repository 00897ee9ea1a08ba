"""The dense path: every token against every active row, two library GEMMs and one multiplication.

``H = X Aᵀ; H *= G; Y_m += H_m B_m``. Exact for any ranks and any mixture; near the memory floor for decode batches and
for few active adapters, because the rows of all adapters are read once however many tokens use them.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lorafleet.kernels.bank import PackedGroup
from lorafleet.kernels.plan import Plan


def mixture_dense(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """Same signature and result as :func:`lorafleet.kernels.reference.mixture_reference`.

    The intermediate stays in the bank's dtype (float32), so y is rounded once. Closed gates are written as zeros, not
    multiplied: an adapter whose intermediate overflows must not turn its neighbours' zeros into NaN.
    """
    h = F.linear(x if x.dtype == group.a.dtype else x.to(group.a.dtype), group.a)
    gates, closed = plan.row_gates(group.layout)
    h.mul_(gates)
    if closed is not None:
        h.masked_fill_(closed, 0.0)
    for columns, rows, b in group.modules:
        if y.dtype == h.dtype:
            y[:, columns].addmm_(h[:, rows], b)
        else:
            y[:, columns].add_(h[:, rows] @ b)
