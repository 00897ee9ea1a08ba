"""Keys and values of the running sequences.

Storage is a pool of slots of equal capacity, ``[layers, 2, slots, capacity, kv_heads, head_dim]``; a sequence owns one
slot while it runs. A token's place is the flat index ``slot · capacity + position``, the only thing that writers use.
The capacity doubles when a sequence outgrows it, so that a base with a long context costs what its sequences use.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

_FIRST_CAPACITY = 128


class KvCache:
    """Not thread-safe: belongs to the stepping thread."""

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        slots: int,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """``max_tokens``: the most tokens that one sequence can have."""
        self.slots, self.max_tokens = slots, max_tokens
        self._free = list(range(slots))
        shape = (layers, 2, slots, min(_FIRST_CAPACITY, max_tokens), kv_heads, head_dim)
        self._bind(torch.zeros(shape, device=device, dtype=dtype))

    def _bind(self, data: Tensor) -> None:
        self._data = data
        self.capacity = data.shape[3]
        """tokens that a slot holds at present"""
        self.keys = [layer[0] for layer in data]
        """one ``[slots, capacity, kv_heads, head_dim]`` view a layer"""
        self.values = [layer[1] for layer in data]
        heads_dim = data.shape[4] * data.shape[5]
        self._flat = [(layer[0].view(-1, heads_dim), layer[1].view(-1, heads_dim)) for layer in data]

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """The lowest free slot, so that the slots in use stay close together; at least one must be free."""
        return heapq.heappop(self._free)

    def release(self, slot: int, *, tokens: int) -> None:
        """Give a slot back; ``tokens`` is how many were written. They are zeroed: a masked NaN would still spread."""
        self._data[:, :, slot, :tokens].zero_()
        heapq.heappush(self._free, slot)

    def reserve(self, tokens: int) -> None:
        """Make every slot hold at least this many tokens."""
        if tokens <= self.capacity:
            return
        assert tokens <= self.max_tokens, f"{tokens} tokens in a slot, at most {self.max_tokens}"
        capacity = self.capacity
        while capacity < tokens:
            capacity *= 2
        shape = list(self._data.shape)
        shape[3] = min(capacity, self.max_tokens)
        data = self._data.new_zeros(shape)
        data[:, :, :, : self.capacity] = self._data
        self._bind(data)

    def write(self, layer: int, index: Tensor, key: Tensor, value: Tensor) -> None:
        """Store ``key`` and ``value`` ``[T, kv_heads, head_dim]`` at flat places ``index [T]``."""
        keys, values = self._flat[layer]
        keys.index_copy_(0, index, key.reshape(index.shape[0], -1))
        values.index_copy_(0, index, value.reshape(index.shape[0], -1))
