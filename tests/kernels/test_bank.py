"""How adapter rows are kept and packed, and how gates are spread over them."""

from __future__ import annotations

import pytest
import torch

from lorafleet.kernels import Bank, GroupSpec, ModuleSpec, Plan, Run, mixture_path
from lorafleet.kernels.dense import library_multiplies_bfloat16

GROUPS = (
    GroupSpec("qkv", 8, (ModuleSpec("q", 6), ModuleSpec("k", 4), ModuleSpec("v", 4))),
    GroupSpec("o", 6, (ModuleSpec("o", 8),)),
)
SHAPES = {"q": (8, 6), "k": (8, 4), "v": (8, 4), "o": (6, 8)}


def bank_with(**adapters: dict[str, int]) -> Bank:
    """Adapters as module → rank; every A entry of the n-th adapter is n."""
    bank = Bank(GROUPS)
    for number, (key, ranks) in enumerate(adapters.items(), start=1):
        bank.add(
            key,
            bank.pages(
                {
                    m: (torch.full((r, SHAPES[m][0]), float(number)), torch.ones(SHAPES[m][1], r))
                    for m, r in ranks.items()
                }
            ),
        )
    return bank


def test_packing_holds_exactly_the_ranks_module_by_module() -> None:
    packing = bank_with(a={"q": 2, "v": 1, "o": 3}, b={"q": 5, "k": 1}).pack(["b", "a"])
    assert packing.keys == ("a", "b")
    assert packing.rows == 12
    qkv = packing.groups["qkv"]
    assert [(m.columns, m.rows) for m in qkv.modules] == [
        (slice(0, 6), slice(0, 7)),
        (slice(6, 10), slice(7, 8)),
        (slice(10, 14), slice(8, 9)),
    ]
    assert qkv.layout.adapter_of_row.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0]
    assert qkv.a[:, 0].tolist() == [1, 1, 2, 2, 2, 2, 2, 2, 1]
    assert packing.groups["o"].a.shape == (3, 6)


def test_groups_that_no_active_adapter_changes_are_absent() -> None:
    assert set(bank_with(a={"q": 2, "o": 3}, b={"o": 1}).pack(["b"]).groups) == {"o"}


def test_equal_layouts_are_one_object_so_that_gates_are_spread_once() -> None:
    groups = [GroupSpec(f"g{i}", 4, (ModuleSpec(f"m{i}", 4),)) for i in range(3)]
    bank = Bank(groups)
    bank.add("a", bank.pages({f"m{i}": (torch.ones(2 + (i == 2), 4), torch.ones(4, 2 + (i == 2))) for i in range(3)}))
    packed = bank.pack(["a"]).groups
    assert packed["g0"].layout is packed["g1"].layout
    assert packed["g0"].layout is not packed["g2"].layout


def test_packing_is_kept_while_the_active_set_stays() -> None:
    bank = bank_with(a={"q": 2}, b={"q": 2})
    first = bank.pack(["a", "b"])
    assert bank.pack(["b", "a"]) is first
    assert bank.packings_total == 1


def test_packing_is_kept_for_a_subset_that_needs_at_least_half_of_the_rows() -> None:
    bank = bank_with(a={"q": 4}, b={"q": 4}, c={"q": 1})
    first = bank.pack(["a", "b", "c"])
    assert bank.pack(["a", "c"]) is first
    assert bank.pack(["c"]).keys == ("c",)


def test_removed_adapter_leaves_the_packing_too() -> None:
    bank = bank_with(a={"q": 2}, b={"q": 2})
    bank.pack(["a", "b"])
    bank.remove("a")
    assert "a" not in bank
    assert bank.pack(["b"]).keys == ("b",)


@pytest.mark.parametrize(
    ("path", "a", "b", "words"),
    [
        ("gate", (2, 8), (6, 2), "none of this bank's groups"),
        ("q", (2, 7), (6, 2), r"expected \[r, 8\] and \[6, r\]"),
        ("q", (2, 8), (6, 3), r"expected \[r, 8\] and \[6, r\]"),
    ],
)
def test_factors_that_do_not_fit_are_refused(path: str, a: tuple[int, int], b: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Bank(GROUPS).pages({path: (torch.ones(a), torch.ones(b))})


def test_a_module_in_two_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Bank([GroupSpec("x", 4, (ModuleSpec("m", 4),)), GroupSpec("y", 4, (ModuleSpec("m", 4),))])


def test_plan_spreads_gates_over_tokens_and_adds_duplicates_up() -> None:
    plan = Plan([Run((("a", 0.5), ("b", 1.0), ("a", 0.25)), 2), Run((), 1), Run((("b", -2.0),), 1)], ["a", "b"])
    assert plan.tokens == 4
    assert plan.gates.tolist() == [[0.75, 1.0], [0.75, 1.0], [0.0, 0.0], [0.0, -2.0]]


def test_plan_refuses_an_adapter_that_is_not_active() -> None:
    with pytest.raises(ValueError, match="'c', which is not among the 2 active"):
        Plan([Run((("c", 1.0),), 1)], ["a", "b"])


def test_row_gates_know_where_no_gate_is_closed() -> None:
    packing = bank_with(a={"q": 2}, b={"q": 1}).pack(["a", "b"])
    layout = packing.groups["qkv"].layout
    opened = Plan([Run((("a", 1.0), ("b", 2.0)), 1)], packing.keys).row_gates(layout)
    assert opened.gates.tolist() == [[1.0, 1.0, 2.0]]
    assert opened.closed is None
    half = Plan([Run((("b", 2.0),), 1)], packing.keys).row_gates(layout)
    assert half.closed is not None
    assert half.closed.tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("weights", "exact"),
    [((1.0, 0.5), True), ((255 / 64, 4.0), True), ((0.7,), False), ((257 / 64,), False), ((), True)],
)
def test_plan_knows_whether_bfloat16_holds_its_gates(weights: tuple[float, ...], exact: bool) -> None:
    mix = tuple((f"a{index}", weight) for index, weight in enumerate(weights))
    assert Plan([Run(mix, 1)], [key for key, _ in mix]).exact_in_bfloat16 is exact


@pytest.mark.skipif(not library_multiplies_bfloat16(), reason="no bfloat16 in oneDNN on this processor")
def test_library_forms_do_not_keep_the_plain_rows() -> None:
    bank = Bank(GROUPS, dtype=torch.bfloat16)
    for key in ("a", "b"):
        bank.add(key, bank.pages({"q": (torch.ones(64, 8), torch.ones(6, 64))}))
    packing = bank.pack(["a", "b"])
    group = packing.groups["qkv"]
    x, y = torch.ones(2, 8).bfloat16(), torch.zeros(2, 14).bfloat16()
    mixture_path("dense")(y, x, group, Plan([Run((("a", 1.0), ("b", 0.5)), 2)], packing.keys))
    assert y[0, 0] == 64 * 8 * 1.5
    assert {"a_library"} <= set(vars(group))
    assert "a" not in vars(group)
    assert "b" not in vars(group.modules[0])
