"""Where adapter rows live.

Modules that read the same input form a group (``qkv``, ``gate_up``; a lone module is a group of one): one shrink for
the group, one expand for each module. An adapter's rank in a module is the number of rows it owns there; no rank is
padded to another's. Pages are keyed (adapter, module) by the adapter's content digest, so a page never changes.

Shapes: A page ``[r, d_in]``, B page ``[r, d_out]`` (B transposed, so that both are rows), gate vector ``[d_in]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from lorafleet.kernels.packing import Layouts, PackedGroup, PackedModule, Packing
from lorafleet.kernels.pool import PAGE_ROWS, GroupPool, PooledGroup, PooledPage
from lorafleet.kernels.tile_pages import TiledGroup, TilePage, TileTable, table_row, tile_pages, tiles_fit
from lorafleet.kernels.token_gates import no_gates
from lorafleet.native.linear import Linear

# A packing that covers what is needed is kept while at least this share of its rows is needed: rows with a closed
# gate cost some arithmetic, copying every active adapter's rows costs more.
KEEP_SHARE = 0.5


class ModuleSpec(NamedTuple):
    path: str
    """module path in the base, as adapters name it"""
    d_out: int


class GroupSpec(NamedTuple):
    """Modules that read one input; their outputs lie side by side in the order given."""

    name: str
    d_in: int
    modules: tuple[ModuleSpec, ...]


class Page(NamedTuple):
    """One adapter's rows in one module, scaling folded into B."""

    a: Tensor
    """``[r, d_in]``"""
    b: Tensor
    """``[r, d_out]``"""
    gate: Tensor | None = None
    """``[d_in]``, the gate vector of adapter and group; on the page of the adapter's first module there"""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def size_bytes(self) -> int:
        return sum(rows.nbytes for rows in (self.a, self.b, self.gate) if rows is not None)


_Pages: TypeAlias = Mapping[str, Page | PooledPage | TilePage]


