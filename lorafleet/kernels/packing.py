"""The rows of the active adapters, side by side for a kernel, in the forms that libraries multiply fastest.

Shapes: R rank rows over all modules and adapters of a group, module by module, inside a module adapter by adapter; G
gate rows, one for each adapter that can be routed per token. ``a [R, d_in]``, ``gate_rows [G, d_in]``; of a module
``b [r, d_out]``. Forms are made when a path first asks for them, and stay as long as the packing; none needs another to
stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lorafleet.kernels.pool import PageTable, PooledGroup, PooledPage, page_table
from lorafleet.kernels.tile_pages import TiledGroup, TileTable

# Copies for subsets of the active adapters (the segmented path) are forgotten together once they hold this many times
# the group's own rows: enough for the overlapping mixes of a steady batch, and a small multiple of its memory.
SUBSET_SHARE = 2


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Which active adapter owns each packed row. Groups with equal layouts share one object (hashed by identity)."""

    adapter_of_row: Tensor
    """``[R]`` int64, index into ``Packing.keys``"""
    gated: tuple[int, ...]
    """the adapter of each gate row, ascending"""
    rows_of: Mapping[int, int]
    """adapter → how many rows it owns"""
    owners: frozenset[int]
    """the adapters with rows in the group"""


class Layouts:
    """Makes layouts and page tables, equal ones once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[Hashable, RowLayout] = {}
        self._tables: dict[Hashable, PageTable] = {}

    def layout(self, owners: Sequence[int], gated: Sequence[int]) -> RowLayout:
        """The layout with ``owners`` (the adapter of each row) and ``gated`` (that of each gate row)."""
        key = (tuple(owners), tuple(gated))
        if key not in self._known:
            rows = torch.tensor(owners, dtype=torch.int64, device=self._device)
            self._known[key] = RowLayout(rows, tuple(gated), Counter(owners), frozenset(owners))
        return self._known[key]

    def page_table(self, pages: Sequence[tuple[int, PooledPage]]) -> PageTable:
        """The table of ``(adapter index, its page)`` in order of module and adapter."""
        key = page_table(pages)
        return self._tables.setdefault(key, PageTable(*key))


@dataclass(frozen=True, eq=False)
class PackedModule:
    """One module's rows of all active adapters."""

    columns: slice
    """of ``y [T, Σ d_out]``"""
    rows: slice
    """of ``a`` and of the intermediate ``[T, R]``"""
    make: Callable[[], Tensor]
    """``b``, when it is first needed"""

    @cached_property
    def b(self) -> Tensor:
        """``[r, d_out]``"""
        return self.make()

    @cached_property
    def b_library(self) -> Tensor:
        """``b`` as the weight of oneDNN's linear layer, in the blocked order that it picks for bfloat16 on a CPU."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self.make().T.contiguous())
        return packed


@dataclass(frozen=True, eq=False)
class PackedGroup:
    """One group's rows of all active adapters."""

    modules: tuple[PackedModule, ...]
    """only those with at least one row"""
    layout: RowLayout
    make_a: Callable[[], Tensor]
    """``a``, when it is first needed"""
    make_gate_rows: Callable[[], Tensor]
    """``gate_rows``, when they are first needed"""
    keys: tuple[str, ...]
    """the active adapters: index in ``layout`` → key"""
    d_in: int
    dtype: torch.dtype
    pooled: PooledGroup | None = None
    """the same rows at fixed addresses, if the bank has a pool"""
    tiled: TiledGroup | None = None
    """the same rows in tile order, if the bank keeps tiles"""
    _subsets: dict[tuple[int, ...], PackedGroup] = field(default_factory=dict)

    @cached_property
    def a(self) -> Tensor:
        """``[R, d_in]``"""
        return _fast_order(self.make_a())

    @cached_property
    def gate_rows(self) -> Tensor:
        """``[G, d_in]``, in the order of ``layout.gated``"""
        return _fast_order(self.make_gate_rows())

    @cached_property
    def gate_rows_float32(self) -> Tensor:
        """``[G, d_in]``"""
        return _fast_order(self.gate_rows.float())

    @cached_property
    def a_and_gate_rows(self) -> Tensor:
        """``[R + G, d_in]``: one GEMM gives the intermediate and the router's logits. Made for routed tokens only."""
        return _fast_order(torch.cat([self.a, self.gate_rows]))

    @cached_property
    def a_library(self) -> Tensor:
        """``a`` as the weight of oneDNN's linear layer, in the blocked order that it picks for bfloat16 on a CPU."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self.make_a().contiguous())
        return packed

    @cached_property
    def float32(self) -> PackedGroup:
        """The same rows in float32; the group itself where it is."""
        if self.dtype == torch.float32:
            return self
        make_gate_rows = self.make_gate_rows
        return PackedGroup(
            tuple(PackedModule(m.columns, m.rows, _given(m.make().float())) for m in self.modules),
            self.layout,
            _given(self.make_a().float()),
            lambda: make_gate_rows().float(),
            self.keys,
            self.d_in,
            torch.float32,
        )

    @property
    def row_count(self) -> int:
        return self.layout.adapter_of_row.shape[0]

    @cached_property
    def shape(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """``d_in``, and of each module ``d_out`` and rows: what the cost of a call depends on, beside the plan."""
        columns = tuple(m.columns.stop - m.columns.start for m in self.modules)
        return self.d_in, columns, tuple(m.rows.stop - m.rows.start for m in self.modules)

    def subset(self, adapters: tuple[int, ...]) -> PackedGroup:
        """The rows of some of the adapters (ascending indices, each with rows here), contiguous.

        Views where they are contiguous already, copies otherwise; kept for as long as :data:`SUBSET_SHARE` allows.
        """
        if len(adapters) == len(self.layout.owners) == len(self.keys):
            return self
        found = self._subsets.get(adapters)
        if found is None:
            found = self._select(adapters)
            held = sum(group.row_count for group in self._subsets.values()) + found.row_count
            if held > SUBSET_SHARE * self.row_count:
                self._subsets.clear()
            self._subsets[adapters] = found
        return found

    def _select(self, adapters: tuple[int, ...]) -> PackedGroup:
        index = {adapter: place for place, adapter in enumerate(adapters)}
        owner_of = self.layout.adapter_of_row.tolist()
        owners: list[int] = []
        modules: list[PackedModule] = []
        taken: list[slice] = []
        for module in self.modules:
            rows = [row for row in range(module.rows.start, module.rows.stop) if owner_of[row] in index]
            if not rows:
                continue
            spans = _spans(rows)
            taken += spans
            first = len(owners)
            owners += [index[owner_of[row]] for row in rows]
            own = [slice(span.start - module.rows.start, span.stop - module.rows.start) for span in spans]
            modules.append(PackedModule(module.columns, slice(first, len(owners)), _given(_gather(module.b, own))))
        make_gate_rows = self.make_gate_rows
        gates = [place for place, adapter in enumerate(self.layout.gated) if adapter in index]
        layout = Layouts(self.layout.adapter_of_row.device).layout(
            owners, [index[self.layout.gated[place]] for place in gates]
        )
        return PackedGroup(
            tuple(modules),
            layout,
            _given(_gather(self.a, taken)),
            lambda: _gather(make_gate_rows(), _spans(gates)),
            tuple(self.keys[adapter] for adapter in adapters),
            self.d_in,
            self.dtype,
        )


def _fast_order(rows: Tensor) -> Tensor:
    """The same ``[r, d_in]`` in the order of memory in which the library multiplies it fastest.

    In float32 on a CPU that is input-major: 593 against 930 µs for 32 tokens, 2048 → 720, one core with AVX-512.
    """
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.stride(0) != 1:
        return rows.T.contiguous().T
    return rows


def _given(tensor: Tensor) -> Callable[[], Tensor]:
    """For what is made at once: a closure over the parent would be a cycle, and keep its memory for longer."""
    return lambda: tensor


def _gather(rows: Tensor, spans: Sequence[slice]) -> Tensor:
    """``[r, d]``: some rows; a view where they are neighbours."""
    if len(spans) == 1:
        return rows[spans[0]]
    return torch.cat([rows[span] for span in spans]) if spans else rows[:0]


def _spans(rows: Iterable[int]) -> list[slice]:
    """Ascending numbers as slices, neighbours together."""
    spans: list[slice] = []
    for row in rows:
        if spans and spans[-1].stop == row:
            spans[-1] = slice(spans[-1].start, row + 1)
        else:
            spans.append(slice(row, row + 1))
    return spans


@dataclass(frozen=True, eq=False)
class Packing:
    """The active adapters' rows."""

    keys: tuple[str, ...]
    rows: int
    """over all groups"""
    make_groups: Callable[[], Mapping[str, PackedGroup]]
    """``groups``, when they are first needed"""
    tiles: TileTable | None = None
    """where the pages lie, if the bank keeps tiles; the tiled path needs nothing else"""

    @cached_property
    def groups(self) -> Mapping[str, PackedGroup]:
        """Contiguous. Groups that no active adapter changes are absent."""
        return self.make_groups()
