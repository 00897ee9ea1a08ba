"""A shortened demo with every real process: what it writes, what it leaves behind, and how it ends when interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.process, pytest.mark.timeout(540)]

# Inherited by everything that the demo starts, Ray and the arms' workers included.
MARK = "LORAFLEET_TEST_RUN"

SHORT = """
import sys
from pathlib import Path
from lorafleet.coordinator.settings import Training
from lorafleet.demo.run import run_demo
from lorafleet.demo.settings import DemoSettings

if __name__ == "__main__":
    # Two of the three domains: each owner is a SuperNode, and a process for each of its tasks.
    short = DemoSettings(
        domains=("prose", "sql"), ranks=(16, 8, 32, 4), rounds=2, training=Training(steps=2, batch_size=2), windows=2,
        burst_requests=16,
    )
    run_demo(Path(sys.argv[1]), settings=short)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    script = folder / "short.py"
    script.write_text(SHORT)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder / "out")],
        env={**os.environ, MARK: str(folder)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def of_this_run(folder: Path) -> list[psutil.Process]:
    """Processes that carry the run's mark in their environment, wherever they hang in the tree."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if mark == str(folder):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, int]]:
    folder = tmp_path_factory.mktemp("demo")
    process = start(folder)
    try:
        _, said = process.communicate(timeout=480)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        raise
    yield folder, said, process.returncode


def test_the_loop_closes_and_is_reported(finished: tuple[Path, str, int]) -> None:
    folder, said, code = finished
    assert code == 0, said
    assert said == ""  # progress is for terminals
    report = json.loads((folder / "out" / "report.json").read_text())
    assert set(report["domains"]) == {"prose", "sql"}
    arms = {"base", "local", "fedit", "federated", "centralised", "routed", "oracle"}
    assert all(set(row) == arms and all(0 < loss < 12 for loss in row.values()) for row in report["domains"].values())
    assert report["aggregation"]["relative_error"] <= 1e-5
    assert [r["round"] for r in report["rounds"]] == [1, 2]
    assert len(report["rounds"][1]["updates"]) == 4
    assert {u["rank"] for u in report["rounds"][0]["updates"].values()} == {4, 8, 16, 32}
    serving = report["serving"]
    assert serving["errors"] == 0, serving["first_errors"]
    assert serving["tenants"] == 4
    assert serving["distinct_mixes"] >= 10
    assert serving["swaps_while_serving"] >= 1
    assert (folder / "out" / "report.html").stat().st_size > 10_000


def test_nothing_is_left_running(finished: tuple[Path, str, int]) -> None:
    assert of_this_run(finished[0]) == []


def test_experts_load_with_peft_and_the_engine_gives_its_greedy_tokens(finished: tuple[Path, str, int]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lorafleet.assets import base_path
    from lorafleet.engine import Engine, SamplingParams
    from lorafleet.registry import Registry

    out, prompts = finished[0] / "out", ["SELECT name, ", "INSERT INTO orders ", "This software is provided "]
    engine = Engine.load("tiny", dtype="float32")
    compared = 0
    with Registry.open(f"sqlite:///{out / 'registry.db'}", out / "blobs") as registry:
        experts = [v for v in registry.live("operator") if v.adapter.startswith("fleet-")]
        assert len(experts) >= 2
        for version in experts:
            base = AutoModelForCausalLM.from_pretrained(base_path("tiny"), dtype=torch.float32)
            model = PeftModel.from_pretrained(base, str(registry.path(version))).eval()
            engine.add_adapter(version.adapter, registry.path(version))
            for prompt in prompts:
                (ours,) = engine.generate(
                    [prompt],
                    mixes=[{version.adapter: 1.0}],
                    sampling=SamplingParams(max_tokens=24, ignore_eos=True),
                )
                asked = [engine.tokenizer.eos_token_id, *engine.tokenizer(prompt).input_ids]
                with torch.no_grad():  # all places at once: what came before each is ours, and was found right
                    logits = model(input_ids=torch.tensor([asked + list(ours.token_ids)])).logits[0]
                for token, place in zip(ours.token_ids, logits[len(asked) - 1 : -1], strict=True):
                    best = place.topk(2)
                    if best.values[0] - best.values[1] < 1e-4:
                        break  # a tie in float32: either is right, and the texts part here
                    assert token == best.indices[0]
                    compared += 1
    assert compared >= 100


@pytest.mark.long
def test_interrupted_it_ends_all_its_processes(tmp_path: Path) -> None:
    process = start(tmp_path)
    deadline = time.monotonic() + 120
    # Interrupted in the middle: when the SuperNodes and the coordinator are there.
    while not (tmp_path / "out" / "logs" / "coordinator.log").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 10
    assert any("raylet" in child.name() for child in family)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=90)
    assert process.returncode != 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert of_this_run(tmp_path) == []
