"""The tiers by themselves: who leaves, who stays, and that nothing is lost that somebody holds."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.engine.tiers import Tiers
from lorafleet.errors import InvalidInputError, OverloadedError
from lorafleet.kernels import Bank, GroupSpec, ModuleSpec

# A row of the bank's one module has 8 values: 32 bytes.

ROW_BYTES = 32
GROUPS = [GroupSpec("g", 4, (ModuleSpec("m", 4),))]


def small_adapter(seed: int, rank: int = 1) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    pair = LoraPair(torch.randn(rank, 4, generator=generator), torch.randn(4, rank, generator=generator))
    return LoraAdapter({"m": pair})


class Shelf:
    """Tiers over a disk that is a dict, with a clock that is set."""

    def __init__(self, *, device_rows: int, host_rows: int) -> None:
        self.disk: dict[Path, LoraAdapter] = {}
        self.now_s = 0.0
        self._changes = threading.Condition()
        self.bank = Bank(GROUPS)
        self.tiers = Tiers(
            self.bank,
            device_bytes=device_rows * ROW_BYTES,
            host_bytes=host_rows * ROW_BYTES,
            read=lambda folder: self.disk[folder],
            changed=self._changed,
            clock=lambda: self.now_s,
        )

    def _changed(self) -> None:
        with self._changes:
            self._changes.notify_all()

    def put(self, adapter: LoraAdapter, *, folder: bool = True, pinned: bool = False) -> str:
        source = Path(adapter.digest) if folder else None
        if source is not None:
            self.disk[source] = adapter
        self.tiers.put(adapter.digest, self.tiers.stage(adapter), source=source, gated=False, pinned=pinned)
        return adapter.digest

    def forget(self, digest: str, *, folder: bool = True, pinned: bool = False) -> None:
        self.tiers.forget(digest, source=Path(digest) if folder else None, pinned=pinned)

    def settle(self) -> None:
        with self._changes:
            assert self._changes.wait_for(lambda: not self.tiers.loading, timeout=30)

    def expect(self, *order: tuple[str, ...]) -> None:
        self.tiers.expect(order)
        self.settle()


def test_what_was_used_longest_ago_leaves_first_and_waiting_requests_count() -> None:
    shelf = Shelf(device_rows=2, host_rows=9)
    a, b, c, d = (shelf.put(small_adapter(seed)) for seed in range(4))
    for digest in (a, a, a, b):
        shelf.tiers.hold([digest])
    shelf.expect((a,), (b,))
    shelf.expect((c,))
    assert (a in shelf.bank, b in shelf.bank, c in shelf.bank) == (True, False, True)
    shelf.tiers.hold([c])
    shelf.now_s = 3000.0  # ten half-lives: what a had is worth nothing
    shelf.tiers.hold([c])
    shelf.expect((d,))
    assert (a in shelf.bank, c in shelf.bank, d in shelf.bank) == (False, True, True)
    shelf.expect((b,), (d,))
    assert (b in shelf.bank, c in shelf.bank, d in shelf.bank) == (True, False, True)


def test_what_a_request_needs_is_not_pushed_out_for_one_behind_it() -> None:
    shelf = Shelf(device_rows=2, host_rows=9)
    a, b, c = (shelf.put(small_adapter(seed)) for seed in range(3))
    shelf.expect((a, b), (c,))
    assert (a in shelf.bank, b in shelf.bank, c in shelf.bank) == (True, True, False)
    assert shelf.tiers.claim((c,)) == "full"
    assert shelf.tiers.claim((a,)) == "claimed"
    shelf.expect((c,))
    assert (a in shelf.bank, b in shelf.bank, c in shelf.bank) == (True, False, True)


def test_pinned_ones_are_there_at_once_and_stay() -> None:
    shelf = Shelf(device_rows=3, host_rows=0)
    pinned = shelf.put(small_adapter(0, rank=2), pinned=True)
    others = [shelf.put(small_adapter(seed)) for seed in range(1, 5)]
    for digest in others:
        shelf.expect((digest,))
        assert digest in shelf.bank
        assert pinned in shelf.bank
    with pytest.raises(OverloadedError, match="pinned adapters"):
        shelf.put(small_adapter(9, rank=2), pinned=True)
    with pytest.raises(InvalidInputError, match=r"beside 6\.4e-05 MB that are pinned"):
        shelf.tiers.require_fit(others[:2])
    shelf.tiers.require_fit([pinned, others[0]])
    shelf.forget(pinned, pinned=True)
    assert pinned not in shelf.bank


def test_pinned_one_takes_its_place_when_a_running_request_ends() -> None:
    shelf = Shelf(device_rows=1, host_rows=9)
    a, late = shelf.put(small_adapter(0)), small_adapter(1)
    shelf.expect((a,))
    assert shelf.tiers.claim((a,)) == "claimed"
    shelf.expect()
    shelf.put(late, pinned=True)
    assert late.digest not in shelf.bank
    shelf.tiers.unclaim((a,))
    assert late.digest in shelf.bank


def test_request_that_waits_for_nothing_but_a_later_pin_runs_beyond_the_budget_and_leaves_again() -> None:
    shelf = Shelf(device_rows=2, host_rows=9)
    a = shelf.put(small_adapter(0, rank=2))
    shelf.tiers.require_fit([a])
    shelf.tiers.hold([a])
    pinned = shelf.put(small_adapter(1), pinned=True)
    shelf.expect((a,))
    assert shelf.tiers.claim((a,)) == "claimed"
    assert shelf.tiers.stats().device_bytes == 3 * ROW_BYTES
    shelf.expect()
    shelf.tiers.unclaim((a,))
    assert (a in shelf.bank, pinned in shelf.bank) == (False, True)


def test_objects_stay_in_host_memory_and_folders_make_room_for_them() -> None:
    shelf = Shelf(device_rows=1, host_rows=2)
    folder = shelf.put(small_adapter(0))
    assert shelf.tiers.stats().on_host == 1
    for seed in (1, 2):
        shelf.put(small_adapter(seed), folder=False)
    stats = shelf.tiers.stats()
    assert (stats.on_host, stats.on_disk, stats.host_bytes) == (2, 1, 2 * ROW_BYTES)
    with pytest.raises(OverloadedError, match="adapters given as objects"):
        shelf.put(small_adapter(3), folder=False)
    shelf.expect((folder,))
    assert folder in shelf.bank
    assert shelf.tiers.stats().disk_reads_total == 1


def test_loads_that_have_not_begun_are_dropped_by_stop_and_begin_anew() -> None:
    shelf = Shelf(device_rows=9, host_rows=0)
    digests = [shelf.put(small_adapter(seed)) for seed in range(9)]
    gate, reading = threading.Event(), threading.Semaphore(0)

    def read(folder: Path) -> LoraAdapter:
        reading.release()
        assert gate.wait(30)
        return shelf.disk[folder]

    shelf.tiers._read = read
    shelf.tiers.expect([(digest,) for digest in digests])
    for _ in range(4):
        assert reading.acquire(timeout=30)
    assert shelf.tiers.claim(digests[:1]) == "loading"
    shelf.tiers.stop(timeout_s=0)
    gate.set()
    shelf.settle()
    assert shelf.tiers.stats().on_device == 4
    assert shelf.tiers.stats().device_bytes == 4 * ROW_BYTES
    shelf.expect(*[(digest,) for digest in digests])
    assert shelf.tiers.stats().on_device == 9


def test_adapter_that_is_forgotten_while_it_is_read_leaves_no_bytes() -> None:
    shelf = Shelf(device_rows=2, host_rows=0)
    digest = shelf.put(small_adapter(0))
    gate, reading = threading.Event(), threading.Event()

    def read(folder: Path) -> LoraAdapter:
        reading.set()
        assert gate.wait(30)
        return shelf.disk[folder]

    shelf.tiers._read = read
    shelf.tiers.expect([(digest,)])
    assert reading.wait(30)
    shelf.forget(digest)
    gate.set()
    shelf.settle()
    stats = shelf.tiers.stats()
    assert (stats.on_device, stats.on_host, stats.on_disk, stats.device_bytes, stats.host_bytes) == (0, 0, 0, 0, 0)
    assert digest not in shelf.bank


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_keep_the_budgets_and_lose_nothing_that_is_held(seed: int) -> None:
    rng = random.Random(seed)
    shelf = Shelf(device_rows=6, host_rows=5)
    tiers, bank = shelf.tiers, shelf.bank
    known = [small_adapter(number, rank=rng.choice([1, 1, 2, 3])) for number in range(10)]
    sizes = {adapter.digest: adapter.rank * ROW_BYTES for adapter in known}
    names: list[tuple[str, bool, bool]] = []  # digest, folder, pinned
    waiting: list[tuple[str, ...]] = []
    running: list[tuple[str, ...]] = []
    for turn in range(200):
        shelf.now_s += rng.random() * 100
        there = sorted({digest for digest, _, _ in names})
        match rng.choice(["put", "put", "forget", "submit", "submit", "step", "step", "finish", "cancel"]):
            case "put":
                adapter, folder, pinned = rng.choice(known), rng.random() < 0.8, rng.random() < 0.15
                try:
                    shelf.put(adapter, folder=folder, pinned=pinned)
                    names.append((adapter.digest, folder, pinned))
                except OverloadedError:
                    assert pinned or not folder
            case "forget" if names:
                digest, folder, pinned = names.pop(rng.randrange(len(names)))
                shelf.forget(digest, folder=folder, pinned=pinned)
            case "submit" if there:
                mix = tuple(rng.sample(there, rng.randint(1, min(3, len(there)))))
                try:
                    tiers.require_fit(mix)
                except InvalidInputError:
                    continue
                tiers.hold(mix)
                waiting.append(mix)
            case "step":
                shelf.expect(*waiting)
                for mix in list(waiting):
                    if tiers.claim(mix) == "claimed":
                        waiting.remove(mix)
                        running.append(mix)
                assert running or not waiting, f"turn {turn}: nothing runs and nothing can"
            case "finish" if running:
                mix = running.pop(rng.randrange(len(running)))
                tiers.unclaim(mix)
                tiers.release(mix)
            case "cancel" if waiting:
                tiers.release(waiting.pop(rng.randrange(len(waiting))))
        shelf.settle()
        assert tiers.take_failed() == {}
        held = Counter(digest for mix in waiting + running for digest in mix)
        alive = set(held) | {digest for digest, _, _ in names}
        claimed = {digest for mix in running for digest in mix}
        pinned_ones = {digest for digest, _, pinned in names if pinned}
        on_device = {digest for digest in sizes if digest in bank}
        stats = tiers.stats()
        assert stats.on_device + stats.on_host + stats.on_disk == len(alive), f"turn {turn}"
        assert claimed <= on_device <= alive, f"turn {turn}"
        assert stats.device_bytes == sum(sizes[digest] for digest in on_device), f"turn {turn}"
        first = set(tiers._first)
        assert stats.device_bytes <= tiers.device_bytes or on_device <= claimed | pinned_ones | first, f"turn {turn}"
        in_host = {digest for digest, entry in tiers._entries.items() if tiers._host_only(entry)}
        stay = {digest for digest in in_host if not tiers._entries[digest].droppable}
        assert stats.host_bytes <= tiers.host_bytes or in_host == stay, f"turn {turn}"
        nameless = alive - {digest for digest, _, _ in names}
        objects = {digest for digest, folder, _ in names if not folder}
        assert objects <= {digest for digest, entry in tiers._entries.items() if entry.host is not None}, f"turn {turn}"
        assert nameless <= set(tiers._entries), f"turn {turn}"
