"""The mixture as a differentiable function of everything in it, for training gates and for checks.

Shapes: T tokens, K adapters of ranks r_k; as adapters hold them, ``A_k [r_k, d_in]`` and ``B_k [d_out, r_k]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorafleet.kernels.token_gates import token_gates


def mixture(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], gates: Tensor) -> Tensor:
    """``y [T, d_out] = Σ_k g[t,k] B_k (A_k x[t])`` from ``x [T, d_in]`` and ``gates [T, K]``."""
    if not len(a) == len(b) == gates.shape[1]:
        raise ValueError(f"found {len(a)} A, {len(b)} B and gates for {gates.shape[1]}, expected as many of each")
    total = x.new_zeros(x.shape[0], b[0].shape[0])
    for k, (a_k, b_k) in enumerate(zip(a, b, strict=True)):
        total = total + gates[:, k : k + 1] * (x @ a_k.T @ b_k.T)
    return total


def routed_mixture(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    gate_vectors: Tensor,
    *,
    top_k: int,
    temperature: float = 1.0,
    eligible: Tensor | None = None,
) -> Tensor:
    """The mixture with token-level gates from ``gate_vectors [K, d_in]``; ``eligible [T, K]`` (bool), or all are."""
    logits = x @ gate_vectors.T
    allowed = torch.ones_like(logits, dtype=torch.bool) if eligible is None else eligible
    return mixture(x, a, b, token_gates(logits, eligible=allowed, top_k=top_k, temperature=temperature))
