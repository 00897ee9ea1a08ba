"""Token-level routing: from the router's logits to gates.

Each adapter that can be routed has one gate vector v_k for each group of modules; it is one more row of A. For a token
x, with the eligible adapters E and temperature τ::

    l_k = v_k · x          (the GEMM that shrinks gives it)
    S   = the k largest l_k of E, equal ones in the order of their columns
    g_k = exp(l_k / τ) / Σ_{j ∈ S} exp(l_j / τ)  for k ∈ S, 0 otherwise

A softmax over the chosen ones is Mixtral's (arXiv 2401.04088, section 2.1). Adapters that are not eligible are masked
before anything is compared, so that they change no gate.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def token_gates(logits: Tensor, *, eligible: Tensor, top_k: Tensor | int, temperature: Tensor | float) -> Tensor:
    """Gates ``[T, K]`` from ``logits [T, K]`` and ``eligible [T, K]`` (bool); each row sums to 1.

    ``top_k`` and ``temperature`` hold for all tokens, or one ``[T, 1]`` for each. Fewer eligible adapters than
    ``top_k`` are all chosen; a row without any is zero. Closed gates are exact zeros. Differentiable in the logits,
    with the choice held fixed. No value is read by the host.
    """
    barred = logits.detach().masked_fill(~eligible, -torch.inf)
    order = barred.argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    chosen = eligible & (place < top_k)
    best = barred.amax(-1, keepdim=True).masked_fill(~eligible.any(-1, keepdim=True), 0.0)
    # Masked on both sides: what is not chosen gives an exact zero, and a gradient of zero instead of NaN.
    scaled = (logits.masked_fill(~chosen, 0.0) - best) / temperature
    weight = scaled.masked_fill(~chosen, -torch.inf).exp()
    return weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)


def no_gates(keys: Iterable[str]) -> str:
    """What to say of adapters that a route names and that have no gate vectors."""
    return (
        f"no gates for token-level routing in: {', '.join(map(repr, keys))}; leave them out of the route, or publish "
        "them with gates"
    )
