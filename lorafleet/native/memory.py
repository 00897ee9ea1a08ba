"""Memory that the system maps in pages of 2 MB where it can."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def huge_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU, whose memory is taken when it is first touched.

    Read in pages of 2 MB as against 4 kB: 33 and 24 GB/s on two cores with 480 MB of shared cache. Elsewhere than on
    Linux in whatever pages torch gets.
    """
    count = math.prod(shape)
    if count == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype)
    # Private: what is shared, mmap's default, lies in files of memory, and those get no huge pages.
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)  # which holds the mapping
