"""How ``lexical.cpp`` is called."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from lorafleet.native.build import LEXICAL, BuildError, build, cache_folder

_Pointer, _Long, _Double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_UNIT: Final = 2
"""Bytes of a letter, or of half of one."""

logger = logging.getLogger(__name__)


class _Index(ctypes.Structure):
    _fields_ = (("documents", _Long), ("pieces", _Long), *((f"array_{number}", _Pointer) for number in range(7)))


class _Sums(ctypes.Structure):
    _fields_ = (("most", _Double), ("unknown", _Long))


class Matcher:
    """Matches texts with one index; :func:`available` comes first."""

    def __init__(self, documents: int, pieces: int, arrays: Sequence[Any]) -> None:
        """``arrays``: numpy's, of eight bytes a number and in one piece each, in the order of ``struct Index``. They
        must not change."""
        for array in arrays:
            assert array.itemsize == 8 and array.flags.c_contiguous, (array.dtype, array.strides)
        self._arrays = tuple(arrays)
        self._index = _Index(documents, pieces, *(array.ctypes.data for array in arrays))
        self._address = ctypes.addressof(self._index)
        self._match = _function()

    def match(self, letters: bytes, words: Sequence[int], most: int) -> tuple[list[tuple[int, float]], float, int]:
        """Number and score of the ``most`` best documents, what one could have at most, and how many pieces none has.

        ``letters``: words of a piece's length and more between single spaces, in UTF-16; ``words``: rows, in order.
        """
        numbers, scores, sums = (_Long * most)(), (_Double * most)(), _Sums()
        rows = (_Long * len(words))(*words)
        found = self._match(
            self._address, letters, len(letters) // _UNIT, rows, len(words), most, numbers, scores, ctypes.byref(sums)
        )
        if found < 0:
            raise MemoryError(f"there is no memory to match a text of {len(letters) // _UNIT} letters")
        return list(zip(numbers[:found], scores[:found], strict=True)), sums.most, sums.unknown


def available() -> bool:
    """Whether there is a compiler, or what it made before; the first call compiles, for a second."""
    return _function() is not None


@cache
def _function() -> Any:
    try:
        folder = cache_folder()
        try:
            # Holds the interpreter: another thread that took it would keep it for longer than this takes.
            loaded = ctypes.PyDLL(str(build(folder, LEXICAL)))
        except OSError:  # damaged in the cache: made once more
            loaded = ctypes.PyDLL(str(build(folder, LEXICAL, again=True)))
    except (BuildError, OSError) as error:
        logger.info("texts are matched with cards by numpy: %s", error)
        return None
    function = loaded.lorafleet_match
    function.argtypes = (
        _Pointer, ctypes.c_char_p, _Long, _Pointer, _Long, _Long, _Pointer, _Pointer, _Pointer,
    )  # fmt: skip
    function.restype = _Long
    return function
