"""The order of jobs, and what becomes of rows whose check is red or whose process fails."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from lorafleet.bench.jobs import Answer, Job
from lorafleet.bench.rows import select
from lorafleet.bench.run import Outcome, Settings, run_rows, works
from lorafleet.bench.shapes import SHAPES
from lorafleet.errors import UnavailableError

OK = {"tokens": 64, "total_s": 2.0, "prefill_s": 0.5}


class Script:
    """Answers jobs without doing them; ``problems`` of checks, ``failing`` names of jobs."""

    def __init__(self, problems: Mapping[str, str] | None = None, failing: Mapping[str, str] | None = None) -> None:
        self.problems, self.failing = problems or {}, failing or {}
        self.jobs: list[str] = []
        self.requests: dict[str, int] = {}

    def __call__(self, job: Job) -> Answer:
        self.jobs.append(f"{job.task} {job.name} {job.seed}" if job.task == "time" else f"{job.task} {job.name}")
        if job.name in self.failing and self.jobs[-1].startswith(self.failing[job.name]):
            raise UnavailableError(f"{job.task} {job.name}: its process ended with 1\n  a log of /home/me")
        if job.task == "check":
            assert job.shape.layers == 2 and job.shape.name.endswith("-reduced")
            return Answer("", problem=self.problems.get(job.name))
        versions = {"vllm": "0.1"} if job.name == "vllm" else None
        self.requests[job.name] = job.load.requests
        return Answer("a GPU", timing=OK if job.task == "time" else None, versions=versions, memory_bytes_per_s=5.0)


def settings(*rows: str, repeats: int = 2) -> Settings:
    return Settings(
        shape=SHAPES["tiny"],
        selection=select(list(rows), vllm=True),
        repeats=repeats,
        device="cpu",
        threads=1,
        work=Path("work"),
    )


def run(script: Script, *rows: str) -> Outcome:
    return run_rows(settings(*rows), run_job=script, say=lambda _step: None)


def statuses(outcome: Outcome) -> dict[str, str]:
    return {result.row.name: result.status for result in outcome.results}


def test_rows_are_run_in_turn_and_the_turns_repeated() -> None:
    script = Script()
    outcome = run(script, "base", "peft", "many")
    assert script.jobs == [
        "prepare tiny", "prepare tiny-reduced", "check base", "check single",
        "time peft 0", "time base 0", "time many 0", "time peft 1", "time base 1", "time many 1",
    ]  # fmt: skip
    assert outcome.complete and outcome.checks == {"base": None, "single": None}
    assert all(len(result.timings) == 2 for result in outcome.results)


def test_a_row_may_have_requests_of_its_own() -> None:
    script = Script()
    outcome = run(script, "base", "base_alone")
    assert (script.requests["base"], script.requests["base_alone"]) == (SHAPES["tiny"].load.requests, 1)
    assert [result.memory_bytes_per_s for result in outcome.results] == [5.0, 5.0]


def test_peers_alone_need_no_check() -> None:
    script = Script()
    outcome = run(script, "vllm")
    assert script.jobs == ["prepare tiny", "time vllm 0", "time vllm 1"]
    assert (outcome.device, outcome.versions) == ("a GPU", {"vllm": "0.1"})


def test_a_red_check_refuses_the_rows_that_depend_on_it_and_no_other() -> None:
    script = Script(problems={"single": "request 0, new token 1: found 7, expected 9"})
    outcome = run(script, "generate", "base", "single", "many", "mix2")
    assert statuses(outcome) == {
        "generate": "measured", "base": "measured", "single": "refused", "mix2": "measured", "many": "refused",
    }  # fmt: skip
    assert not outcome.complete
    assert not any(job.startswith(("time single", "time many")) for job in script.jobs)
    (single,) = (result for result in outcome.results if result.row.name == "single")
    assert "expected 9" in single.reason and not single.timings


def test_a_check_that_cannot_run_is_red() -> None:
    outcome = run(Script(failing={"base": "check"}), "base", "generate")
    assert statuses(outcome) == {"generate": "measured", "base": "refused"}


def test_a_row_that_fails_is_not_tried_again_and_its_log_stays_out_of_the_record(
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = Script(failing={"peft": "time"})
    outcome = run(script, "peft", "base")
    assert statuses(outcome) == {"peft": "failed", "base": "measured"} and not outcome.complete
    assert script.jobs.count("time peft 0") == 1 and "time peft 1" not in script.jobs
    assert outcome.results[0].reason == "time peft: its process ended with 1"
    assert "/home/me" in caplog.text


def test_without_weights_nothing_is_run() -> None:
    with pytest.raises(UnavailableError):
        run(Script(failing={"tiny": "prepare"}), "base")


def test_a_row_that_is_left_out_leaves_the_run_complete() -> None:
    some = Settings(
        shape=SHAPES["tiny"], selection=select(["vllm", "base"], vllm=False), repeats=1, device="cpu", threads=1,
        work=Path("work"),
    )  # fmt: skip
    outcome = run_rows(some, run_job=Script(), say=lambda _step: None)
    assert statuses(outcome) == {"vllm": "left out", "base": "measured"} and outcome.complete


def test_only_our_rows_with_adapters_have_a_floor() -> None:
    assert works(settings("generate", "peft", "base", "single", "mix2", "many")).keys() == {"single", "mix2", "many"}
