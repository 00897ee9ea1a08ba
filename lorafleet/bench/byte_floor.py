"""``lorafleet bench kernels --floor``: decoding's mixtures at a model's own shapes, against the bytes that they move.

A step of 64 tokens, two adapters each, on all groups of modules of a decoder layer. No kernel can take less time than
its bytes: the rows of the distinct active adapters once, the inputs read, the outputs read and written. On a GPU calls
are captured and replayed, as the engine does it, so that what launching costs on the host is not counted; groups are
cold, as in :mod:`lorafleet.kernels.measure`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lorafleet.bench.bandwidth import memory_bytes_per_s
from lorafleet.bench.jobs import Device
from lorafleet.bench.kernels import device_clock
from lorafleet.bench.shapes import SHARED_INPUT, Shape, projections
from lorafleet.kernels import PATHS, MixturePath, PackedGroup, Plan, Run
from lorafleet.kernels.measure import Workload, check, prepare

TOKENS = 64
WEIGHTS = (0.7, 0.3)
SPREAD = (8, 16, 32, 64)
"""Ranks of adapters of different ranks, in turn."""
TURNS = 20
CALLS = {"cpu": 1, "cuda": 32}
"""At least so many between two readings of the clock: waiting for a GPU takes as long as a short call."""


class Case(NamedTuple):
    adapters: str
    """in words"""
    group: str
    """the modules that share the input, joined"""
    workload: Workload


class Result(NamedTuple):
    adapters: str
    group: str
    path: str
    us: float
    floor_us: float
    launches: int | None
    """kernels that one call starts; None on a CPU"""

    @property
    def ratio(self) -> float:
        """To the floor."""
        return self.us / self.floor_us


def adapter_sets() -> dict[str, dict[str, int]]:
    """In words → adapter → rank."""
    return {
        "8 of rank 16": {f"a{n:02}": 16 for n in range(8)},
        "64 of rank 16": {f"a{n:02}": 16 for n in range(64)},
        "64 of ranks 8 to 64": {f"a{n:02}": SPREAD[n % len(SPREAD)] for n in range(64)},
    }


def cases(shape: Shape, *, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """Every set of adapters on every group of a decoder layer."""
    sizes = {projection.path: projection for projection in projections(shape)}
    for words, ranks in adapter_sets().items():
        keys = list(ranks)
        mixes = [
            tuple((keys[(token + place) % len(keys)], weight) for place, weight in enumerate(WEIGHTS))
            for token in range(TOKENS)
        ]
        runs = tuple(Run(mix, 1) for mix in mixes)
        for group in SHARED_INPUT:
            d_outs = tuple(sizes[path].d_out for path in group)
            name = "+".join(path.rpartition(".")[2].removesuffix("_proj") for path in group)
            yield Case(words, name, Workload(sizes[group[0]].d_in, d_outs, ranks, runs, dtype, dtype))


def floor_bytes(workload: Workload) -> int:
    """What a call has to move: rows and inputs once, outputs twice."""
    rows = workload.elements * workload.bank_dtype.itemsize
    moved = workload.tokens * (workload.d_in + 2 * sum(workload.d_outs)) * workload.dtype.itemsize
    return rows + moved


def bench_floor(found: Sequence[Case], *, paths: Sequence[str], device: Device) -> Iterator[Result]:
    """Each path on each case; raises WrongResultError before it times a path that is wrong there."""
    on = torch.device(device)
    clock = device_clock(device)
    per_s = memory_bytes_per_s(device, clock=clock)
    for adapters, group, workload in found:
        packing, plan, x, y = prepare(workload, on, pooled="triton" in paths)
        copies = list(packing.groups.values())
        groups = copies * -(-CALLS[device] // len(copies))
        for path in paths:
            check(path, PATHS[path], x, groups[0], plan)
            call = partial(_call_each, PATHS[path], y, x, groups, plan)
            us = timed_us(call, device=device, clock=clock) / len(groups)
            launches = count_launches(call) // len(groups) if device == "cuda" else None
            yield Result(adapters, group, path, us, floor_bytes(workload) / per_s * 1e6, launches)


def _call_each(path: MixturePath, y: Tensor, x: Tensor, groups: Sequence[PackedGroup], plan: Plan) -> None:
    for group in groups:
        path(y, x, group, plan)


def timed_us(call: Callable[[], None], *, device: Device, clock: Callable[[], float]) -> float:
    """µs of the fastest of some calls, warm; on a GPU replayed from a graph."""
    call()
    run = _captured(call) if device == "cuda" else call
    best = float("inf")
    for _ in range(TURNS):
        began = clock()
        run()
        best = min(best, clock() - began)
    return best * 1e6


def _captured(call: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    replay: Callable[[], None] = graph.replay
    return replay


def count_launches(call: Callable[[], None]) -> int:
    """Kernels that a call starts on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() or () if event.device_type.name == "CUDA"]
    return sum(not event.name.startswith("Mem") for event in on_device)  # copies and fills are no kernels of ours
