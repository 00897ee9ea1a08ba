"""The demo's smaller parts: windows, mixtures, processes, progress."""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from sqlalchemy import make_url
from tokenizers import Tokenizer

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.assets import base_path
from lorafleet.coordinator.settings import CoordinatorConfig
from lorafleet.coordinator.tree import LocalReducer, Weighted
from lorafleet.demo import evaluate
from lorafleet.demo.corpora import Corpora, Owner
from lorafleet.demo.exactness import module_error, relative_error, sum_error, unevenly_weighted
from lorafleet.demo.fleet import federation_toml, service_address
from lorafleet.demo.processes import MemoryMeter, Processes, wait_for_line, wait_for_port
from lorafleet.demo.progress import Progress
from lorafleet.demo.run import MARKER, prepare
from lorafleet.demo.settings import DemoSettings
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
        found[f"m{k}"] = Weighted(LoraAdapter({"q": pair, "v": LoraPair(pair.a, -pair.b)}), 1 / 3)
    return found


def test_a_modules_error_is_the_distance_from_the_dense_sum_over_its_norm() -> None:
    # B A of the members: [[1, 2]] and [[3, 0]]; 0.25 and 0.75 of them are [[2.5, 0.5]], of norm √6.5.
    one, other = (
        LoraPair(torch.tensor([[1.0, 2.0]]), torch.ones(1, 1)),
        LoraPair(torch.eye(2), torch.tensor([[3.0, 0]])),
    )
    members = {"m1": Weighted(LoraAdapter({"q": one}), 0.25), "m2": Weighted(LoraAdapter({"q": other}), 0.75)}
    # Found is [[2.5, 1.0]]: off by 0.5.
    found = LoraAdapter({"q": LoraPair(torch.tensor([[2.5, 1.0]]), torch.ones(1, 1))})
    assert module_error(found, members, "q") == pytest.approx(0.5 / 6.5**0.5, rel=1e-12)
    assert sum_error(members, LocalReducer()) < 1e-7


def test_uneven_weights_sum_to_one_over_a_hundredfold_range_whoever_came_first() -> None:
    members = updates()
    weights = {name: weight for name, (_, weight) in unevenly_weighted(members).items()}
    assert sum(weights.values()) == pytest.approx(1.0)
    assert max(weights.values()) / min(weights.values()) == pytest.approx(100.0)
    again = unevenly_weighted(dict(reversed(members.items())))
    assert {name: weight for name, (_, weight) in again.items()} == weights
    assert all(again[name].adapter is members[name].adapter for name in members)


def test_the_real_tree_is_exact_up_to_the_rounding_to_float32() -> None:
    assert 0 < relative_error(updates(), LocalReducer()) < 1e-6


def forgets_a_member(members: Mapping[str, Weighted]) -> Mapping[str, Weighted]:
    return dict(list(members.items())[:-1])


def weighs_all_alike(members: Mapping[str, Weighted]) -> Mapping[str, Weighted]:
    """Right under the equal weights of a run whose members do the same steps, and under no others."""
    return {name: update._replace(weight=1 / len(members)) for name, update in members.items()}


def loses_a_module(members: Mapping[str, Weighted]) -> Mapping[str, Weighted]:
    return {name: Weighted(LoraAdapter({"q": a.modules["q"]}), weight) for name, (a, weight) in members.items()}


def invents_a_module(members: Mapping[str, Weighted]) -> Mapping[str, Weighted]:
    return {name: Weighted(LoraAdapter({**a.modules, "x": a.modules["q"]}), w) for name, (a, w) in members.items()}


@pytest.mark.parametrize("spoil", [forgets_a_member, weighs_all_alike, loses_a_module, invents_a_module])
def test_a_wrong_sum_is_found(spoil: Callable[[Mapping[str, Weighted]], Mapping[str, Weighted]]) -> None:
    class Wrong:
        def reduce(self, rule: str, updates: Mapping[str, Weighted]) -> LoraAdapter:
            return LocalReducer().reduce(rule, spoil(updates))

    assert relative_error(updates(), Wrong()) > 0.1


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
    process = processes.start(name, [sys.executable, "-c", code], environment=os.environ)
    wait_for_line(processes.log(name), "up", process, name)
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


ANNOUNCES_AND_GOES_ON = """
import sys, time
print("a warning", file=sys.stderr)
print("listening grpc=127.0.0.1:", end="", flush=True)
time.sleep(0.3)
print("4711", flush=True)
print("x" * 300_000, flush=True)
print("still here", flush=True)
time.sleep(600)
"""


