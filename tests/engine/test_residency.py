"""Adapters on disk, in host memory and on the device of a running engine: nobody waits for another."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.engine import Engine, Generation
from lorafleet.engine.kv_pages import PAGE_TOKENS
from lorafleet.errors import InvalidInputError, UnavailableError
from tests.engine.bases import to_length

DOWN = "model.layers.1.mlp.down_proj"
RANK_BYTES = (80 + 48) * 4
PROMPT = [5, 6, 7]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Six adapters of rank 2 that change the tokens."""
    made: dict[str, Path] = {}
    for number, name in enumerate("abcdef"):
        generator = torch.Generator().manual_seed(number)
        a, b = torch.randn(2, 80, generator=generator), torch.randn(48, 2, generator=generator)
        LoraAdapter({DOWN: LoraPair(a, b)}).save(tmp_path / name)
        made[name] = tmp_path / name
    return made


@pytest.fixture
def expected(base_folder: Path, folders: dict[str, Path]) -> Callable[..., list[int]]:
    """``expected(mix)``: the tokens that an engine with room for everything gives."""
    roomy = Engine.load(base_folder, dtype="float32")
    for name, folder in folders.items():
        roomy.add_adapter(name, folder)

    def tokens(mix: dict[str, float], length: int = 10) -> list[int]:
        return roomy.generate([PROMPT], mixes=[mix], sampling=to_length(length))[0].token_ids

    return tokens


def tight(base_folder: Path, *, adapters: int, host: int = 0, **other: object) -> Engine:
    """Room for so many of the six adapters on the device, and for so many more in host memory."""
    size = 2 * RANK_BYTES
    settings: dict[str, object] = {"max_sequences": 4, "max_batch_tokens": 16} | other
    return Engine.load(
        base_folder,
        dtype="float32",
        adapter_bytes=adapters * size,
        host_bytes=host * size,
        **settings,  # type: ignore[arg-type]
    )


class BlockedReader:
    """Reads folders once ``open`` is set, but for those that are not in ``slow``; counts what it was asked for."""

    def __init__(self, *slow: Path) -> None:
        self.slow = set(slow)
        self.open, self.asked = threading.Event(), threading.Event()

    def __call__(self, folder: Path) -> LoraAdapter:
        if folder in self.slow:
            self.asked.set()
            assert self.open.wait(30)
        return LoraAdapter.load(folder)


def blocked(engine: Engine, *slow: Path) -> BlockedReader:
    reader = engine._residency._tiers._read = BlockedReader(*slow)
    return reader


@pytest.mark.parametrize(("host", "background"), [(0, True), (2, False), (9, False)])
def test_more_adapters_than_fit_are_all_served_with_their_tokens(
    base_folder: Path, folders: dict[str, Path], expected: Callable[..., list[int]], host: int, background: bool
) -> None:
    engine = tight(base_folder, adapters=2, host=host)
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    mixes: list[dict[str, float]] = [{name: 1.0} for name in folders] * 2
    mixes += [{"a": 0.5, "f": 0.5}, {}, {"b": 1.0, "c": -1.0}]
    if background:
        engine.start()
    found = engine.generate([PROMPT] * len(mixes), mixes=mixes, sampling=to_length(10))
    engine.stop()
    assert [generation.token_ids for generation in found] == [expected(mix) for mix in mixes]
    stats = engine.stats()
    assert stats.adapter_evictions_total >= 4
    assert stats.adapter_device_bytes <= 2 * 2 * RANK_BYTES
    assert stats.adapter_host_bytes <= host * 2 * RANK_BYTES
    assert stats.adapters_on_device + stats.adapters_on_host + stats.adapters_on_disk == 6
    assert (stats.adapter_disk_reads_total > 0) == (host < 6)
    assert len({tuple(generation.token_ids) for generation in found[:6]}) == 6


