"""``lorafleet bench engine`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafleet.bench import engine
from lorafleet.bench.jobs import Answer, Job
from lorafleet.cli import main
from lorafleet.errors import UnavailableError


def lorafleet(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as end:
        main(["bench", "engine", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int | None)
    return end.value.code or 0, out, err


class Scripted:
    """In place of child processes: a check of mixtures that is red, and rows that take no time."""

    def __init__(self, _folder: Path, *, vllm_python: Path | None) -> None:
        pass

    def __call__(self, job: Job) -> Answer:
        if job.name == "peft":
            raise UnavailableError("time peft: its process ended with -9\nKilled")
        problem = "request 0, new token 0: found 3, expected 4" if (job.task, job.name) == ("check", "mix2") else None
        timing = {"tokens": 64, "total_s": 2.0, "prefill_s": 0.5} if job.task == "time" else None
        return Answer("", timing=timing, problem=problem)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Children", Scripted)


@pytest.mark.usefixtures("scripted")
def test_a_red_check_ends_with_status_one_and_the_record_says_why(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, _ = lorafleet(capsys, "--shape", "tiny", "--rows", "base,mix2", "--out", tmp_path, "--json")
    record: dict[str, Any] = json.loads(out)
    assert status == 1
    assert {row["name"]: row["status"] for row in record["rows"]} == {"base": "measured", "mix2": "refused"}
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == [record]


@pytest.mark.usefixtures("scripted")
def test_a_complete_run_ends_with_status_zero_and_prints_a_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, err = lorafleet(
        capsys, "--shape", "tiny", "--rows", "vllm,generate,base,single", "--repeats", "1", "--out", tmp_path
    )
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["row", "generate", "base", "single", "vllm:", "record:"]


@pytest.mark.usefixtures("scripted")
def test_a_row_that_fails_ends_with_status_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = lorafleet(capsys, "--shape", "tiny", "--rows", "peft,base", "--out", tmp_path)
    assert status == 1 and "peft: failed: time peft: its process ended with -9" in out


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--shape", "XL"], 1, "unknown shape 'XL'"),
        (["--shape", "tiny", "--rows", "mix3"], 1, "unknown row 'mix3'"),
        (["--shape", "tiny", "--rows", "vllm"], 1, "--vllm-python"),
        (["--shape", "tiny", "--vllm-python", "/nowhere/python"], 2, "/nowhere/python"),
        (["--shape", "tiny", "--repeats", "0"], 2, "--repeats"),
    ],
)
def test_a_wrong_command_line_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, said: str
) -> None:
    found, out, err = lorafleet(capsys, *arguments)
    assert (found, out) == (status, "") and said in err


@pytest.mark.long
@pytest.mark.process
@pytest.mark.timeout(1200)
def test_a_tiny_run_measures_us_and_peers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = ["generate", "peft", "base", "single", "mix2", "token_top2"]
    status, out, err = lorafleet(
        capsys, "--shape", "tiny", "--rows", ",".join(rows), "--repeats", "1", "--threads", "1",
        "--work", tmp_path / "work", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert status == 0, err
    record: dict[str, Any] = json.loads(out)
    assert record["checks"] == dict.fromkeys(["base", "single", "mix2", "token_top2"])
    for row in record["rows"]:
        assert (row["status"], [each["tokens"] for each in row["repeats"]]) == ("measured", [64])
        assert row["median"]["prefill_s"] > 0 and row["median"]["tokens_per_s"] > 0
    assert record["floors"].keys() == {"single", "mix2", "token_top2"}
    compared = {(ratio["of"], ratio["to"]) for ratio in record["ratios"]}
    assert compared >= {("base", "generate"), ("single", "peft"), ("mix2", "base")}
    assert str(tmp_path) not in out
