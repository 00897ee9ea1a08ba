"""The summary of kernel measurements."""

from __future__ import annotations

import pytest
import torch

from lorafleet.bench.kernels import CHOSEN, all_workloads, bench_kernels, summarise
from lorafleet.kernels import CostModel, Run
from lorafleet.kernels.cost_model import Call, Coefficients, Measurement, Segment
from lorafleet.kernels.measure import TIMED, Workload


def call(tokens: int) -> Call:
    return Call(64, (64,), (8,), tokens, (Segment(tokens, 8),), True, "float32")


MEASURED = [
    Measurement("dense", call(1), 10.0), Measurement("segmented", call(1), 20.0),
    Measurement("dense", call(2), 40.0), Measurement("segmented", call(2), 10.0),
]  # fmt: skip


def test_each_path_is_compared_with_the_fastest_of_its_workload() -> None:
    found = {summary.path: summary[2:] for summary in summarise(MEASURED, model=None)}
    assert found == {"dense": (1, 2, pytest.approx(2.5), 4.0), "segmented": (1, 2, pytest.approx(1.5), 2.0)}


def test_what_a_model_chooses_is_compared_as_well() -> None:
    only_dense = CostModel({"dense float32": Coefficients(1.0, 0.0, 0.0)})
    found = {summary.path: summary for summary in summarise(MEASURED, model=only_dense)}
    assert found[CHOSEN][2:] == found["dense"][2:]


def test_workloads_come_in_every_dtype_of_the_engine() -> None:
    kinds = {(case.dtype, case.bank_dtype) for case in all_workloads()}
    assert kinds == {
        (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
    }  # fmt: skip


def test_every_path_of_the_device_is_measured() -> None:
    case = Workload(16, (16,), {"a": 2}, (Run((("a", 1.0),), 3),), torch.float32, torch.float32)
    assert [measurement.path for measurement in bench_kernels([case], device="cpu")] == list(TIMED)
