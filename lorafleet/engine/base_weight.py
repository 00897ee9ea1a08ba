"""A base weight in the order of memory in which this machine multiplies it fastest.

Where the processor has a matrix unit and the kernels for it are there, all of a model's linears are in tiles instead
(:mod:`lorafleet.engine.mixture_linear`), and its output layer is a :class:`TiledHead`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafleet.native.linear import Linear, panels_of
from lorafleet.native.memory import huge_zeros

# The token count that packed weights are laid out for; other counts run on the same layout.
_PACKED_FOR_TOKENS = 32


class BaseWeight(Protocol):
    """``x [T, d_in]`` → ``x Wᵀ + bias (+ residual)`` ``[T, d_out]``, a new tensor."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...


class PlainWeight:
    """As the library takes it.

    In float32 on a CPU input-major: 139 against 188 µs for 32 tokens, 256 → 1408, one core with AVX-512.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        input_major = weight.device.type == "cpu" and weight.dtype == torch.float32
        self._weight = weight.T.contiguous().T if input_major else weight.contiguous()
        self._bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(x, self._weight, self._bias)
        return y if residual is None else y.add_(residual)


class PackedWeight:
    """bfloat16 on a CPU with AMX or AVX-512, in oneDNN's blocked order, with the residual added inside the product.

    Against ``F.linear`` and an addition on two cores of a shared machine: 2048 → 768 for 32 tokens 117 and 166 µs,
    5632 → 2048 for 16 tokens 490 to 980 and 835 to 1 124 µs. For 1 024 tokens most shapes are equal; 768 → 1280 took
    1.8 and 1.3 ms.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_TOKENS)
        self._bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise
        y: Tensor
        if residual is None:
            y = product(x, self._weight, self._bias, "none", [], "")
        else:
            y = product.binary(x, residual, self._weight, self._bias, "add")
        return y


class TiledHead:
    """An output layer in tiles, with the norm before it where it is given; its result is float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, norm: tuple[Tensor, float] | None = None) -> None:
        panels = panels_of(weight)
        self._linear = Linear(
            huge_zeros(tuple(panels.shape), torch.bfloat16).copy_(panels),
            d_in=weight.shape[1],
            d_outs=[weight.shape[0]],
            bias=None if bias is None else bias.float(),
            norm=norm,
            float_out=True,
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._linear(x, residual)


def lay_out(weight: Tensor, bias: Tensor | None) -> BaseWeight:
    """``weight [d_out, d_in]``, ``bias [d_out]``"""
    packs = (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return PackedWeight(weight, bias) if packs else PlainWeight(weight, bias)
