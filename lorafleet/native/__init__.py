"""What is written in C++: kernels for processors with a matrix unit (AMX), in bfloat16, and the matching of texts.

- ``linear.cpp``: products of packed weights and of the adapters' rows, with what stands around them in a layer
- ``attention.cpp``: attention over pages of keys and values
- ``logprobs.cpp``: log-probabilities of given tokens under rows of logits
- ``lexical.cpp``: BM25 of a text in many documents, on any processor

:func:`library` gives the kernels where they can run, :mod:`.lexical` the last one. Callers keep a path without them.
"""

from __future__ import annotations

import ctypes
import logging
import time
from functools import cache

from lorafleet.native.build import BuildError, build, cache_folder

__all__ = ["BLOCK_TOKENS", "INNER", "MOST_MODULES", "PAGE_TOKENS", "UNIT", "library", "why_not"]

BLOCK_TOKENS = 32
"""tokens that are computed together, with all adapters that one of them may need"""
INNER = 32
"""d_in, and the size of a head, are multiples of this"""
UNIT = 16
"""columns that an adapter's rows are laid out by: every module's d_out is a multiple of it"""
PAGE_TOKENS = 32
"""of keys and values"""
MOST_MODULES = 8
"""of a group of linears"""

logger = logging.getLogger(__name__)


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where this machine cannot run them, or cannot compile them."""
    return _load()[0]


def why_not() -> str:
    """Why :func:`library` gives None; empty where it does not."""
    return _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    import torch  # only now: who matches texts needs none of it

    try:  # torch's own names, which a version of it may change
        # Asked of torch, which has OpenMP's threads and the permission to use tiles in its hands.
        if not (torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported()):
            return None, "this processor has no matrix unit (AMX) for bfloat16"
        if not torch.cpu._init_amx():
            return None, "the system does not let this process use the matrix unit (AMX)"
    except AttributeError as error:
        return None, f"this version of torch does not say whether there is a matrix unit (AMX): {error}"
    started = time.monotonic()
    try:
        loaded = _open()
    except (BuildError, OSError) as error:
        logger.warning("no kernels of our own, torch's products serve: %s", error)
        return None, str(error)
    logger.debug("kernels ready after %.1f s", time.monotonic() - started)
    return loaded, ""


def _open() -> ctypes.CDLL:
    folder = cache_folder()
    try:
        loaded = ctypes.CDLL(str(build(folder)))
    except OSError:  # damaged in the cache: made once more
        loaded = ctypes.CDLL(str(build(folder, again=True)))
    agreed = (ctypes.c_int64 * 5)()
    loaded.lorafleet_layout(agreed)
    assert tuple(agreed) == (BLOCK_TOKENS, INNER, UNIT, PAGE_TOKENS, MOST_MODULES), tuple(agreed)
    return loaded
