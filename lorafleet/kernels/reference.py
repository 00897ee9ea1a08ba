"""The plain loop that every other path is checked against: one token, one module, one adapter at a time, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafleet.kernels.packing import PackedGroup
from lorafleet.kernels.plan import Plan


def mixture_reference(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """``y[t] += Σ_k g[t,k] B_k (A_k x[t])`` for every module of the group, in place.

    ``y [T, Σ d_out]`` (the modules' outputs side by side), ``x [T, d_in]``. The sum over the adapters is taken in
    float32 and rounded to y's dtype once. An adapter whose gate is zero takes no part, whatever its factors hold.
    """
    gates = plan.gates
    if plan.routing is not None:
        logits = x[plan.routing.tokens].float() @ group.gate_rows.float().T
        gates = plan.routed_gates(group.layout, logits)
    for module in group.modules:
        a, b = group.a[module.rows].float(), module.b.float()
        owner = group.layout.adapter_of_row[module.rows]
        for t in range(x.shape[0]):
            total = torch.zeros(b.shape[1], device=y.device)
            for k in range(gates.shape[1]):
                if gates[t, k] != 0:
                    a_k, b_k = a[owner == k], b[owner == k]
                    total += gates[t, k] * ((a_k @ x[t].float()) @ b_k)
            y[t, module.columns] = (y[t, module.columns].float() + total).to(y.dtype)
