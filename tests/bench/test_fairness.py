"""The benchmark of a flood: what is asked, what is made of the answers, and a small run as it is."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from lorafleet.bench.fairness import (
    LONG,
    USUAL,
    ArmResult,
    FairnessSettings,
    arm_result,
    ask,
    bench_fairness,
    make_record,
    percentile,
    ratios,
    wanted,
)
from lorafleet.bench.service.asks import Outcome
from lorafleet.cli import main
from lorafleet.errors import InvalidInputError, UnavailableError
from tests.bench.test_schedulers import NOON


def arm(name: Any, latencies: list[float], *, turn: int = 0, offered: int = 4) -> ArmResult:
    return ArmResult(name, turn, offered, latencies, [each / 2 for each in latencies], {}, 0.0, 0)


def outcome(status: str, ended_s: float, *, at_s: float = 0.0) -> Outcome:
    return Outcome(status=status, at_s=at_s, sent_s=at_s, first_s=at_s + 0.1, ended_s=ended_s)


def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed() -> None:
    values = [float(number) for number in range(1, 21)]
    assert [percentile(values, percent) for percent in (5, 50, 95, 100)] == [1, 10, 19, 20]
    assert percentile([], 95) == math.inf


def test_ratios_are_over_all_turns_and_a_missing_answer_is_missing_throughput() -> None:
    results = [
        arm("alone", [1.0] * 19 + [2.0]),
        arm("alone", [1.0] * 19 + [3.0], turn=1),
        arm("alike", [1.0] * 18, turn=1),
        arm("alike", [1.5] * 20),
    ]
    (ratio,) = ratios(results)
    assert (ratio.arm, ratio.throughput, ratio.latency, ratio.first_token) == ("alike", 38 / 40, 1.5, 1.5)
    assert ratio.met and wanted([ratio])
    assert not ratio._replace(throughput=0.94).met
    assert not wanted([ratio._replace(latency=2.1)])
    assert wanted([ratio, ratio._replace(arm="one tenant", latency=9.0)])


def test_latencies_are_of_answers_and_the_floods_rate_is_of_the_time_in_between() -> None:
    quiet = [outcome("OK", 3.0, at_s=1.0), outcome("RESOURCE_EXHAUSTED", 1.0)]
    flood = [outcome("OK", 2.0), outcome("OK", 4.0), outcome("OK", 99.0), outcome("RESOURCE_EXHAUSTED", 1.0)]
    found = arm_result("alike", 0, quiet, flood, warm_s=3.0, seconds=10.0)
    assert (found.offered, found.latencies_s, found.failures) == (2, [2.0], {"RESOURCE_EXHAUSTED": 1})
    assert (found.flood_rate, found.flood_refused) == (0.1, 1)
    assert found.first_tokens_s == pytest.approx([0.1])


def test_a_flood_whose_answers_end_later_was_there_all_the_same() -> None:
    found = arm_result("long", 0, [], [outcome("OK", 14.0, at_s=1.0)], warm_s=3.0, seconds=10.0)
    assert found.flood_rate == 0.0
    with pytest.raises(UnavailableError, match="between 3 and 13 s"):
        arm_result("long", 0, [], [outcome("OK", 2.0), outcome("OK", 15.0, at_s=14.0)], warm_s=3.0, seconds=10.0)


def test_a_flood_that_was_never_answered_is_no_flood() -> None:
    refused = [outcome("UNAUTHENTICATED", 4.0)]
    with pytest.raises(UnavailableError, match="UNAUTHENTICATED"):
        arm_result("alike", 0, [outcome("OK", 2.0)], refused, warm_s=3.0, seconds=10.0)
    assert arm_result("alone", 0, [outcome("OK", 2.0)], [], warm_s=3.0, seconds=10.0).flood_rate == 0.0


def test_a_quiet_tenant_that_got_no_answer_alone_is_nothing_to_compare_with() -> None:
    for quiet in ([], [outcome("DEADLINE_EXCEEDED", 9.0)]):
        with pytest.raises(UnavailableError, match="--seconds"):
            arm_result("alone", 0, quiet, [], warm_s=3.0, seconds=10.0)


def test_prompts_are_as_long_as_drawn_and_words_change_without_the_lengths() -> None:
    asks = [ask("key", USUAL, random.Random(1), words=random.Random(seed)) for seed in (1, 2)]
    assert len({each.prompt for each in asks}) == 2
    assert len({(len(each.prompt.split()), each.max_tokens) for each in asks}) == 1
    for lengths in (USUAL, LONG):
        words = len(ask("key", lengths, random.Random(3)).prompt.split())
        assert lengths.prompt[0] <= words <= lengths.prompt[1]


@pytest.mark.parametrize("wrong", [{"part": 0.0}, {"part": 1.5}, {"flood": 0.0}, {"turns": 0}, {"seconds": 0.0}])
def test_settings_without_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        FairnessSettings(**wrong)


def test_the_record_says_what_was_missed() -> None:
    results = [arm("alone", [1.0] * 4), arm("long", [2.5] * 3)]
    record = make_record(FairnessSettings(compare=False), 40.0, results, ratios(results), when=NOON)
    assert record["command"].startswith("lorafleet bench fairness --seconds 20 --turns 3")
    assert record["command"].endswith("--no-compare")
    assert [(row["arm"], row["answered"], row["latency_p95_s"]) for row in record["arms"]] == [
        ("alone", 4, 1.0),
        ("long", 3, 2.5),
    ]
    assert record["ratios"] == [
        {"arm": "long", "throughput": 0.75, "latency": 2.5, "first_token": 2.5, "met": False},
    ]
    json.dumps(record, allow_nan=False)


def test_an_arm_without_an_answer_has_missed_and_its_record_is_json() -> None:
    results = [arm("alone", [1.0] * 4), arm("alike", [])]
    found = ratios(results)
    assert not wanted(found)
    record = make_record(FairnessSettings(compare=False), 40.0, results, found, when=NOON)
    assert record["ratios"] == [
        {"arm": "alike", "throughput": 0.0, "latency": None, "first_token": None, "met": False},
    ]
    json.dumps(record, allow_nan=False)


def test_a_part_of_more_than_the_share_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "fairness", "--part", "2"])
    assert end.value.code == 1 and "at most 1" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.process
@pytest.mark.timeout(900)  # 46 s on an idle machine, 265 s beside six busy processes on two cores
def test_a_small_run_measures_every_arm(tmp_path: Path) -> None:
    settings = FairnessSettings(seconds=5.0, turns=1, flood=1.0, warm_s=1.0, compare=False)
    said: list[str] = []
    done = bench_fairness(settings, work=tmp_path / "work", out=tmp_path / "out", when=NOON, say=said.append)
    assert done.capacity > 0
    assert [result.arm for result in done.results] == ["alone", "alike", "long"] and len(said) == 4
    assert all(sum(r.failures.values()) + len(r.latencies_s) == r.offered for r in done.results)
    assert [ratio.arm for ratio in done.ratios] == ["alike", "long"]
    assert json.loads(done.file.read_text()) == [done.record]
