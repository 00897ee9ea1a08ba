"""One group's aggregate from updates that come one by one, in bounded memory, with bits that do not depend on who came
first.

The members are known at the start; who of them answers is said as it happens. A slot of the tree
(:mod:`lorafleet.coordinator.slots`) is put to work as soon as each of its members is in or will not come; the slots
above follow. Only keys wait: an update's factors are read, from the journal say, when its slot starts, and are dropped
when it is merged.

**Memory.** Modules are cut into *windows*, so many that the partial results of one fit into ``memory_bytes``; each
window is a pass over the updates that reads its own modules alone. The first window works while updates come. Within a
window a slot waits while what is held fills the memory, unless it is the first in key order that has not started: with
the slots taken in that order, no level has more than three parts waiting, so that the bound does not grow with the
number of members but for one such level at each fourfold. A module that is larger than the memory is a window alone.
``flora`` and ``fedex``, whose aggregate is a stack of all members, grow with them.

**Weights.** ``add`` takes the weight p_k that the rule gives. Rules whose weights depend on all updates take a pass
before (:func:`weigh`), of one update at a time. Rules that compare whole updates bit by bit need them all at hand.

**Losses.** Tasks are pure, so that one whose worker died is run again, with the same inputs and bits, and its result
takes the place of none. A task's inputs are kept until it has ended, and no longer: where a part was lost whose inputs
are gone, its window starts again.
"""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.adapters.factor_space import compress
from lorafleet.adapters.threads import one_thread
from lorafleet.coordinator.rules import get_rule
from lorafleet.coordinator.rules.rule import Modules, Parts, any_ranks, finish_all, lift_all, merge_all, one_rank
from lorafleet.coordinator.slots import ARITY, Slot, Slots
from lorafleet.errors import BaseMismatchError, InvalidInputError, UnavailableError

MEMORY_BYTES = 1 << 30
# One task costs about a millisecond of Ray's own time; a shard of this many parameters of one update keeps it small.
SHARD_PARAMETERS = 2_000_000
# A window has at least so many shards, where it has as many modules: work for that many processors.
SHARDS = 4
ATTEMPTS = 3
RETRIES = 5
"""How often a task is run again whose worker died."""

T = TypeVar("T")

Read = Callable[[str, Sequence[str]], Modules]
"""(a member's key, module paths) → the factors of those of them that its update has; the same ones at each call."""
Packed = dict[str, tuple[Any, tuple[Any, ...]]]
"""Module path → (the part's type, its tensors as arrays), which Ray's object store hands out without a copy."""


class PartsLostError(Exception):
    """Parts are gone, with what they could be made from again."""


class Done(NamedTuple):
    """Handles of a task's output."""

    output: Any
    size: Any
    """of the number of bytes of the output; there once the task has ended"""


class Workers(Protocol):
    """Where tasks run. Handles stand for what lies there, and may be given as a task's arguments."""

    def put(self, value: Any) -> Any: ...

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Any:
        """The handle of what the task will return."""
        ...

    def submit_sized(self, task: Callable[..., tuple[Any, int]], *arguments: Any) -> Done:
        """A task that is run once; whose worker dies is for :meth:`ended` to say."""
        ...

    def ended(self, sizes: Sequence[Any], *, wait: bool) -> dict[int, int | None]:
        """Position → bytes, of those tasks that have ended; of one at least where ``wait``.

        None for one whose worker died, or the worker of a task before it. Raises PartsLostError.
        """
        ...

    def get(self, handle: Any) -> Any:
        """Raises PartsLostError."""
        ...


class Extent(NamedTuple):
    """How large one module's sum may become."""

    d_out: int
    d_in: int
    rank: int
    """Σ r_k over all members"""


class Reduced(NamedTuple):
    adapter: LoraAdapter
    """float64; untruncated, or of the rank that was asked for"""
    errors: Mapping[str, float]
    """Module path → relative Frobenius error of the truncation; empty where nothing was truncated"""


def extents_of(adapters: Sequence[LoraAdapter]) -> dict[str, Extent]:
    """Of adapters that are at hand."""
    found: dict[str, Extent] = {}
    for adapter in adapters:
        for path, (a, b) in adapter.modules.items():
            rank = found[path].rank if path in found else 0
            found[path] = Extent(b.shape[0], a.shape[1], rank + a.shape[0])
    return found


