"""Child processes: what they are told, and how their failures are reported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lorafleet.bench import children
from lorafleet.bench.children import Children
from lorafleet.bench.jobs import Answer, Job
from lorafleet.bench.peers.vllm_job import vllm_environment, vllm_job
from lorafleet.bench.shapes import SHAPES
from lorafleet.errors import UnavailableError

FAKE = "import json, sys; job = json.load(open(sys.argv[1])); "


def job(name: str = "vllm", **other: object) -> Job:
    fields: dict[str, object] = {
        "task": "time", "name": name, "shape": SHAPES["tiny"], "work": Path("/w"), "device": "cpu", "threads": 1,
        "seed": 0,
    }  # fmt: skip
    return Job(**(fields | other))  # type: ignore[arg-type]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file to write a program into that stands in vLLM's place."""
    program = tmp_path / "program.py"
    monkeypatch.setattr(children, "PROGRAM", program)
    return program


def run(folder: Path) -> Answer:
    return Children(folder / "run", vllm_python=Path(sys.executable))(job())


def test_a_job_survives_being_written() -> None:
    assert Job.from_json(job("mix2").to_json()) == job("mix2")


def test_an_answer_comes_back(fake: Path, tmp_path: Path) -> None:
    fake.write_text(FAKE + "json.dump({'device': str(len(job['prompts'])), 'problem': None}, open(sys.argv[2], 'w'))")
    assert run(tmp_path) == Answer("3")


def test_a_failure_says_how_it_ended_and_quotes_its_log_below(fake: Path, tmp_path: Path) -> None:
    fake.write_text("print('no memory left'); raise SystemExit(3)")
    with pytest.raises(UnavailableError, match=r"(?s)\Atime vllm: its process ended with 3\n.*no memory left"):
        run(tmp_path)


def test_a_child_without_an_answer_has_failed(fake: Path, tmp_path: Path) -> None:
    fake.write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "answer.json").write_text('{"device": "of an earlier job"}')
    with pytest.raises(UnavailableError, match="ended without an answer"):
        run(tmp_path)


def test_a_child_that_hangs_is_ended(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "LIMIT_S", 1.0)
    fake.write_text("import threading; threading.Event().wait()")
    with pytest.raises(UnavailableError, match="no result in 1 s"):
        run(tmp_path)


def test_a_child_finds_no_module_of_ours_beside_its_program(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("")
    fake.write_text(FAKE + "import vllm")
    with pytest.raises(UnavailableError, match="No module named 'vllm'"):
        run(tmp_path)


def test_vllm_is_told_of_the_eight_adapters_only_for_lora() -> None:
    assert vllm_job(job("vllm"))["adapters"] == []
    adapters = vllm_job(job("vllm_lora"))["adapters"]
    assert [each["name"] for each in adapters] == [f"a{i}" for i in range(8)]
    assert all(each["folder"].startswith("/w/tiny-") for each in adapters)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_vllm_gets_as_many_cores_as_the_others_get_threads() -> None:
    bound = vllm_environment(job(threads=1))["VLLM_CPU_OMP_THREADS_BIND"]
    assert int(bound) in os.sched_getaffinity(0)
