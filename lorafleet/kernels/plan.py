"""Which gates hold for which token of one step.

A step's tokens come in runs: the tokens of one request stand together and share one mix. The plan spreads the mixes
over the tokens, ``gates [T, K]``, and for a kernel over the packed rows, ``[T, R]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lorafleet.kernels.bank import RowLayout

Mix: TypeAlias = tuple[tuple[str, float], ...]
"""(adapter key, weight) pairs; ``()`` is the bare base. A key that comes twice counts with the sum of its weights."""


class Run(NamedTuple):
    """Neighbouring tokens with one mix."""

    mix: Mix
    tokens: int


class RowGates(NamedTuple):
    gates: Tensor
    """``[T, R]`` float32"""
    closed: Tensor | None
    """``[T, R]`` bool, where the gate is zero; None where every gate is known to be open"""


class Plan:
    """The gates of one step's tokens over the active adapters, in the order of a packing's keys."""

    def __init__(self, runs: Sequence[Run], active: Sequence[str], *, device: torch.device | str = "cpu") -> None:
        column = {key: index for index, key in enumerate(active)}
        table = torch.zeros(len(runs), len(active))
        for row, run in enumerate(runs):
            for key, weight in run.mix:
                if key not in column:
                    raise ValueError(f"a mix names {key!r}, which is not among the {len(column)} active adapters")
                table[row, column[key]] += weight
        # Told from the small host table, so that a GPU is never waited for.
        self._all_open = bool((table != 0).all())
        counts = torch.tensor([run.tokens for run in runs], dtype=torch.int64)
        self.runs, self.active = tuple(runs), tuple(active)
        self.gates = table.repeat_interleave(counts, dim=0).to(device)
        """``[T, K]`` float32"""
        self._row_gates: dict[RowLayout, RowGates] = {}

    @property
    def tokens(self) -> int:
        return self.gates.shape[0]

    def row_gates(self, layout: RowLayout) -> RowGates:
        """The gates spread over packed rows; computed once a layout, and layers mostly share one."""
        found = self._row_gates.get(layout)
        if found is None:
            gates = self.gates.index_select(1, layout.adapter_of_row)
            found = self._row_gates[layout] = RowGates(gates, None if self._all_open else gates == 0)
        return found
