"""Memory that a training has used and nobody needs any more."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch


def give_back(device: str) -> None:
    """Return freed memory to the machine: a member waits far longer than it works, and others live there, too.

    On Linux the C library keeps what was freed; after 8 steps of 4 × 256 tokens on the tiny base that is 70 MB of 530.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other C libraries have none
        if trim is not None:
            trim(0)
