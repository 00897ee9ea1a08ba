"""Keys and values in pages, as the matrix unit of a processor reads them.

Per layer ``keys`` are ``[pages, kv_heads, D / 2, P, 2]`` and ``values`` ``[pages, kv_heads, P / 2, D, 2]``, for P =
PAGE_TOKENS tokens and the head size D: pairs of what is summed over side by side, which is D in the scores and P in the
products after them. A page has the bytes of one of :mod:`lorafleet.engine.kv_pages`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorafleet.engine.kv_pages import PAGE_TOKENS
from lorafleet.native.memory import huge_zeros


class TilePages:
    """Storage alone, for bfloat16 on a CPU; :class:`lorafleet.engine.tile_attention.TileAttention` fills it."""

    def __init__(
        self, *, layers: int, kv_heads: int, head_dim: int, pages: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        assert device.type == "cpu" and dtype == torch.bfloat16 and head_dim % 2 == 0
        # Taken now: no load can fail for want of memory later, and no step waits for it. Taking 2 MB costs 3.6 ms on a
        # virtual machine, and the pages of 32 prompts of 128 tokens were a tenth of the time of their generation.
        self._data = huge_zeros((layers, 2, pages, kv_heads, PAGE_TOKENS * head_dim), dtype, taken=True)
        self.pages, self.kv_heads, self.head_dim = pages, kv_heads, head_dim
        self.keys = [layer[0].view(pages, kv_heads, head_dim // 2, PAGE_TOKENS, 2) for layer in self._data]
        self.values = [layer[1].view(pages, kv_heads, PAGE_TOKENS // 2, head_dim, 2) for layer in self._data]
        self.addresses = [(layer[0].data_ptr(), layer[1].data_ptr()) for layer in self._data]
        """of a layer's keys and of its values"""

    def clear(self, pages: Sequence[int]) -> None:
        """Nothing is left to do: the kernel zeroes what a page's last owner may have left, with the first token."""
