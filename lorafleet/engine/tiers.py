"""Where adapters' rows are: on disk, in host memory, on the device; and which of them have to leave.

The device tier is the bank. The host tier holds rows as the bank takes them, in page-locked memory where the device is
a GPU. An adapter that came from a folder may leave host memory and is read again when it is needed; one that was given
as an object stays. On a CPU both tiers share the tensors: putting rows on the device copies nothing, and rows there
count against the device's budget only, unless they have to stay in host memory in any case.

What stays longest is what is used most for its size: ``(uses + waiting requests) / bytes``, uses decaying
exponentially. Nothing leaves the device that a running request has claimed, that is pinned, or that a request needs
which came before the one that the room is for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lorafleet.adapters import LoraAdapter
from lorafleet.engine.eviction import Candidate, choose_evictions, decayed
from lorafleet.errors import InvalidInputError, LorafleetError, OverloadedError, UnavailableError
from lorafleet.kernels import Bank, Packing
from lorafleet.kernels.bank import Page
from lorafleet.kernels.tile_pages import TilePage

logger = logging.getLogger(__name__)

# A use counts half after so long: long enough to outlast a tenant's pause, short enough to follow the day's load.
HALF_LIFE_S = 300.0
# One slow disk or folder must not hold up the loads behind it.
LOADERS = 4

Pages: TypeAlias = Mapping[str, Page] | Mapping[str, TilePage]
Read: TypeAlias = Callable[[Path], LoraAdapter]
Claim: TypeAlias = Literal["claimed", "loading", "full"]
"""``loading``: some rows are still on their way. ``full``: some have no room on the device yet."""


def size_of(pages: Pages) -> int:
    """Bytes of an adapter's rows."""
    return sum(page.size_bytes for page in pages.values())


class TierStats(NamedTuple):
    on_device: int
    """adapters; each is counted once, where it is nearest to the device"""
    on_host: int
    on_disk: int
    device_bytes: int
    """with those that are on their way"""
    host_bytes: int
    loads_total: int
    """how often an adapter was put on the device"""
    evictions_total: int
    """how often one left it for another"""
    disk_reads_total: int
    """how often one was read again from its folder"""


@dataclass(eq=False)
class _Entry:
    """One adapter version."""

    digest: str
    size_bytes: int
    """of its rows"""
    room_bytes: int
    """that it takes on the device"""
    gated: bool
    host: Pages | None
    folder: Path | None = None
    """where it is read again"""
    sources: list[Path | None] = field(default_factory=list)
    """one for each name: the folder that it came from, None for an object"""
    pins: int = 0
    holds: int = 0
    """requests that are not done"""
    claims: int = 0
    """requests that run"""
    uses: float = 0.0
    used_at_s: float = 0.0
    place: Literal["away", "loading", "device"] = "away"
    """whether it is on the device; room there is taken from ``loading`` on"""

    @property
    def droppable(self) -> bool:
        """Whether its rows may leave host memory.

        Without a name they stay until the last request ends: whoever removed it may delete the folder, too.
        """
        return bool(self.sources) and None not in self.sources and (self.pins == 0 or self.place == "device")


