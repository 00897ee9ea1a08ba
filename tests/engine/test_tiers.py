"""Adapters on disk, in host memory and on the device: who leaves, who stays, and that nobody waits for another."""

from __future__ import annotations

import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.engine import Engine, Generation
from lorafleet.engine.kv_pages import PAGE_TOKENS
from lorafleet.engine.page_allocator import PageAllocator
from lorafleet.engine.prefix import SharedPrefixes
from lorafleet.engine.request import Request, ResolvedMix
from lorafleet.engine.scheduler import Scheduler
from lorafleet.engine.tiers import Candidate, Claim, Tiers, choose_evictions, decayed, score
from lorafleet.errors import InvalidInputError, OverloadedError, UnavailableError
from lorafleet.kernels import Bank, GroupSpec, ModuleSpec
from tests.engine.bases import to_length

# Choosing.


def test_uses_count_half_after_a_half_life() -> None:
    assert decayed(8.0, elapsed_s=0.0, half_life_s=60.0) == 8.0
    assert decayed(8.0, elapsed_s=60.0, half_life_s=60.0) == 4.0
    assert decayed(8.0, elapsed_s=180.0, half_life_s=60.0) == 1.0


def test_score_grows_with_use_and_waiting_requests_and_falls_with_size() -> None:
    assert score(Candidate("x", 10, 2.0, 3)) == 0.5
    assert score(Candidate("x", 10, 2.0, 4)) > score(Candidate("x", 10, 2.0, 3)) > score(Candidate("x", 20, 2.0, 3))


def test_lowest_scores_leave_until_there_is_room_and_no_more_than_needed() -> None:
    cold, warm, hot = Candidate("cold", 4, 0.0, 0), Candidate("warm", 4, 1.0, 0), Candidate("hot", 4, 1.0, 5)
    assert choose_evictions([hot, warm, cold], needed_bytes=4) == ["cold"]
    assert choose_evictions([hot, warm, cold], needed_bytes=5) == ["cold", "warm"]
    assert choose_evictions([hot, warm, cold], needed_bytes=0) == []
    assert choose_evictions([hot, warm, cold], needed_bytes=13) is None
    # Once the large one has to go, the small one before it need not.
    assert choose_evictions([Candidate("small", 1, 0.0, 0), Candidate("large", 8, 1.0, 0)], needed_bytes=6) == ["large"]


# The tiers by themselves. A row of the bank's one module has 8 values: 32 bytes.

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


# The scheduler.


def scheduled(scheduler: Scheduler) -> list[int]:
    """First tokens of what runs in the next step."""
    return [run.request.tokens[0] for run in scheduler.schedule()]


def bare_request(token: int) -> Request:
    return Request(
        [token], mix=ResolvedMix(), sampling=to_length(9), max_new=9, decode=lambda tokens: "".join(map(chr, tokens))
    )


def test_only_so_many_pass_a_first_request_that_waits_for_room_but_any_number_one_that_loads() -> None:
    state: Claim = "full"
    claims: list[int] = []

    def claim(request: Request) -> Claim:
        if request.tokens[0] == 0:
            return state
        claims.append(request.tokens[0])
        return "claimed"

    pages = PageAllocator(50)
    scheduler = Scheduler(pages, SharedPrefixes(pages), max_sequences=3, max_batch_tokens=8, claim=claim)
    requests = [bare_request(token) for token in range(8)]
    for request in requests:
        scheduler.add(request)
    assert scheduled(scheduler) == [1, 2, 3]
    for request in requests[1:4]:
        scheduler.remove(request)
    assert scheduled(scheduler) == []
    state = "loading"
    assert scheduled(scheduler) == [4, 5, 6]
    state = "claimed"
    scheduler.remove(requests[4])
    assert 0 in scheduled(scheduler)


def test_claims_are_given_back_at_the_end_at_preemption_and_where_pages_are_missing() -> None:
    claimed: Counter[int] = Counter()

    def claim(request: Request) -> Claim:
        claimed[request.tokens[0]] += 1
        return "claimed"

    pages = PageAllocator(2)
    scheduler = Scheduler(
        pages,
        SharedPrefixes(pages),
        max_sequences=4,
        max_batch_tokens=4 * PAGE_TOKENS,
        claim=claim,
        unclaim=lambda request: claimed.subtract([request.tokens[0]]),
    )
    first, second, third = (bare_request(token) for token in (1, 2, 3))
    for request in (first, second, third):
        scheduler.add(request)
    assert scheduled(scheduler) == [1, 2]
    assert claimed == {1: 1, 2: 1, 3: 0}
    first.computed = PAGE_TOKENS
    first.tokens += [9] * PAGE_TOKENS  # needs a second page: the other one's
    scheduler.schedule()
    assert scheduler.preemptions_total == 1
    assert claimed == {1: 1, 2: 0, 3: 0}
    scheduler.remove(first)
    scheduler.remove(third)
    assert claimed == {1: 0, 2: 0, 3: 0}


# The engine.

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
