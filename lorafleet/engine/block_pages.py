"""Keys and values in pages, as block tables on a GPU index them.

Per layer ``blocks`` are keys and values ``[pages + 1, PAGE_TOKENS, kv_heads, head_dim]``: token by token inside a page,
the layout of ``torch.nn.attention.varlen`` and of :mod:`lorafleet.engine.triton_attention`. The last page belongs to
nobody: rows that only fill up a captured step write there. Otherwise as :mod:`lorafleet.engine.kv_pages`; its ``keys``
and ``values`` are views here, so that prefill is computed as on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafleet.engine.kv_pages import PAGE_TOKENS, KvPages


class BlockPages(KvPages):
    """Storage alone; :class:`lorafleet.engine.block_attention.BlockAttention` reads it."""

    def __init__(
        self, *, layers: int, kv_heads: int, head_dim: int, pages: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (layers, 2, pages + 1, PAGE_TOKENS, kv_heads, head_dim)
        self._data = torch.zeros(shape, device=device, dtype=dtype)
        self.pages, self.kv_heads, self.head_dim = pages, kv_heads, head_dim
        self.blocks: list[tuple[Tensor, Tensor]] = [(layer[0], layer[1]) for layer in self._data]
        """keys and values of a layer, ``[pages + 1, PAGE_TOKENS, kv_heads, head_dim]`` each"""
        self.keys = [keys.transpose(1, 2) for keys, _ in self.blocks]
        self.values = [values.transpose(1, 2) for _, values in self.blocks]
        wide = kv_heads * head_dim
        self._rows = [(keys.view(-1, wide), values.view(-1, wide)) for keys, values in self.blocks]

    @property
    def spare_page(self) -> int:
        """The page that belongs to nobody."""
        return self.pages

    def rows(self, page: Tensor, offset: Tensor) -> Tensor:
        """Where tokens lie: ``page [T]`` and ``offset [T]`` inside it → slots ``[T]`` for :meth:`write`."""
        return page * PAGE_TOKENS + offset
