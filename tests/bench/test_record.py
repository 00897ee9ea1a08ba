"""The record of a run: what it says, what it keeps to itself, and how it is appended and shown."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lorafleet.bench.engine import command_line
from lorafleet.bench.floor import Work
from lorafleet.bench.machine import Commit, commit, cpu_name, versions
from lorafleet.bench.record import append, file_name, make_record, plain
from lorafleet.bench.results import RowResult
from lorafleet.bench.rows import ROWS, select
from lorafleet.bench.run import Settings
from lorafleet.bench.shapes import SHAPES
from lorafleet.bench.table import COLUMNS, lines, notes
from lorafleet.bench.timing import Timing
from lorafleet.errors import InvalidInputError

SETTINGS = Settings(
    shape=SHAPES["S"], selection=select(["base", "single"], vllm=False), repeats=2, device="cpu", threads=2,
    work=Path("/home/me/weights"),
)  # fmt: skip


def record(**other: Any) -> dict[str, Any]:
    timings = [Timing(2048, 4.0, 1.0), Timing(2048, 6.0, 2.0)]
    fields: dict[str, Any] = {
        "when": datetime(2026, 11, 22, 10, 30, 5, 123, UTC),
        "command": command_line(SETTINGS, asked=["base", "single"], vllm=True),
        "shape": SHAPES["S"],
        "device": {"kind": "cpu", "name": "A CPU", "cores": 2, "threads": 2},
        "versions": {"torch": "2.13"},
        "commit": Commit("abc", False),
        "repeats": 2,
        "checks": {"base": None, "single": None, "mix2": "found 1, expected 2"},
        "results": [
            RowResult(ROWS["peft"], "measured", timings=[Timing(2048, 10.0, 3.0)]),
            RowResult(ROWS["base"], "measured", timings=timings),
            RowResult(ROWS["single"], "measured", timings=[Timing(2048, 8.0, 2.0)]),
            RowResult(ROWS["mix2"], "refused", "the check of mix2 is red"),
        ],
        "works": {"single": Work(100, 50, 10.0, 1.0), "mix2": Work(1, 1, 1.0, 1.0)},
    }
    return make_record(**(fields | other))


def test_a_record_holds_every_repeat_and_medians() -> None:
    rows = {row["name"]: row for row in record()["rows"]}
    assert rows["base"]["repeats"][1] == {"tokens": 2048, "total_s": 6.0, "prefill_s": 2.0, "decode_s": 4.0}
    assert rows["base"]["median"] == {"tokens_per_s": 2048 / 5, "total_s": 5.0, "prefill_s": 1.5, "decode_s": 3.5}
    assert rows["mix2"]["median"] is None and rows["mix2"]["reason"] == "the check of mix2 is red"


def test_a_record_says_what_was_run_where() -> None:
    found = record()
    assert found["date"] == "2026-11-22T10:30:05+00:00" and found["commit"] == "abc"
    assert found["shape"]["hidden"] == 768 and found["load"]["requests"] == 32
    assert found["ratios"] == [
        {"of": "peft", "to": "base", "ratio": 0.5},
        {"of": "single", "to": "base", "ratio": 0.625},
        {"of": "single", "to": "peft", "ratio": 1.25},
    ]
    assert found["floors"]["single"]["floor_s"] == pytest.approx(3.5 * 1.5 + 1.5 * 1.1)
    assert found["floors"]["single"]["share"] == pytest.approx((3.5 * 1.5 + 1.5 * 1.1) / 8)
    assert "mix2" not in found["floors"]


def test_a_record_names_no_folder_of_this_machine() -> None:
    text = json.dumps(record())
    assert "/" not in text.replace("https://", "").replace("tokens/s", "")
    assert record()["command"] == (
        "lorafleet bench engine --shape S --rows base,single --repeats 2 --device cpu --threads 2 --vllm-python PYTHON"
    )


def test_records_of_a_day_shape_and_device_share_a_file(tmp_path: Path) -> None:
    first, second = record(), record(commit=Commit(None, None))
    assert file_name(first) == "2026-11-22-S-cpu.json"
    assert append(first, tmp_path / "new") == append(second, tmp_path / "new") == tmp_path / "new" / file_name(first)
    (file,) = (tmp_path / "new").iterdir()
    assert json.loads(file.read_text()) == [first, second]


@pytest.mark.parametrize("text", ["{}", "not json"])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / file_name(record())
    file.write_text(text)
    with pytest.raises(InvalidInputError, match="expected one to append to"):
        append(record(), tmp_path)
    assert file.read_text() == text


def test_numbers_that_json_has_no_word_for_are_null(tmp_path: Path) -> None:
    found = {"latency": math.nan, "arms": [{"p95": math.inf, "name": "long"}, (1.5, -math.inf)], "of": 3, "met": False}
    wanted = {"latency": None, "arms": [{"p95": None, "name": "long"}, [1.5, None]], "of": 3, "met": False}
    assert plain(found) == plain(plain(found)) == wanted
    file = append({**record(), "results": found}, tmp_path)
    (kept,) = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert kept["results"] == wanted


def test_the_table_has_a_line_a_measured_row_and_a_note_for_the_others() -> None:
    shown = {line[0]: dict(zip(COLUMNS, line, strict=True)) for line in lines(record())}
    assert shown["base"] == {
        "row": "base", "tokens/s": "409.6", "prefill s": "1.500", "decode s": "3.500", ": base": "-",
        "floor : ours": "-", ": peers": "-",
    }  # fmt: skip
    assert (shown["single"][": base"], shown["single"][": peers"]) == ("0.62", "1.25 peft")
    assert shown["single"]["floor : ours"] == "0.86"
    assert notes(record()) == ["mix2: refused: the check of mix2 is red"]


def test_a_cpus_name_is_its_models() -> None:
    assert cpu_name("processor\t: 0\nmodel name\t: A CPU: 2 GHz\n", otherwise="x") == "A CPU: 2 GHz"
    assert cpu_name("processor\t: 0\n", otherwise="aarch64") == "aarch64"


def test_versions_of_what_rows_run_on_are_known() -> None:
    assert versions().keys() == {"python", "lorafleet", "torch", "transformers", "peft"}


def test_the_commit_is_one_or_none() -> None:
    found = commit()
    assert (found.id is None) == (found.modified is None)
    assert found.id is None or len(found.id) == 40


def test_the_record_says_how_close_decoding_comes_to_reading_the_weights() -> None:
    alone = RowResult(ROWS["base_alone"], "measured", timings=[Timing(64, 2.0, 1.0)], memory_bytes_per_s=4e12)
    found = record(results=[alone])
    floor_s = 63 * 163_616_256 / 4e12  # 64 new tokens; the bytes are those of test_floor.py
    assert found["weight_floors"]["base_alone"] == {"floor_s": pytest.approx(floor_s), "share": pytest.approx(floor_s)}
    assert notes(found)[-1] == "base_alone: decoding at 0.00 of the floor of reading the weights in every step"
