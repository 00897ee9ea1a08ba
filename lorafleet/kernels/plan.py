"""Which gates hold for which token of one step.

A step's tokens come in runs: the tokens of one request stand together and share one mix, or one route. The plan
spreads the mixes over the tokens, ``gates [T, K]``, and for a kernel over the packed rows, ``[T, R]``. The gates of
routed tokens depend on the input of each group; a kernel asks for them with its logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from lorafleet.kernels.packing import RowLayout
from lorafleet.kernels.token_gates import no_gates, token_gates

Mix: TypeAlias = tuple[tuple[str, float], ...]
"""(adapter key, weight) pairs; ``()`` is the bare base. A key that comes twice counts with the sum of its weights."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TokenRoute:
    """Each token of the run is routed among these adapters, in each group of modules anew, by the adapters' gates."""

    keys: tuple[str, ...]
    """the eligible adapters; kept sorted, each once"""
    top_k: int
    """how many of them a token gets, at most"""
    temperature: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple(sorted(set(self.keys))))
        if not self.keys:
            raise ValueError("found a route without adapters, expected at least one eligible key")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise ValueError(f"found top_k {self.top_k!r}, expected a whole number of at least 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"found temperature {self.temperature!r}, expected a finite number above 0")


class Run(NamedTuple):
    """Neighbouring tokens with one mix, or one route."""

    mix: Mix | TokenRoute
    tokens: int


class RowGates(NamedTuple):
    gates: Tensor
    """``[T, R]``"""
    closed: Tensor | None
    """``[T, R]`` bool, where the gate is zero; None where every gate is known to be open"""


class Routing(NamedTuple):
    """The routed tokens of a step; T_r of them."""

    tokens: Tensor
    """``[T_r]`` int64, ascending"""
    eligible: Tensor
    """``[T_r, K]`` bool"""
    top_k: Tensor
    """``[T_r, 1]`` int64"""
    temperature: Tensor
    """``[T_r, 1]`` float32"""


class Segment(NamedTuple):
    """Tokens that need the same adapters' rows, and a plan for them alone."""

    adapters: tuple[int, ...]
    """indices into ``Plan.active``, ascending"""
    tokens: slice | Tensor
    """a slice where they stand together, else ``[T_s]`` int64"""
    plan: Plan


class Plan:
    """The gates of one step's tokens over the active adapters, in the order of a packing's keys."""

    def __init__(self, runs: Sequence[Run], active: Sequence[str], *, device: torch.device | str = "cpu") -> None:
        self.runs, self.active, self.device = tuple(runs), tuple(active), torch.device(device)
        self._column = {key: index for index, key in enumerate(self.active)}
        self._table, self._eligible = self._tables()
        self._counts = torch.tensor([run.tokens for run in self.runs], dtype=torch.int64)
        # Told from the small host tables, so that a GPU is never waited for.
        self._all_open = bool((self._table != 0).all())
        self.gates = self._table.repeat_interleave(self._counts, dim=0).to(self.device)
        """``[T, K]`` float32; zeros for routed tokens"""
        self.routing = None if self._eligible is None else self._routing(self._eligible)
        """None where no token is routed"""
        self.exact_in_bfloat16 = self.routing is None and torch.equal(self._table, self._table.bfloat16().float())
        """whether bfloat16 holds every gate as it is: weights in steps of 1/64 up to 4 do"""
        self._made: dict[object, object] = {}

    def _tables(self) -> tuple[Tensor, Tensor | None]:
        """For each run the gates ``[runs, K]``, and if any is routed the eligible adapters ``[runs, K]`` (bool).

        Put together from lists: writing single elements of a tensor takes 5 µs each.
        """
        blank = [0.0] * len(self.active)
        gates, eligible, routed = [], [], False
        for run in self.runs:
            row, may = blank.copy(), blank
            if isinstance(run.mix, TokenRoute):
                may, routed = blank.copy(), True
                for key in run.mix.keys:
                    may[self._column_of(key)] = 1.0
            else:
                for key, weight in run.mix:
                    row[self._column_of(key)] += weight
            gates.append(row)
            eligible.append(may)
        shape = (len(self.runs), len(self.active))
        table = torch.tensor(gates, dtype=torch.float32).reshape(shape)
        return table, torch.tensor(eligible).reshape(shape).bool() if routed else None

    def _column_of(self, key: str) -> int:
        if key not in self._column:
            raise ValueError(f"a mix names {key!r}, which is not among the {len(self._column)} active adapters")
        return self._column[key]

    def _routing(self, eligible: Tensor) -> Routing:
        routes = [run.mix if isinstance(run.mix, TokenRoute) else None for run in self.runs]

        def spread(values: Tensor) -> Tensor:
            return values.repeat_interleave(self._counts, dim=0)

        tokens = spread(torch.tensor([route is not None for route in routes])).nonzero()[:, 0]
        top_k = spread(torch.tensor([0 if route is None else route.top_k for route in routes]))
        temperature = spread(torch.tensor([1.0 if route is None else route.temperature for route in routes]))
        found = (tokens, spread(eligible)[tokens], top_k[tokens, None], temperature[tokens, None])
        return Routing(*(tensor.to(self.device) for tensor in found))

    @property
    def tokens(self) -> int:
        return self.gates.shape[0]

    def once(self, key: object, make: Callable[[], _T]) -> _T:
        """What ``make`` gave for this key the first time: steps repeat a plan, and the layers of a step share it."""
        if key not in self._made:
            self._made[key] = make()
        return cast(_T, self._made[key])

    def row_gates(self, layout: RowLayout, dtype: torch.dtype = torch.float32) -> RowGates:
        """The gates spread over packed rows, where no token is routed; once a layout, and layers mostly share one."""
        assert self.routing is None
        return self.once((layout, dtype), lambda: self._spread(self.gates, layout, dtype))

    def routed_row_gates(self, layout: RowLayout, logits: Tensor) -> RowGates:
        """The same where tokens are routed: :meth:`routed_gates`, spread over packed rows."""
        return self._spread(self.routed_gates(layout, logits), layout, torch.float32)

    def _spread(self, gates: Tensor, layout: RowLayout, dtype: torch.dtype) -> RowGates:
        rows = gates.index_select(1, layout.adapter_of_row)
        open_for_sure = self._all_open and self.routing is None
        return RowGates(rows.to(dtype), None if open_for_sure else rows == 0)

    def routed_gates(self, layout: RowLayout, logits: Tensor) -> Tensor:
        """``[T, K]`` float32 for one group: mixes as they are, routed tokens from ``logits [T_r, G]``, one a gate row.

        Adapters without rows in the group take no part there. Raises ValueError as :meth:`check_routes` does.
        """
        assert self.routing is not None
        tokens, eligible, top_k, temperature = self.routing
        gated = self.check_routes(layout)
        chosen = token_gates(
            logits.float(), eligible=eligible.index_select(1, gated), top_k=top_k, temperature=temperature
        )
        routed = chosen.new_zeros(eligible.shape).index_copy_(1, gated, chosen)
        return self.gates.index_copy(0, tokens, routed)

    def check_routes(self, layout: RowLayout) -> Tensor:
        """The adapter of each gate row, ``[G]`` int64 on the device.

        Raises ValueError, which names it, for an adapter that is eligible, has rows in the group, and has no gate.
        """
        return self.once(("gated", layout), lambda: self._gated_columns(layout))

    def _gated_columns(self, layout: RowLayout) -> Tensor:
        assert self._eligible is not None
        needed = set(self._eligible.any(0).nonzero()[:, 0].tolist())
        if without := sorted((needed & layout.owners) - set(layout.gated)):
            raise ValueError(no_gates(self.active[column] for column in without))
        return torch.tensor(layout.gated, dtype=torch.int64, device=self.device)

    def needed(self) -> tuple[Tensor, Tensor]:
        """On the host: whether a token may need an adapter, ``[T, K]``, and whether it is routed, ``[T]`` (bool)."""
        may = self._table != 0 if self._eligible is None else (self._table != 0) | self._eligible
        routed = torch.tensor([isinstance(run.mix, TokenRoute) for run in self.runs], dtype=torch.bool)
        return may.repeat_interleave(self._counts, dim=0), routed.repeat_interleave(self._counts, dim=0)

    def adapter_sets(self, owners: frozenset[int]) -> dict[tuple[tuple[int, ...], bool], list[int]]:
        """Which of the owners' rows each run needs: (adapters, whether routed) → runs; host work only.

        Runs that need none of them, or have no tokens, are left out.
        """
        return self.once(("sets", owners), lambda: self._adapter_sets(owners))

    def _adapter_sets(self, owners: frozenset[int]) -> dict[tuple[tuple[int, ...], bool], list[int]]:
        sets: dict[tuple[tuple[int, ...], bool], list[int]] = {}
        rows = (self._table if self._eligible is None else self._table + self._eligible).tolist()
        for index, (run, row) in enumerate(zip(self.runs, rows, strict=True)):
            needed = tuple(column for column, gate in enumerate(row) if gate != 0 and column in owners)
            if needed and run.tokens:
                sets.setdefault((needed, isinstance(run.mix, TokenRoute)), []).append(index)
        return sets

    def segments(self, owners: frozenset[int]) -> tuple[Segment, ...]:
        """The tokens by what they need of the owners' rows."""
        return self.once(("segments", owners), lambda: self._segments(owners))

    def _segments(self, owners: frozenset[int]) -> tuple[Segment, ...]:
        starts = [0, *torch.cumsum(self._counts, 0).tolist()]
        segments: list[Segment] = []
        for (adapters, _), indices in self.adapter_sets(owners).items():
            keys = [self.active[column] for column in adapters]
            runs = [Run(_only(self.runs[index].mix, keys), self.runs[index].tokens) for index in indices]
            spans = [(starts[index], starts[index + 1]) for index in indices]
            segments.append(Segment(adapters, _positions(spans, self.device), Plan(runs, keys, device=self.device)))
        return tuple(segments)


def _only(mix: Mix | TokenRoute, keys: Sequence[str]) -> Mix | TokenRoute:
    """A mix or route without the other adapters."""
    if isinstance(mix, TokenRoute):
        return TokenRoute(tuple(key for key in mix.keys if key in keys), mix.top_k, mix.temperature)
    return tuple((key, weight) for key, weight in mix if key in keys)


def _positions(spans: Iterable[tuple[int, int]], device: torch.device) -> slice | Tensor:
    """Ascending spans ``[start, stop)`` as one slice, or as positions ``[T_s]`` where there are gaps."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    if len(joined) == 1:
        return slice(*joined[0])
    return torch.cat([torch.arange(start, stop) for start, stop in joined]).to(device)
