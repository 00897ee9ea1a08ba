"""The Triton path: two launches a group, whatever its modules, adapters and ranks.

The concatenated-rank view of Punica's SGMV (arXiv 2310.18547): a mixture is a virtual adapter whose ranks are those
of its adapters together. What is shrunk and expanded are pages of 16 ranks (:mod:`lorafleet.kernels.pool`), so that
nothing is padded to another's rank and addresses never change.

- *Work list*: one item for each block of tokens and page that some token of the block needs, sorted by block, module,
  adapter. Pairs whose gates are all zero are not in it. It lies in device memory with its length: a captured launch
  runs whatever list is there, programs without an item leave at once, and the grid depends on the number of tokens
  alone.
- *Shrink*: item by item ``X_block A_pageᵀ``, multiplied by the tokens' gates. d_in is split, each part writing a plane
  of its own in float32: nothing to clear, no atomics, the same result every time.
- *Expand*: a block of tokens and a tile of columns of one module at a time, over all its items: the planes are summed
  on load, rounded once, and go into one accumulator; y is read and written once.

Routed tokens: gate vectors are pages, too, so that the shrink gives the logits. Their gates are computed by torch
between the two launches, and the expand applies gates instead of the shrink, and leaves out items that no token
chose.

Shapes: T tokens in blocks of BLOCK_T, K active adapters, W items, S splits, M modules of the group.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from lorafleet.kernels.packing import PackedGroup
from lorafleet.kernels.plan import Plan
from lorafleet.kernels.pool import PAGE_ROWS, GroupPool, PageTable, PooledGroup
from lorafleet.kernels.token_gates import token_gates

# Untuned: nothing has run on a GPU yet. 16 is the smallest block that matrix units multiply.
_DECODE_TOKENS = 64
_BLOCK_K, _BLOCK_N = 128, 128
_MAX_PROGRAMS = 2048


class Tiles(NamedTuple):
    """How a step is cut up; fixed for a number of tokens."""

    block_t: int
    splits: int

    @staticmethod
    def of(tokens: int) -> Tiles:
        """Decode has few blocks and splits d_in to fill the device; prefill has enough of them."""
        return Tiles(16, 4) if tokens <= _DECODE_TOKENS else Tiles(64, 1)


@triton.jit
def shrink_kernel(
    x,
    a,
    gates,
    items,
    count,
    planes,
    tokens,
    d_in,
    x_stride,
    gates_stride,
    plane_stride,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
):
    """``planes[s, item] [BLOCK_T, 16] = gate · X_block A_pageᵀ`` over the s-th part of d_in."""
    split = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    for item in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        block = tl.load(items + item * 3)
        page = tl.load(items + item * 3 + 1).to(tl.int64)
        adapter = tl.load(items + item * 3 + 2)
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        live = t < tokens
        x_rows = x + t.to(tl.int64)[:, None] * x_stride
        a_rows = a + (page * ROWS + rows)[None, :] * d_in
        h = tl.zeros((BLOCK_T, ROWS), dtype=tl.float32)
        for start in range(split * BLOCK_K, d_in, SPLITS * BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x_tile = tl.load(x_rows + k[None, :], mask=live[:, None] & (k < d_in)[None, :], other=0.0)
            a_tile = tl.load(a_rows + k[:, None], mask=(k < d_in)[:, None], other=0.0)
            h = tl.dot(x_tile.to(DTYPE).to(DOT), a_tile.to(DTYPE).to(DOT), h, input_precision="ieee")
        if GATED:
            gate = tl.load(gates + t * gates_stride + adapter, mask=live, other=0.0)[:, None]
            h = tl.where(gate != 0.0, h * gate, 0.0)
        place = split.to(tl.int64) * plane_stride + tl.full((), BLOCK_T * ROWS, tl.int64) * item
        tl.store(planes + place + tl.arange(0, BLOCK_T)[:, None] * ROWS + rows[None, :], h)


@triton.jit
def expand_kernel(
    y,
    b,
    gates,
    items,
    first,
    modules,
    planes,
    tokens,
    module_count,
    module_pages,
    y_stride,
    gates_stride,
    plane_stride,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
):
    """``Y_block[:, tile] += Σ_items H_item B_page[:, tile]`` for one module."""
    block, module = tl.program_id(0), tl.program_id(2)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d_out = tl.load(modules + module * 3)
    column = tl.load(modules + module * 3 + 1)
    b_start = tl.load(modules + module * 3 + 2)
    place = block * (module_count + 1) + module
    begin, end = tl.load(first + place), tl.load(first + place + 1)
    if (begin < end) & (tl.program_id(1) * BLOCK_N < d_out):
        rows = tl.arange(0, ROWS)
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        live = t < tokens
        total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for item in range(begin, end):
            page = tl.load(items + item * 3 + 1).to(tl.int64) - module * module_pages
            gate = tl.load(gates + t * gates_stride + tl.load(items + item * 3 + 2), mask=live, other=0.0)[:, None]
            # In the work list of routed tokens stands what they may choose.
            if (not GATED) or (tl.sum((gate != 0.0).to(tl.int32)) > 0):
                h_at = planes + tl.full((), BLOCK_T * ROWS, tl.int64) * item
                h_at += tl.arange(0, BLOCK_T)[:, None] * ROWS + rows[None, :]
                h = tl.load(h_at)
                for split in tl.static_range(1, SPLITS):
                    h += tl.load(h_at + split * plane_stride)
                if GATED:
                    h = tl.where(gate != 0.0, h * gate, 0.0)
                b_at = b + b_start + (page * ROWS + rows)[:, None] * d_out + n[None, :]
                b_tile = tl.load(b_at, mask=(n < d_out)[None, :], other=0.0)
                total = tl.dot(h.to(DTYPE).to(DOT), b_tile.to(DTYPE).to(DOT), total, input_precision="ieee")
        y_at = y + t.to(tl.int64)[:, None] * y_stride + (column + n)[None, :]
        inside = live[:, None] & (n < d_out)[None, :]
        before = tl.load(y_at, mask=inside, other=0.0)
        tl.store(y_at, (before.to(tl.float32) + total).to(before.dtype), mask=inside)


INTERPRETED = type(shrink_kernel).__name__ == "InterpretedFunction"
"""whether TRITON_INTERPRET=1 was set when this module was imported: kernels run on the CPU, slowly"""


class Capacity(NamedTuple):
    """What a captured step has room for."""

    tokens: int
    adapters: int
    items: int
    routed: bool
    """whether steps with routed tokens fit, too"""


class Work:
    """A step's work list, gates and scratch for the groups of one page table, in device memory.

    Built for one plan, or with a capacity and loaded again before each step: the tensors stay where they are, so that
    launches with them can be captured into a CUDA graph and replayed.
    """

    def __init__(self, capacity: Capacity, pool: GroupPool, *, like: Work | None = None) -> None:
        """``like``: one of the same capacity whose gates and scratch it uses, too; they never run at the same time."""
        self.capacity, self.tiles = capacity, Tiles.of(capacity.tokens)
        self.modules = len(pool.d_outs)
        self.blocks = -(-capacity.tokens // self.tiles.block_t)
        device = pool.a.device
        tokens, adapters = capacity.tokens, capacity.adapters
        self.items = torch.zeros(capacity.items, 3, dtype=torch.int32, device=device)
        """``[W, 3]``: block of tokens, page in the pool's ``a``, adapter"""
        self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self.first = torch.zeros(self.blocks * (self.modules + 1) + 1, dtype=torch.int32, device=device)
        """where the items of block and module begin; gate pages are module M"""
        self.gates: Tensor = torch.zeros(tokens, adapters, device=device) if like is None else like.gates
        """``[T, K]``; for routed tokens once their logits are there"""
        shape = (self.tiles.splits, capacity.items, self.tiles.block_t, PAGE_ROWS)
        self.planes: Tensor = torch.empty(shape, device=device) if like is None else like.planes
        self.choice = Choice.empty(tokens, adapters, device) if capacity.routed else None

    def load(self, plan: Plan, table: PageTable, module_pages: int) -> None:
        """The work of a plan; ValueError where it does not fit. ``module_pages``: the pool's pages for each module."""
        block_t, capacity = self.tiles.block_t, self.capacity
        if plan.tokens > capacity.tokens or len(plan.active) > capacity.adapters:
            raise ValueError(
                f"found {plan.tokens} tokens and {len(plan.active)} adapters, expected at most {capacity.tokens} and "
                f"{capacity.adapters}"
            )
        if plan.routing is not None and self.choice is None:
            raise ValueError("found routed tokens; capture the step with a capacity for them")
        items, first = work_list(plan, table, modules=self.modules, module_pages=module_pages, block_t=block_t)
        if len(items) > capacity.items:
            raise ValueError(f"found {len(items)} pairs of block and page, expected at most {capacity.items}")
        # Blocks behind the plan's last one have nothing to do.
        first = torch.nn.functional.pad(first, (0, len(self.first) - len(first)), value=len(items))
        self.items[: len(items)].copy_(items)
        self.first.copy_(first)
        self.count.fill_(len(items))
        self.gates.zero_()
        self.gates[: plan.tokens, : len(plan.active)].copy_(plan.gates)
        if self.choice is not None:
            first_gate = first[:-1].reshape(self.blocks, -1)[:, self.modules]
            self.choice.load(plan, table, first_gate, block_t)

    def copy_to(self, others: Sequence[Work]) -> None:
        """Make others that are ``like`` this one hold the same work; on the device, for all of them together."""
        if others:
            for own, theirs in zip(self._lists(), zip(*(other._lists() for other in others), strict=True), strict=True):
                torch._foreach_copy_(list(theirs), [own] * len(theirs))

    def _lists(self) -> list[Tensor]:
        return [self.items, self.count, self.first, *(self.choice or ())]

    def choose(self) -> None:
        """Gates of the routed tokens, from the logits that the shrink left in the planes."""
        if self.choice is not None:
            self.choice.into(self.gates, self.planes)


