"""``lorafleet bench service`` with real processes and few calls: what it counts, not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafleet.bench.service.names import DOORS
from lorafleet.cli import main

pytestmark = [pytest.mark.process, pytest.mark.long]


def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The record of a run, which is the one that was appended."""
    with pytest.raises(SystemExit) as end:
        main(["bench", "service", "--threads", "1", "--out", str(tmp_path), "--json", *arguments])
    assert end.value.code in (0, 1, None)
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text()) == [record]
    assert str(tmp_path) not in file.read_text()
    return record


def test_answers_of_a_few_tenants_are_those_of_isolated_runs_while_adapters_change(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--scenario", "isolation", "--requests", "80", "--tenants", "3", "--changes", "10"]
    record = bench(capsys, tmp_path, *arguments)
    found = record["results"]["isolation"]
    assert found["wrong"] == [] and found["failed"] == {}
    assert found["right"] + found["not_there"] + found["foreign_refused"] == 80
    assert found["foreign_refused"] == found["kinds"]["foreign"] > 0
    assert found["changes"] and found["digests_used"] > 6


def test_the_time_of_a_refusal_is_taken_for_names_that_are_there_and_that_are_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = bench(capsys, tmp_path, "--scenario", "names", "--name-probes", "60", "--control-probes", "80")
    found = record["results"]["names"]
    assert set(found) == {f"{door}/{kind}" for door in DOORS for kind in ("control", "foreign", "left")}
    for one in found.values():
        assert 0 < one["there"] < one["probes"] and one["median_s"]["missing"] > 0
        assert 0.0 <= one["area"] <= 1.0  # of so few probes beside other tests it says no more
    assert [verdict["found"] for verdict in record["verdicts"]] == [one["area"] for one in found.values()]


def test_a_route_by_cards_is_measured_beside_a_server_that_does_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--scenario", "route", "--routers", "cards", "--adapters", "5", "--route-seconds", "2"]
    record = bench(capsys, tmp_path, *arguments, "--callers", "4")
    cards, bare = record["results"]["route"]["cards"], record["results"]["route"]["bare"]
    assert cards["right"] > 0.9 and set(cards["statuses"]) == {"OK"}
    assert bare["per_s"] > 0 and cards["per_s"] == 2 * cards["at_half"]["asked_per_s"] > 0
    assert 0 < bare["server_cpu_s_a_call"] < cards["server_cpu_s_a_call"]
    compared = [verdict for verdict in record["verdicts"] if "does nothing" in verdict["figure"]]
    assert [verdict["found"] for verdict in compared] == [bare["per_s"], 1e3 * bare["at_rate"]["latency_s"]["p99"]]
    assert all(verdict["met"] for verdict in compared)
