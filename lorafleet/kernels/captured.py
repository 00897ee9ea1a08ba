"""The Triton path of a captured step: work lists at fixed addresses, loaded again before each replay.

Every group of a model has a list of its own, as the pages of its adapters are its own. Layers as a rule hold the same
adapters at the same ranks, so that their page tables are equal: a list is made and sent to the device once for each
table, and copied there to all groups that have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from lorafleet.kernels.bank import Bank, GroupSpec
from lorafleet.kernels.packing import Layouts, PackedGroup, Packing
from lorafleet.kernels.plan import Plan, Run
from lorafleet.kernels.pool import GroupPool, PageTable, PooledGroup
from lorafleet.kernels.triton import Capacity, Tiles, Work, launch

# Room for work: a list that is longer is computed without the capture. 64 tokens of 64 adapters of rank 64 with three
# modules are 768 items; scratch for 4 096 are 17 MB.
MOST_ITEMS = 4096
MOST_ADAPTERS = 1024

_NOTHING = PageTable((), ())
_Shape: TypeAlias = tuple[int, tuple[int, ...]]
"""d_in, and d_out of each module"""


class CapturedMixture:
    """A ``MixturePath`` for all groups of a bank with pools, and for steps of at most so many tokens."""

    def __init__(self, bank: Bank, *, tokens: int, routed: bool) -> None:
        """``routed``: for steps with routed tokens, whose gates are computed between the two launches."""
        self._bank, self._tokens = bank, tokens
        self._names: dict[_Shape, list[str]] = {}
        for spec in bank.groups:
            self._names.setdefault(_shape(spec), []).append(spec.name)
        firsts = {shape: bank.pools[names[0]] for shape, names in self._names.items()}
        likes = {shape: Work(capacity_of(pool, tokens=tokens, routed=routed), pool) for shape, pool in firsts.items()}
        # Groups are computed one after the other, and can write over each other's planes.
        scratch = max((work.planes for work in likes.values()), key=Tensor.numel).view(-1)
        for work in likes.values():
            work.planes = scratch[: work.planes.numel()].view(work.planes.shape)
        self._works: dict[str, Work] = {}
        for shape, names in self._names.items():
            like = likes[shape]
            self._works[names[0]] = like
            self._works.update((name, Work(like.capacity, bank.pools[name], like=like)) for name in names[1:])
        self._work_of: dict[GroupPool, Work] = {bank.pools[name]: work for name, work in self._works.items()}
        self._loaded: tuple[Plan, Packing] | None = None

    def load(self, plan: Plan, packing: Packing) -> None:
        """The work of the next steps; ValueError, and nothing may be replayed, where there is no room for it."""
        if self._loaded is not None and self._loaded[0] is plan and self._loaded[1] is packing:
            return
        self._loaded = None
        groups = packing.groups
        for names in self._names.values():
            tables: dict[PageTable, list[Work]] = {}
            for name in names:
                group = groups.get(name)
                if group is not None and plan.routing is not None:
                    plan.check_routes(group.layout)
                pooled = None if group is None else group.pooled
                tables.setdefault(_NOTHING if pooled is None else pooled.table, []).append(self._works[name])
            for table, (first, *others) in tables.items():
                first.load(plan, table, self._bank.pools[names[0]].pages)
                first.copy_to(others)
        self._loaded = plan, packing

    def __call__(self, y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
        """``y += …`` for whatever is loaded when it runs; ``plan`` is not asked."""
        assert group.pooled is not None
        pool = group.pooled.pool
        launch(y, x if x.stride(1) == 1 else x.contiguous(), pool, self._work_of[pool])

    def stand_ins(self) -> tuple[Packing, Plan]:
        """What a step is captured with: every group of the bank takes part, whoever's rows it will hold."""
        device = self._bank.device
        layout = Layouts(device).layout((), ())
        empty = torch.empty(0, device=device)
        groups: Mapping[str, PackedGroup] = {
            spec.name: PackedGroup(
                (), layout, lambda: empty, lambda: empty, (), spec.d_in, self._bank.dtype,
                PooledGroup(self._bank.pools[spec.name], _NOTHING),
            )
            for spec in self._bank.groups
        }  # fmt: skip
        return Packing((), 0, lambda: groups), Plan([Run((), self._tokens)], (), device=device)


def capacity_of(pool: GroupPool, *, tokens: int, routed: bool) -> Capacity:
    """Room for every page of the pool in every block of tokens, as far as :data:`MOST_ITEMS` goes."""
    blocks = -(-tokens // Tiles.of(tokens).block_t)
    items = min(blocks * pool.a.shape[0], MOST_ITEMS)
    return Capacity(tokens, min(len(pool.d_outs) * pool.pages, MOST_ADAPTERS), items, routed)


def _shape(spec: GroupSpec) -> _Shape:
    return spec.d_in, tuple(module.d_out for module in spec.modules)
