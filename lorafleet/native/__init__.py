"""Kernels in C++ for processors with a matrix unit (AMX), in bfloat16.

- ``linear.cpp``: products of packed weights and of the adapters' rows, with what stands around them in a layer
- ``attention.cpp``: attention over pages of keys and values

:func:`library` gives them where they can run. Callers keep a path without them.
"""

from __future__ import annotations

import ctypes
import logging
import time
from functools import cache

import torch

from lorafleet.native.build import BuildError, build, cache_folder

__all__ = ["library", "why_not"]

logger = logging.getLogger(__name__)


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where this machine cannot run them, or cannot compile them (said once, in the log)."""
    return _load()[0]


def why_not() -> str:
    """Why :func:`library` gives None; empty where it does not."""
    return _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    # Asked of torch, which has OpenMP's threads and the permission to use tiles in its hands.
    if not (torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()):
        return None, "this processor has no matrix unit (AMX) for bfloat16"
    if not torch.cpu._init_amx():
        return None, "the system does not let this process use the matrix unit (AMX)"
    started = time.monotonic()
    try:
        made = build(cache_folder())
        try:
            loaded = ctypes.CDLL(str(made))
        except OSError:  # damaged in the cache: made once more
            made.unlink(missing_ok=True)
            loaded = ctypes.CDLL(str(build(cache_folder())))
    except (BuildError, OSError) as error:
        logger.warning("no kernels of our own, torch's products serve, at about half the speed: %s", error)
        return None, str(error)
    logger.debug("kernels ready after %.1f s", time.monotonic() - started)
    return loaded, ""
