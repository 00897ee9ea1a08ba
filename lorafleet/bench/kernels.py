"""``lorafleet bench kernels``: the kernel paths on this machine, and a cost model fitted to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from statistics import mean
from typing import NamedTuple

import torch

from lorafleet.bench.jobs import Device
from lorafleet.kernels import CostModel, paths_on
from lorafleet.kernels.cost_model import Measurement
from lorafleet.kernels.measure import TIMED, Workload, measure, workloads

CHOSEN = "chosen by the cost model"


class PathSummary(NamedTuple):
    """How a path did on the workloads of one dtype."""

    dtype: str
    path: str
    fastest: int
    """workloads on which no other path was faster"""
    workloads: int
    mean_ratio: float
    """its time to that of the fastest path, over the workloads"""
    worst_ratio: float


def all_workloads() -> Iterator[Workload]:
    """Inputs and rows in bfloat16, in float32, and rows in float32 under inputs in bfloat16."""
    yield from workloads(torch.bfloat16)
    yield from workloads(torch.float32)
    yield from workloads(torch.bfloat16, bank_dtype=torch.float32)


def bench_kernels(cases: Iterable[Workload], *, device: Device) -> Iterator[Measurement]:
    """Measure every path that runs on the device; those of one workload come together."""
    paths = [*TIMED, *(name for name in paths_on(device) if name == "triton")]
    return measure(cases, paths=paths, device=device, clock=device_clock(device))


def device_clock(device: Device) -> Callable[[], float]:
    """Seconds; on a GPU once it has done all that was asked of it."""

    def waiting() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return waiting if device == "cuda" else time.perf_counter


def summarise(measurements: Sequence[Measurement], *, model: CostModel | None) -> list[PathSummary]:
    """Each path, and what ``model`` would have chosen, against the fastest path of each workload."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for call, group in groupby(measurements, key=lambda measurement: measurement.call):
        us = {measurement.path: measurement.us for measurement in group}
        fastest = min(us.values())
        for path, took in us.items():
            ratios.setdefault((call.dtype, path), []).append(took / fastest)
        if model is not None:
            ratios.setdefault((call.dtype, CHOSEN), []).append(us[model.cheapest(call, list(us))] / fastest)
    return [
        PathSummary(dtype, path, sum(ratio == 1.0 for ratio in found), len(found), mean(found), max(found))
        for (dtype, path), found in ratios.items()
    ]
