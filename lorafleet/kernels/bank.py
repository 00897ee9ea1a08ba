"""Where adapter rows live, and how the rows of the active adapters are packed for a kernel.

Modules that read the same input form a group (``qkv``, ``gate_up``; a lone module is a group of one): one shrink for
the group, one expand for each module. An adapter's rank in a module is the number of rows it owns there; no rank is
padded to another's. Pages are keyed (adapter, module) by the adapter's content digest, so a page never changes.

Shapes: A page ``[r, d_in]``, B page ``[r, d_out]`` (B transposed, so that both are rows). Packed group: ``a [R, d_in]``
with R = Σ_modules Σ_adapters r, module by module, inside a module adapter by adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Which active adapter owns each packed row. Groups with equal layouts share one object (hashed by identity)."""

    adapter_of_row: Tensor
    """``[R]`` int64, index into ``Packing.keys``"""


class PackedModule(NamedTuple):
    columns: slice
    """of ``y [T, Σ d_out]``"""
    rows: slice
    """of ``a`` and of the intermediate ``[T, R]``"""
    b: Tensor
    """``[R_module, d_out]``"""


class PackedGroup(NamedTuple):
    a: Tensor
    """``[R, d_in]``"""
    modules: tuple[PackedModule, ...]
    """only those with at least one row"""
    layout: RowLayout


class Packing(NamedTuple):
    """The active adapters' rows, contiguous. Groups that no active adapter changes are absent."""

    keys: tuple[str, ...]
    groups: Mapping[str, PackedGroup]
    rows: int
    """over all groups"""


class Bank:
    """Adapter rows on one device in one dtype. Not thread-safe: the owner holds a lock or stays in one thread.

    The default dtype is float32 whatever the base's: the products are small beside the base's own, and the gated
    intermediate then loses nothing that a merged weight would keep.
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.groups = tuple(groups)
        self.device, self.dtype = torch.device(device), dtype
        self._shapes = {m.path: (group.d_in, m.d_out) for group in self.groups for m in group.modules}
        if len(self._shapes) != sum(len(group.modules) for group in self.groups):
            raise ValueError("found a module in two groups, expected every module in exactly one")
        self._pages: dict[str, dict[str, Page]] = {}
        self._packing: Packing | None = None
        self.packings_total = 0

    def __contains__(self, key: str) -> bool:
        return key in self._pages

    def pages(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Page]:
        """Factors ``path → (A [r, d_in], B [d_out, r])`` as pages on this bank's device.

        Apart from :meth:`add`, so that the copying can happen outside the owner's lock. Raises ValueError for a
        module that the bank does not know, or a shape that does not fit.
        """
        pages: dict[str, Page] = {}
        for path, (a, b) in factors.items():
            if path not in self._shapes:
                raise ValueError(f"found factors for {path!r}, which is in none of this bank's groups")
            d_in, d_out = self._shapes[path]
            if a.ndim != 2 or a.shape[1] != d_in or b.shape != (d_out, a.shape[0]):
                raise ValueError(
                    f"{path}: found A {list(a.shape)} and B {list(b.shape)}, expected [r, {d_in}] and [{d_out}, r]"
                )
            pages[path] = Page(
                a.detach().to(self.device, self.dtype).contiguous(),
                b.detach().T.to(self.device, self.dtype).contiguous(),
            )
        return pages

    def add(self, key: str, pages: Mapping[str, Page]) -> None:
        """Make an adapter available under its digest; the same key again has the same content and is ignored."""
        self._pages.setdefault(key, dict(pages))

    def remove(self, key: str) -> None:
        """Forget an adapter; nothing that runs may still need it."""
        del self._pages[key]
        if self._packing is not None and key in self._packing.keys:
            self._packing = None  # its copy of the rows goes too

    def pack(self, needed: Iterable[str]) -> Packing:
        """The rows of at least the needed adapters, contiguous; the last packing as long as it still serves."""
        wanted = frozenset(needed)
        current = self._packing
        if current is not None and wanted.issubset(current.keys):
            if len(wanted) == len(current.keys):
                return current
            if self._row_count(wanted) >= KEEP_SHARE * current.rows:
                return current
        self._packing = self._pack(tuple(sorted(wanted)))
        self.packings_total += 1
        return self._packing

    def _row_count(self, keys: Iterable[str]) -> int:
        return sum(page.a.shape[0] for key in keys for page in self._pages[key].values())

    def _pack(self, keys: tuple[str, ...]) -> Packing:
        layouts: dict[tuple[int, ...], RowLayout] = {}
        groups = {
            group.name: packed
            for group in self.groups
            if (packed := self._pack_group(group, keys, layouts)) is not None
        }
        return Packing(keys, groups, self._row_count(keys))

    def _pack_group(
        self, group: GroupSpec, keys: tuple[str, ...], layouts: dict[tuple[int, ...], RowLayout]
    ) -> PackedGroup | None:
        a_pages: list[Tensor] = []
        owners: list[int] = []
        modules: list[PackedModule] = []
        column = 0
        for path, d_out in group.modules:
            first_row = len(owners)
            b_pages: list[Tensor] = []
            for index, key in enumerate(keys):
                page = self._pages[key].get(path)
                if page is not None:
                    a_pages.append(page.a)
                    b_pages.append(page.b)
                    owners.extend([index] * page.a.shape[0])
            if b_pages:
                modules.append(
                    PackedModule(slice(column, column + d_out), slice(first_row, len(owners)), torch.cat(b_pages))
                )
            column += d_out
        if not modules:
            return None
        layout = layouts.get(tuple(owners))
        if layout is None:
            layout = layouts[tuple(owners)] = RowLayout(torch.tensor(owners, device=self.device))
        return PackedGroup(torch.cat(a_pages), tuple(modules), layout)
