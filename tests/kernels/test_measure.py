"""Timing: medians by a clock that is given, and nothing wrong is timed."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import Tensor

from lorafleet.kernels import PATHS, MixturePath, PackedGroup, Plan, Run
from lorafleet.kernels.measure import Workload, WrongResultError, check, measure, prepare, workloads

CASE = Workload(24, (16, 8), {"a": 3, "b": 5}, (Run((("a", 0.5),), 3), Run((("b", 1.5),), 9)), *[torch.float32] * 2)


class Ticks:
    """A clock that each call of a path moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def charged(self, path: MixturePath, seconds: list[float]) -> MixturePath:
        """The path, with a time for each call."""
        calls = count()

        def timed(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
            path(y, x, group, plan)
            self.now += seconds[next(calls) % len(seconds)]

        return timed


def test_each_path_is_timed_by_the_clock_that_was_given() -> None:
    clock = Ticks()
    known = {"slow": clock.charged(PATHS["dense"], [3e-6]), "fast": clock.charged(PATHS["segmented"], [1e-6])}
    found = list(measure([CASE], paths=["slow", "fast"], clock=clock, turn_s=1e-4, turns=3, known=known))
    assert [m.path for m in found] == ["slow", "fast"]
    assert [m.us for m in found] == pytest.approx([3.0, 1.0])
    assert found[0].call.tokens == 12
    assert found[0].call.rows == (8, 8)


def test_a_wrong_path_is_not_timed() -> None:
    def wrong(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
        PATHS["dense"](y, x, group, plan)
        y[-1] *= 1.01

    with pytest.raises(WrongResultError, match="path 'wrong' is off the reference"):
        list(measure([CASE], paths=["wrong"], known={"wrong": wrong}))


def test_a_path_that_gives_nan_is_not_timed() -> None:
    def empty(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
        y.fill_(float("nan"))

    with pytest.raises(WrongResultError):
        list(measure([CASE], paths=["empty"], known={"empty": empty}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_paths_are_timed_on_a_workload(dtype: torch.dtype) -> None:
    case = CASE._replace(dtype=dtype, bank_dtype=dtype)
    found = {m.path: m.us for m in measure([case], turns=1, turn_s=0.0)}
    assert set(found) == {"dense", "dense_float32", "segmented"}
    assert min(found.values()) > 0


def test_the_shipped_workloads_cover_decode_and_prefill_with_and_without_segments() -> None:
    cases = list(workloads(torch.bfloat16))
    assert {case.tokens for case in cases} == {1, 8, 32, 128, 256}
    assert {len({run.mix for run in case.runs}) for case in cases} >= {1, 4, 16}
    assert all(case.bank_dtype == torch.bfloat16 for case in cases)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_workload_is_prepared_with_pages_for_the_path_that_reads_them(pooled: bool) -> None:
    packing, plan, x, y = prepare(CASE, torch.device("cpu"), pooled=pooled)
    assert len(packing.groups) > 1 and y.shape == (12, 24)
    for group in packing.groups.values():
        assert (group.pooled is not None) is pooled
    check("dense", PATHS["dense"], x, next(iter(packing.groups.values())), plan)
