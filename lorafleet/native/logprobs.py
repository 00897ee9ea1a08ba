"""How ``logprobs.cpp`` is called."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorafleet.native import library

_Pointer, _Long = ctypes.c_void_p, ctypes.c_int64


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """``[N]`` log-probabilities (nats) of ``tokens [N]`` int64 under ``logits [N, V]`` float32, to 4e-6.

    NaN where a row has NaN, +inf, or nothing else than -inf. Raises ValueError for other types and shapes; a token that
    is none of the V is IndexError.
    """
    fits = logits.dtype == torch.float32 and logits.dim() == 2 and logits.stride(1) == 1 and logits.shape[1] > 0
    if not fits or tokens.dtype != torch.int64 or tokens.shape != logits.shape[:1]:
        raise ValueError(
            f"found logits {list(logits.shape)} of {logits.dtype}, strides {logits.stride()}, and tokens "
            f"{list(tokens.shape)} of {tokens.dtype}; expected [N, V] of float32, columns side by side, and [N] int64"
        )
    out = torch.empty(logits.shape[0], dtype=torch.float32)
    if not logits.shape[0]:
        return out
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or most >= logits.shape[1]:
        raise IndexError(f"found tokens from {least} to {most} for {logits.shape[1]} logits")
    tokens = tokens.contiguous()
    _function()(
        logits.data_ptr(), logits.stride(0), logits.shape[0], logits.shape[1], tokens.data_ptr(), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


@cache
def _function() -> Any:
    loaded = library()
    assert loaded is not None, "asked for a kernel that this machine does not have"
    function = loaded.lorafleet_logprobs
    function.argtypes = (_Pointer, _Long, _Long, _Long, _Pointer, _Pointer, ctypes.c_int)
    function.restype = None
    return function
