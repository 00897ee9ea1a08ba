"""Pages at fixed addresses: who gets which, and what is left behind."""

from __future__ import annotations

import pytest
import torch

from lorafleet.errors import OverloadedError
from lorafleet.kernels import PATHS, Bank, GroupSpec, ModuleSpec, PackedGroup, paths_on
from lorafleet.kernels.bank import pool_page_bytes
from lorafleet.kernels.pool import GroupPool
from tests.kernels.cases import CASES, check_against_reference

GROUPS = (GroupSpec("qk", 5, (ModuleSpec("q", 6), ModuleSpec("k", 3))), GroupSpec("o", 6, (ModuleSpec("o", 5),)))
SHAPES = {"q": (5, 6), "k": (5, 3), "o": (6, 5)}


def bank(pages: int = 8) -> Bank:
    found = Bank(GROUPS, pool_pages=pages)
    for pool in pools(found):
        pool.a.fill_(float("nan"))
        pool.b.fill_(float("nan"))
    return found


def pools(bank: Bank) -> list[GroupPool]:
    return list(bank._pools.values())


def add(bank: Bank, key: str, ranks: dict[str, int], *, value: float = 1.0, gates: bool = False) -> None:
    factors = {
        m: (torch.full((r, SHAPES[m][0]), value), torch.full((SHAPES[m][1], r), value)) for m, r in ranks.items()
    }
    firsts = {"q" if "q" in ranks else "k", "o"} & set(ranks)
    vectors = {m: torch.full((SHAPES[m][0],), value) for m in firsts} if gates else None
    bank.add(key, bank.pages(factors, vectors))


def group(bank: Bank, *keys: str, name: str = "qk") -> PackedGroup:
    return bank.pack(keys).groups[name]


def test_a_rank_takes_as_many_pages_of_sixteen_as_it_needs() -> None:
    found = bank()
    add(found, "x", {"q": 1, "k": 17})
    add(found, "y", {"q": 16, "k": 32})
    pooled = group(found, "x", "y").pooled
    assert pooled is not None
    assert [(e.module, e.adapter, e.page) for e in pooled.table.entries] == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 0),
        (1, 0, 1),
        (1, 1, 2),
        (1, 1, 3),
    ]


def test_spare_rows_of_a_page_are_zeros() -> None:
    found = bank()
    add(found, "x", {"q": 20})
    pool = pools(found)[0]
    assert pool.a[1, 4:].eq(0).all()
    assert pool.b_of(0)[1, 4:].eq(0).all()
    assert pool.a[:2].isfinite().all()


def test_rows_are_read_back_as_they_were_put() -> None:
    found = bank()
    add(found, "x", {"q": 20, "k": 3}, value=2.0, gates=True)
    add(found, "y", {"q": 5}, value=3.0)
    packed = group(found, "x", "y")
    assert packed.a[:, 0].tolist() == [2.0] * 20 + [3.0] * 5 + [2.0] * 3
    assert packed.modules[0].b[:, 0].tolist() == [2.0] * 20 + [3.0] * 5
    assert packed.gate_rows.tolist() == [[2.0] * 5]


def test_pages_of_a_removed_adapter_go_to_the_next_and_nothing_moves() -> None:
    found = bank(pages=2)
    add(found, "x", {"q": 16}, value=1.0)
    add(found, "y", {"q": 16}, value=2.0)
    addresses = [pool.a.data_ptr() for pool in pools(found)]
    found.remove("x")
    add(found, "z", {"q": 3}, value=7.0, gates=True)
    assert group(found, "y", "z").a[:, 0].tolist() == [2.0] * 16 + [7.0] * 3
    assert [pool.a.data_ptr() for pool in pools(found)] == addresses


def test_an_adapter_that_does_not_fit_changes_nothing() -> None:
    found = bank(pages=2)
    add(found, "x", {"q": 16, "o": 16})
    with pytest.raises(OverloadedError, match="o: rank 20 needs 2 pages of 16 ranks, 1 of 2 are free"):
        add(found, "y", {"q": 16, "o": 20}, gates=True)
    assert "y" not in found
    add(found, "y", {"q": 16, "o": 16}, gates=True)
    found.require_gates(["y"])


def test_groups_with_equal_tables_share_one() -> None:
    groups = [GroupSpec(f"g{i}", 4, (ModuleSpec(f"m{i}", 4),)) for i in range(3)]
    found = Bank(groups, pool_pages=4)
    found.add(
        "a",
        found.pages({f"m{i}": (torch.ones(2 + 20 * (i == 2), 4), torch.ones(4, 2 + 20 * (i == 2))) for i in range(3)}),
    )
    tables = [packed.pooled.table for packed in found.pack(["a"]).groups.values() if packed.pooled is not None]
    assert tables[0] is tables[1]
    assert tables[0] is not tables[2]


@pytest.mark.parametrize("path", paths_on("cpu"))
@pytest.mark.parametrize("case", ["mixed ranks and modules left alone", "routed tokens", "bfloat16, routed tokens"])
def test_every_path_runs_on_a_bank_with_a_pool(path: str, case: str) -> None:
    check_against_reference(PATHS[path], CASES[case], pool_pages=40)


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0 pages"):
        Bank(GROUPS, pool_pages=0)


def test_the_room_of_an_adapter_is_that_of_its_largest_rank_in_every_module() -> None:
    page = pool_page_bytes(GROUPS, torch.float32)
    # 17 rows of A (one is for gates) and 16 of B in q, k and o, of 4 bytes.
    assert page == 4 * (17 * (5 + 5 + 6) + 16 * (6 + 3 + 5))
    found = bank()
    sizes = {"q": (torch.ones(17, 5), torch.ones(6, 17)), "o": (torch.ones(2, 6), torch.ones(5, 2))}
    assert found.room_for(found.pages(sizes)) == 2 * page
    assert found.room_for({}) == 0
    plain = Bank(GROUPS)
    assert plain.room_for(plain.pages(sizes)) == 4 * (17 * 11 + 2 * 11)


def test_adapters_that_have_room_by_the_count_fit_in_every_module() -> None:
    found = bank(pages=4)
    ranks = ({"q": 17, "k": 1}, {"k": 32}, {"q": 1, "k": 40, "o": 5})
    room = 4 * pool_page_bytes(GROUPS, torch.float32)
    for index, each in enumerate(ranks[:2]):
        factors = {m: (torch.ones(r, SHAPES[m][0]), torch.ones(SHAPES[m][1], r)) for m, r in each.items()}
        room -= found.room_for(found.pages(factors))
        add(found, f"a{index}", each)
    assert room == 0
    with pytest.raises(OverloadedError):
        add(found, "one too many", ranks[2])


def test_rows_in_neighbouring_pages_are_not_copied() -> None:
    found = bank()
    add(found, "x", {"q": 17})
    add(found, "y", {"q": 1})
    found.remove("x")
    add(found, "z", {"q": 40})  # pages 0, 1 and 3
    (y, z), pool = (found._pages[key]["q"] for key in ("y", "z")), pools(found)[0]
    assert y.a.data_ptr() == pool.a[2].data_ptr()
    assert z.a.data_ptr() != pool.a.data_ptr() and torch.equal(z.a, torch.ones(40, 5))
