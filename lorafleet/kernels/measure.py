"""Timing the paths on this machine, for the cost model and for benchmarks; only paths whose results are right.

What is timed is cold, as in a model: each call has another group's rows, so many that they do not stay in a core's
cache. The paths take turns; the median over the turns counts, or another summary of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorafleet.errors import LorafleetError
from lorafleet.kernels.bank import Bank, GroupSpec, ModuleSpec
from lorafleet.kernels.cost_model import Measurement
from lorafleet.kernels.dispatch import PATHS, MixturePath, call_of
from lorafleet.kernels.packing import PackedGroup, Packing
from lorafleet.kernels.plan import Mix, Plan, Run
from lorafleet.kernels.pool import PAGE_ROWS
from lorafleet.kernels.reference import mixture_reference

COLD_ELEMENTS = {"cpu": 8 << 20, "cuda": 64 << 20}
"""of rows between two calls on the same group: 16 and 128 MB in bfloat16, whatever the dtype is. A core of the CPUs at
hand caches 2 MB, an H200 50"""
MAX_COPIES = 32
CHECKED_TOKENS = 8
TIMED = ("dense", "dense_float32", "segmented")
"""the paths that a cost model on a CPU chooses from"""


class WrongResultError(LorafleetError):
    """A path's result is not the reference's, so that its speed means nothing."""


class Workload(NamedTuple):
    """A group, adapters as key → rank, and the runs of a step."""

    d_in: int
    d_outs: tuple[int, ...]
    ranks: Mapping[str, int]
    runs: tuple[Run, ...]
    dtype: torch.dtype
    bank_dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return sum(run.tokens for run in self.runs)

    @property
    def elements(self) -> int:
        """of all rows"""
        return sum(self.ranks.values()) * sum(self.d_in + d_out for d_out in self.d_outs)


def workloads(dtype: torch.dtype, *, bank_dtype: torch.dtype | None = None) -> Iterator[Workload]:
    """Decode and prefill, small and large modules, one mix for all and one for each request, even weights or not."""
    for d_in, d_outs in ((768, (768,)), (2048, (2048, 256, 256)), (2048, (5632,)), (5632, (2048,))):
        for adapters, rank in ((1, 16), (4, 16), (4, 64), (16, 32)):
            ranks = {f"a{index:02}": rank for index in range(adapters)}
            keys = list(ranks)
            for requests, tokens in ((1, 1), (8, 1), (32, 1), (1, 128), (4, 64)):
                weight = 0.5 if requests % 3 else 0.7  # bfloat16 holds the first exactly
                mixes: list[Mix] = [
                    tuple((keys[(request + step) % adapters], weight) for step in range(min(2, adapters)))
                    for request in range(requests)
                ]
                runs = tuple(Run(mix, tokens) for mix in mixes)
                yield Workload(d_in, d_outs, ranks, runs, dtype, bank_dtype or dtype)


def measure(
    cases: Iterable[Workload],
    *,
    paths: Sequence[str] = TIMED,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    turns: int = 5,
    turn_s: float = 0.01,
    summary: Callable[[Sequence[float]], float] = statistics.median,
    known: Mapping[str, MixturePath] = PATHS,
) -> Iterator[Measurement]:
    """µs of a call of each path on each case; raises WrongResultError before it times a path that is wrong there.

    ``clock`` gives seconds; on a GPU it has to wait for the device first. A turn calls the path on each copy of the
    rows, and again until ``turn_s`` have passed. ``summary`` makes one number of the turns: on a machine that others
    use, ``min`` of many short ones. ``known`` maps names to paths.
    """
    for case in cases:
        packing, plan, x, y = prepare(case, torch.device(device), pooled="triton" in paths)
        groups = list(packing.groups.values())
        for path in paths:
            check(path, known[path], x, groups[0], plan)
            _turn(known[path], y, x, groups, plan, clock, 0.0)
        times: dict[str, list[float]] = {path: [] for path in paths}
        for _ in range(turns):
            for path in paths:
                times[path].append(_turn(known[path], y, x, groups, plan, clock, turn_s))
        for path in paths:
            yield Measurement(path, call_of(x, groups[0], plan), summary(times[path]) * 1e6)


def check(name: str, path: MixturePath, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """Raise WrongResultError where a path's result is not the reference's, on tokens spread over the step."""
    d_out = max(module.columns.stop for module in group.modules)
    y = torch.zeros(plan.tokens, d_out, dtype=x.dtype, device=x.device)
    path(y, x, group, plan)
    picked = sorted({round(place * (plan.tokens - 1) / CHECKED_TOKENS) for place in range(CHECKED_TOKENS + 1)})
    mixes = [run.mix for run in plan.runs for _ in range(run.tokens)]
    alone = Plan([Run(mixes[token], 1) for token in picked], plan.active, device=plan.device)
    expected = torch.zeros(len(picked), d_out, dtype=x.dtype, device=x.device)
    mixture_reference(expected, x[picked], group, alone)
    error = (y[picked].double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    tolerance = 1e-5 if x.dtype == torch.float32 == group.dtype else 1e-2
    if not error <= tolerance:
        raise WrongResultError(
            f"path {name!r} is off the reference by {error:.1e} of its size, allowed are {tolerance:.0e} "
            f"({plan.tokens} tokens, {group.shape}); it is not timed"
        )


def prepare(case: Workload, device: torch.device, *, pooled: bool) -> tuple[Packing, Plan, Tensor, Tensor]:
    """Cold copies of the workload's group in one packing, the plan, ``x [T, d_in]`` and ``y [T, Σ d_out]``.

    ``pooled``: the rows lie in pages, as Triton's path wants them.
    """
    copies = max(1, min(MAX_COPIES, -(-COLD_ELEMENTS[device.type] // max(case.elements, 1))))
    generator = torch.Generator().manual_seed(0)
    names = [[f"g{copy}.m{index}" for index in range(len(case.d_outs))] for copy in range(copies)]
    bank = Bank(
        [
            GroupSpec(f"g{copy}", case.d_in, tuple(map(ModuleSpec, paths, case.d_outs)))
            for copy, paths in enumerate(names)
        ],
        device=device,
        dtype=case.bank_dtype,
        pool_pages=sum(-(-rank // PAGE_ROWS) for rank in case.ranks.values()) if pooled else None,
    )
    for key, rank in case.ranks.items():
        one = [
            (
                torch.randn(rank, case.d_in, generator=generator) / case.d_in**0.5,
                torch.randn(d_out, rank, generator=generator) / rank**0.5,
            )
            for d_out in case.d_outs
        ]
        bank.add(key, bank.pages({name: pair for paths in names for name, pair in zip(paths, one, strict=True)}))
    packing = bank.pack(case.ranks)
    plan = Plan(case.runs, packing.keys, device=device)
    x = torch.randn(plan.tokens, case.d_in, generator=generator).to(device, case.dtype)
    return packing, plan, x, torch.zeros(plan.tokens, sum(case.d_outs), dtype=case.dtype, device=device)


def _turn(
    path: MixturePath,
    y: Tensor,
    x: Tensor,
    groups: Sequence[PackedGroup],
    plan: Plan,
    clock: Callable[[], float],
    turn_s: float,
) -> float:
    """Seconds of one call."""
    calls = 0
    start = now = clock()
    while calls == 0 or now - start < turn_s:
        for group in groups:
            path(y, x, group, plan)
        calls += len(groups)
        now = clock()
    return (now - start) / calls
