"""The benchmark of members that are killed: what is done when, what is made of it, and a small run as it is."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorafleet.bench import dropout as benchmark
from lorafleet.bench.dropout import (
    DropoutSettings,
    Kind,
    Outcome,
    RoundResult,
    counted_twice,
    drawn,
    federation_toml,
    kinds,
    make_record,
    of_medians,
    seconds,
    seconds_with_look,
    verdicts,
)
from lorafleet.bench.dropout_fleet import asleep, family, frozen
from lorafleet.cli import main
from lorafleet.coordinator.schedulers.sync import select
from lorafleet.coordinator.settings import CoordinatorConfig
from lorafleet.errors import InvalidInputError
from tests.bench.test_schedulers import NOON

SETTINGS = DropoutSettings()


def found(number: int, kind: Kind, took_s: float, *, look_s: float = 1.0, counted: int = 7) -> RoundResult:
    return RoundResult(number, kind, (), took_s, look_s, 0.5, counted, 0)


ROUNDS = [
    found(1, "warm-up", 99.0), found(2, "undisturbed", 10.0), found(3, "undisturbed", 12.0), found(4, "killed", 11.0),
    found(5, "killed", 12.0, look_s=5.0), found(6, "undisturbed", 11.0, look_s=6.0),
]  # fmt: skip


def test_rounds_take_turns_and_the_last_that_is_hit_is_followed_by_one_more() -> None:
    assert kinds(3, "killed") == [
        "warm-up", "undisturbed", "undisturbed", "killed", "killed", "undisturbed", "killed", "undisturbed",
    ]  # fmt: skip


def test_the_quorum_is_of_those_who_are_left() -> None:
    assert (SETTINGS.killed, SETTINGS.quorum) == (3, 7)
    assert DropoutSettings(members=7).quorum == 5


def test_members_are_drawn_by_seed_and_anew_in_each_round() -> None:
    draws = [drawn(SETTINGS, "killed", number) for number in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    assert {len(draw) for draw in draws} == {3} and len(drawn(SETTINGS, "stalled", 3)) == 1
    assert drawn(SETTINGS, "undisturbed", 3) == []


@pytest.mark.parametrize(("members", "goal"), [(10, 7), (6, 5), (10, 0)])
def test_the_file_asks_all_members_whatever_the_goal(tmp_path: Path, members: int, goal: int) -> None:
    settings = DropoutSettings(members=members)
    toml = tmp_path / "f.toml"
    toml.write_text(
        federation_toml(
            settings, "killed", rounds=9, goal=goal, deadline_s=60.0, folder=tmp_path, superlink="127.0.0.1:1"
        )
    )
    agreed = CoordinatorConfig.load(toml).federation
    assert (agreed.quorum, agreed.scheduling.goal, agreed.rounds) == (settings.quorum, goal, 9)
    over = agreed.scheduling.over_selection
    assert select(settings.keys, goal=goal, over_selection=over, seed=(1, 1)) == settings.keys


def test_the_look_for_those_who_came_back_counts_for_the_round_that_they_were_killed_in() -> None:
    assert seconds(ROUNDS, "killed") == [11.0, 12.0]
    assert seconds_with_look(ROUNDS, "killed") == [16.0, 18.0]
    assert seconds_with_look(ROUNDS, "undisturbed") == [11.0, 13.0]
    assert of_medians(ROUNDS, seconds) == pytest.approx(11.5 / 11.0)
    assert of_medians(ROUNDS, seconds_with_look) == pytest.approx(17.0 / 12.0)
    assert of_medians(ROUNDS[:3], seconds) is None


def test_an_update_that_two_rounds_name_is_counted_twice() -> None:
    def report(*updates: tuple[str, int, int]) -> dict[str, Any]:
        return {"counted": [{"member": m, "ordered_in": n, "attempt": a} for m, n, a in updates]}

    assert counted_twice([report(("a", 1, 1), ("b", 1, 1)), report(("a", 2, 1))]) == 0
    assert counted_twice([report(("a", 1, 1)), report(("a", 1, 1), ("b", 2, 1))]) == 1


def said(killed: Outcome, stalled: Outcome | None = None) -> dict[str, bool]:
    settings = DropoutSettings(rounds=2, stalled=1)
    return {verdict.figure: verdict.met for verdict in verdicts(settings, killed, stalled)}


def test_what_was_wanted_is_met_or_missed() -> None:
    good = Outcome(ROUNDS, "", 0)
    held = [
        found(1, "warm-up", 9.0),
        found(2, "undisturbed", 10.0),
        found(3, "stalled", 61.0),
        found(4, "undisturbed", 9),
    ]
    assert said(good, Outcome(held, "", 0)) == {
        "rounds that committed": True,
        "least updates in a round": True,
        "updates counted twice": True,
        "seconds of a round, killed : undisturbed": True,
        "the same, with the next round's look, killed : undisturbed": False,
        "seconds to the close, one member stalled": True,
    }
    assert not said(Outcome(ROUNDS[:4], "round 5 was abandoned", 0))["rounds that committed"]
    assert not said(good._replace(counted_twice=1))["updates counted twice"]
    assert not said(Outcome([*ROUNDS[:5], found(6, "undisturbed", 11.0, counted=6)], "", 0))["least updates in a round"]
    late = [*held[:2], found(3, "stalled", 63.0), held[3]]
    assert not said(good, Outcome(late, "", 0))["seconds to the close, one member stalled"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"members": 2}, "0.3 of 2 members"), ({"share": 0.95}, "two to stay"), ({"rounds": 0}, "found 0")],
)
def test_settings_that_measure_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        DropoutSettings(**changes)


def test_the_command_says_what_was_missed_and_ends_with_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scripted(settings: DropoutSettings, *, out: Path, **_: Any) -> benchmark.DropoutBenchmark:
        outcome = Outcome(ROUNDS[:5], "round 6 was abandoned", 0)
        return benchmark.DropoutBenchmark(make_record(settings, outcome, None, when=NOON), out, outcome, None)

    monkeypatch.setattr(benchmark, "bench_dropout", scripted)
    with pytest.raises(SystemExit) as end:
        main(["bench", "dropout", "--rounds", "2", "--stalled", "0", "--out", str(tmp_path)])
    out, _ = capsys.readouterr()
    assert end.value.code == 1
    assert "rounds that committed: 5 (wanted all 6: missed)" in out and "round 6 was abandoned" in out


FAMILY = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "print(child.pid, flush=True); time.sleep(600)"
)


@contextlib.contextmanager
def running(code: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            for each in reversed(family(process)):
                each.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="where a process is held is read from /proc")
def test_a_family_is_held_with_all_below_it() -> None:
    with running(FAMILY) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        held = frozen(process)
        assert [each.pid for each in held] == [process.pid, child]
        assert not asleep(process)
        assert {each.status() for each in held} == {psutil.STATUS_STOPPED}


@pytest.mark.long
@pytest.mark.process
@pytest.mark.timeout(540)
def test_a_federation_goes_on_without_the_member_that_is_killed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(
            [
                "bench",
                "dropout",
                "--members",
                "3",
                "--share",
                "0.34",
                "--rounds",
                "1",
                "--steps",
                "1",
                "--stalled",
                "0",
                "--work",
                str(tmp_path / "work"),
                "--out",
                str(tmp_path / "out"),
                "--json",
            ]
        )
    record = json.loads(capsys.readouterr().out)
    outcome = record["federations"]["killed"]
    assert (outcome["problem"], outcome["counted_twice"]) == ("", 0)
    assert [found["kind"] for found in outcome["rounds"]] == ["warm-up", "undisturbed", "killed", "undisturbed"]
    assert all(found["counted"] >= 2 for found in outcome["rounds"])
    (file,) = (tmp_path / "out").iterdir()
    assert file.name.endswith("-dropout-cpu.json") and json.loads(file.read_text()) == [record]
    assert str(tmp_path) not in file.read_text()
