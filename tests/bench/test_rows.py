"""Which rows are run."""

from __future__ import annotations

import pytest

from lorafleet.bench.checks import CHECKS
from lorafleet.bench.requests import ASKS
from lorafleet.bench.rows import COMPARED, ROWS, select
from lorafleet.errors import InvalidInputError, UnknownNameError


def names(wanted: list[str] | None, *, vllm: bool = True) -> list[str]:
    return [row.name for row in select(wanted, vllm=vllm).rows]


def test_rows_come_in_the_order_of_the_table_and_once() -> None:
    assert names(["single", "base", "generate", "single"]) == ["generate", "base", "single"]


def test_without_a_choice_every_row_that_can_is_run() -> None:
    selection = select(None, vllm=True, cuda=True)
    assert {row.name for row in selection.rows} | selection.left_out.keys() == ROWS.keys()


def test_rows_about_gpus_are_run_on_a_cpu_where_they_are_asked_for() -> None:
    assert names(["base", "base_alone"]) == ["base", "base_alone"]
    assert "base" in names(None) and "base_alone" not in names(None)


def test_rows_of_vllm_are_left_out_with_a_note_where_it_is_absent() -> None:
    selection = select(["vllm", "vllm_lora", "base"], vllm=False)
    assert [row.name for row in selection.rows] == ["base"]
    assert all("--vllm-python" in selection.left_out[name] for name in ("vllm", "vllm_lora"))


def test_an_unknown_row_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="mix2"):
        select(["mix3"], vllm=True)


@pytest.mark.parametrize("wanted", [["vllm"], []])
def test_a_choice_that_leaves_nothing_is_refused(wanted: list[str]) -> None:
    with pytest.raises(InvalidInputError, match="expected at least one of"):
        select(wanted, vllm=False)


def test_every_row_of_ours_depends_on_a_check_that_exists_and_no_peers_does() -> None:
    assert all(row.check is None for row in ROWS.values() if row.kind == "peer")
    assert {row.check for row in ROWS.values() if row.kind == "ours"} == CHECKS.keys()


def test_every_row_of_ours_says_what_its_requests_ask() -> None:
    assert {row.name for row in ROWS.values() if row.kind == "ours"} == ASKS.keys()


def test_rows_are_compared_with_peers() -> None:
    for ours, peers in COMPARED.items():
        assert ROWS[ours].kind == "ours" and all(ROWS[peer].kind == "peer" for peer in peers)
