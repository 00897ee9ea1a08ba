"""The client's benchmark: turns, medians, losses that have to agree before anything is said of times."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.assets import base_path
from lorafleet.bench import client_child
from lorafleet.bench.client import (
    ClientSettings,
    bench_client,
    command_line,
    disagreement,
    make_record,
    rows,
    run_trainings,
)
from lorafleet.bench.client_jobs import TrainChildren, Trained, TrainJob
from lorafleet.cli import main
from lorafleet.errors import InvalidInputError, UnavailableError

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
SPEED = {"ours": 300.0, "trainer": 200.0, "trainer_bf16": 240.0}
PEAK = {"ours": 100, "trainer": 200, "trainer_bf16": 90}


def settings(**changes: Any) -> ClientSettings:
    fields: dict[str, Any] = {
        "base": base_path("tiny"), "shape": None, "device": "cpu", "dtype": "bfloat16", "threads": 1, "steps": 10,
    }  # fmt: skip
    return ClientSettings(**{**fields, **changes})


def trained(job: TrainJob, **changes: Any) -> Trained:
    """Made up: each repeat a little faster."""
    fields: dict[str, Any] = {
        "tokens_per_s": SPEED[job.row] + job.seed, "peak_bytes": PEAK[job.row], "base_bytes": 7,
        "losses": [4.0] * 5 + [2.0] * 5, "total_s": 1.0, "device": "",
    }  # fmt: skip
    return Trained(**{**fields, **changes})


def silent(_: str) -> None:
    pass


def test_rows_take_turns_and_every_repeat_has_data_of_its_own() -> None:
    jobs: list[TrainJob] = []
    said: list[str] = []

    def run(job: TrainJob) -> Trained:
        jobs.append(job)
        return trained(job)

    outcome = run_trainings(settings(repeats=2), run=run, say=said.append)
    assert [(job.row, job.seed) for job in jobs] == [(row, seed) for seed in (0, 1) for row in rows("bfloat16")]
    assert said[0] == "repeat 1 of 2: ours"
    assert outcome.problem == ""
    assert {(j.base, j.dtype, j.rank, j.batch_size, j.sequence_length, j.steps) for j in jobs} == {
        (base_path("tiny"), "bfloat16", 16, 8, 256, 10)
    }


def test_ratios_are_of_medians_and_both_have_to_hold() -> None:
    outcome = run_trainings(settings(repeats=3), run=trained, say=silent)
    plain, low = outcome.ratios
    assert (plain.to, low.to) == ("trainer", "trainer_bf16")
    assert plain.tokens_per_s == pytest.approx(301 / 201)
    assert (plain.peak_bytes, plain.met) == (0.5, True)
    assert (low.tokens_per_s > 1, low.met) == (True, False)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([4.0] * 5 + [2.1] * 5, "trainer at 2.1000; expected the same within 1.0%"),
        ([4.0] * 5 + [float("nan")] * 5, "trainer at nan"),
        ([2.0] * 9, "ours took 10 steps, trainer 9"),
    ],
)
def test_rows_that_end_at_other_losses_are_found(losses: list[float], words: str) -> None:
    job = TrainJob(row="ours", base=Path("b"), shape=None, device="cpu", dtype="bfloat16", threads=1, rank=1,
                   batch_size=1, sequence_length=8, steps=10, seed=0)  # fmt: skip
    mine = trained(job)
    assert disagreement({"ours": [mine], "trainer": [mine]}, 0.01) == ""
    assert words in disagreement({"ours": [mine], "trainer": [mine._replace(losses=losses)]}, 0.01)


def test_record_without_agreement_holds_no_times_or_memory(tmp_path: Path) -> None:
    def run(job: TrainJob) -> Trained:
        return trained(job, losses=[3.0 if job.row == "ours" else 2.0] * 10)

    benchmark = bench_client(settings(repeats=1), run=run, out=tmp_path, when=NOON, say=silent)
    assert "loss of 3.0000" in benchmark.record["problem"]
    assert benchmark.record["ratios"] is None
    assert "tokens_per_s" not in json.dumps(benchmark.record)
    assert "peak_bytes" not in json.dumps(benchmark.record)


def test_record_holds_what_was_run_and_nothing_of_the_machine_but_its_kind(tmp_path: Path) -> None:
    benchmark = bench_client(settings(repeats=1), run=trained, out=tmp_path, when=NOON, say=silent)
    assert benchmark.file == tmp_path / "2026-11-22-client-tiny-base-cpu.json"
    (record,) = json.loads(benchmark.file.read_text())
    assert record == json.loads(json.dumps(benchmark.record))
    assert record["rows"][0]["median"]["tokens_per_s"] == 300.0
    assert [ratio["to"] for ratio in record["ratios"]] == ["trainer", "trainer_bf16"]
    assert str(base_path("tiny")) not in json.dumps(record)
    assert "accelerate" in record["versions"]


def test_command_that_is_recorded_does_it_again() -> None:
    words = command_line(settings(shape="S", dtype="float32", steps=12))
    assert " ".join(words) == (
        "lorafleet bench client --shape S --dtype float32 --rank 16 --batch-size 8 --sequence-length 256 --steps 12 "
        "--repeats 3 --device cpu --threads 1"
    )


def test_too_few_steps_to_measure_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least 10"):
        settings(steps=9)


def test_in_float32_there_is_one_way_to_hold_factors() -> None:
    assert rows("float32") == ("ours", "trainer")
    record = make_record(
        settings(dtype="float32"), run_trainings(settings(dtype="float32"), run=trained, say=silent), when=NOON
    )
    assert [row["name"] for row in record["rows"]] == ["ours", "trainer"]


def test_text_to_train_on_fills_as_many_blocks_as_are_asked_for() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_path("tiny"), local_files_only=True)
    blocks = client_child.own_text(tokenizer, 2000, 12)
    assert blocks.shape == (12, 2001)
    assert blocks.dtype == torch.long
    assert int(blocks.min()) >= 0


@pytest.mark.long
@pytest.mark.process
def test_all_rows_train_the_same_in_processes_of_their_own(tmp_path: Path) -> None:
    asked = settings(
        base=tmp_path / "base", shape="tiny", steps=10, rank=4, batch_size=2, sequence_length=32, repeats=1
    )
    outcome = run_trainings(asked, run=TrainChildren(tmp_path), say=silent)
    assert outcome.problem == ""
    for (found,) in outcome.trainings.values():
        assert len(found.losses) == 10
        assert found.losses[-1] < found.losses[0]
        assert found.tokens_per_s > 0
        assert found.peak_bytes > 0
    # Step by step, not at the end alone.
    ours, trainer = (outcome.trainings[row][0].losses for row in ("ours", "trainer"))
    assert ours == pytest.approx(trainer, rel=2e-2)


def test_training_that_fails_is_an_error_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_process(command: list[str], *, environment: dict[str, str], log: Path) -> str:
        log.write_text("Traceback\nno base here\n")
        return "1"

    monkeypatch.setattr("lorafleet.bench.client_jobs.run_process", run_process)
    with pytest.raises(UnavailableError) as failed:
        run_trainings(settings(repeats=1), run=TrainChildren(tmp_path), say=silent)
    assert str(failed.value).splitlines() == ["ours: its process ended with 1", "Traceback", "no base here"]


def test_command_prints_a_table_or_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = False

    def run(self: TrainChildren, job: TrainJob) -> Trained:
        return trained(job, losses=[3.0 if wrong and job.row == "ours" else 2.0] * 10)

    monkeypatch.setattr(TrainChildren, "__call__", run)
    command = ["bench", "client", "--dtype", "bfloat16", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert not end.value.code
    out = capsys.readouterr().out
    assert "ours : trainer: 1.50 of the tokens/s, 0.50 of the memory (at least as fast, no more memory: met)" in out
    assert "0.50 of the memory" in out and "1.11 of the memory (at least as fast, no more memory: missed)" in out
    wrong = True
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 1
    out = capsys.readouterr().out
    assert out.startswith("refused: repeat 1: ours ends at a loss of 3.0000")
    assert "tokens/s" not in out


def test_environment_of_a_child_keeps_it_offline_and_on_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}

    def run_process(command: list[str], *, environment: dict[str, str], log: Path) -> str:
        seen.update(environment)
        Path(command[-1]).write_text(json.dumps(trained(TrainJob.from_json(Path(command[-2]).read_text()))._asdict()))
        return "0"

    monkeypatch.setattr("lorafleet.bench.client_jobs.run_process", run_process)
    run_trainings(settings(threads=3, repeats=1), run=TrainChildren(tmp_path), say=silent)
    assert (seen["OMP_NUM_THREADS"], seen["HF_HUB_OFFLINE"]) == ("3", "1")
    assert seen["PATH"] == os.environ["PATH"]