def test_the_services_address_is_a_whole_line_and_what_it_says_later_blocks_nobody(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        log = processes.log("service")
        command = [sys.executable, "-c", ANNOUNCES_AND_GOES_ON]
        process = processes.start("service", command, environment=os.environ)
        assert service_address(process, log) == "127.0.0.1:4711"
        # More than a pipe holds, and nobody has read it.
        assert wait_for_line(log, "still here", process, "service")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise SystemExit('no such base')", "no such base"),
        ("print('listening grpc=127.0.0.1:47', end='')", "listening grpc=127.0.0.1:47"),
    ],
    ids=["an error", "half a line"],
)
def test_a_service_that_ends_before_it_listens_is_said_with_its_last_words(
    tmp_path: Path, code: str, words: str
) -> None:
    with Processes(tmp_path) as processes:
        process = processes.start("service", [sys.executable, "-c", code], environment=os.environ)
        with pytest.raises(UnavailableError, match=rf"service ended[\s\S]*{words}"):
            service_address(process, processes.log("service"))


def test_a_line_that_never_comes_is_not_waited_for_forever(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        process = started(processes, "sleeper", SLEEPER)
        with pytest.raises(UnavailableError, match=r"sleeper did not write 'down' within 0 s[\s\S]*up"):
            wait_for_line(processes.log("sleeper"), "down", process, "sleeper", timeout_s=0.0)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.demo.progress.TICK_S", 0.01)
    text, ticked = io.StringIO(), threading.Event()
    with Progress(Console(file=text, force_terminal=terminal, width=80), on_tick=ticked.set) as progress:
        with progress.step("a round", total=2) as done:
            done(1)
        with pytest.raises(UnavailableError), progress.step("a step that fails"):
            raise UnavailableError("the service ended")
        assert ticked.wait(timeout=30)
    assert ("✓" in text.getvalue() and "a round" in text.getvalue()) == terminal
    assert text.getvalue().count("✓") == terminal
    assert terminal or text.getvalue() == ""


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


def test_the_federations_file_says_what_the_settings_say_whatever_is_in_a_path(tmp_path: Path) -> None:
    folder = tmp_path / 'a "quoted" \\back\\slash é'
    settings = DemoSettings()
    owner = Owner('o\'dd "name"', "sql", folder, 1, 1, {})
    corpora = Corpora(folder, 7, (owner,), (), ())
    url = f"sqlite:///{folder / 'registry.db'}"
    text = federation_toml(settings, corpora, registry=url, blobs=folder / "blobs", ray="h:1", superlink="127.0.0.1:1")
    path = tmp_path / "federation.toml"
    path.write_text(text, encoding="utf-8")
    config = CoordinatorConfig.load(path)
    assert config.federation == settings.federation()
    assert (config.blobs, config.members) == (folder / "blobs", {owner.name: owner.name})
    assert make_url(config.registry).database == str(folder / "registry.db")


KILLED = """
import os, sys
from pathlib import Path
from lorafleet.demo.processes import Processes, wait_for_line
processes = Processes(Path(sys.argv[1]))
child = processes.start("child", [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"],
                        environment=os.environ)
wait_for_line(processes.log("child"), "up", child, "child")
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_demo_that_is_killed_leaves_no_children(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        gone, _ = psutil.wait_procs([child], timeout=20)
    assert gone == [child]


WORKERS = """
import sys
from pathlib import Path
from lorafleet.demo.arms import Arms
import os
if __name__ == "__main__":
    with Arms(None, None, Path(), workers=1) as arms:
        print(arms._beside.submit(os.getpid).result(), arms._pool.submit(os.getpid).result(), flush=True)
        sys.stdin.read()
"""


@pytest.mark.process
@pytest.mark.long
def test_a_demo_that_is_killed_leaves_no_workers(tmp_path: Path) -> None:
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(number)) for number in parent.stdout.readline().split()]
        parent.kill()
        gone, _ = psutil.wait_procs(workers, timeout=20)
    assert len(workers) == 2 and set(gone) == set(workers)


@pytest.mark.parametrize("terminal", [True, False])
def test_an_interrupted_demo_says_that_it_stops_before_its_parts_are_ended(terminal: bool) -> None:
    text, order = io.StringIO(), list[bool]()
    progress = Progress(Console(file=text, force_terminal=terminal, width=80), on_tick=lambda: None)
    with pytest.raises(KeyboardInterrupt), progress, contextlib.ExitStack() as stack:
        stack.callback(lambda: order.append("stopping" in text.getvalue()))
        with progress.saying_when_stopped("stopping …"), progress.step("a round"):
            raise KeyboardInterrupt
    assert order == [terminal]
    assert ("stopping …" in text.getvalue()) == terminal
