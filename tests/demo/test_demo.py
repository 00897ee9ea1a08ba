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

SHORT = """
import sys
from pathlib import Path
from rich.console import Console
from lorafleet.coordinator.settings import Training
from lorafleet.demo.run import run_demo
from lorafleet.demo.settings import DemoSettings

if __name__ == "__main__":
    short = DemoSettings(rounds=2, training=Training(steps=3), windows=4, burst_requests=16, judged=False)
    run_demo(Path(sys.argv[1]), settings=short, console=Console(stderr=True))
"""


def start(folder: Path) -> subprocess.Popen[str]:
    script = folder / "short.py"
    script.write_text(SHORT)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder / "out")], stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def of_this_run(folder: Path) -> list[psutil.Process]:
    """Processes whose command line or environment names the run's folder, wherever they hang in the tree."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if process.pid != os.getpid() and any(str(folder / "out") in word for word in words):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, int]]:
    folder = tmp_path_factory.mktemp("demo")
    process = start(folder)
    _, said = process.communicate(timeout=480)
    yield folder, said, process.returncode


def test_the_loop_closes_and_is_reported(finished: tuple[Path, str, int]) -> None:
    folder, said, code = finished
    assert code == 0, said
    report = json.loads((folder / "out" / "report.json").read_text())
    assert set(report["domains"]) == {"cpp", "prose", "sql"}
    arms = {"base", "local", "fedit", "federated", "centralised", "routed", "oracle"}
    assert all(set(row) == arms and all(0 < loss < 12 for loss in row.values()) for row in report["domains"].values())
    assert report["aggregation"]["relative_error"] <= 1e-5
    assert [r["round"] for r in report["rounds"]] == [1, 2]
    assert len(report["rounds"][1]["updates"]) == 6
    assert {u["rank"] for u in report["rounds"][0]["updates"].values()} == {4, 8, 16, 32}
    serving = report["serving"]
    assert serving["errors"] == 0, serving["first_errors"]
    assert serving["tenants"] == 6
    assert serving["distinct_mixes"] >= 10
    assert serving["swaps_while_serving"] >= 1
    assert (folder / "out" / "report.html").stat().st_size > 10_000


def test_nothing_is_left_running(finished: tuple[Path, str, int]) -> None:
    assert of_this_run(finished[0]) == []


def test_experts_load_with_peft_and_answer_as_the_report_says(finished: tuple[Path, str, int]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lorafleet.assets import base_path
    from lorafleet.registry import Registry

    out = finished[0] / "out"
    with Registry.open(f"sqlite:///{out / 'registry.db'}", out / "blobs") as registry:
        live = registry.live("operator")
        assert len(live) >= 5
        for version in live:
            base = AutoModelForCausalLM.from_pretrained(base_path("tiny"), dtype=torch.float32)
            model = PeftModel.from_pretrained(base, str(registry.path(version)))
            weights = registry.load(version)
            path, pair = next(iter(weights.modules.items()))
            module = model.base_model.model.get_submodule(path)
            torch.testing.assert_close(module.get_delta_weight("default"), pair.delta, rtol=1e-5, atol=1e-7)


def test_interrupted_it_ends_all_its_processes(tmp_path: Path) -> None:
    process = start(tmp_path)
    deadline = time.monotonic() + 120
    # Interrupted in the middle: when the SuperNodes and the coordinator are there.
    while not (tmp_path / "out" / "logs" / "coordinator.log").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    family = [process, *of_this_run(tmp_path)]
    assert len(family) >= 10
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert of_this_run(tmp_path) == []