class Choice(NamedTuple):
    """How the gates of routed tokens come about; all of a fixed shape, for tokens that are not routed, too."""

    logit: Tensor
    """``[T, K]`` int64: where a token's logit for an adapter lies in a plane"""
    eligible: Tensor
    """``[T, K]`` bool"""
    top_k: Tensor
    """``[T, 1]`` int64"""
    temperature: Tensor
    """``[T, 1]`` float32"""

    @staticmethod
    def empty(tokens: int, adapters: int, device: torch.device) -> Choice:
        return Choice(
            torch.zeros(tokens, adapters, dtype=torch.int64, device=device),
            torch.zeros(tokens, adapters, dtype=torch.bool, device=device),
            torch.zeros(tokens, 1, dtype=torch.int64, device=device),
            torch.ones(tokens, 1, device=device),
        )

    def load(self, plan: Plan, table: PageTable, first_gate: Tensor, block_t: int) -> None:
        """``first_gate [blocks]``: the first item of each block that is a gate page."""
        gate_pages = _gate_pages(table)
        self.eligible.zero_()
        if plan.routing is None:
            return
        tokens, eligible, top_k, temperature = plan.routing
        self.top_k[tokens] = top_k
        self.temperature[tokens] = temperature
        t = plan.needed()[1].nonzero()[:, 0]
        for adapter, row in table.gates:
            item = first_gate[t // block_t] + gate_pages.index(row // PAGE_ROWS)
            place = (item * block_t + t % block_t) * PAGE_ROWS + row % PAGE_ROWS
            self.logit[tokens, adapter] = place.to(self.logit.device)
            self.eligible[tokens, adapter] = eligible[:, adapter]

    def into(self, gates: Tensor, planes: Tensor) -> None:
        """Overwrite the rows of routed tokens in ``gates [T, K]``."""
        logits = planes.flatten(1)[:, self.logit].sum(0)
        chosen = token_gates(logits, eligible=self.eligible, top_k=self.top_k, temperature=self.temperature)
        gates.copy_(torch.where(self.eligible.any(1, keepdim=True), chosen, gates))


def work_list(plan: Plan, table: PageTable, *, modules: int, module_pages: int, block_t: int) -> tuple[Tensor, Tensor]:
    """Items ``[W, 3]`` (block, page in the pool's ``a``, adapter), and where those of block and module begin.

    The second is ``[blocks · (M + 1) + 1]``; blocks with routed tokens have every gate page in use, as module M.
    """
    needed, routed = plan.needed()
    gates = [(modules, 0, page) for page in _gate_pages(table)]
    module, adapter, page = torch.tensor([*table.entries, *gates], dtype=torch.int64).reshape(-1, 3).unbind(1)
    mask = _any_in_block(needed, block_t)[:, adapter]
    mask[:, module == modules] = _any_in_block(routed[:, None], block_t)
    block, entry = mask.nonzero().unbind(1)
    items = torch.stack([block, module[entry] * module_pages + page[entry], adapter[entry]], dim=1)
    counts = mask.to(torch.int64) @ torch.nn.functional.one_hot(module, modules + 1)  # [blocks, M + 1]
    return items, torch.cat([torch.zeros(1, dtype=torch.int64), counts.flatten().cumsum(0)])


def _gate_pages(table: PageTable) -> list[int]:
    """The gate pages in use."""
    return sorted({entry.row // PAGE_ROWS for entry in table.gates})


def _any_in_block(per_token: Tensor, block_t: int) -> Tensor:
    """``[T, K]`` bool → ``[blocks, K]``"""
    tokens, columns = per_token.shape
    blocks = -(-tokens // block_t)
    padded = per_token.new_zeros(blocks * block_t, columns)
    padded[:tokens] = per_token
    return padded.view(blocks, block_t, columns).any(1)


def work_for(plan: Plan, pooled: PooledGroup) -> Work:
    """The work of one plan, in the room that it takes."""
    pool, table = pooled
    items, _ = work_list(
        plan,
        table,
        modules=len(pool.d_outs),
        module_pages=pool.pages,
        block_t=Tiles.of(plan.tokens).block_t,
    )
    work = Work(Capacity(plan.tokens, len(plan.active), len(items), plan.routing is not None), pool)
    work.load(plan, table, pool.pages)
    return work


def launch(y: Tensor, x: Tensor, pool: GroupPool, work: Work) -> None:
    """``y [T, Σ d_out] += Σ_k g[t,k] B_k (A_k x)``, in place; reads nothing on the host, so that it can be captured."""
    block_t, splits = work.tiles
    narrow = pool.a.dtype if x.dtype == y.dtype == pool.a.dtype else torch.float32
    dtype = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[narrow]
    routed = work.choice is not None
    # The interpreter multiplies the bits of bfloat16 as whole numbers (3.9); float32 holds its products exactly.
    dot = tl.float32 if INTERPRETED else dtype
    shape = {"ROWS": PAGE_ROWS, "BLOCK_T": block_t, "SPLITS": splits, "DTYPE": dtype, "DOT": dot}
    plane_stride, gates_stride = work.planes.stride(0), work.gates.stride(0)
    shrink_kernel[(min(work.capacity.items, _MAX_PROGRAMS), splits)](
        x, pool.a, work.gates, work.items, work.count, work.planes,
        x.shape[0], pool.d_in, x.stride(0), gates_stride, plane_stride,
        BLOCK_K=_BLOCK_K, GATED=not routed, **shape,
    )  # fmt: skip
    work.choose()
    tiles = -(-max(pool.d_outs) // _BLOCK_N)
    expand_kernel[(work.blocks, tiles, work.modules)](
        y, pool.b, work.gates, work.items, work.first, pool.module_table, work.planes,
        x.shape[0], work.modules, pool.pages, y.stride(0), gates_stride, plane_stride,
        BLOCK_N=_BLOCK_N, GATED=routed, **shape,
    )  # fmt: skip


def mixture_triton(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """Same signature and result as :func:`lorafleet.kernels.reference.mixture_reference`, from a bank with a pool."""
    pooled = group.pooled
    if pooled is None:
        raise ValueError("found a bank without a pool of pages; make it with Bank(..., pool_pages=...)")
    if plan.routing is not None:
        plan.check_routes(group.layout)
    pool, table = pooled
    key = ("triton", table, len(pool.d_outs), pool.pages)
    work = plan.once(key, lambda: work_for(plan, pooled))
    if work.capacity.items and plan.tokens:
        launch(y, x if x.stride(1) == 1 else x.contiguous(), pool, work)
