"""The reduction tree over a real Ray cluster of this test's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.coordinator.reduction import Extent, extents_of
from lorafleet.coordinator.settings import CoordinatorConfig
from lorafleet.coordinator.tree import LocalReducer, RayReducer, Reducer, Weighted
from lorafleet.errors import InvalidInputError, UnavailableError

SHAPES = {f"model.{i}.{name}": shape for i in range(3) for name, shape in (("q", (32, 48)), ("down", (48, 96)))}


def updates(count: int) -> dict[str, Weighted]:
    members = {}
    for k in range(count):
        generator, rank = torch.Generator().manual_seed(k), 4 + 3 * k
        modules = {
            path: LoraPair(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))
            for path, (d_out, d_in) in SHAPES.items()
        }
        members[f"m{k:02}"] = Weighted(LoraAdapter(modules, "base"), (k + 1) / (count * (count + 1) / 2))
    return members


def streamed(reducer: Reducer, watch: Callable[[str], None], count: int = 40) -> str:
    """The digest of a sum over several windows whose members come out of order; ``watch`` sees every reading."""
    members = updates(count)

    def read(key: str, paths: Sequence[str]) -> dict[str, LoraPair]:
        watch(key)
        modules = members[key].adapter.modules
        return {path: modules[path] for path in paths if path in modules}

    extents = extents_of([member.adapter for member in members.values()])
    reduction = reducer.start("exact", list(members), read, extents, rank=8, base="base")
    for key in sorted(members, key=lambda key: key[::-1]):
        if key != "m17":
            reduction.add(key, members[key].weight)
    reduction.skip("m17")
    assert reduction.windows > 1
    return reduction.result().adapter.digest


# Processes of their own: Ray keeps one connection a process, and the cluster has to outlive the reducer that attaches.
HEAD = """
import os, signal, subprocess, sys
import psutil, ray
from lorafleet.coordinator.settings import CoordinatorConfig
from lorafleet.coordinator.tree import RayReducer
from tests.coordinator.test_tree import LARGE, MEMORY, extents_of_large, large, streamed, updates

cluster = ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
for rule in ("fedit", "rbla", "hetlora"):
    print("head", rule, RayReducer().reduce(rule, updates(9)).digest)
subprocess.run([sys.executable, "-c", sys.argv[1], cluster.address_info["gcs_address"]], check=True)
print("alive", ray.get(ray.remote(lambda: 41 + 1).remote()))

TASKS = ("ray::IDLE", "ray::lift_slot", "ray::merge_slot", "ray::finish_module")

def workers():
    below = psutil.Process().children(recursive=True)
    return [p for p in below if p.cmdline() and p.cmdline()[0].startswith(TASKS)]

read, killed = [], []
def kill(key):
    read.append(key)
    if len(read) in (30, 70):
        for process in workers():
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)

print("killed", streamed(RayReducer(memory_bytes=MEMORY), kill), len(killed) >= 2, len(read))

# What was summed is let go of: Ray would keep what `ray.put` stored for tasks that it may run again.
core, kept = ray._private.worker.global_worker.core_worker, []
reduction = RayReducer(memory_bytes=6_000_000).start("exact", LARGE, large, extents_of_large(), rank=8)
for number, key in enumerate(LARGE):
    reduction.add(key, 1 / len(LARGE))
    kept.append(len(core.get_all_reference_counts()))
reduction.result()
print("kept", max(kept[-16:]) <= 2 * max(kept[8:24]))
print(kept, file=sys.stderr)  # for who reads why it failed
"""
ATTACHED = """
import sys
from lorafleet.coordinator.settings import CoordinatorConfig
from lorafleet.coordinator.tree import RayReducer
from tests.coordinator.test_tree import updates

reducer = RayReducer(sys.argv[1])
print("attached", reducer.reduce("exact", updates(9)).digest, flush=True)
reducer.close()
"""
MEMORY = 400_000
LARGE = [f"m{number:03}" for number in range(64)]


def large(key: str, paths: Sequence[str]) -> dict[str, LoraPair]:
    """Too large for Ray to send along with a task: 512 kB an update."""
    generator = torch.Generator().manual_seed(int(key[1:]))
    return {
        path: LoraPair(torch.randn(64, 1024, generator=generator), torch.randn(1024, 64, generator=generator))
        for path in paths
    }


def extents_of_large() -> dict[str, Extent]:
    return {"model.q": Extent(1024, 1024, 64 * len(LARGE))}


@pytest.mark.long
@pytest.mark.process
def test_ray_gives_the_same_bits_as_one_process_when_workers_are_killed_too_and_is_left_running() -> None:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    run = subprocess.run(
        [sys.executable, "-c", HEAD, ATTACHED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    lines = [
        line for line in run.stdout.splitlines() if line.startswith(("head", "attached", "alive", "killed", "kept"))
    ]
    heads = [f"head {rule} {LocalReducer().reduce(rule, updates(9)).digest}" for rule in ("fedit", "rbla", "hetlora")]
    attached = LocalReducer().reduce("exact", updates(9)).digest
    read: list[str] = []
    streamed_here = streamed(LocalReducer(memory_bytes=MEMORY), read.append)
    # As many readings as without a loss: what died was computed again from the inputs in the store.
    killed = f"killed {streamed_here} True {len(read)}"
    assert lines == [*heads, f"attached {attached}", "alive 42", killed, "kept True"], run.stderr


def test_a_file_says_how_much_the_sum_may_hold(tmp_path: Path) -> None:
    def load(line: str) -> CoordinatorConfig:
        text = f"""
[federation]
tenant = "operator"
name = "fleet"
[coordinator]
registry = "sqlite:///registry.db"
blobs = "blobs"
ray_address = "local"
superlink = "127.0.0.1:8000"
{line}
"""
        (tmp_path / "federation.toml").write_text(text)
        return CoordinatorConfig.load(tmp_path / "federation.toml")

    assert load("").reduce_memory_mb == 1024
    assert load("reduce_memory_mb = 300").reduce_memory_mb == 300
    with pytest.raises(InvalidInputError, match="reduce_memory_mb is 0"):
        load("reduce_memory_mb = 0")


def test_a_cluster_that_is_not_there_is_said() -> None:
    with pytest.raises(UnavailableError, match="ray start --head"):
        RayReducer("127.0.0.1:1")


def test_a_cluster_that_has_lost_its_nodes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_node(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster\nat its address")

    monkeypatch.setattr("ray.init", no_node)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=f"'{address}' takes no work .Failed to connect to Ray cluster.:"):
            RayReducer(address)
