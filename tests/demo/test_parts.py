"""The demo's smaller parts: windows, mixtures, processes, progress."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.assets import base_path
from lorafleet.coordinator.tree import LocalReducer, Weighted
from lorafleet.demo import evaluate
from lorafleet.demo.exactness import relative_error
from lorafleet.demo.processes import MemoryMeter, Processes, wait_for_port
from lorafleet.demo.run import MARKER, prepare
from lorafleet.demo.traffic import random_mix
from lorafleet.errors import AlreadyExistsError, UnavailableError
from lorafleet.flower_commands import free_port

SLEEPER = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); print('up', flush=True); time.sleep(600)"  # noqa: E501
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


def test_windows_are_prompt_and_text_and_skip_the_prompts_tokens(tmp_path: Path) -> None:
    text = "".join(f"SELECT column_{i} FROM table_{i % 7};\n" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    tokenizer = Tokenizer.from_file(str(base_path("tiny") / "tokenizer.json"))
    found = evaluate.windows(tmp_path, tokenizer, limit=5)
    assert len(found) == 5
    for window in found:
        assert window.text.startswith(window.prompt) and window.prompt.endswith("\n")
        assert len(window.text) <= evaluate.WINDOW_CHARACTERS
        assert len(tokenizer.encode(window.text).ids) <= evaluate.MAX_WINDOW_TOKENS + 1
        assert window.skip == len(tokenizer.encode(window.prompt).ids)
        assert window.skip < len(tokenizer.encode(window.text).ids)


def test_random_mixes_sum_to_one_in_64ths() -> None:
    rng = random.Random(0)
    mixes = [random_mix(rng, ["a", "b", "c", "d"]) for _ in range(200)]
    assert all(sum(mix.values()) == 1.0 and all(w * 64 == int(w * 64) > 0 for w in mix.values()) for mix in mixes)
    assert {len(mix) for mix in mixes} == {1, 2, 3}


def updates() -> dict[str, Weighted]:
    found = {}
    for k, rank in enumerate((4, 8, 32)):
        generator = torch.Generator().manual_seed(k)
        pair = LoraPair(torch.randn(rank, 48, generator=generator), torch.randn(20, rank, generator=generator))
        found[f"m{k}"] = Weighted(LoraAdapter({"q": pair}), 1 / 3)
    return found


def test_exactness_of_the_real_tree_is_float32_rounding_and_a_wrong_one_is_found() -> None:
    class Forgetful(LocalReducer):
        def reduce(self, rule: str, updates: dict[str, Weighted]) -> LoraAdapter:  # type: ignore[override]
            return super().reduce(rule, dict(list(updates.items())[:-1]))

    assert relative_error(updates(), LocalReducer()) < 1e-6
    assert relative_error(updates(), Forgetful()) > 0.1


def test_a_folder_that_is_not_ours_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(AlreadyExistsError, match="no earlier demo wrote it"):
        prepare(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_an_earlier_demos_folder_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(out)
    (out / "old.txt").touch()
    prepare(out)
    assert [path.name for path in out.iterdir()] == [MARKER]


def started(processes: Processes, name: str, code: str) -> subprocess.Popen[bytes]:
    process = processes.start(name, [sys.executable, "-c", code], environment=os.environ, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    return process


def test_leaving_ends_children_and_grandchildren_and_those_who_do_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafleet.demo.processes.STOP_TIMEOUT_S", 1.0)
    with Processes(tmp_path) as processes:
        head = started(processes, "sleeper", SLEEPER)
        deaf = started(processes, "deaf", DEAF)
        family = [
            psutil.Process(head.pid),
            *psutil.Process(head.pid).children(recursive=True),
            psutil.Process(deaf.pid),
        ]
        assert len(family) == 3
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert alive == [] and len(gone) == 3


def test_a_child_that_ends_on_its_own_is_said_with_its_last_words(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        code = "import sys; print('no space on device', file=sys.stderr); sys.exit(3)"
        process = processes.start("writer", [sys.executable, "-c", code], environment=os.environ)
        process.wait()
        with pytest.raises(UnavailableError, match=r"writer ended with 3[\s\S]*no space on device"):
            processes.check()


def test_a_child_that_may_end_is_missed_only_where_it_failed(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        good = processes.start("good", [sys.executable, "-c", ""], environment=os.environ, may_end=True)
        good.wait()
        processes.check()
        bad = processes.start(
            "bad", [sys.executable, "-c", "raise SystemExit(4)"], environment=os.environ, may_end=True
        )
        bad.wait()
        with pytest.raises(UnavailableError, match="bad ended with 4"):
            processes.check()


def test_a_port_that_nobody_opens_is_said(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        process = processes.start("mute", [sys.executable, "-c", "print('hello')"], environment=os.environ)
        with pytest.raises(UnavailableError, match=r"mute ended[\s\S]*hello"):
            wait_for_port(free_port(), process, "mute", processes.log("mute"))


def test_memory_of_children_counts() -> None:
    code = "x = bytearray(200 * 2**20); print('up', flush=True); import sys; sys.stdin.read()"
    before = MemoryMeter()
    before.sample()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        during = MemoryMeter()
        during.sample()
        child.communicate(b"")
    assert during.peak_bytes - before.peak_bytes > 190 * 2**20