def weigh(rule: str, weights: Mapping[str, float], read: Read, paths: Sequence[str]) -> dict[str, float]:
    """The weights p_k of updates that are read one at a time, where the rule has to see them, and not at all elsewhere.

    ``weights``: key → the weight that was given. Raises InvalidInputError for rules that need all updates at hand.
    """
    chosen, keys = get_rule(rule), sorted(weights)
    if chosen.personal is not None or chosen.check not in (any_ranks, one_rank):
        raise InvalidInputError(
            f"{rule} cannot be summed as updates come: it compares or keeps whole updates, and needs them all at hand"
        )
    if not all(math.isfinite(weight) for weight in weights.values()):
        raise InvalidInputError("found a weight that is no finite number, expected finite ones")
    with one_thread():
        sizes = [1.0 if chosen.size is None else chosen.size(LoraAdapter(read(key, paths))) for key in keys]
    return dict(zip(keys, chosen.share(sizes, [weights[key] for key in keys]), strict=True))


def admitted(
    rule: str, weights: Mapping[str, float], read: Read, extents: Mapping[str, Extent], *, memory_bytes: int
) -> dict[str, float]:
    """The weights p_k of updates that can be read again and again.

    As :func:`weigh`, and for rules that compare whole updates, too: what those compare they find in each module by
    itself, so that some modules of all updates are at hand at a time. Raises InvalidInputError for what the rule
    cannot combine.
    """
    chosen, keys = get_rule(rule), sorted(weights)
    if chosen.personal is not None or chosen.check in (any_ranks, one_rank):
        return weigh(rule, weights, read, sorted(extents))
    # As it was read, and in float64 while it is compared.
    sizes = {path: 12 * (d_out + d_in) * rank for path, (d_out, d_in, rank) in extents.items()}
    for paths in cut(sizes, memory_bytes):
        chosen.check([LoraAdapter(modules) for key in keys if (modules := read(key, paths))])
    return dict(zip(keys, chosen.share([1.0] * len(keys), [weights[key] for key in keys]), strict=True))


