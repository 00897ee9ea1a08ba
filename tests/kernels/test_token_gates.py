"""Token-level routing: from logits to gates, alone and inside a step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorafleet.kernels import PATHS, Bank, GroupSpec, ModuleSpec, Plan, Run, TokenRoute, paths_on
from lorafleet.kernels.functional import mixture, routed_mixture
from lorafleet.kernels.token_gates import token_gates
from tests.kernels.cases import CASES, Case, bank_of, check_close, step_of


def gates_of(
    logits: list[list[float]], *, top_k: int, temperature: float = 1.0, barred: tuple[int, ...] = ()
) -> Tensor:
    rows = torch.tensor(logits)
    eligible = torch.ones(rows.shape, dtype=torch.bool)
    eligible[:, list(barred)] = False
    return token_gates(rows, eligible=eligible, top_k=top_k, temperature=temperature)


def test_the_chosen_share_one_by_softmax_and_the_others_are_exact_zeros() -> None:
    gates = gates_of([[0.0, math.log(3.0), -1.0, -2.0]], top_k=2)
    torch.testing.assert_close(gates, torch.tensor([[0.25, 0.75, 0.0, 0.0]]))
    assert gates[0, 2:].tolist() == [0.0, 0.0]


def test_temperature_divides_the_logits() -> None:
    gates = gates_of([[0.0, 2 * math.log(3.0)]], top_k=2, temperature=2.0)
    torch.testing.assert_close(gates, torch.tensor([[0.25, 0.75]]))


def test_the_mask_comes_before_the_choice_and_the_softmax() -> None:
    """An adapter that is not eligible takes no place among the chosen and no weight from them, whatever its logit."""
    for logit in (9.0, math.inf, math.nan):
        torch.testing.assert_close(
            gates_of([[logit, 0.0, math.log(3.0)]], top_k=2, barred=(0,)), torch.tensor([[0.0, 0.25, 0.75]])
        )


def test_ties_go_to_the_first_columns() -> None:
    assert gates_of([[1.0, 2.0, 2.0, 2.0]], top_k=2).tolist() == [[0.0, 0.5, 0.5, 0.0]]
    assert gates_of([[0.0] * 70], top_k=3).nonzero()[:, 1].tolist() == [0, 1, 2]


def test_fewer_eligible_than_top_k_are_all_chosen_and_none_gives_none() -> None:
    torch.testing.assert_close(gates_of([[5.0, 0.0, 0.0]], top_k=9, barred=(0,)), torch.tensor([[0.0, 0.5, 0.5]]))
    assert gates_of([[5.0, 1.0]], top_k=1, barred=(0, 1)).tolist() == [[0.0, 0.0]]


def test_extreme_logits_and_temperatures_give_finite_gates_that_sum_to_one() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [88.0, 89.0, 90.0], [-1e4, -2e4, -3e4]])
    for temperature in (1e-6, 1.0, 1e6):
        gates = token_gates(logits, eligible=torch.ones(3, 3, dtype=torch.bool), top_k=2, temperature=temperature)
        assert gates.isfinite().all()
        torch.testing.assert_close(gates.sum(1), torch.ones(3))


def test_each_token_has_its_own_top_k_and_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]] * 2)
    gates = token_gates(
        logits,
        eligible=torch.ones(2, 3, dtype=torch.bool),
        top_k=torch.tensor([[1], [3]]),
        temperature=torch.tensor([[1.0], [0.5]]),
    )
    assert gates[0].tolist() == [0.0, 0.0, 1.0]
    torch.testing.assert_close(gates[1], (logits[1] * 2).softmax(0))


def test_what_is_not_chosen_gets_no_gradient() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 9.0]], requires_grad=True)
    eligible = torch.tensor([[True, True, True, False]])
    token_gates(logits, eligible=eligible, top_k=2, temperature=1.0)[0, 0].backward()
    assert logits.grad is not None
    assert logits.grad[0, 2:].tolist() == [0.0, 0.0]
    assert logits.grad[0, 0] > 0 > logits.grad[0, 1]


def random_factors(*ranks: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return random(4, 6), [random(rank, 6) for rank in ranks], [random(5, rank) for rank in ranks]


def test_gradients_of_a_mixture_in_gates_factors_and_input() -> None:
    x, a, b = random_factors(1, 3, 2)
    gates = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, gates, *f: mixture(x, f[:3], f[3:], gates), (x, gates, *a, *b))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradients_of_a_routed_mixture_in_gate_vectors_factors_and_input(top_k: int) -> None:
    x, a, b = random_factors(1, 3, 2)
    vectors = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    eligible = torch.tensor([[True, True, True], [True, False, True], [False, True, True], [False, False, True]])

    def routed(x: Tensor, vectors: Tensor, *factors: Tensor) -> Tensor:
        return routed_mixture(x, factors[:3], factors[3:], vectors, top_k=top_k, temperature=0.7, eligible=eligible)

    assert torch.autograd.gradcheck(routed, (x, vectors, *a, *b))


def test_the_functional_mixture_is_what_the_reference_computes() -> None:
    case = Case(24, (10,), {"a": (3,), "b": (5,)}, (Run(TokenRoute(("a", "b"), top_k=1, temperature=0.5), 6),))
    packing, plan, x, y = step_of(case)
    group = packing.groups["group"]
    module = group.modules[0]
    owner = group.layout.adapter_of_row
    a, b = ([rows[owner == k] for k in range(2)] for rows in (group.a, module.b))
    expected = y + routed_mixture(x, a, [rows.T for rows in b], group.gate_rows, top_k=1, temperature=0.5)
    PATHS["reference"](y, x, group, plan)
    check_close(y, expected)


@pytest.mark.parametrize("path", paths_on("cpu"))
def test_the_best_of_two_adapters_answers_each_token_of_a_routed_run(path: str) -> None:
    """Gate vectors that look at one input each, next to a token whose gates are fixed."""
    bank = Bank([GroupSpec("group", 2, (ModuleSpec("m", 1),))])
    for key, gate, value in (("left", (1.0, 0.0), 10.0), ("right", (0.0, 1.0), 20.0)):
        factors = (torch.ones(1, 2), torch.full((1, 1), value))
        bank.add(key, bank.pages({"m": factors}, {"m": torch.tensor(gate)}))
    packing = bank.pack(["left", "right"])
    plan = Plan([Run(TokenRoute(("left", "right"), top_k=1), 2), Run((("left", 0.5),), 1)], packing.keys)
    y = torch.zeros(3, 1)
    PATHS[path](y, torch.tensor([[3.0, 1.0], [1.0, 3.0], [1.0, 3.0]]), packing.groups["group"], plan)
    assert y[:, 0].tolist() == [40.0, 80.0, 20.0]


@pytest.mark.parametrize("path", paths_on("cpu"))
def test_an_adapter_without_gates_cannot_be_routed(path: str) -> None:
    bank = Bank([GroupSpec("group", 4, (ModuleSpec("m", 3),))])
    factors = {"m": (torch.ones(2, 4), torch.ones(3, 2))}
    bank.add("with", bank.pages(factors, {"m": torch.ones(4)}))
    bank.add("without", bank.pages(factors))
    bank.require_gates(["with"])
    with pytest.raises(ValueError, match="no gates for token-level routing in: 'without'"):
        bank.require_gates(["with", "without"])
    packing = bank.pack(["with", "without"])
    plan = Plan([Run(TokenRoute(("with", "without"), top_k=1), 1)], packing.keys)
    y = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="'without'"):
        PATHS[path](y, torch.ones(1, 4), packing.groups["group"], plan)
    assert y.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("path", paths_on("cpu"))
def test_an_adapter_without_rows_in_a_group_takes_no_part_in_its_routing(path: str) -> None:
    groups = [GroupSpec("one", 4, (ModuleSpec("m", 3),)), GroupSpec("two", 4, (ModuleSpec("n", 3),))]
    bank = Bank(groups)
    pair = (torch.ones(1, 4), torch.ones(3, 1))
    bank.add("both", bank.pages({"m": pair, "n": pair}, {"m": torch.zeros(4), "n": torch.zeros(4)}))
    bank.add("one", bank.pages({"m": pair}, {"m": torch.ones(4)}))
    packing = bank.pack(["both", "one"])
    plan = Plan([Run(TokenRoute(("both", "one"), top_k=2), 1)], packing.keys)
    y = torch.zeros(1, 3)
    PATHS[path](y, torch.ones(1, 4), packing.groups["two"], plan)
    assert y.tolist() == [[4.0, 4.0, 4.0]]  # all of the weight is with the one adapter that is there


@pytest.mark.parametrize("path", paths_on("cpu"))
def test_fixed_gates_are_the_same_with_and_without_routed_neighbours(path: str) -> None:
    case = CASES["routed tokens"]
    packing, plan, x, y = step_of(case)
    alone = y.clone()
    fixed = torch.tensor([4, 5, 10, 11])
    PATHS[path](y, x, packing.groups["group"], plan)
    runs = [Run((("b", 0.3), ("d", 1.0)), 2), Run((("a", 1.0),), 2)]
    part = alone[fixed]
    PATHS[path](part, x[fixed], packing.groups["group"], Plan(runs, packing.keys))
    check_close(y[fixed], part)


def test_a_step_without_routed_tokens_needs_no_gate_rows() -> None:
    packing, plan, x, y = step_of(CASES["mixed ranks and modules left alone"])
    group = packing.groups["group"]
    for path in paths_on("cpu"):
        PATHS[path](y, x, group, plan)
    assert not {"gate_rows", "a_and_gate_rows", "gate_rows_float32"} & set(vars(group))


@pytest.mark.parametrize(
    ("keys", "top_k", "temperature", "words"),
    [
        ((), 1, 1.0, "at least one eligible key"),
        (("a",), 0, 1.0, "top_k 0"),
        (("a",), True, 1.0, "top_k True"),
        (("a",), 1, 0.0, "temperature 0.0"),
        (("a",), 1, math.inf, "temperature inf"),
        (("a",), 1, math.nan, "temperature nan"),
    ],
)
def test_routes_that_mean_nothing_are_refused(
    keys: tuple[str, ...], top_k: int, temperature: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        TokenRoute(keys, top_k, temperature)


def test_equal_routes_are_equal_in_whatever_order_their_keys_came() -> None:
    assert TokenRoute(("b", "a", "b"), 2) == TokenRoute(("a", "b"), 2, 1.0)
    assert hash(TokenRoute(("b", "a"), 2)) == hash(TokenRoute(("a", "b"), 2))


def test_a_route_to_an_adapter_that_is_not_active_is_refused() -> None:
    with pytest.raises(ValueError, match="'c', which is not among the 2 active"):
        Plan([Run(TokenRoute(("a", "c"), 1), 1)], ["a", "b"])


GROUPS = (
    GroupSpec("qkv", 4, (ModuleSpec("q", 3), ModuleSpec("k", 3), ModuleSpec("v", 3))),
    GroupSpec("o", 3, (ModuleSpec("o", 4),)),
)


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        ({"k": 4}, "expected one for the first module that the adapter changes in each group: k, o"),
        ({"v": 4, "o": 3}, "found gate vectors for o, v; expected one"),
        ({"k": 4, "o": 3, "x": 4}, "found gate vectors for k, o, x; expected one"),
        ({"k": 3, "o": 3}, r"k: found a gate vector \[3\], expected \[4\]"),
    ],
)
def test_gate_vectors_that_do_not_fit_the_bank_are_refused(gates: dict[str, int], words: str) -> None:
    factors = {m: (torch.ones(2, d), torch.ones(o, 2)) for m, d, o in (("k", 4, 3), ("v", 4, 3), ("o", 3, 4))}
    with pytest.raises(ValueError, match=words):
        Bank(GROUPS).pages(factors, {path: torch.ones(size) for path, size in gates.items()})


def test_the_modules_of_a_group_share_its_gate() -> None:
    """One routing decision for q, k and v of a token."""
    case = Case(8, (4, 5), {"a": (2, 2), "b": (2, 2)}, (Run(TokenRoute(("a", "b"), top_k=1), 5),))
    packing, plan, x, y = step_of(case)
    group = packing.groups["group"]
    assert group.gate_rows.shape == (2, 8)
    assert group.layout.gated == (0, 1)
    assert len(bank_of(case).pack(["b"]).groups["group"].gate_rows) == 1
    PATHS["dense"](y, x, group, plan)
