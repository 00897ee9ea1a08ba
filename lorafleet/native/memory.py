"""Memory that the system maps in pages of 2 MB where it can."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

# Linux 5.14; Python's mmap does not name it yet.
_MADV_POPULATE_WRITE = 23


def huge_zeros(shape: Sequence[int], dtype: torch.dtype, *, taken: bool = False) -> Tensor:
    """A tensor of zeros on the CPU, whose memory is taken when it is first touched; now where ``taken`` and Linux can.

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
        if taken:
            memory.madvise(_MADV_POPULATE_WRITE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)  # which holds the mapping
