"""Mixtures against their bytes: what is run, and what it has to move."""

from __future__ import annotations

import pytest
import torch

from lorafleet.bench.bandwidth import memory_bytes_per_s
from lorafleet.bench.byte_floor import Result, adapter_sets, bench_floor, cases, floor_bytes
from lorafleet.bench.shapes import SHAPES
from lorafleet.kernels import Run
from lorafleet.kernels.measure import Workload


def test_every_set_of_adapters_meets_every_group_of_a_layer() -> None:
    found = list(cases(SHAPES["8B"]))
    assert {(case.adapters, case.group) for case in found} == {
        (words, group) for words in adapter_sets() for group in ("q+k+v", "o", "gate+up", "down")
    }
    assert len(found) == 12


def test_each_of_64_requests_has_two_adapters() -> None:
    for case in cases(SHAPES["8B"]):
        assert len(case.workload.runs) == case.workload.tokens == 64
        assert all(len({key for key, _ in run.mix}) == 2 for run in case.workload.runs if isinstance(run.mix, tuple))
        assert {key for run in case.workload.runs for key, _ in run.mix} == case.workload.ranks.keys()  # type: ignore[union-attr]


def test_the_sets_are_those_of_the_target() -> None:
    sets = adapter_sets()
    assert [len(ranks) for ranks in sets.values()] == [8, 64, 64]
    assert set(sets["8 of rank 16"].values()) == set(sets["64 of rank 16"].values()) == {16}
    assert set(sets["64 of ranks 8 to 64"].values()) == {8, 16, 32, 64}


def test_the_floor_counts_rows_and_inputs_once_and_outputs_twice() -> None:
    workload = Workload(10, (6, 4), {"a": 2, "b": 3}, (Run((("a", 1.0),), 7),), torch.bfloat16, torch.bfloat16)
    # 5 rows of 10 + 6 and of 10 + 4; 7 tokens of 10 in and 10 out.
    assert floor_bytes(workload) == 2 * (5 * (16 + 14) + 7 * (10 + 20))


def test_a_path_is_timed_against_the_floor() -> None:
    tiny = [case for case in cases(SHAPES["tiny"]) if case.adapters == "8 of rank 16"]
    found = list(bench_floor(tiny, paths=["dense"], device="cpu"))
    assert [result.group for result in found] == ["q+k+v", "o", "gate+up", "down"]
    assert all(result.us > 0 and result.floor_us > 0 and result.launches is None for result in found)


def test_the_ratio_is_of_the_time_to_the_floor() -> None:
    assert Result("x", "o", "triton", 3.0, 2.0, 2).ratio == pytest.approx(1.5)


def test_memory_is_timed_by_the_clock_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.bench.bandwidth.COPIED_BYTES", {"cpu": 1000})
    ticks = iter(range(100))
    assert memory_bytes_per_s("cpu", clock=lambda: float(next(ticks))) == 2000.0