def cut(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Module paths in order, cut so that no piece is larger than ``limit``, or it is one module."""
    pieces: list[list[str]] = []
    filled = limit
    for path in sorted(sizes):
        if filled + sizes[path] > limit or not pieces:
            pieces.append([])
            filled = 0
        pieces[-1].append(path)
        filled += sizes[path]
    return pieces


def held_bytes(extent: Extent, slots: Slots) -> int:
    """What one module's parts take at most while the slots are taken in key order: an estimate, to cut windows by.

    A part is a stack in float32 or a matrix in float64, whichever is smaller; all stacks together are no larger than
    the last one. Of the levels whose parts are matrices, each may have three waiting. To that come a merge's output and
    its copy on the way to the store.
    """
    d_out, d_in, rank = extent
    part = min(4 * (d_out + d_in) * rank, 8 * d_out * d_in)
    small, own = min(d_out, d_in), rank / len(slots.keys)
    full = sum(own * float(ARITY) ** (level + 1) > small for level in range(slots.levels - 1))
    return part * (3 + (ARITY - 1) * full)


@dataclass
class _Part:
    """A slot's partial result of one shard."""

    output: Any
    bytes: int


@dataclass
class _Task:
    """A part on its way."""

    size: Any
    """of the bytes of its output; a handle"""
    part: _Part
    inputs: Sequence[_Part]
    """go when it has ended"""
    start: Callable[[], Done]
    retries: int = 0


@dataclass
class _Window:
    """One pass: some shards of modules over all slots."""

    rule: str
    shards: list[list[str]]
    slots: Slots
    weights: Mapping[str, float]
    read: Read
    workers: Workers
    memory_bytes: int
    parts: dict[Slot, list[_Part] | None] = field(default_factory=dict)
    """None for a slot whose members all are missing"""
    running: dict[int, _Task] = field(default_factory=dict)
    """In the order of submission: a task comes after those whose outputs it is given."""
    ready: list[Slot] = field(default_factory=list)
    opened: set[Slot] = field(default_factory=set)
    started: set[Slot] = field(default_factory=set)
    held: int = 0
    peak: int = 0
    tasks: int = 0
    frontier: int = 0
    step: int = 0
    """what starting a slot took last"""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def open(self, leaf: Slot) -> None:
        """All members of the slot are in, or missing."""
        self.opened.add(leaf)
        heapq.heappush(self.ready, leaf)
        self.advance()

    def advance(self) -> None:
        """Start what there is room for."""
        self._collect(wait=False)
        while self.ready:
            first = self.ready[0].number == self.frontier
            if not first and self.held + self.step > self.memory_bytes:
                return
            self._start(heapq.heappop(self.ready))
            while Slot(0, self.frontier) in self.started:
                self.frontier += 1

    def roots(self) -> list[_Part]:
        """The last part of each shard; every slot was opened before."""
        while self.ready or self.running:
            self.advance()
            if self.running:
                self._collect(wait=True)
        parts = self.parts[self.slots.root]
        assert parts is not None
        return parts

    def _start(self, leaf: Slot) -> None:
        self.started.add(leaf)
        present = [key for key in self.slots.members(leaf) if key in self.weights]
        if not present:
            self._settle(leaf, None)
            return
        paths = [path for shard in self.shards for path in shard]
        updates = [self.read(key, paths) for key in present]
        for key, update in zip(present, updates, strict=True):
            self._check(key, update)
        size = sum(_bytes(pair) for update in updates for pair in update.values())
        self.step = 2 * size
        while self.running and self.held + self.step > self.memory_bytes:
            self._collect(wait=True)
        weights = [self.weights[key] for key in present]
        parts = []
        for shard in self.shards:
            chosen = [{path: update[path] for path in shard if path in update} for update in updates]
            size = sum(_bytes(pair) for update in chosen for pair in update.values())
            members = _Part(self.workers.put([pack(update) for update in chosen]), size)
            self._hold(size)
            parts.append(self._submit(lift_slot, [members], weights, reserved=size))
        self._settle(leaf, parts)

    def _check(self, key: str, update: Modules) -> None:
        ranks = not get_rule(self.rule).mixed_ranks
        for path, (a, b) in update.items():
            shape = (b.shape[0], a.shape[1], a.shape[0]) if ranks else (b.shape[0], a.shape[1])
            if self.shapes.setdefault(path, shape) != shape:
                wanted = "d_out, d_in and rank" if ranks else "d_out and d_in"
                raise BaseMismatchError(
                    f"{path}: found an update of {shape} ({wanted}), expected {self.shapes[path]} as of those before"
                )

    def _settle(self, slot: Slot, parts: list[_Part] | None) -> None:
        """A slot's parts are under way; so are those above it, where it was the last."""
        self.parts[slot] = parts
        if slot == self.slots.root:
            return
        below = self.slots.below(slot.parent)
        if not all(other in self.parts for other in below):
            return
        found = [parts for parts in (self.parts.pop(other) for other in below) if parts is not None]
        merged = [self._submit(merge_slot, column) for column in zip(*found, strict=True)]
        self._settle(slot.parent, merged or None)

    def _submit(
        self,
        task: Callable[..., tuple[Packed, int]],
        inputs: Sequence[_Part],
        *arguments: Any,
        reserved: int = 0,
    ) -> _Part:
        """``reserved``: bytes for the output until it is known; that of a merge takes the place of its inputs."""

        def start() -> Done:
            return self.workers.submit_sized(task, self.rule, *arguments, *(part.output for part in inputs))

        done = start()
        part = _Part(done.output, reserved)
        self._hold(reserved)
        self.running[self.tasks] = _Task(done.size, part, inputs, start)
        self.tasks += 1
        return part

    def _hold(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)

    def _collect(self, *, wait: bool) -> None:
        numbers = list(self.running)
        if not numbers:
            return
        ended = self.workers.ended([self.running[n].size for n in numbers], wait=wait)
        for position, size in sorted(ended.items()):
            number = numbers[position]
            if size is None:
                self._run_again(self.running[number])
                continue
            task = self.running.pop(number)
            self._hold(size - task.part.bytes - sum(part.bytes for part in task.inputs))
            task.part.bytes = size

    def _run_again(self, task: _Task) -> None:
        """With inputs that are there still; one of them that was lost, too, runs again already, under a new handle."""
        if task.retries == RETRIES:
            raise UnavailableError(
                f"the cluster lost the same task {RETRIES + 1} times, each time its worker died: give workers more "
                "memory, or the reduction less"
            )
        task.retries += 1
        done = task.start()
        task.size, task.part.output = done.size, done.output


class Reduction:
    """The aggregate of one group of members, whose updates come in any order.

    ``extents`` names every module that an update may have; ``read`` gives an update's factors once it was added.
    """

    def __init__(
        self,
        rule: str,
        keys: Sequence[str],
        read: Read,
        extents: Mapping[str, Extent],
        workers: Workers,
        *,
        rank: int | None = None,
        base: str = "",
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        if rank is not None and rank < 1:
            raise InvalidInputError(f"found a target rank of {rank}, expected at least 1")
        if memory_bytes < 1:
            raise InvalidInputError(f"found {memory_bytes} bytes for a reduction, expected at least 1")
        get_rule(rule)
        self._rule, self._read, self._workers, self._rank, self._base = rule, read, workers, rank, base
        self._slots = Slots(keys)
        self._memory_bytes = memory_bytes
        self._windows = self._plan(extents)
        self._weights: dict[str, float] = {}
        self._missing: set[str] = set()
        self._number, self._attempts = 0, 1
        self._window = self._begin(0)
        self.peak_bytes = 0
        """What parts, and updates that wait to be lifted, took at most; without the outputs of tasks that still run"""

    @property
    def windows(self) -> int:
        """Passes over the updates."""
        return len(self._windows)

    def add(self, key: str, weight: float) -> None:
        """A member's update can be read, and counts with this weight. Waits while running tasks fill the memory."""
        if not math.isfinite(weight):
            raise InvalidInputError(f"found the weight {weight} for {key!r}, expected a finite number")
        leaf = self._heard(key)
        self._weights[key] = weight
        self._open(leaf)

    def skip(self, key: str) -> None:
        """A member's update will not come."""
        leaf = self._heard(key)
        self._missing.add(key)
        self._open(leaf)

    def result(self) -> Reduced:
        """The aggregate; every member was added or skipped before."""
        modules: dict[str, LoraPair] = {}
        errors: dict[str, float] = {}
        for part in self.parts():
            modules |= part.adapter.modules
            errors |= part.errors
        return Reduced(LoraAdapter(modules, self._base), errors)

    def parts(self) -> Iterator[Reduced]:
        """The aggregate window by window, each with modules of its own, for those who let go of one before the next."""
        if waiting := [key for key in self._slots.keys if not self._known(key)]:
            raise InvalidInputError(f"{len(waiting)} of {len(self._slots.keys)} members are neither added nor skipped")
        if not self._weights:
            raise InvalidInputError("nothing to aggregate: found no updates, expected at least one")
        for number in range(len(self._windows)):
            if number != self._number:
                self._number, self._attempts = number, 1
                self._window = self._begin(number)
            done = self._retried(self._finish, again=self._finish)
            self.peak_bytes = max(self.peak_bytes, self._window.peak)
            yield done

    def _plan(self, extents: Mapping[str, Extent]) -> list[list[list[str]]]:
        """Windows of shards of module paths."""
        sizes = {path: held_bytes(extent, self._slots) for path, extent in extents.items()}
        own = {path: (e.d_out + e.d_in) * -(-e.rank // len(self._slots.keys)) for path, e in extents.items()}
        windows = []
        for paths in cut(sizes, self._memory_bytes):
            parameters = {path: own[path] for path in paths}
            windows.append(cut(parameters, min(SHARD_PARAMETERS, -(-sum(parameters.values()) // SHARDS))))
        return windows

    def _begin(self, number: int) -> _Window:
        return _Window(
            self._rule, self._windows[number], self._slots, self._weights, self._read, self._workers,
            self._memory_bytes,
        )  # fmt: skip

    def _known(self, key: str) -> bool:
        return key in self._weights or key in self._missing

    def _heard(self, key: str) -> Slot:
        leaf = self._slots.leaf(key)
        if self._known(key):
            raise InvalidInputError(f"found {key!r} a second time, expected each member once")
        return leaf

    def _open(self, leaf: Slot) -> None:
        if self._complete(leaf):
            self._retried(lambda: self._window.open(leaf), again=self._catch_up)
        else:
            self._retried(self._window.advance, again=self._catch_up)

    def _retried(self, work: Callable[[], T], *, again: Callable[[], T]) -> T:
        """What ``work`` returns; where parts are lost, the window starts anew, with ``again``."""
        while True:
            try:
                return work()
            except PartsLostError as lost:
                if self._attempts == ATTEMPTS:
                    raise UnavailableError(f"parts of the sum were lost {ATTEMPTS} times: {lost}") from None
                self._attempts += 1
                self._window = self._begin(self._number)
                work = again

    def _catch_up(self) -> None:
        """Open all slots whose members are known."""
        for leaf in self._slots.leaves:
            if leaf not in self._window.opened and self._complete(leaf):
                self._window.open(leaf)

    def _complete(self, leaf: Slot) -> bool:
        return all(map(self._known, self._slots.members(leaf)))

    def _finish(self) -> Reduced:
        self._catch_up()
        roots = self._window.roots()
        modules: dict[str, LoraPair] = {}
        errors: dict[str, float] = {}
        if self._rank is None:
            for root in roots:
                with one_thread():
                    finished = finish_all(get_rule(self._rule), unpack(self._workers.get(root.output)))
                # Copies: what the store hands out is read-only, and goes with its handle.
                modules |= {path: LoraPair(pair.a.clone(), pair.b.clone()) for path, pair in finished.items()}
            return Reduced(LoraAdapter(modules, self._base), errors)
        under_way = {
            path: self._workers.submit(finish_module, self._rule, self._rank, path, root.output)
            for shard, root in zip(self._window.shards, roots, strict=True)
            for path in shard
        }
        for path, handle in under_way.items():
            finished = self._workers.get(handle)
            if finished is not None:
                a, b, errors[path] = finished
                modules[path] = LoraPair(torch.tensor(a), torch.tensor(b))
        return Reduced(LoraAdapter(modules, self._base), errors)


# What a worker does: pure functions of packed parts.


def lift_slot(rule: str, weights: Sequence[float], members: Sequence[Packed]) -> tuple[Packed, int]:
    """Members' factors → the partial result of their slot, and its size in bytes."""
    chosen = get_rule(rule)
    with one_thread():
        lifted = [lift_all(chosen, unpack(m), weight) for m, weight in zip(members, weights, strict=True)]
        return _sized(merge_all(chosen, lifted))


def merge_slot(rule: str, *parts: Packed) -> tuple[Packed, int]:
    with one_thread():
        return _sized(merge_all(get_rule(rule), [unpack(part) for part in parts]))


def finish_module(rule: str, rank: int, path: str, parts: Packed) -> tuple[Any, Any, float] | None:
    """A ``[rank, d_in]``, B ``[d_out, rank]`` and the relative error; None where no member has the module."""
    if path not in parts:
        return None
    with one_thread():
        part = unpack({path: parts[path]})[path]
        pair, error = compress(get_rule(rule).finish(part), rank=rank)
        return _array(pair.a), _array(pair.b), error


def pack(parts: Mapping[str, tuple[Tensor, ...]]) -> Packed:
    return {path: (type(part), tuple(_array(tensor) for tensor in part)) for path, part in parts.items()}


def unpack(packed: Packed) -> Parts:
    with warnings.catch_warnings():
        # The store's arrays are read-only, and rules do not change their inputs.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {path: kind(*(torch.from_numpy(array) for array in arrays)) for path, (kind, arrays) in packed.items()}


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    narrow = tensor.dtype in (torch.bfloat16, torch.float16)  # numpy lacks the first; float32 holds both exactly
    return (tensor.detach().float() if narrow else tensor.detach()).cpu().contiguous().numpy()


def _sized(parts: Parts) -> tuple[Packed, int]:
    packed = pack(parts)
    return packed, sum(array.nbytes for _, arrays in packed.values() for array in arrays)


def _bytes(pair: LoraPair) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in pair)
