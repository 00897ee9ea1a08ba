"""Where keys and values lie: pages of 32 tokens, any page for any sequence.

Per layer ``keys`` and ``values`` are ``[pages, kv_heads, PAGE_TOKENS, head_dim]``: head by head inside a page, so that
attention multiplies a page as it lies, without a copy. A page's memory is first touched when a token is written to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorafleet.native.memory import huge_zeros

PAGE_TOKENS = 32


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)


class KvPages:
    """Storage alone: who owns which page is the allocator's business. Belongs to the stepping thread."""

    def __init__(
        self, *, layers: int, kv_heads: int, head_dim: int, pages: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (layers, 2, pages, kv_heads, PAGE_TOKENS, head_dim)
        on_cpu = device.type == "cpu"
        self._data = huge_zeros(shape, dtype) if on_cpu else torch.zeros(shape, device=device, dtype=dtype)
        self.pages, self.kv_heads = pages, kv_heads
        self.keys = [layer[0] for layer in self._data]
        """``[pages, kv_heads, PAGE_TOKENS, head_dim]`` a layer"""
        self.values = [layer[1] for layer in self._data]
        self._rows = [(layer[0].view(-1, head_dim), layer[1].view(-1, head_dim)) for layer in self._data]
        self._heads = torch.arange(kv_heads, device=device) * PAGE_TOKENS

    @staticmethod
    def page_bytes(*, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers."""
        return layers * 2 * kv_heads * PAGE_TOKENS * head_dim * dtype.itemsize

    def rows(self, page: Tensor, offset: Tensor) -> Tensor:
        """Where tokens' heads lie: ``page [T]`` and ``offset [T]`` inside it → ``[T · kv_heads]`` for :meth:`write`."""
        first = page * (self.kv_heads * PAGE_TOKENS) + offset
        return (first[:, None] + self._heads).flatten()

    def write(self, layer: int, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Store ``key`` and ``value`` ``[T, kv_heads, head_dim]``."""
        keys, values = self._rows[layer]
        keys.index_copy_(0, rows, key.reshape(-1, keys.shape[1]))
        values.index_copy_(0, rows, value.reshape(-1, values.shape[1]))

    def copy(self, source: int, destination: int) -> None:
        """Make one page hold what another holds, in all layers."""
        self._data[:, :, destination] = self._data[:, :, source]

    def clear(self, pages: Sequence[int]) -> None:
        """Zero pages that get a new owner: a stale NaN would spread even where it is masked."""
        for page in pages:
            self._data[:, :, page].zero_()
