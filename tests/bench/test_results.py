"""Medians, ratios and floors of measured rows."""

from __future__ import annotations

import pytest

from lorafleet.bench.floor import Work
from lorafleet.bench.results import Ratio, RowResult, all_figures, figures, floors, ratios, weight_floors
from lorafleet.bench.rows import ROWS
from lorafleet.bench.timing import Timing


def measured(name: str, *seconds: float) -> RowResult:
    return RowResult(ROWS[name], "measured", timings=[Timing(100, total, total / 4) for total in seconds])


def test_figures_are_medians_of_the_repeats() -> None:
    found = figures([Timing(100, 10.0, 1.0), Timing(100, 4.0, 3.0), Timing(100, 5.0, 2.0)])
    assert found == (100 / 5.0, 5.0, 2.0, 3.0)  # decode 9, 1 and 3


def test_only_measured_rows_have_figures() -> None:
    failed = RowResult(ROWS["peft"], "failed", "it ended", [Timing(100, 1.0, 0.5)])
    assert all_figures([measured("base", 1.0), failed]).keys() == {"base"}


def test_the_base_is_compared_with_the_best_peer_and_single_with_each() -> None:
    rows = [("generate", 4.0), ("transformers_cb", 2.0), ("peft", 8.0), ("vllm_lora", 5.0), ("base", 1.0)]
    found = all_figures([*(measured(*row) for row in rows), measured("single", 2.0)])
    assert Ratio("base", "transformers_cb", pytest.approx(2.0)) in ratios(found)
    assert Ratio("single", "peft", pytest.approx(4.0)) in ratios(found)
    assert Ratio("single", "vllm_lora", pytest.approx(2.5)) in ratios(found)
    assert Ratio("single", "base", pytest.approx(0.5)) in ratios(found)
    assert not any((r.of, r.to) == ("base", "generate") for r in ratios(found))


def test_without_the_base_there_is_nothing_to_compare_with() -> None:
    found = all_figures([measured("single", 2.0)])
    assert ratios(found) == []
    assert floors(found, {"single": Work(1, 1, 1.0, 1.0)}) == {}


def test_the_floors_share_is_one_where_a_row_is_as_fast_as_its_floor() -> None:
    # The base takes 1 s of prefill and 3 s of decoding; the floor is 3 · 1.5 + 1 · 2.
    found = all_figures([measured("base", 4.0), measured("single", 6.5), measured("mix2", 13.0)])
    half = Work(base_bytes=2, adapter_bytes=1, base_operations=1.0, adapter_operations=1.0)
    shares = {name: floor.share for name, floor in floors(found, {"single": half, "mix2": half}).items()}
    assert shares == pytest.approx({"single": 1.0, "mix2": 0.5})


def test_the_floor_of_the_weights_counts_a_step_for_each_token_but_the_first() -> None:
    alone = measured("base_alone", 4.0)  # 3 s of decoding
    alone.memory_bytes_per_s = 100.0
    found = weight_floors([alone, measured("base", 1.0)], step_bytes=50, new_tokens=4)
    assert found == {"base_alone": (1.5, 0.5)}