class Bank:
    """Adapter rows on one device in one dtype. Not thread-safe: the owner holds a lock or stays in one thread.

    In the base's dtype the rows cost what the base's own weights cost. In float32 (the default, and the right one for a
    float32 base) the intermediate loses nothing that a merged weight would keep, at twice a bfloat16 base's bytes.

    With ``pool_pages`` the rows live at fixed addresses, so many pages of 16 ranks for each module
    (:mod:`lorafleet.kernels.pool`); the Triton path reads them there. With ``tiles`` they lie as a CPU's matrix unit
    reads them (:mod:`lorafleet.kernels.tile_pages`); the other paths then work on copies.
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        pool_pages: int | None = None,
        tiles: bool = False,
    ) -> None:
        """Raises ValueError for a module in two groups, and for ``tiles`` where :func:`can_tile` says no."""
        self.groups = tuple(groups)
        self.device, self.dtype = torch.device(device), dtype
        self._group_of = {m.path: group for group in self.groups for m in group.modules}
        self._shapes = {m.path: (group.d_in, m.d_out) for group in self.groups for m in group.modules}
        if len(self._shapes) != sum(len(group.modules) for group in self.groups):
            raise ValueError("found a module in two groups, expected every module in exactly one")
        self._pools: dict[str, GroupPool] = {}
        if pool_pages is not None:
            self._pools = {
                g.name: GroupPool(g.d_in, dict(g.modules), pages=pool_pages, device=self.device, dtype=dtype)
                for g in self.groups
            }
        if tiles and pool_pages is not None:
            raise ValueError("found pool_pages and tiles, expected one of them: rows lie in one order")
        if tiles and not can_tile(self.groups, device=self.device, dtype=dtype):
            raise ValueError("found groups, a device or a dtype that cannot be laid out in tiles; ask can_tile() first")
        self._paths = tuple(m.path for group in self.groups for m in group.modules)
        self.tiles = tiles
        self._pages: dict[str, _Pages] = {}
        self._rows: dict[str, Tensor] = {}
        self._gated: set[str] = set()
        self._packing: Packing | None = None
        self.packings_total = 0

    def __contains__(self, key: str) -> bool:
        return key in self._pages

    @property
    def pools(self) -> Mapping[str, GroupPool]:
        """Group → its pool; empty for a bank without ``pool_pages``."""
        return self._pools

    def room_for(self, pages: Mapping[str, Page] | Mapping[str, TilePage]) -> int:
        """Bytes that an adapter takes here. With pools as if each module had its largest rank, in whole pages.

        Pools have equally many pages for each module: adapters that fit by this count fit in every one of them.
        """
        if not self._pools:
            return sum(page.size_bytes for page in pages.values())
        most = max((-(-page.rank // PAGE_ROWS) for page in pages.values()), default=0)
        return most * pool_page_bytes(self.groups, self.dtype)

    def pages(
        self, factors: Mapping[str, tuple[Tensor, Tensor]], gates: Mapping[str, Tensor] | None = None
    ) -> dict[str, Page] | dict[str, TilePage]:
        """Factors ``path → (A [r, d_in], B [d_out, r])`` as pages on this bank's device.

        ``gates`` are the gate vectors ``[d_in]`` for token-level routing, each under the path of the first module that
        the adapter changes in a group: all groups that it changes, or none.

        Apart from :meth:`add`, so that the copying can happen outside the owner's lock. Raises ValueError for a
        module that the bank does not know, a shape that does not fit, or a gate vector missing or misplaced.
        """
        pages: dict[str, Any] = {}
        for path, (a, b) in factors.items():
            if path not in self._shapes:
                raise ValueError(f"found factors for {path!r}, which is in none of this bank's groups")
            d_in, d_out = self._shapes[path]
            if a.ndim != 2 or a.shape[1] != d_in or b.shape != (d_out, a.shape[0]):
                raise ValueError(
                    f"{path}: found A {list(a.shape)} and B {list(b.shape)}, expected [r, {d_in}] and [{d_out}, r]"
                )
            if not self.tiles:
                pages[path] = Page(self._keep(a), self._keep(b.T))
        if self.tiles:
            paths = [[m.path for m in group.modules if m.path in factors] for group in self.groups]
            made = tile_pages([[(factors[path][0], factors[path][1].T) for path in group] for group in paths])
            for group, of_group in zip(paths, made, strict=True):
                pages.update(zip(group, of_group, strict=True))
        if gates:
            places = {path: self._shapes[path][0] for path in self._first_modules(pages)}
            if set(gates) != set(places):
                raise ValueError(
                    f"found gate vectors for {', '.join(sorted(gates))}; expected one for the first module that the "
                    f"adapter changes in each group: {', '.join(sorted(places))}"
                )
            for path, gate in gates.items():
                if gate.shape != (places[path],):
                    raise ValueError(f"{path}: found a gate vector {list(gate.shape)}, expected [{places[path]}]")
                pages[path] = pages[path]._replace(gate=self._keep(gate))
        return pages

    def _keep(self, rows: Tensor) -> Tensor:
        return rows.detach().to(self.device, self.dtype).contiguous()

    def _first_modules(self, pages: _Pages) -> list[str]:
        firsts = (next((m.path for m in group.modules if m.path in pages), None) for group in self.groups)
        return [path for path in firsts if path is not None]

    def add(self, key: str, pages: Mapping[str, Page] | Mapping[str, TilePage]) -> None:
        """Make an adapter available under its digest; the same key again has the same content and is ignored.

        Raises OverloadedError where the pool has too few free pages; nothing has changed then.
        """
        if key in self._pages:
            return
        self._pages[key] = self._into_pools(cast(Mapping[str, Page], pages)) if self._pools else dict(pages)
        if self.tiles:
            self._rows[key] = table_row(self._paths, cast(Mapping[str, TilePage], pages))
        if pages and all(pages[path].gate is not None for path in self._first_modules(pages)):
            self._gated.add(key)

    def _into_pools(self, pages: Mapping[str, Page]) -> dict[str, PooledPage]:
        pooled: dict[str, PooledPage] = {}
        try:
            for path, page in pages.items():
                pooled[path] = self._pools[self._group_of[path].name].put(path, page.a, page.b, page.gate)
        except BaseException:
            for path, page_ in pooled.items():
                self._pools[self._group_of[path].name].free(page_)
            raise
        return pooled

    def remove(self, key: str) -> None:
        """Forget an adapter; nothing that runs may still need it."""
        pages = self._pages.pop(key)
        self._rows.pop(key, None)
        self._gated.discard(key)
        for path, page in pages.items():
            if isinstance(page, PooledPage):
                self._pools[self._group_of[path].name].free(page)
        if self._packing is not None and key in self._packing.keys:
            self._packing = None  # and with it what it holds of the rows

    def require_gates(self, keys: Iterable[str]) -> None:
        """Raise ValueError, which names them, where some of these adapters have no gates to be routed by."""
        if without := sorted(key for key in set(keys) if key not in self._gated):
            raise ValueError(no_gates(without))

    def pack(self, needed: Iterable[str]) -> Packing:
        """The rows of at least the needed adapters; the last packing as long as it still serves."""
        wanted = frozenset(needed)
        current = self._packing
        if current is not None and wanted.issubset(current.keys):
            if len(wanted) == len(current.keys):
                return current
            # With tiles nothing is copied, and closed gates would be all that keeping it brings.
            if not self.tiles and self._row_count(wanted) >= KEEP_SHARE * current.rows:
                return current
        self._packing = self._pack(tuple(sorted(wanted)))
        self.packings_total += 1
        return self._packing

    def _row_count(self, keys: Iterable[str]) -> int:
        return sum(page.rank for key in keys for page in self._pages[key].values())

    def _pack(self, keys: tuple[str, ...]) -> Packing:
        pages = [self._pages[key] for key in keys]
        table = self._table(keys)

        def make_groups() -> dict[str, PackedGroup]:
            layouts = Layouts(self.device)
            packed = {group.name: self._pack_group(group, keys, pages, layouts, table) for group in self.groups}
            return {name: group for name, group in packed.items() if group is not None}

        return Packing(keys, self._row_count(keys), make_groups, table)

    def _table(self, keys: tuple[str, ...]) -> TileTable | None:
        if not self.tiles:
            return None
        rows = torch.stack([self._rows[key] for key in keys]) if keys else torch.zeros(0, len(self._paths), 4).long()
        starts = accumulate((len(group.modules) for group in self.groups[:-1]), initial=0)
        return TileTable(rows, tuple(starts), tuple(self._pages[key] for key in keys))

    def _pack_group(
        self,
        group: GroupSpec,
        keys: tuple[str, ...],
        pages: Sequence[_Pages],
        layouts: Layouts,
        table: TileTable | None,
    ) -> PackedGroup | None:
        found: list[tuple[int, Page | PooledPage | TilePage]] = []
        owners: list[int] = []
        modules: list[PackedModule] = []
        column = 0
        for path, d_out in group.modules:
            first_row, first_page = len(owners), len(found)
            for index, of_adapter in enumerate(pages):
                page = of_adapter.get(path)
                if page is not None:
                    found.append((index, page))
                    owners += [index] * page.rank
            if len(owners) > first_row:
                rows = slice(first_row, len(owners))
                own = [page for _, page in found[first_page:]]
                modules.append(PackedModule(slice(column, column + d_out), rows, _stacked(own, "b")))
            column += d_out
        if not modules:
            return None
        gates = {index: page for index, page in found if page.gate is not None}
        gated = sorted(gates)
        d_in, device = group.d_in, self.device
        return PackedGroup(
            tuple(modules),
            layouts.layout(owners, gated),
            _stacked([page for _, page in found], "a"),
            _stacked([gates[index] for index in gated], "gate", torch.empty(0, d_in, device=device, dtype=self.dtype)),
            keys,
            d_in,
            self.dtype,
            self._pooled(group, found, layouts),
            None if table is None else self._in_tiles(group, table),
        )

    def _in_tiles(self, group: GroupSpec, table: TileTable) -> TiledGroup:
        d_outs, place = [module.d_out for module in group.modules], self.groups.index(group)
        return TiledGroup(table, Linear(None, d_in=group.d_in, d_outs=d_outs, first_module=table.starts[place]))

    def _pooled(
        self, group: GroupSpec, found: Sequence[tuple[int, Page | PooledPage | TilePage]], layouts: Layouts
    ) -> PooledGroup | None:
        pages = [(index, page) for index, page in found if isinstance(page, PooledPage)]
        return PooledGroup(self._pools[group.name], layouts.page_table(pages)) if pages else None


def pool_page_bytes(groups: Sequence[GroupSpec], dtype: torch.dtype) -> int:
    """Bytes of one page of every module, with its share of the pages for gate vectors."""
    rows = PAGE_ROWS + 1  # as many gate vectors as pages
    a = sum(rows * group.d_in * len(group.modules) for group in groups)
    b = sum(PAGE_ROWS * module.d_out for group in groups for module in group.modules)
    return (a + b) * dtype.itemsize


def can_tile(groups: Sequence[GroupSpec], *, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a bank for these groups can keep its rows in tiles, and this machine multiply them."""
    shapes = [(group.d_in, [module.d_out for module in group.modules]) for group in groups]
    return device.type == "cpu" and dtype == torch.bfloat16 and tiles_fit(shapes)


def _stacked(
    pages: Sequence[Page | PooledPage | TilePage], name: Literal["a", "b", "gate"], empty: Tensor | None = None
) -> Callable[[], Tensor]:
    """Puts the pages' rows one below the other, when asked to; ``empty`` where there are no pages."""

    def make() -> Tensor:
        parts: list[Tensor] = [getattr(page, name) for page in pages]
        if name == "gate":
            parts = [part.unsqueeze(0) for part in parts]
        if not parts:
            assert empty is not None
            return empty
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return make
