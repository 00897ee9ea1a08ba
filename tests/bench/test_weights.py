"""The random weights: what the floor counts is what is on the disk, and peers can read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lorafleet.adapters import LoraAdapter
from lorafleet.assets import count_parameters
from lorafleet.bench.cache import adapter_folder, base_folder, folder_of
from lorafleet.bench.floor import adapter_bytes, base_bytes
from lorafleet.bench.requests import ASKS, EIGHT, rank_of
from lorafleet.bench.shapes import SHAPES
from lorafleet.bench.weights import make_adapter, prepare

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    prepare(folder, TINY)
    return folder


def test_the_base_has_as_many_weights_as_the_floor_counts(work: Path) -> None:
    embedding = TINY.vocabulary * TINY.hidden
    assert 2 * (count_parameters(base_folder(work, TINY)) - embedding) == base_bytes(TINY)


def test_the_base_is_in_bfloat16_and_has_no_end_of_text(work: Path) -> None:
    folder = base_folder(work, TINY)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads((folder / "config.json").read_text()).get("eos_token_id") is None


def test_every_adapter_that_a_request_reads_from_disk_is_there_with_its_rank(work: Path) -> None:
    used = {name for row in ("single", "many_cold") for ask in ASKS[row](TINY.load) for name in ask.uses}
    assert used >= set(EIGHT)
    for name in used:
        adapter = LoraAdapter.load(adapter_folder(work, TINY, name))
        assert adapter.rank == rank_of(name)
        assert 2 * adapter.parameters == adapter_bytes(TINY, [rank_of(name)])
        assert len(adapter.modules) == 7 * TINY.layers
        assert all(pair.b.abs().max() > 0 for pair in adapter.modules.values())


def test_adapters_differ_and_are_the_same_each_time() -> None:
    assert make_adapter(TINY, "m1").digest == make_adapter(TINY, "m1").digest
    assert len({make_adapter(TINY, name).digest for name in ("a0", "a4", "m1", "m2")}) == 4


def test_weights_are_made_once_and_half_done_ones_again(work: Path, tmp_path: Path) -> None:
    before = (base_folder(work, TINY) / "model.safetensors").stat().st_mtime_ns
    prepare(work, TINY)
    assert (base_folder(work, TINY) / "model.safetensors").stat().st_mtime_ns == before
    base_folder(tmp_path / "part", TINY).mkdir(parents=True)  # left by a run that was ended
    (base_folder(tmp_path / "part", TINY) / "config.json").write_text("{")
    prepare(tmp_path, TINY)
    assert json.loads((base_folder(tmp_path, TINY) / "config.json").read_text())["hidden_size"] == 64
    assert [path.name for path in tmp_path.iterdir()] == [folder_of(tmp_path, TINY).name]
