"""The dense path: every token against every active row, two library GEMMs and one multiplication.

``H = X Aᵀ; H *= G; Y_m += H_m B_m``. Exact for any ranks and any mixture; near the memory floor for decode batches and
for few active adapters, because the rows of all adapters are read once however many tokens use them.

How often the gated intermediate is rounded decides about the contract (1.5 times the error of a merged model). With
factors in bfloat16 a merged model rounds twice, weight and result. Here A, B and the result cost one rounding each,
and what is left is one for the intermediate, after its gate: 1.41 times the merged error where adapters outweigh the
base. A second one, as of a bfloat16 GEMM followed by a multiplication, makes it 1.58. Where the library returns
float32 for bfloat16 factors (CUDA) that is natural. On a CPU it does not:

- gates that bfloat16 holds exactly are multiplied inside the GEMM, before it rounds (oneDNN's binary post-op);
- for others the GEMM runs twice, the second time for what the first one rounded off.

Times below: µs, one core of a Xeon with AMX (shared machine), torch 2.13, oneDNN 3.12.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafleet.kernels.packing import PackedGroup, PackedModule
from lorafleet.kernels.plan import Plan, RowGates

# In bfloat16 on a CPU the expand is oneDNN's linear layer with an addition, on packed rows, and a copy into y, while
# each row is used for few tokens: up to a quarter of the rows, and no more than this. Above, it is addmm_ in place on
# plain rows. R → 2048, packed against addmm_: R of 64, T=1 27/27, T=16 36/31, T=64 88/53; R of 256, T=1 35/68, T=16
# 50/86, T=32 77/90, T=64 137/115, T=256 428/231, T=1024 1818/762; R of 720, T=1 138/245, T=64 279/340, T=128 427/428.
_PACKED_TOKENS = 128


def mixture_dense(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """Same signature and result as :func:`lorafleet.kernels.reference.mixture_reference`.

    Closed gates are written as zeros, not multiplied: an adapter whose intermediate overflows must not turn its
    neighbours' zeros into NaN.
    """
    if group.dtype == torch.bfloat16 and x.dtype == y.dtype == torch.bfloat16:
        if x.device.type == "cuda":
            _expand_in_place(y, _shrink_to_float32(x, group, plan).to(torch.bfloat16), group)
            return
        if x.device.type == "cpu" and library_multiplies_bfloat16():
            _expand_packed(y, _shrink_packed(x, group, plan), group)
            return
    wide = group.float32
    h = _shrink(x.float(), wide, plan)
    if y.dtype == h.dtype:
        _expand_in_place(y, h, wide)
    else:
        for module in wide.modules:
            y[:, module.columns].add_(_columns(h, module, wide) @ module.b)


def mixture_dense_float32(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """The dense path on a float32 copy of the rows, whatever the bank's dtype.

    On a CPU a call of oneDNN's costs 16 to 20 µs before it computes anything, a float32 GEMM 3: with 768 → 64 → 768 and
    T=1 11 against 38, T=16 33 against 42, T=64 109 against 60.
    """
    mixture_dense(y, x, group.float32, plan)


@cache
def library_multiplies_bfloat16() -> bool:
    """Whether torch has oneDNN and this processor what its bfloat16 needs; otherwise float32 rows serve."""
    if not torch._C._has_mkldnn:
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _shrink(x: Tensor, group: PackedGroup, plan: Plan) -> Tensor:
    """``x [T, d_in]`` → gated ``[T, R]``, all in float32; for routed tokens one GEMM gives their logits, too."""
    if plan.routing is None:
        h = F.linear(x, group.a)
        return _gate(h, plan.row_gates(group.layout))
    both = F.linear(x, group.a_and_gate_rows)
    h, logits = both[:, : group.row_count], both[plan.routing.tokens, group.row_count :]
    return _gate(h, plan.routed_row_gates(group.layout, logits))


def _gate(h: Tensor, gates: RowGates) -> Tensor:
    """In place."""
    h.mul_(gates.gates)
    return h if gates.closed is None else h.masked_fill_(gates.closed, 0.0)


def _expand_in_place(y: Tensor, h: Tensor, group: PackedGroup) -> None:
    for module in group.modules:
        y[:, module.columns].addmm_(_columns(h, module, group), module.b)


def _columns(h: Tensor, module: PackedModule, group: PackedGroup) -> Tensor:
    return h if len(group.modules) == 1 else h[:, module.rows]


def _shrink_to_float32(x: Tensor, group: PackedGroup, plan: Plan) -> Tensor:
    """As :func:`_shrink`, from bfloat16 factors on CUDA."""
    if plan.routing is None:
        return _gate(torch.mm(x, group.a.T, out_dtype=torch.float32), plan.row_gates(group.layout))
    both = torch.mm(x, group.a_and_gate_rows.T, out_dtype=torch.float32)
    h, logits = both[:, : group.row_count], both[plan.routing.tokens, group.row_count :]
    return _gate(h, plan.routed_row_gates(group.layout, logits))


def _shrink_packed(x: Tensor, group: PackedGroup, plan: Plan) -> Tensor:
    """``x [T, d_in]`` → gated ``[T, R]`` bfloat16, rounded once, on a CPU.

    2048 → 256 at T of 1, 32, 1024: a packed weight takes 25, 45, 835, a plain one 64, 83, 926; with the gates inside
    the GEMM 28, 49, 894; twice, and gated in float32, 66, 115, 2081. float32 rows take 43, 220, 10352.
    """
    weight = group.a_library
    if plan.exact_in_bfloat16:
        gates, closed = plan.row_gates(group.layout, torch.bfloat16)
        h: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, gates, weight, None, "mul")
        return h if closed is None else h.masked_fill_(closed, 0.0)
    high: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    low: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, high, weight, None, "sub")
    if plan.routing is None:
        row_gates = plan.row_gates(group.layout)
    else:
        # Not among the rows of the GEMM above, which rounds: 8 bits of a logit of 5 are 1% of a gate.
        logits = F.linear(x[plan.routing.tokens].float(), group.gate_rows_float32)
        row_gates = plan.routed_row_gates(group.layout, logits)
    return _gate(high.float().add_(low), row_gates).to(torch.bfloat16)


def _expand_packed(y: Tensor, h: Tensor, group: PackedGroup) -> None:
    """In place; either way the sum is in float32 and rounded once."""
    tokens = y.shape[0]
    for module in group.modules:
        y_m, h_m = y[:, module.columns], _columns(h, module, group)
        if tokens > min(_PACKED_TOKENS, (module.rows.stop - module.rows.start) // 4):
            y_m.addmm_(h_m, module.b)
        else:
            y_m.copy_(torch.ops.mkldnn._linear_pointwise.binary(h_m, y_m, module.b_library, None, "add"))