@pytest.mark.parametrize("background", [True, False])
def test_slow_disk_delays_the_requests_of_its_own_adapter_only(
    base_folder: Path, folders: dict[str, Path], expected: Callable[..., list[int]], background: bool
) -> None:
    engine = tight(base_folder, adapters=3)
    for name in "abc":
        engine.add_adapter(name, folders[name])
    reader = blocked(engine, folders["a"])
    if background:
        engine.start()
    slow = engine.submit(PROMPT, mix={"a": 1.0}, sampling=to_length(10))
    assert reader.asked.wait(30)
    others = [engine.submit(PROMPT, mix={name: 1.0}, sampling=to_length(10)) for name in "bc"]
    bare = engine.submit(PROMPT, sampling=to_length(10))
    assert [ticket.result(timeout_s=60).token_ids for ticket in others] == [expected({"b": 1.0}), expected({"c": 1.0})]
    assert bare.result(timeout_s=60).token_ids == expected({})
    assert not slow.done
    reader.open.set()
    assert slow.result(timeout_s=60).token_ids == expected({"a": 1.0})
    engine.stop()


def test_adapter_is_fetched_while_its_request_waits(base_folder: Path, folders: dict[str, Path]) -> None:
    engine = tight(base_folder, adapters=2, max_sequences=1)
    engine.add_adapter("a", folders["a"])
    reader = blocked(engine, folders["a"])
    running = engine.submit(PROMPT, sampling=to_length(100))
    next(running.stream())
    waiting = engine.submit(PROMPT, mix={"a": 1.0}, sampling=to_length(3))
    assert reader.asked.wait(30)
    assert (engine.stats().requests_running, engine.stats().requests_waiting) == (1, 1)
    reader.open.set()
    tiers = engine._residency._tiers
    with tiers._idle:
        assert tiers._idle.wait_for(lambda: tiers._loaders == 0, 30)
    assert engine.stats().adapters_on_device == 1
    assert not running.done
    assert waiting.result(timeout_s=60).finish_reason == "length"


@pytest.mark.parametrize("background", [True, False])
def test_who_waits_for_a_load_may_cancel_or_give_up(
    base_folder: Path, folders: dict[str, Path], background: bool
) -> None:
    engine = tight(base_folder, adapters=2)
    engine.add_adapter("a", folders["a"])
    reader = blocked(engine, folders["a"])
    if background:
        engine.start()
    ticket = engine.submit(PROMPT, mix={"a": 1.0}, sampling=to_length(3))
    assert reader.asked.wait(30)
    with pytest.raises(TimeoutError):
        ticket.result(timeout_s=0.01)
    steps = engine.stats().steps_total
    ticket.cancel()
    assert ticket.result(timeout_s=60).finish_reason == "cancelled"
    assert engine.stats().steps_total == steps
    reader.open.set()
    engine.stop()


