"""Adapters' rows as the matrix unit of a CPU (AMX) reads them, and where they lie.

A page holds one adapter's rows in one module in tile order (``native/mixture.h`` has the layout), with nothing filled
up. Nothing is copied when the active set changes: a table of the pages' addresses is all that a step needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorafleet.native import INNER, MOST_MODULES, UNIT, library
from lorafleet.native.linear import Linear
from lorafleet.native.memory import huge_zeros

_STRIP = 16
_BEHIND = 32  # elements that a narrow strip's last tile reads beyond its end


class TilePage(NamedTuple):
    """One adapter's rows in one module; the same attributes as a page of plain rows, which are copies here."""

    a_tiles: Tensor
    """``[r · d_in]``, and 64 bytes"""
    b_tiles: Tensor
    """``[d_out · 2 ⌈r / 2⌉]``"""
    rank: int
    d_in: int
    d_out: int
    gate: Tensor | None = None
    """``[d_in]``"""

    @property
    def a(self) -> Tensor:
        """``[r, d_in]``"""
        full = self.rank // _STRIP * _STRIP
        rows = self.a_tiles[: self.rank * self.d_in]
        parts = [_a_rows(rows[: full * self.d_in], _STRIP, self.d_in)] if full else []
        if full < self.rank:
            parts.append(_a_rows(rows[full * self.d_in :], self.rank - full, self.d_in))
        return torch.cat(parts)

    @property
    def b(self) -> Tensor:
        """``[r, d_out]``"""
        tiles = self.b_tiles.view(self.d_out // UNIT, -1, UNIT, 2).permute(1, 3, 0, 2)
        return tiles.reshape(-1, self.d_out)[: self.rank]

    @property
    def size_bytes(self) -> int:
        gate = 0 if self.gate is None else self.gate.nbytes
        return self.a_tiles.nbytes + self.b_tiles.nbytes + gate


def tile_pages(groups: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[list[TilePage]]:
    """One adapter's ``(a [r, d_in], b [r, d_out])`` of each module, group by group, in tile order.

    They lie in one piece, those of a group side by side, as a step reads them: first what it shrinks with, then what
    it expands with.
    """
    sizes = [
        [(a.shape[0] * a.shape[1] + _BEHIND, -(-b.shape[0] // 2) * 2 * b.shape[1]) for a, b in group]
        for group in groups
    ]
    memory = huge_zeros((sum(size for group in sizes for both in group for size in both),), torch.bfloat16)
    at = 0

    def take(size: int) -> Tensor:
        nonlocal at
        at += size
        return memory[at - size : at]

    pages = []
    for group, of_group in zip(groups, sizes, strict=True):
        first = [take(size) for size, _ in of_group]
        second = [take(size) for _, size in of_group]
        pages.append([_fill(*pair, *room) for pair, *room in zip(group, first, second, strict=True)])
    return pages


def _fill(a: Tensor, b: Tensor, a_tiles: Tensor, b_tiles: Tensor) -> TilePage:
    rank, d_in = a.shape
    d_out = b.shape[1]
    a, b = a.detach().to(torch.bfloat16), b.detach().to(torch.bfloat16)
    full = rank // _STRIP * _STRIP
    if full:
        a_tiles[: full * d_in] = _a_strips(a[:full], _STRIP)
    if full < rank:
        a_tiles[full * d_in : rank * d_in] = _a_strips(a[full:], rank - full)
    even = b if rank % 2 == 0 else torch.cat([b, b.new_zeros(1, d_out)])
    b_tiles.view(d_out // UNIT, -1, UNIT, 2).copy_(even.reshape(-1, 2, d_out // UNIT, UNIT).permute(2, 0, 3, 1))
    return TilePage(a_tiles, b_tiles, rank, d_in, d_out)


def _a_strips(rows: Tensor, width: int) -> Tensor:
    """``[n · width, d_in]`` → flat ``[n][d_in / 32][16 pairs][width][2]``"""
    return rows.reshape(-1, width, rows.shape[1] // INNER, 16, 2).permute(0, 2, 3, 1, 4).reshape(-1)


def _a_rows(tiles: Tensor, width: int, d_in: int) -> Tensor:
    """Back again."""
    return tiles.view(-1, d_in // INNER, 16, width, 2).permute(0, 3, 1, 2, 4).reshape(-1, d_in)


def tiles_fit(shapes: Sequence[tuple[int, Sequence[int]]]) -> bool:
    """Whether groups of these shapes, (d_in, d_out of each module), can be laid out in tiles, and multiplied here."""
    fit = all(
        d_in % INNER == 0 and len(d_outs) <= MOST_MODULES and all(d_out % UNIT == 0 for d_out in d_outs)
        for d_in, d_outs in shapes
    )
    return fit and library() is not None  # asked last: it may compile


def table_row(paths: Sequence[str], pages: Mapping[str, TilePage]) -> Tensor:
    """Where one adapter's pages lie, for all modules of a model in order: ``[modules, 4]`` int64."""
    rows = []
    for path in paths:
        page = pages.get(path)
        if page is None:
            rows.append([0, 0, 0, 0])
        else:
            gate = 0 if page.gate is None else page.gate.data_ptr()
            rows.append([page.a_tiles.data_ptr(), page.b_tiles.data_ptr(), gate, page.rank])
    return torch.tensor(rows, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class TileTable:
    """Where the active adapters' pages lie."""

    rows: Tensor
    """``[K, modules, 4]`` int64: addresses of a, b and the gate vector, and the rank"""
    starts: tuple[int, ...]
    """the first module of each group"""
    kept: tuple[Mapping[str, object], ...]
    """the pages, which stay where they are as long as this"""


class TiledGroup(NamedTuple):
    """One group's place in a table."""

    table: TileTable
    mixture: Linear
    """without a weight: y is its residual"""
