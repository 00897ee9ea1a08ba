"""Linear algebra on low-rank products ``P = B A`` that never forms the product.

Shapes: ``A [r, d_in]``, ``B [d_out, r]``. Everything costs O((d_in + d_out) r²), against O(d_in · d_out · min(d_in,
d_out)) for a dense SVD. Weighted stacking is FLoRA's (arXiv 2409.05976, eq. 5): ``[w_1 A_1; …; w_K A_K]`` and
``[B_1 … B_K]`` multiply to exactly ``Σ w_k B_k A_k``. Compression by QR of both stacks and an SVD of the small core is
FLoRIST's (arXiv 2506.09199), with QR in place of its two SVDs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LoraPair(NamedTuple):
    """The factors of one module's update ``B A``; any scaling is already folded in."""

    a: Tensor
    """``[r, d_in]``"""
    b: Tensor
    """``[d_out, r]``"""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def delta(self) -> Tensor:
        """The dense update ``[d_out, d_in]``, the shape of a ``torch.nn.Linear`` weight."""
        return self.b @ self.a


def stack(pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """``Σ w_k B_k A_k`` as one pair of rank ``Σ r_k``, exactly.

    The weight goes on A alone; on both factors it would be squared.
    """
    if len(pairs) != len(weights) or not pairs:
        raise ValueError(f"found {len(pairs)} pairs and {len(weights)} weights, expected the same number, at least one")
    a = torch.cat([pair.a * weight for pair, weight in zip(pairs, weights, strict=True)], dim=0)
    return LoraPair(a, torch.cat([pair.b for pair in pairs], dim=1))


def inner(p: LoraPair, q: LoraPair) -> Tensor:
    """Frobenius inner product ``<B_p A_p, B_q A_q>``, from ``tr((B_pᵀ B_q)(A_q A_pᵀ))``; a scalar."""
    return ((p.b.T @ q.b) * (p.a @ q.a.T)).sum()


def norm(p: LoraPair) -> Tensor:
    """Frobenius norm of ``B A`` in float64; a scalar.

    From the core: ``B = Q_b R_b``, ``Aᵀ = Q_a R_a``, and ``‖B A‖ = ‖R_b R_aᵀ‖``. ``sqrt(<P, P>)`` would lose half of
    the digits where nearly equal columns cancel, and all of them in float32.
    """
    r_b = torch.linalg.qr(p.b.double(), mode="r").R
    r_a = torch.linalg.qr(p.a.double().T, mode="r").R
    size: Tensor = torch.linalg.matrix_norm(r_b @ r_a.T)
    return size


class Spectrum(NamedTuple):
    """A thin SVD of ``B A = U diag(s) Vᵀ`` of ``k = min(r, d_in, d_out)`` components."""

    u: Tensor
    """``[d_out, k]``, orthonormal columns"""
    s: Tensor
    """``[k]``, falling"""
    vt: Tensor
    """``[k, d_in]``, orthonormal rows"""


def svd(pair: LoraPair) -> Spectrum:
    """Thin SVD of ``B A`` from the factors, in float64, with canonical signs.

    ``B = Q_b R_b``, ``Aᵀ = Q_a R_a``, and the core ``R_b R_aᵀ`` is at most r × r. The largest entry of each left
    vector is made positive, so that the same product gives the same bits whatever LAPACK preferred.
    """
    q_b, r_b = torch.linalg.qr(pair.b.double())
    q_a, r_a = torch.linalg.qr(pair.a.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    u, vt = q_b @ u, vt @ q_a.T
    strongest = u.abs().argmax(dim=0)
    sign = torch.where(u[strongest, torch.arange(u.shape[1])] < 0, -1.0, 1.0).to(u.dtype)
    return Spectrum(u * sign, s, vt * sign[:, None])


class Compressed(NamedTuple):
    pair: LoraPair
    error: float
    """``‖P - P_r‖_F / ‖P‖_F``, from the dropped singular values; 0 for a zero product"""


def compress(pair: LoraPair, *, rank: int | None = None, energy: float = 1.0) -> Compressed:
    """The best approximation of ``B A`` of rank at most ``rank`` (Eckart–Young), balanced, in the pair's dtype.

    ``energy`` in (0, 1] drops the smallest components as long as that share of ``Σ s²`` is kept; at 1.0 only
    components below float64's noise go. At least one component stays. Both factors carry ``sqrt(s)``.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"found a target rank of {rank}, expected at least 1")
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"found an energy share of {energy}, expected a number above 0 and at most 1")
    spectrum = svd(pair)
    power = spectrum.s.square()
    total = power.sum()
    if total == 0:
        zero = LoraPair(torch.zeros_like(pair.a[:1]), torch.zeros_like(pair.b[:, :1]))
        return Compressed(zero, 0.0)
    # Tail power after keeping k components; noise is what SVD in float64 cannot tell from zero.
    noise = torch.finfo(torch.float64).eps * max(pair.a.shape[1], pair.b.shape[0])
    tail = power.flip(0).cumsum(0).flip(0)
    keep = int((tail > max(1.0 - energy, noise**2) * total).sum()) or 1
    keep = min(keep, rank or keep)
    root = spectrum.s[:keep].sqrt()
    a = (root[:, None] * spectrum.vt[:keep]).to(pair.a.dtype)
    b = (spectrum.u[:, :keep] * root).to(pair.b.dtype)
    return Compressed(LoraPair(a, b), float((power[keep:].sum() / total).sqrt()))
