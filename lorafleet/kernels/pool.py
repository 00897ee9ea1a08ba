"""Adapter rows at fixed addresses: pages of 16 ranks from one pool for each group, a free list for each module.

A kernel that reads a pool can be captured into a CUDA graph, and adapters come and go without a copy of the others:
only the page table of the active ones changes. 16 ranks are the smallest tile that matrix units multiply. A module of
rank r takes ⌈r/16⌉ pages, whose last is filled up with zeros; nothing is padded to another adapter's rank.

Shapes: ``a [pages, 16, d_in]`` of all modules, module by module; ``b`` flat, module by module ``[pages, 16, d_out]``. A
page has the same number within its module in both. Gate vectors are rows of pages behind those of the modules: 16
adapters' gates a page.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorafleet.errors import OverloadedError

PAGE_ROWS = 16


class PageEntry(NamedTuple):
    """One page of one active adapter in one module."""

    module: int
    """index of the module in its group"""
    adapter: int
    """index among the active adapters"""
    page: int
    """within the module"""


class GateEntry(NamedTuple):
    """Where the gate vector of one active adapter lies."""

    adapter: int
    """index among the active adapters"""
    row: int
    """counted over all gate pages"""


@dataclass(frozen=True, eq=False)
class PageTable:
    """The pages of the active adapters in one group. Groups with equal tables share one object (hashed by identity)."""

    entries: tuple[PageEntry, ...]
    """in order of module, adapter, page"""
    gates: tuple[GateEntry, ...]
    """in order of adapter"""


class PooledGroup(NamedTuple):
    """A group's pool, and which of its pages are in use by the active adapters."""

    pool: GroupPool
    table: PageTable


class PooledPage(NamedTuple):
    """One adapter's rows in one module, with the attributes of a page of tensors: copies, or views while it stays."""

    pool: GroupPool
    module: int
    rank: int
    pages: tuple[int, ...]
    """within the module"""
    gate_row: int | None

    @property
    def a(self) -> Tensor:
        """``[r, d_in]``"""
        first = self.pool.first_page(self.module)
        rows = _select(self.pool.a, [first + page for page in self.pages])
        return rows.reshape(-1, self.pool.d_in)[: self.rank]

    @property
    def b(self) -> Tensor:
        """``[r, d_out]``"""
        b = self.pool.b_of(self.module)
        return _select(b, self.pages).reshape(-1, b.shape[2])[: self.rank]

    @property
    def gate(self) -> Tensor | None:
        """``[d_in]``"""
        return None if self.gate_row is None else self.pool.gate_rows[self.gate_row]


def _select(store: Tensor, pages: Sequence[int]) -> Tensor:
    """Some pages; a view where they are neighbours, as they mostly are: an index would have to go to the device."""
    if pages and pages[-1] - pages[0] + 1 == len(pages):  # ascending
        return store[pages[0] : pages[-1] + 1]
    return store[list(pages)]


class GroupPool:
    """The pages of one group. Not thread-safe."""

    def __init__(
        self, d_in: int, d_outs: Mapping[str, int], *, pages: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """``d_outs`` maps the group's module paths, in order, to d_out; ``pages`` is the number for each module."""
        if pages < 1:
            raise ValueError(f"found {pages} pages for each module, expected at least one")
        self.d_in, self.d_outs, self.pages = d_in, tuple(d_outs.values()), pages
        self._index = {path: index for index, path in enumerate(d_outs)}
        modules = len(self.d_outs)
        gate_pages = -(-modules * pages // PAGE_ROWS)  # an adapter has at least one page somewhere in the group
        self.a = torch.empty(modules * pages + gate_pages, PAGE_ROWS, d_in, device=device, dtype=dtype)
        self.b = torch.empty(sum(self.d_outs) * pages * PAGE_ROWS, device=device, dtype=dtype)
        columns = [sum(self.d_outs[:index]) for index in range(modules)]
        places = [[d_out, columns[index], self.b_start(index)] for index, d_out in enumerate(self.d_outs)]
        self.module_table = torch.tensor(places, device=device)
        """``[modules, 3]`` int64: d_out, first column in y, start in ``b``"""
        self._free = [list(range(pages)) for _ in self.d_outs]
        self._free_gate_rows = list(range(modules * pages))

    def first_page(self, module: int) -> int:
        """Of a module in ``a``; ``len(d_outs)`` asks for the first gate page."""
        return module * self.pages

    def b_start(self, module: int) -> int:
        """Of a module in ``b``, in elements."""
        return sum(self.d_outs[:module]) * self.pages * PAGE_ROWS

    def b_of(self, module: int) -> Tensor:
        """``[pages, 16, d_out]``, a view"""
        start = self.b_start(module)
        d_out = self.d_outs[module]
        return self.b[start : start + self.pages * PAGE_ROWS * d_out].view(self.pages, PAGE_ROWS, d_out)

    @property
    def gate_rows(self) -> Tensor:
        """``[gate pages · 16, d_in]``, a view"""
        return self.a[self.first_page(len(self.d_outs)) :].view(-1, self.d_in)

    def put(self, path: str, a: Tensor, b: Tensor, gate: Tensor | None) -> PooledPage:
        """Copy ``a [r, d_in]``, ``b [r, d_out]`` and a gate vector into free pages.

        Raises OverloadedError, and changes nothing, where too few are free.
        """
        module = self._index[path]
        rank = a.shape[0]
        count = -(-rank // PAGE_ROWS)
        free = self._free[module]
        if count > len(free):
            raise OverloadedError(
                f"{path}: rank {rank} needs {count} pages of {PAGE_ROWS} ranks, {len(free)} of {self.pages} are free; "
                "remove an adapter, or make the pool larger"
            )
        pages = tuple(heapq.heappop(free) for _ in range(count))
        gate_row = None if gate is None else heapq.heappop(self._free_gate_rows)
        page = PooledPage(self, module, rank, pages, gate_row)
        # What an earlier owner left is cleared: the last page's spare rows are read and multiplied.
        for store, rows in ((self.a[self.first_page(module) :], a), (self.b_of(module), b)):
            for place, index in enumerate(pages):
                part = rows[place * PAGE_ROWS : (place + 1) * PAGE_ROWS]
                store[index, : part.shape[0]] = part
                store[index, part.shape[0] :] = 0.0
        if gate is not None:
            self.gate_rows[gate_row] = gate
        return page

    def free(self, page: PooledPage) -> None:
        """Give pages back; no kernel may still read them."""
        for index in page.pages:
            heapq.heappush(self._free[page.module], index)
        if page.gate_row is not None:
            heapq.heappush(self._free_gate_rows, page.gate_row)


def page_table(pages: Sequence[tuple[int, PooledPage]]) -> tuple[tuple[PageEntry, ...], tuple[GateEntry, ...]]:
    """What a :class:`PageTable` holds, for ``(adapter index, its page)`` in order of module and adapter."""
    entries = tuple(PageEntry(page.module, adapter, index) for adapter, page in pages for index in page.pages)
    gates = sorted(GateEntry(adapter, page.gate_row) for adapter, page in pages if page.gate_row is not None)
    return entries, tuple(gates)
