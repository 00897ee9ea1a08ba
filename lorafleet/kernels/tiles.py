"""The tiled path: products of bfloat16 on a CPU's matrix unit (AMX), each block of 32 tokens with its own adapters.

In the engine the base's product and the mixture are one call (:class:`lorafleet.native.linear.Linear`), which adds
both in the same float32 sums; :func:`mixture_tiles` is the mixture alone, for other paths to be compared with.

The gated intermediate is rounded once, and the result once for base and mixture together. Against float64 the error is
0.7 times that of a merged model in bfloat16 where the mixture is a tenth of the base's product, 1.1 times where it is
as large, and 1.4 times where it is four times as large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafleet.kernels.packing import PackedGroup
from lorafleet.kernels.plan import Plan
from lorafleet.kernels.tile_pages import TileTable
from lorafleet.kernels.token_gates import no_gates
from lorafleet.native import BLOCK_TOKENS
from lorafleet.native.linear import Mixture, MixtureArguments


def mixture_tiles(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """Same signature and result as :func:`lorafleet.kernels.reference.mixture_reference`, in bfloat16.

    Raises ValueError for a group of a bank without tiles, and for other dtypes.
    """
    tiled = group.tiled
    if tiled is None:
        raise ValueError("found a group of a bank without tiles, which the tiled path needs: make the bank with tiles")
    if x.dtype != torch.bfloat16 or y.dtype != torch.bfloat16:
        raise ValueError(f"found x of {x.dtype} and y of {y.dtype}, expected torch.bfloat16 for the tiled path")
    tiled.mixture.into(y, x.contiguous(), y, tile_mixture(plan, tiled.table))


def tile_mixture(plan: Plan, table: TileTable) -> Mixture:
    """A plan's gates over the adapters of a table, which are the plan's active ones; made once for both.

    Raises ValueError where they are not as many, and one, which names it, for an adapter that is eligible for a token,
    has rows in a group, and no gate there.
    """
    return plan.once(("tiles", table), lambda: _mixture(plan, table))


def _mixture(plan: Plan, table: TileTable) -> Mixture:
    tokens, adapters = plan.gates.shape
    if adapters != table.rows.shape[0]:
        raise ValueError(
            f"found a plan over {adapters} adapters and a packing of {table.rows.shape[0]}, expected one set"
        )
    needed, _ = plan.needed()
    blocks = -(-tokens // BLOCK_TOKENS)
    padded = torch.zeros(blocks * BLOCK_TOKENS, adapters, dtype=torch.bool)
    padded[:tokens] = needed
    of_block = padded.view(blocks, BLOCK_TOKENS, adapters).any(1)
    starts = torch.zeros(blocks + 1, dtype=torch.int32)
    starts[1:] = of_block.sum(1).cumsum(0)
    members = of_block.nonzero()[:, 1].to(torch.int32)
    kept: list[Tensor] = [plan.gates, starts, members]
    arguments = MixtureArguments(
        pages=table.rows.data_ptr(),
        modules=table.rows.shape[1],
        adapters=adapters,
        gates=plan.gates.data_ptr(),
        block_starts=starts.data_ptr(),
        block_adapters=members.data_ptr(),
    )
    if plan.routing is not None:
        routed, may, top_k, temperature = plan.routing
        _check_gates(plan, table, may.any(0))
        eligible = torch.zeros(tokens, adapters, dtype=torch.uint8)
        eligible[routed] = may.to(torch.uint8)
        top = torch.zeros(tokens, dtype=torch.int32)
        top[routed] = top_k[:, 0].to(torch.int32)
        at = torch.ones(tokens)
        at[routed] = temperature[:, 0]
        arguments.eligible, arguments.top_k, arguments.temperature = eligible.data_ptr(), top.data_ptr(), at.data_ptr()
        kept += [eligible, top, at]
    return Mixture(arguments, tokens, (*kept, table))


def _check_gates(plan: Plan, table: TileTable, eligible: Tensor) -> None:
    stops = (*table.starts[1:], table.rows.shape[1])
    has_rows, has_gate = table.rows[:, :, 3] > 0, table.rows[:, :, 2] > 0
    for start, stop in zip(table.starts, stops, strict=True):
        without = eligible & has_rows[:, start:stop].any(1) & ~has_gate[:, start:stop].any(1)
        if without.any():
            raise ValueError(no_gates(plan.active[column] for column in without.nonzero()[:, 0].tolist()))