@pytest.mark.parametrize("damage", ["deleted", "changed", "damaged"])
@pytest.mark.parametrize("background", [True, False])
def test_folder_that_is_gone_or_changed_fails_its_own_requests_only(
    base_folder: Path,
    folders: dict[str, Path],
    expected: Callable[..., list[int]],
    tmp_path: Path,
    background: bool,
    damage: str,
) -> None:
    engine = tight(base_folder, adapters=2)
    for name in "ab":
        engine.add_adapter(name, folders[name])
    shutil.copytree(folders["a"], tmp_path / "kept")
    shutil.rmtree(folders["a"])
    if damage == "changed":
        shutil.copytree(folders["c"], folders["a"])
    elif damage == "damaged":
        folders["a"].mkdir()
        (folders["a"] / "adapter_config.json").write_text("{")
        (folders["a"] / "adapter_model.safetensors").write_text("")
    if background:
        engine.start()
    mixes: list[dict[str, float]] = [{"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 0.5}, {}]
    tickets = [engine.submit(PROMPT, mix=mix, sampling=to_length(10)) for mix in mixes]
    for place in (0, 2):
        with pytest.raises(UnavailableError, match=str(folders["a"])):
            tickets[place].result(timeout_s=60)
    for place in (1, 3):
        assert tickets[place].result(timeout_s=60).token_ids == expected(mixes[place])
    assert engine.stats().requests_failed_total == 2
    shutil.rmtree(folders["a"], ignore_errors=True)
    shutil.copytree(tmp_path / "kept", folders["a"])
    again = engine.submit(PROMPT, mix={"a": 1.0}, sampling=to_length(10))
    assert again.result(timeout_s=60).token_ids == expected({"a": 1.0})
    engine.stop()


def test_names_that_are_replaced_or_removed_serve_their_requests_in_flight(
    base_folder: Path, folders: dict[str, Path], expected: Callable[..., list[int]]
) -> None:
    want: dict[str, list[int]] = {name: expected({name: 1.0}, 20) for name in "abc"}
    engine = tight(base_folder, adapters=1, host=4)
    for name in "ab":
        engine.add_adapter(name, folders[name])
    running = engine.submit(PROMPT, mix={"a": 1.0}, sampling=to_length(20))
    next(running.stream())
    waiting = [engine.submit(PROMPT, mix={name: 1.0}, sampling=to_length(20)) for name in "ba"]
    engine.add_adapter("a", folders["c"])
    engine.remove_adapter("b")
    new = engine.submit(PROMPT, mix={"a": 1.0}, sampling=to_length(20))
    for name in "ab":  # nobody needs the folders any more
        shutil.rmtree(folders[name])
    results: list[Generation] = [ticket.result() for ticket in (running, *waiting, new)]
    assert [result.token_ids for result in results] == [want["a"], want["b"], want["a"], want["c"]]
    stats = engine.stats()
    assert stats.adapter_loads_total == 3
    assert stats.adapters_on_device + stats.adapters_on_host + stats.adapters_on_disk == 1


def test_pinned_adapter_stays_while_others_come_and_go(base_folder: Path, folders: dict[str, Path]) -> None:
    engine = tight(base_folder, adapters=2)
    digest = engine.add_adapter("a", folders["a"], pinned=True)
    shutil.rmtree(folders["a"])
    for name in "bcd":
        engine.add_adapter(name, folders[name])
    engine.generate([PROMPT] * 4, mixes=[{name: 1.0} for name in "bcda"], sampling=to_length(4))
    assert digest in engine._residency._tiers._bank
    with pytest.raises(InvalidInputError, match="that are pinned"):
        engine.submit(PROMPT, mix={"b": 0.5, "c": 0.5})
    engine.remove_adapter("a")
    assert engine.generate([PROMPT], mixes=[{"b": 0.5, "c": 0.5}], sampling=to_length(4))


def test_mix_that_the_device_can_never_hold_is_refused(base_folder: Path, folders: dict[str, Path]) -> None:
    engine = tight(base_folder, adapters=2)
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    with pytest.raises(InvalidInputError, match=r"0\.00307 MB of rows; expected at most 0\.00205 MB.*adapter_bytes"):
        engine.submit(PROMPT, mix=dict.fromkeys("abc", 0.3))
    # Refused whole: nothing is held.
    for name in folders:
        engine.remove_adapter(name)
    stats = engine.stats()
    assert stats.adapters_on_device + stats.adapters_on_host + stats.adapters_on_disk == 0


def test_adapter_that_was_evicted_is_served_from_its_cached_prefix_and_fresh_rows(
    base_folder: Path, folders: dict[str, Path]
) -> None:
    engine = tight(base_folder, adapters=1)
    for name in "ab":
        engine.add_adapter(name, folders[name])
    prompt = [(7 * n) % 251 for n in range(2 * PAGE_TOKENS + 3)]
    first, _, again = (
        engine.generate([prompt], mixes=[{name: 1.0}], sampling=to_length(8))[0].token_ids for name in "aba"
    )
    assert again == first
    assert engine.stats().prefix_tokens_total == 2 * PAGE_TOKENS
    assert engine.stats().adapter_evictions_total == 2


def test_preempted_requests_get_their_adapters_back(
    base_folder: Path, folders: dict[str, Path], expected: Callable[..., list[int]]
) -> None:
    engine = tight(base_folder, adapters=2, host=1, kv_tokens=4 * PAGE_TOKENS)
    for name in "abc":
        engine.add_adapter(name, folders[name])
    mixes = [{name: 1.0} for name in "abcabc"]
    length = 2 * PAGE_TOKENS
    found = engine.generate([PROMPT] * 6, mixes=mixes, sampling=to_length(length))
    assert [generation.token_ids for generation in found] == [expected(mix, length) for mix in mixes]
    assert engine.stats().preemptions_total > 0
    assert all(entry.claims == entry.holds == 0 for entry in engine._residency._tiers._entries.values())


def test_no_room_for_any_adapter_is_refused(base_folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="adapter_bytes"):
        Engine.load(base_folder, dtype="float32", adapter_bytes=0)
    with pytest.raises(InvalidInputError, match="host_bytes"):
        Engine.load(base_folder, dtype="float32", host_bytes=-1)
