"""``fedit``: (Σ p_k B_k)(Σ p_k A_k), the average of the factors (FedIT, arXiv 2305.05644, section 3.2).

Unlike ranks are zero-padded to the largest, as FLoRA's comparison and HetLoRA (arXiv 2401.06432) do. Not exact: the
product of averages has cross-terms B_i A_j, and rows beyond a member's rank shrink by the weight of those who have
them, once in each factor. Here to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorafleet.adapters import LoraPair
from lorafleet.coordinator.rules.rule import Rule


def lift(pair: LoraPair, weight: float) -> LoraPair:
    return LoraPair(pair.a * weight, pair.b * weight)


def merge(parts: Sequence[LoraPair]) -> LoraPair:
    rank = max(part.rank for part in parts)
    a = torch.zeros(rank, parts[0].a.shape[1], dtype=parts[0].a.dtype)
    b = torch.zeros(parts[0].b.shape[0], rank, dtype=parts[0].b.dtype)
    for part in parts:
        a[: part.rank] += part.a
        b[:, : part.rank] += part.b
    return LoraPair(a, b)


FEDIT = Rule(name="fedit", formula="(Σ p_k B_k)(Σ p_k A_k)", exact=False, mixed_ranks=True, lift=lift, merge=merge)