class Tiers:
    """Thread-safe; its lock is innermost: nothing else is locked, and nothing called back, while it is held.

    Folders are read and rows copied by a few daemon threads, which start when there is something to load and end when
    there is nothing left.
    """

    def __init__(
        self,
        bank: Bank,
        *,
        device_bytes: int,
        host_bytes: int,
        read: Read = LoraAdapter.load,
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        half_life_s: float = HALF_LIFE_S,
    ) -> None:
        """``changed`` is called, without the lock, by a loader thread when a load has ended."""
        self.device_bytes, self.host_bytes = device_bytes, host_bytes
        self._bank, self._read, self._changed = bank, read, changed
        self._clock, self._half_life_s = clock, half_life_s
        self._shared = bank.device.type == "cpu"
        self._staging = bank if self._shared else Bank(bank.groups, device="cpu", dtype=bank.dtype)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._entries: dict[str, _Entry] = {}
        self._pinned: dict[str, _Entry] = {}
        self._waiting: Counter[str] = Counter()
        self._first: frozenset[str] = frozenset()
        self._queue: deque[_Entry] = deque()
        self._loaders = 0
        self._failed: dict[str, LorafleetError] = {}
        self._device_used = 0
        self._loads_total = self._evictions_total = self._disk_reads_total = 0

    # Adapters come and go.

    def read(self, folder: Path) -> LoraAdapter:
        """An adapter from its folder; raises what the reader raises."""
        return self._read(folder)

    def stage(self, adapter: LoraAdapter) -> Pages:
        """An adapter's rows for :meth:`put`; slow, and without the lock. Raises ValueError where they do not fit."""
        factors = {path: (pair.a, pair.b) for path, pair in adapter.modules.items()}
        pages = self._staging.pages(factors, adapter.gates)
        return pages if self._shared else {path: _each(page, Tensor.pin_memory) for path, page in _plain(pages)}

    def put(self, digest: str, pages: Pages, *, source: Path | None, gated: bool, pinned: bool = False) -> None:
        """A name means this adapter from now on; ``source`` is the folder to read it from again, None for an object.

        A pinned one goes to the device as soon as there is room, and stays. Raises OverloadedError where the pinned
        ones would not fit on the device together, or an object not in host memory; nothing has changed then.
        """
        with self._lock:
            entry = self._entries.get(digest)
            entry = entry or _Entry(digest, size_of(pages), self._bank.room_for(pages), gated, None)
            if pinned and not entry.pins:
                found = entry.room_bytes + sum(e.room_bytes for e in self._pinned.values() if e is not entry)
                self._require_room("pinned adapters", "adapter_bytes", found, self.device_bytes)
            if source is None and (entry.droppable or not entry.sources):
                kept = [other for other in self._entries.values() if other.host is not None and not other.droppable]
                found = entry.size_bytes + sum(e.size_bytes for e in kept if e is not entry)
                self._require_room("adapters given as objects", "host_bytes", found, self.host_bytes)
            self._entries[digest] = entry
            entry.host = entry.host or pages
            entry.sources.append(source)
            entry.folder = source or entry.folder
            self._failed.pop(digest, None)
            if pinned:
                entry.pins += 1
                self._pinned[digest] = entry
                self._place_pinned()
            self._trim_host()

    def forget(self, digest: str, *, source: Path | None, pinned: bool = False) -> None:
        """A name does not mean it any more, as it was :meth:`put`; requests that hold it go on."""
        with self._lock:
            entry = self._entries[digest]
            entry.sources.remove(source)
            entry.folder = next((folder for folder in reversed(entry.sources) if folder is not None), entry.folder)
            if pinned:
                entry.pins -= 1
                if not entry.pins:
                    del self._pinned[digest]
            self._leave_if_unneeded(entry)
            self._trim_host()

    def hold(self, digests: Iterable[str]) -> None:
        """A request will need these: none of them is forgotten until :meth:`release`. Counts as a use."""
        now = self._clock()
        with self._lock:
            for digest in digests:
                entry = self._entries[digest]
                entry.holds += 1
                entry.uses, entry.used_at_s = self._uses(entry, now) + 1.0, now

    def release(self, digests: Iterable[str]) -> None:
        with self._lock:
            for digest in digests:
                entry = self._entries[digest]
                entry.holds -= 1
                self._leave_if_unneeded(entry)

    def has_gates(self, digest: str) -> bool:
        with self._lock:
            return self._entries[digest].gated

    def require_fit(self, digests: Collection[str]) -> None:
        """Raise InvalidInputError where these can never be on the device together, beside the pinned ones."""
        with self._lock:
            mix = sum(self._entries[digest].room_bytes for digest in digests)
            pinned = sum(entry.room_bytes for digest, entry in self._pinned.items() if digest not in digests)
        if mix + pinned > self.device_bytes:
            beside = f", beside {pinned / 1e6:.3g} MB that are pinned" if pinned else ""
            raise InvalidInputError(
                f"the mix's adapters have {mix / 1e6:.3g} MB of rows{beside}; expected at most "
                f"{self.device_bytes / 1e6:.3g} MB together: mix fewer or smaller ones, or load the engine with more "
                "adapter_bytes"
            )

    # Requests wait, run and end.

    def expect(self, order: Sequence[Collection[str]]) -> None:
        """What waiting requests need, in the order of the queue: brings it to the device as far as there is room.

        None of it pushes out what a request before it needs; room is not given to a later one before an earlier one.
        """
        # Many wait for the same ones: what the first of them gets or does not get, the others get, too.
        times = Counter(map(tuple, order))
        with self._lock:
            self._waiting = Counter()
            for needed, count in times.items():
                for digest in needed:
                    self._waiting[digest] += count
            self._first = frozenset(order[0]) if order else frozenset()
            protected: set[str] = set()
            for needed in times:
                protected.update(needed)
                placed = [self._place(self._entries[digest], protected) for digest in needed]
                if not all(placed):
                    break

    def claim(self, digests: Collection[str]) -> Claim:
        """Keep these on the device until :meth:`unclaim`, if all are there; else nothing has changed."""
        with self._lock:
            entries = [self._entries[digest] for digest in digests]
            if all(entry.place == "device" for entry in entries):
                for entry in entries:
                    entry.claims += 1
                return "claimed"
            return "full" if any(entry.place == "away" for entry in entries) else "loading"

    def unclaim(self, digests: Iterable[str]) -> None:
        with self._lock:
            for digest in digests:
                self._entries[digest].claims -= 1
            self._trim_device()
            self._place_pinned()

    def take_failed(self) -> dict[str, LorafleetError]:
        """Digest → why it could not be loaded, since the last call; whoever needs it later tries again."""
        with self._lock:
            failed, self._failed = self._failed, {}
        return failed

    @property
    def loading(self) -> bool:
        """Whether a load is under way; ``changed`` is called when it has ended."""
        with self._lock:
            return self._loaders > 0

    def pack(self, digests: Iterable[str]) -> Packing:
        """The rows of at least these; each must be claimed."""
        with self._lock:
            return self._bank.pack(digests)

    @property
    def packings_total(self) -> int:
        return self._bank.packings_total

    def stop(self, *, timeout_s: float = 5.0) -> None:
        """Drop the loads that have not begun and wait for those that have, at most so long; later ones start anew."""
        with self._lock:
            while self._queue:
                self._unplace(self._queue.popleft())
            self._idle.wait_for(lambda: self._loaders == 0, timeout_s)

    def stats(self) -> TierStats:
        with self._lock:
            entries = self._entries.values()
            device = sum(entry.place == "device" for entry in entries)
            host = sum(entry.place != "device" and entry.host is not None for entry in entries)
            return TierStats(
                device, host, len(entries) - device - host, self._device_used, self._host_used(),
                self._loads_total, self._evictions_total, self._disk_reads_total,
            )  # fmt: skip

    # From here on the lock is held, but for what a loader does in between.

    def _uses(self, entry: _Entry, now_s: float) -> float:
        return decayed(entry.uses, elapsed_s=now_s - entry.used_at_s, half_life_s=self._half_life_s)

    def _candidates(self, entries: Iterable[_Entry], tier: Literal["host", "device"]) -> list[Candidate]:
        now = self._clock()
        sizes = [(e, e.size_bytes if tier == "host" else e.room_bytes) for e in entries]
        return [Candidate(e.digest, size, self._uses(e, now), self._waiting[e.digest]) for e, size in sizes]

    def _require_room(self, what: str, setting: str, found: int, budget_bytes: int) -> None:
        if found > budget_bytes:
            raise OverloadedError(
                f"found {found / 1e6:.3g} MB of {what} with this one, expected at most {budget_bytes / 1e6:.3g} MB "
                f"({setting}); remove one, or load the engine with more"
            )

    def _host_only(self, entry: _Entry) -> bool:
        """Whether its rows in host memory are counted there, and free memory when they leave."""
        return entry.host is not None and not (self._shared and entry.place == "device" and entry.droppable)

    def _host_used(self) -> int:
        return sum(entry.size_bytes for entry in self._entries.values() if self._host_only(entry))

    def _trim_host(self) -> None:
        """Keep within the budget of host memory, as far as something may leave it."""
        over = self._host_used() - self.host_bytes
        if over <= 0:
            return
        droppable = [entry for entry in self._entries.values() if entry.droppable and self._host_only(entry)]
        chosen = choose_evictions(self._candidates(droppable, "host"), needed_bytes=over)
        for digest in [entry.digest for entry in droppable] if chosen is None else chosen:
            self._entries[digest].host = None

    def _place_pinned(self) -> None:
        for entry in self._pinned.values():
            self._place(entry, self._first)

    def _place(self, entry: _Entry, protected: Collection[str]) -> bool:
        """Whether an adapter is on the device, or on its way with its room taken; puts it there if there is room."""
        if entry.place != "away":
            return True
        if entry.digest in self._failed:
            return False  # until those that need it have been told
        over = self._device_used + entry.room_bytes - self.device_bytes
        if over > 0:
            evictable = [e for e in self._entries.values() if e.digest not in protected and self._evictable(e)]
            chosen = choose_evictions(self._candidates(evictable, "device"), needed_bytes=over)
            if chosen is None:
                if not self._alone(entry):
                    return False
                chosen = [e.digest for e in evictable]
            self._evict(chosen)
        self._device_used += entry.room_bytes
        if self._shared and entry.host is not None:
            full = self._arrive(entry, entry.host)
            assert full is None, "pools on a CPU are for tests, which stay within the budget"
        else:
            entry.place = "loading"
            self._queue.append(entry)
            if self._loaders < LOADERS:
                self._loaders += 1
                threading.Thread(target=self._load, name="lorafleet-loader", daemon=True).start()
        self._trim_host()  # what left the device of a CPU counts in host memory now
        return True

    def _trim_device(self) -> None:
        """Back to the budget, where a first request went beyond it."""
        over = self._device_used - self.device_bytes
        if over > 0:
            evictable = [e for e in self._entries.values() if e.digest not in self._first and self._evictable(e)]
            chosen = choose_evictions(self._candidates(evictable, "device"), needed_bytes=over)
            self._evict([e.digest for e in evictable] if chosen is None else chosen)
            self._trim_host()

    def _evict(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._unplace(self._entries[digest])
            self._bank.remove(digest)
            self._evictions_total += 1

    def _evictable(self, entry: _Entry) -> bool:
        if entry.place != "device" or entry.claims or entry.pins:
            return False
        return entry.host is not None or entry.droppable  # else it is nowhere else

    def _alone(self, entry: _Entry) -> bool:
        """Whether the first waiting request needs it and can wait for nothing more: then it runs beyond the budget.

        It fitted beside what was pinned when it came; what stands in its way was pinned since, or has lost its name.
        """
        return entry.digest in self._first and not any(
            e.claims or (e.place == "loading" and e.digest not in self._first) for e in self._entries.values()
        )

    def _arrive(self, entry: _Entry, rows: Pages) -> OverloadedError | None:
        """None where it is on the device now. A pool of pages is full where it is full, whatever the budget says."""
        try:
            self._bank.add(entry.digest, rows)
        except OverloadedError as full:
            return full
        entry.place = "device"
        self._loads_total += 1
        return None

    def _unplace(self, entry: _Entry) -> None:
        entry.place = "away"
        self._device_used -= entry.room_bytes

    def _leave_if_unneeded(self, entry: _Entry) -> None:
        if entry.sources or entry.holds:
            return
        del self._entries[entry.digest]
        self._failed.pop(entry.digest, None)
        if entry.place == "device":
            self._unplace(entry)
            self._bank.remove(entry.digest)
        elif entry in self._queue:
            self._queue.remove(entry)
            self._unplace(entry)
        # A loader that has begun with it gives its room back when it is done.

    def _load(self) -> None:
        """What a loader thread does: one load after the other, until there is none."""
        while True:
            with self._lock:
                if not self._queue:
                    self._loaders -= 1
                    self._idle.notify_all()
                    break
                entry = self._queue.popleft()
                host, folder = entry.host, entry.folder
            found: tuple[Pages, Pages] | None = None  # in host memory, on the device
            error: LorafleetError | None = None
            try:
                rows = self._read_again(entry.digest, folder) if host is None else host
                found = rows, rows if self._shared else self._on_device(rows)
            except LorafleetError as refused:
                error = refused
            except Exception as fault:
                error = UnavailableError(f"adapter {entry.digest} could not be put on {self._bank.device}: {fault}")
            if error is not None:
                logger.error("%s", error)
            with self._lock:
                needed = self._entries.get(entry.digest) is entry
                if found is not None and needed:
                    entry.host = entry.host or found[0]
                    error = self._arrive(entry, found[1])
                if found is None or not needed or error is not None:
                    self._unplace(entry)
                    if error is not None and needed:
                        self._failed[entry.digest] = error
                self._disk_reads_total += host is None and found is not None
                self._trim_host()
            self._changed()
        self._changed()  # nothing is loading any more

    def _read_again(self, digest: str, folder: Path | None) -> Pages:
        assert folder is not None  # only what came from a folder leaves host memory
        advice = "put it back as it was, or add the adapter again"
        try:
            adapter = self._read(folder)
            found = adapter.digest
            pages = self.stage(adapter) if found == digest else None
        except Exception as error:
            raise UnavailableError(f"adapter {digest} cannot be read again from {folder}: {error}; {advice}") from error
        if pages is None:
            raise UnavailableError(f"{folder} held adapter {digest} when it was added, found {found} now; {advice}")
        return pages

    def _on_device(self, pages: Pages) -> dict[str, Page]:
        """Copies on a CUDA device, made beside the steps that it computes."""
        device = self._bank.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Memory from the computing stream, where the rows are used and freed; what used it before ends first.
        copies = {path: _each(page, lambda rows: torch.empty_like(rows, device=device)) for path, page in _plain(pages)}
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for path, page in _plain(pages):
                for source, copy in zip(page, copies[path], strict=True):
                    if source is not None and copy is not None:
                        copy.copy_(source, non_blocking=True)
        stream.synchronize()
        return copies


def _plain(pages: Pages) -> list[tuple[str, Page]]:
    """Pages of plain rows, as all are that go to a GPU."""
    return [(path, page) for path, page in pages.items() if isinstance(page, Page)]


def _each(page: Page, change: Callable[[Tensor], Tensor]) -> Page:
    return Page(change(page.a), change(page.b), None if page.gate is None else change(page.gate))
