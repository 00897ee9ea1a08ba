"""How tokens are grouped by what they need, and that each group touches only its own rows."""

from __future__ import annotations

import torch

from lorafleet.kernels import Bank, GroupSpec, ModuleSpec, Plan, Run, TokenRoute
from lorafleet.kernels.packing import SUBSET_SHARE
from lorafleet.kernels.segmented import mixture_segmented
from tests.kernels.cases import Case, step_of

ALL = frozenset({0, 1, 2})


def test_tokens_are_grouped_by_adapters_whatever_their_weights() -> None:
    runs = [
        Run((("a", 1.0), ("b", 0.5)), 2),
        Run((("b", 0.1), ("a", 7.0)), 3),
        Run((("c", 1.0),), 1),
        Run((), 4),
        Run((("c", 0.0), ("a", 1.0), ("b", 1.0)), 1),
        Run((("c", 2.0),), 0),
    ]
    plan = Plan(runs, ["a", "b", "c"])
    both, lone = plan.segments(ALL)
    assert both.adapters == (0, 1)
    assert isinstance(both.tokens, torch.Tensor)
    assert both.tokens.tolist() == [0, 1, 2, 3, 4, 10]
    torch.testing.assert_close(both.plan.gates, torch.tensor([[1.0, 0.5]] * 2 + [[7.0, 0.1]] * 3 + [[1.0, 1.0]]))
    assert (lone.adapters, lone.tokens) == ((2,), slice(5, 6))
    assert plan.segments(ALL) is plan.segments(ALL)


def test_neighbouring_runs_are_one_slice() -> None:
    plan = Plan([Run((), 2), Run((("a", 1.0),), 2), Run((("a", 2.0),), 3)], ["a"])
    (segment,) = plan.segments(frozenset({0}))
    assert segment.tokens == slice(2, 7)


def test_adapters_without_rows_in_the_group_do_not_split_segments() -> None:
    plan = Plan([Run((("a", 1.0), ("c", 1.0)), 1), Run((("a", 1.0),), 1), Run((("c", 1.0),), 1)], ["a", "b", "c"])
    (segment,) = plan.segments(frozenset({0, 1}))
    assert (segment.adapters, segment.tokens) == ((0,), slice(0, 2))


def test_routed_tokens_stand_apart_from_fixed_ones() -> None:
    plan = Plan([Run(TokenRoute(("a", "b"), 1), 2), Run((("a", 1.0), ("b", 1.0)), 2)], ["a", "b", "c"])
    assert [(s.adapters, s.plan.routing is not None) for s in plan.segments(ALL)] == [((0, 1), True), ((0, 1), False)]


def poisoned(case: Case, key: str) -> tuple[Bank, Plan]:
    """The case's bank, with NaN in every factor of one adapter."""
    bank = Bank([GroupSpec("group", case.d_in, (ModuleSpec("m0", case.d_outs[0]),))])
    for name, (rank,) in case.ranks.items():
        value = float("nan") if name == key else 1.0
        bank.add(
            name, bank.pages({"m0": (torch.full((rank, case.d_in), value), torch.full((case.d_outs[0], rank), value))})
        )
    return bank, Plan(case.runs, tuple(sorted(case.ranks)))


def test_a_segment_touches_only_its_own_rows() -> None:
    case = Case(6, (4,), {"a": (2,), "b": (3,), "c": (1,)}, (Run((("a", 1.0), ("c", 1.0)), 2), Run((("b", 1.0),), 1)))
    bank, plan = poisoned(case, "b")
    y = torch.zeros(3, 4)
    mixture_segmented(y, torch.ones(3, 6), bank.pack("abc").groups["group"], plan)
    assert y[:2].tolist() == [[18.0] * 4] * 2
    assert y[2].isnan().all()


def test_rows_of_neighbouring_adapters_are_views() -> None:
    case = Case(6, (4,), {"a": (2,), "b": (3,), "c": (1,)}, (Run((), 1),))
    group = step_of(case)[0].groups["group"]
    part = group.subset((0, 1))
    assert part.a.data_ptr() == group.a.data_ptr()
    assert part.modules[0].b.data_ptr() == group.modules[0].b.data_ptr()
    assert torch.equal(group.subset((0, 2)).a, group.a[[0, 1, 5]])
    assert group.subset((0, 1, 2)) is group
    assert group.subset((0, 2)) is group.subset((0, 2))


def test_copies_for_segments_are_bounded() -> None:
    keys = {f"a{i}": (2,) for i in range(8)}
    group = step_of(Case(6, (4,), keys, (Run((), 1),)))[0].groups["group"]
    for bits in range(1, 255):
        group.subset(tuple(i for i in range(8) if bits >> i & 1))
        assert sum(part.row_count for part in group._subsets.values()) <= SUBSET_SHARE * group.row_count
