"""``exact``: Σ p_k B_k A_k in factor space, for any ranks.

Weighted stacking (FLoRA, arXiv 2409.05976, eq. 5) sums products without cross-terms. Once the stacked rank passes
min(d_in, d_out), QR of both stacks and an SVD of the small core (FLoRIST, arXiv 2506.09199, at energy 1) shorten it
again without loss, so that a partial result never outgrows the matrix it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorafleet.adapters import LoraPair
from lorafleet.adapters.factor_space import compress, stack
from lorafleet.coordinator.rules.rule import Rule


def lift(pair: LoraPair, weight: float) -> LoraPair:
    """The weight goes on A alone: on both factors it would be squared."""
    return LoraPair(pair.a * weight, pair.b)


def merge(parts: Sequence[LoraPair]) -> LoraPair:
    stacked = stack(parts, [1.0] * len(parts))
    if stacked.rank <= min(stacked.a.shape[1], stacked.b.shape[0]):
        return stacked
    return compress(stacked).pair


EXACT = Rule(name="exact", formula="Σ p_k B_k A_k", exact=True, mixed_ranks=True, lift=lift, merge=merge)
