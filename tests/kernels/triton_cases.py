"""The Triton path against the reference.

Run by test_triton.py in a process of its own: in Triton's interpreter, which has to be chosen before Triton is first
imported, or on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafleet.kernels import Bank, GroupSpec, ModuleSpec, Plan, Run, TokenRoute
from lorafleet.kernels.captured import MOST_ITEMS, CapturedMixture, capacity_of
from lorafleet.kernels.pool import PAGE_ROWS
from lorafleet.kernels.reference import mixture_reference
from lorafleet.kernels.triton import (
    INTERPRETED,
    Capacity,
    Tiles,
    Work,
    launch,
    mixture_triton,
    work_for,
)
from tests.kernels.cases import CASES, MIXED_RANKS, Case, bank_of, check_against_reference, check_close, step_of

DEVICE = "cpu" if INTERPRETED else "cuda"


def check(case: Case) -> None:
    check_against_reference(mixture_triton, case, pool_pages=40, device=DEVICE)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_gives_what_the_reference_gives(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 2, 8, 15, 16, 17, 64, 255, 256])
def test_it_is_right_at_every_rank(rank: int, dtype: torch.dtype) -> None:
    runs = (Run((("a", 0.5), ("b", 1.5)), 2), Run((("b", 1.0),), 1))
    check(Case(40, (24,), {"a": (rank,), "b": (3,)}, runs, dtype, dtype))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 129])
def test_it_is_right_at_every_edge_of_a_block_of_tokens(tokens: int) -> None:
    runs = (Run((("a", 0.5),), tokens - tokens // 3), Run(TokenRoute(("a", "b"), top_k=1), tokens // 3))
    check(Case(33, (17, 5), {"a": (3, 2), "b": (18, 1)}, runs))


@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (127, 129), (128, 128), (513, 257)])
def test_it_is_right_at_every_edge_of_a_tile(d_in: int, d_out: int) -> None:
    check(Case(d_in, (d_out,), {"a": (5,)}, (Run((("a", 0.7),), 3),)))


def random_step(case: Case, runs: tuple[Run, ...], bank: Bank) -> tuple[Plan, Tensor, Tensor]:
    packing = bank.pack(case.ranks)
    plan = Plan(runs, packing.keys, device=DEVICE)
    generator = torch.Generator().manual_seed(len(runs))
    x = torch.randn(plan.tokens, case.d_in, generator=generator).to(DEVICE, case.dtype)
    y = torch.randn(plan.tokens, sum(case.d_outs), generator=generator).to(DEVICE, case.dtype)
    return plan, x, y


@pytest.mark.parametrize("case", ["mixed ranks and modules left alone", "routed tokens", "bfloat16, routed tokens"])
def test_nothing_is_read_that_was_not_written(case: str) -> None:
    """NaN in the scratch, in free pages, and in the pages of adapters that no token needs."""
    found = CASES[case]
    bank = bank_of(found, pool_pages=40, device=DEVICE)
    for pool in bank._pools.values():
        free = [pool.first_page(module) + page for module, pages in enumerate(pool._free) for page in pages]
        pool.a[free] = float("nan")
        for module, pages in enumerate(pool._free):
            pool.b_of(module)[pages] = float("nan")
        pool.gate_rows[pool._free_gate_rows] = float("nan")
    group = bank.pack(found.ranks).groups["group"]
    plan, x, y = random_step(found, found.runs, bank)
    expected = y.clone()
    mixture_reference(expected, x, group, plan)
    assert group.pooled is not None
    work = work_for(plan, group.pooled)
    work.planes.fill_(float("nan"))
    launch(y, x, group.pooled.pool, work)
    check_close(y, expected)


def test_pairs_of_block_and_page_without_an_open_gate_are_not_in_the_work_list() -> None:
    case = Case(8, (4, 4), {"a": (17, 1), "b": (1, 1)}, (Run((("a", 1.0),), 16), Run((), 16), Run((("b", 1.0),), 3)))
    packing, plan, *_ = step_of(case, pool_pages=8, device=DEVICE)
    pooled = packing.groups["group"].pooled
    assert pooled is not None
    work = work_for(plan, pooled)
    assert work.count.item() == 5
    assert work.items[:5].tolist() == [[0, 0, 0], [0, 1, 0], [0, 8, 0], [2, 2, 1], [2, 9, 1]]
    assert work.first.tolist() == [0, 2, 3, 3, 3, 3, 3, 4, 5, 5]


def test_the_same_addresses_serve_one_step_after_another() -> None:
    """What a captured CUDA graph needs: adapters come and go, steps differ, and every launch has the same arguments."""
    case = Case(33, (17, 9), {"a": (3, 20), "b": (18, 1)}, ())
    bank = bank_of(case, pool_pages=8, device=DEVICE)
    (pool,) = bank._pools.values()
    tokens = 20
    work = Work(Capacity(tokens, 4, items=40, routed=True), pool)
    x, y = torch.zeros(tokens, 33, device=DEVICE), torch.zeros(tokens, 26, device=DEVICE)
    tensors = [pool.a, pool.b, work.items, work.count, work.first, work.gates, work.planes, *(work.choice or ())]
    addresses = [tensor.data_ptr() for tensor in tensors]

    def step(runs: tuple[Run, ...], ranks: dict[str, tuple[int, int]]) -> None:
        plan, x_now, y_now = random_step(Case(33, (17, 9), ranks, ()), runs, bank)
        group = bank.pack(ranks).groups["group"]
        assert group.pooled is not None
        x.zero_()[: plan.tokens] = x_now
        y.zero_()[: plan.tokens] = y_now
        mixture_reference(y_now, x_now, group, plan)
        work.planes.fill_(float("nan"))
        work.load(plan, group.pooled.table, pool.pages)
        launch(y, x, pool, work)
        check_close(y[: plan.tokens], y_now)
        assert not y[plan.tokens :].any()

    both = {"a": (3, 20), "b": (18, 1)}
    step((Run((("a", 1.0), ("b", 0.3)), 20),), both)
    step((Run(TokenRoute(("a", "b"), top_k=1), 5), Run((("b", 0.3),), 3)), both)
    bank.remove("a")
    c = {f"m{i}": (torch.full((r, 33), 0.1), torch.full((d, r), 0.2)) for i, (r, d) in enumerate(((40, 17), (2, 9)))}
    bank.add("c", bank.pages(c, {"m0": torch.full((33,), 0.3)}))
    step((Run((), 17), Run(TokenRoute(("b", "c"), top_k=2), 3)), {"b": (18, 1), "c": (40, 2)})
    step((Run((), 4),), {"b": (18, 1), "c": (40, 2)})
    step((Run((("c", 2.0),), 1), Run((("b", 1.0),), 18)), {"b": (18, 1), "c": (40, 2)})
    assert [tensor.data_ptr() for tensor in tensors] == addresses


def test_a_step_beyond_the_capacity_is_refused() -> None:
    case = Case(8, (4,), {"a": (40,), "b": (1,)}, (Run((("a", 1.0), ("b", 1.0)), 2),))
    packing, plan, *_ = step_of(case, pool_pages=8, device=DEVICE)
    pooled = packing.groups["group"].pooled
    assert pooled is not None
    for capacity, words in (
        (Capacity(1, 2, 9, False), "2 tokens and 2 adapters, expected at most 1 and 2"),
        (Capacity(2, 1, 9, False), "2 tokens and 2 adapters, expected at most 2 and 1"),
        (Capacity(2, 2, 3, False), "4 pairs of block and page, expected at most 3"),
    ):
        with pytest.raises(ValueError, match=words):
            Work(capacity, pooled.pool).load(plan, pooled.table, pooled.pool.pages)
    routed = Plan([Run(TokenRoute(("a",), 1), 1)], packing.keys, device=DEVICE)
    with pytest.raises(ValueError, match="found routed tokens"):
        Work(Capacity(2, 2, 9, False), pooled.pool).load(routed, pooled.table, pooled.pool.pages)


def test_results_are_the_same_bits_every_time() -> None:
    case = Case(300, (40,), MIXED_RANKS_OF_ONE, (Run((("a", 0.3), ("b", 0.7), ("c", 1.1)), 20),))
    packing, plan, x, y = step_of(case, pool_pages=40, device=DEVICE)
    again = y.clone()
    mixture_triton(y, x, packing.groups["group"], plan)
    mixture_triton(again, x, packing.groups["group"], Plan(case.runs, packing.keys, device=DEVICE))
    assert torch.equal(y, again)
    assert Tiles.of(plan.tokens).splits > 1


MIXED_RANKS_OF_ONE = {key: (ranks[0],) for key, ranks in MIXED_RANKS.items() if ranks[0]}


def test_a_closed_gate_shuts_out_an_adapter_that_overflows() -> None:
    bank = Bank([GroupSpec("group", 4, (ModuleSpec("m0", 3),))], pool_pages=2, device=DEVICE)
    bank.add("good", bank.pages({"m0": (torch.ones(2, 4), torch.ones(3, 2))}))
    bank.add("huge", bank.pages({"m0": (torch.full((2, 4), 3e38), torch.full((3, 2), 3e38))}))
    packing = bank.pack(["good", "huge"])
    plan = Plan([Run((("good", 1.0),), 1), Run((("huge", 1.0),), 1), Run((), 1)], packing.keys, device=DEVICE)
    y = torch.zeros(3, 3, device=DEVICE)
    mixture_triton(y, torch.ones(3, 4, device=DEVICE), packing.groups["group"], plan)
    assert y[0].tolist() == [8.0, 8.0, 8.0]
    assert not y[1].isfinite().any()
    assert y[2].tolist() == [0.0, 0.0, 0.0]


def test_an_adapter_without_gates_cannot_be_routed() -> None:
    bank = Bank([GroupSpec("group", 4, (ModuleSpec("m", 3),))], pool_pages=2, device=DEVICE)
    bank.add("without", bank.pages({"m": (torch.ones(2, 4), torch.ones(3, 2))}))
    packing = bank.pack(["without"])
    plan = Plan([Run(TokenRoute(("without",), top_k=1), 1)], packing.keys, device=DEVICE)
    with pytest.raises(ValueError, match="'without'"):
        mixture_triton(torch.zeros(1, 3), torch.ones(1, 4), packing.groups["group"], plan)


def layers_of(*, dtype: torch.dtype = torch.float32) -> Bank:
    """Two layers of a wide and a narrow group, with an adapter of two ranks in both of them."""
    groups = [
        GroupSpec(f"{layer}.{name}", d_in, tuple(ModuleSpec(f"{layer}.{name}.{m}", d) for m, d in outs.items()))
        for layer in (0, 1)
        for name, d_in, outs in (("in", 33, {"q": 17, "k": 9}), ("out", 20, {"o": 33}))
    ]
    bank = Bank(groups, device=DEVICE, dtype=dtype, pool_pages=8)
    add_everywhere(bank, "a", (3, 20, 5))
    return bank


def add_everywhere(bank: Bank, key: str, ranks: tuple[int, int, int], *, layers: tuple[int, ...] = (0, 1)) -> None:
    generator = torch.Generator().manual_seed(sum(ranks))
    sizes = (("in.q", 33, 17), ("in.k", 33, 9), ("out.o", 20, 33))
    factors = {
        f"{layer}.{name}": (
            torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        )
        for layer in layers
        for (name, d_in, d_out), rank in zip(sizes, ranks, strict=True)
    }  # fmt: skip
    bank.add(key, bank.pages(factors))


def test_one_capture_serves_all_layers_and_whatever_is_loaded() -> None:
    bank = layers_of()
    captured = CapturedMixture(bank, tokens=8, routed=False)
    stand_ins, _ = captured.stand_ins()
    assert stand_ins.groups.keys() == {"0.in", "0.out", "1.in", "1.out"}
    assert len({work.planes.data_ptr() for work in captured._works.values()}) == 1

    def check_all(runs: tuple[Run, ...], keys: list[str]) -> None:
        packing = bank.pack(keys)
        plan = Plan(runs, packing.keys, device=DEVICE)
        captured.load(plan, packing)
        generator = torch.Generator().manual_seed(0)
        for spec in bank.groups:
            d_out = sum(module.d_out for module in spec.modules)
            x, y = (torch.randn(8, d, generator=generator).to(DEVICE) for d in (spec.d_in, d_out))
            expected = y.clone()
            found = packing.groups.get(spec.name)
            if found is not None:
                mixture_reference(expected[: plan.tokens], x[: plan.tokens], found, plan)
            captured(y, x, stand_ins.groups[spec.name], plan)
            check_close(y, expected)

    check_all((Run((("a", 0.5),), 8),), ["a"])
    add_everywhere(bank, "b", (40, 1, 16))
    check_all((Run((("a", 0.5),), 2), Run((("b", 2.0), ("a", -1.0)), 3)), ["a", "b"])
    bank.remove("a")
    check_all((Run((("b", 1.0),), 1), Run((), 7)), ["b"])
    only_in = {f"{layer}.in.q": (torch.ones(2, 33), torch.ones(17, 2)) for layer in (0, 1)}
    bank.add("c", bank.pages(only_in))
    check_all((Run((("c", 1.0),), 6),), ["c"])  # "out" has nothing to do
    add_everywhere(bank, "upper", (2, 17, 1), layers=(1,))  # takes pages that the other layer keeps free
    add_everywhere(bank, "after", (1, 2, 3))
    check_all((Run((("upper", 1.0), ("after", 0.5)), 5), Run((("c", 1.0),), 1)), ["c", "upper", "after"])


def test_a_capture_without_routes_refuses_routed_tokens() -> None:
    bank = layers_of()
    packing = bank.pack(["a"])
    plan = Plan((Run(TokenRoute(("a",), 1), 1),), packing.keys, device=DEVICE)
    for routed in (False, True):  # the adapter has no gates, either
        with pytest.raises(ValueError, match="gates"):
            CapturedMixture(bank, tokens=8, routed=routed).load(plan, packing)


def test_room_for_work_is_that_of_every_page_up_to_a_limit() -> None:
    pool = next(iter(layers_of().pools.values()))
    pages = pool.a.shape[0]
    assert capacity_of(pool, tokens=1, routed=False) == Capacity(1, 16, pages, False)
    assert capacity_of(pool, tokens=33, routed=True) == Capacity(33, 16, 3 * pages, True)
    assert capacity_of(pool, tokens=64 * 4096, routed=False).items == MOST_ITEMS


def test_a_bank_without_a_pool_is_refused() -> None:
    packing, plan, x, y = step_of(CASES["odd sizes"], device=DEVICE)
    with pytest.raises(ValueError, match="pool_pages"):
        mixture_triton(y, x, packing.groups["group"], plan)


def test_the_last_item_forgotten_would_be_seen() -> None:
    """The checker on a wrong kernel: a work list that is one short."""

    def one_short(y: Tensor, x: Tensor, group: object, plan: Plan) -> None:
        pooled = group.pooled  # type: ignore[attr-defined]
        work = work_for(plan, pooled)
        work.first[work.first == work.count] -= 1
        launch(y, x, pooled.pool, work)

    with pytest.raises(AssertionError):
        check_against_reference(one_short, CASES["odd sizes"], pool_pages=40, device=DEVICE)


def test_pages_hold_as_many_rows_as_the_kernel_multiplies() -> None:
    assert PAGE_ROWS == 16


@pytest.mark.skipif(INTERPRETED, reason="captures a CUDA graph")
def test_a_captured_step_is_replayed_with_other_adapters_and_mixes() -> None:
    case = Case(64, (32, 48), {"a": (3, 20), "b": (18, 1)}, ())
    bank = bank_of(case, pool_pages=8, device=DEVICE)
    (pool,) = bank._pools.values()
    work = Work(Capacity(8, 4, items=40, routed=True), pool)
    x, y = torch.zeros(8, 64, device=DEVICE), torch.zeros(8, 80, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    for _ in range(2):  # compiles before it captures
        launch(y, x, pool, work)
    with torch.cuda.graph(graph):
        launch(y, x, pool, work)
    for runs in (
        (Run((("a", 1.0),), 5), Run((("b", 0.5),), 3)),
        (Run(TokenRoute(("a", "b"), 1), 8),),
        (Run((), 8),),
    ):
        plan, x_now, expected = random_step(case, runs, bank)
        group = bank.pack(case.ranks).groups["group"]
        assert group.pooled is not None
        x.copy_(x_now)
        y.copy_(expected)
        work.load(plan, group.pooled.table, pool.pages)
        graph.replay()
        mixture_reference(expected, x_now, group, plan)
        check_close(y, expected)
