"""Every kernel path against the plain loop, and the loop against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafleet.errors import UnknownNameError
from lorafleet.kernels import (
    PATHS,
    Bank,
    GroupSpec,
    MixturePath,
    ModuleSpec,
    PackedGroup,
    Plan,
    Run,
    TokenRoute,
    mixture_path,
    paths_on,
)
from tests.kernels.cases import CASES, Case, check_against_reference, step_of


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("path", paths_on("cpu"))
def test_path_gives_what_the_reference_gives(path: str, case: Case) -> None:
    check_against_reference(PATHS[path], case)


@pytest.mark.parametrize("rank", [1, 2, 8, 15, 16, 17, 64, 255, 256])
@pytest.mark.parametrize("path", paths_on("cpu"))
def test_path_is_right_at_every_rank(path: str, rank: int) -> None:
    case = Case(40, (24,), {"a": (rank,), "b": (3,)}, (Run((("a", 0.5), ("b", 1.5)), 2), Run((("b", 1.0),), 1)))
    check_against_reference(PATHS[path], case)


def test_reference_is_the_sum_of_dense_products() -> None:
    case = CASES["mixed ranks and modules left alone"]
    packing, plan, x, y = step_of(case)
    group = packing.groups["group"]
    expected = y.double()
    t = 0
    for run in case.runs:
        for _ in range(run.tokens):
            for key, weight in run.mix:
                for module in group.modules:
                    mine = group.layout.adapter_of_row[module.rows] == packing.keys.index(key)
                    delta = module.b[mine].double().T @ group.a[module.rows][mine].double()
                    expected[t, module.columns] += weight * (delta @ x[t].double())
            t += 1
    PATHS["reference"](y, x, group, plan)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def product_of_sums(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """Wrong on purpose: gates A and B sums apart, so that cross terms come in."""
    gates = plan.row_gates(group.layout).gates
    h = x @ group.a.T
    for module in group.modules:
        y[:, module.columns] += (h[:, module.rows] * gates[:, module.rows].square()) @ module.b


def forgets_the_last_row(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """Wrong on purpose: one rank row short."""
    h = (x @ group.a.T) * plan.row_gates(group.layout).gates
    for module in group.modules:
        y[:, module.columns] += h[:, module.rows.start : module.rows.stop - 1] @ module.b[:-1]


def writes_past_the_end(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """Wrong on purpose: right inside y, and one row below it."""
    PATHS["dense"](y, x, group, plan)
    below = y._base
    assert below is not None
    below[-1, 0] = 0.0


@pytest.mark.parametrize("wrong", [product_of_sums, forgets_the_last_row, writes_past_the_end])
def test_checker_catches_a_wrong_kernel(wrong: MixturePath) -> None:
    with pytest.raises(AssertionError):
        check_against_reference(wrong, CASES["mixed ranks and modules left alone"])


def routes_among_all(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
    """Wrong on purpose: lets every active adapter compete, whatever the route allows."""
    runs = [
        run._replace(mix=TokenRoute(plan.active, run.mix.top_k, run.mix.temperature))
        if isinstance(run.mix, TokenRoute)
        else run
        for run in plan.runs
    ]
    PATHS["dense"](y, x, group, Plan(runs, plan.active))


def test_checker_catches_a_route_without_its_mask() -> None:
    with pytest.raises(AssertionError):
        check_against_reference(routes_among_all, CASES["routed tokens"])


@pytest.mark.parametrize("path", paths_on("cpu"))
def test_a_closed_gate_shuts_out_an_adapter_that_overflows(path: str) -> None:
    bank = Bank([GroupSpec("group", 4, (ModuleSpec("m0", 3),))])
    bank.add("good", bank.pages({"m0": (torch.ones(2, 4), torch.ones(3, 2))}))
    bank.add("huge", bank.pages({"m0": (torch.full((2, 4), 3e38), torch.full((3, 2), 3e38))}))
    packing = bank.pack(["good", "huge"])
    plan = Plan([Run((("good", 1.0),), 1), Run((("huge", 1.0),), 1), Run((), 1)], packing.keys)
    y = torch.zeros(3, 3)
    PATHS[path](y, torch.ones(3, 4), packing.groups["group"], plan)
    assert y[0].tolist() == [8.0, 8.0, 8.0]
    assert not y[1].isfinite().any()
    assert y[2].tolist() == [0.0, 0.0, 0.0]


def test_an_unknown_path_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"dense, .*reference"):
        mixture_path("sparse")
