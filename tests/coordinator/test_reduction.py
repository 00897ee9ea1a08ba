"""The streamed reduction, in this process: any order of arrival, bounded memory, parts that get lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.coordinator.reduction import (
    Done,
    Extent,
    PartsLostError,
    Reduction,
    admitted,
    cut,
    extents_of,
    pack,
    unpack,
    weigh,
)
from lorafleet.coordinator.rules import RULES
from lorafleet.coordinator.slots import Slots
from lorafleet.coordinator.tree import Here, LocalReducer, Weighted
from lorafleet.errors import BaseMismatchError, InvalidInputError, UnavailableError

SHAPES = {f"model.{i}.{name}": shape for i in range(3) for name, shape in (("q", (24, 32)), ("down", (32, 40)))}
COUNT = 23


def update(seed: int, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> LoraAdapter:
    generator, rank = torch.Generator().manual_seed(seed), 1 + seed % 5
    modules = {
        path: LoraPair(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))
        for path, (d_out, d_in) in shapes.items()
    }
    return LoraAdapter(modules, "base")


UPDATES = {f"m{k:02}": Weighted(update(k), (k + 1) / 300) for k in range(COUNT)}
EXTENTS = extents_of([u.adapter for u in UPDATES.values()])


class Journal:
    """Reads updates, and counts what was read."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, tuple[str, ...]]] = []

    def __call__(self, key: str, paths: Sequence[str]) -> dict[str, LoraPair]:
        self.reads.append((key, tuple(paths)))
        modules = UPDATES[key].adapter.modules
        return {path: modules[path] for path in paths if path in modules}


def start(workers: Any = None, *, rule: str = "exact", read: Any = None, **options: Any) -> Reduction:
    return Reduction(rule, list(UPDATES), read or Journal(), EXTENTS, workers or Here(), base="base", **options)


def summed(reduction: Reduction, order: Sequence[str] = tuple(UPDATES), missing: Sequence[str] = ()) -> LoraAdapter:
    for key in order:
        if key in missing:
            reduction.skip(key)
        else:
            reduction.add(key, UPDATES[key].weight)
    return reduction.result().adapter


def shuffled(seed: int) -> list[str]:
    order = list(UPDATES)
    random.Random(seed).shuffle(order)
    return order


@pytest.mark.parametrize("rule", sorted(name for name, rule in RULES.items() if rule.mixed_ranks))
@pytest.mark.parametrize("missing", [(), ("m04", "m05", "m06", "m07", "m13")], ids=["all", "some missing"])
def test_the_same_members_give_the_same_bits_whoever_came_first(rule: str, missing: Sequence[str]) -> None:
    digests = {summed(start(rule=rule), shuffled(seed), missing).digest for seed in range(4)}
    tight = start(rule=rule, memory_bytes=20_000)
    assert tight.windows > 1
    assert digests == {summed(tight, shuffled(9), missing).digest}


def test_all_at_hand_gives_the_bits_of_the_stream() -> None:
    assert LocalReducer().reduce("exact", UPDATES).digest == summed(start(), shuffled(1)).digest


def test_the_sum_is_that_of_the_products() -> None:
    missing = ["m00", "m21", "m22"]
    total = summed(start(memory_bytes=1), shuffled(2), missing)
    for path in SHAPES:
        dense = sum(
            w * (a.modules[path].b.double() @ a.modules[path].a.double())
            for key, (a, w) in UPDATES.items()
            if key not in missing
        )
        torch.testing.assert_close(total.delta(path), dense, rtol=1e-11, atol=1e-11)


def test_a_target_rank_gives_the_truncated_sum_and_its_errors() -> None:
    whole = summed(start())
    reduction = start(rank=4)
    for key in shuffled(3):
        reduction.add(key, UPDATES[key].weight)
    adapter, errors = reduction.result()
    expected, expected_errors = whole.compressed(rank=4)
    assert adapter.rank == 4 and errors == pytest.approx(expected_errors)
    for path in SHAPES:
        torch.testing.assert_close(adapter.delta(path), expected.delta(path), rtol=1e-9, atol=1e-9)


def test_a_slot_starts_as_soon_as_its_members_are_in() -> None:
    journal = Journal()
    reduction = start(read=journal)
    for key in ("m08", "m11", "m10"):
        reduction.add(key, 1.0)
    assert journal.reads == []
    reduction.skip("m09")
    assert [key for key, _ in journal.reads] == ["m08", "m10", "m11"]


def test_each_pass_reads_its_own_modules_alone_and_each_of_them_once() -> None:
    journal = Journal()
    reduction = start(read=journal, memory_bytes=20_000)
    summed(reduction, shuffled(4))
    read = [(key, path) for key, paths in journal.reads for path in paths]
    assert len(journal.reads) == reduction.windows * COUNT
    assert sorted(read) == sorted((key, path) for key in UPDATES for path in SHAPES)


class Late:
    """Workers whose tasks end only when they are waited for; counts what is held."""

    def __init__(self) -> None:
        self.waiting: dict[int, Done] = {}
        self.most = 0

    def put(self, value: Any) -> Any:
        return value

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Any:
        return task(*arguments)

    def submit_sized(self, task: Callable[..., tuple[Any, int]], *arguments: Any) -> Done:
        output, size = task(*arguments)
        self.waiting[id(output)] = done = Done(output, (id(output), size))
        self.most = max(self.most, len(self.waiting))
        return done

    def ended(self, sizes: Sequence[Any], *, wait: bool) -> dict[int, int]:
        if not wait:
            return {}
        number, size = sizes[0]
        self.waiting.pop(number)
        return {0: size}

    def get(self, handle: Any) -> Any:
        return handle


def many(count: int, order: Callable[[list[str]], list[str]], memory_bytes: int) -> Reduction:
    path = "model.0.q"
    keys = [f"m{k:05}" for k in range(count)]
    pair = update(3).modules[path]
    extents = {path: Extent(24, 32, 4 * count)}
    reduction = Reduction("exact", keys, lambda _key, _paths: {path: pair}, extents, Late(), memory_bytes=memory_bytes)
    for key in order(keys):
        reduction.add(key, 1 / count)
    total = reduction.result().adapter
    torch.testing.assert_close(total.delta(path), pair.b.double() @ pair.a.double(), rtol=1e-9, atol=1e-9)
    return reduction


@pytest.mark.parametrize("worst", [False, True], ids=["in order", "each sixteenth member last"])
def test_what_is_held_does_not_grow_with_the_number_of_members(worst: bool) -> None:
    def order(keys: list[str]) -> list[str]:
        return sorted(keys, key=lambda key: int(key[1:]) % 16 == 0) if worst else keys

    bound = 60_000
    peaks = [many(count, order, bound).peak_bytes for count in (100, 400, 1600)]
    part = 8 * 24 * 32
    assert max(peaks) <= bound + 8 * part  # and the first slot in order, with those that it completes
    assert peaks[2] <= peaks[1] + 4 * part


def test_adding_waits_for_running_tasks_where_they_fill_the_memory() -> None:
    roomy, tight = Late(), Late()
    summed(start(roomy))
    summed(start(tight, memory_bytes=6_000))
    assert tight.most < roomy.most


class Lossy(Here):
    """Workers that lose a part at some of the looks at what has ended."""

    def __init__(self, at: Sequence[int]) -> None:
        self.at, self.looks = set(at), 0

    def ended(self, sizes: Sequence[Any], *, wait: bool) -> dict[int, int]:
        self.looks += 1
        if self.looks in self.at:
            raise PartsLostError("its node died")
        return super().ended(sizes, wait=wait) if wait or self.looks % 3 else {}


@pytest.mark.parametrize("at", [(2,), (3, 5)], ids=str)
@pytest.mark.parametrize("memory_bytes", [20_000, 10**9])
def test_a_lost_part_is_made_again_and_nothing_counts_twice(at: Sequence[int], memory_bytes: int) -> None:
    expected = summed(start(memory_bytes=memory_bytes)).digest
    workers = Lossy(at)
    assert summed(start(workers, memory_bytes=memory_bytes), shuffled(5)).digest == expected
    assert workers.looks > min(at)


def test_parts_that_are_lost_again_and_again_end_the_reduction() -> None:
    with pytest.raises(UnavailableError, match="lost 3 times"):
        summed(start(Lossy(range(1, 100))))


class Dying(Here):
    """Workers of which one dies at some of the tasks: those that are given its output fail as well."""

    def __init__(self, at: Sequence[int]) -> None:
        self.at, self.submitted = set(at), 0

    def submit_sized(self, task: Callable[..., tuple[Any, int]], *arguments: Any) -> Done:
        self.submitted += 1
        if self.submitted in self.at or any(argument is DEAD for argument in arguments):
            return Done(DEAD, None)
        return super().submit_sized(task, *arguments)

    def ended(self, sizes: Sequence[Any], *, wait: bool) -> dict[int, int | None]:
        # Late, and the last first: what was given a dead task's output is told before that one.
        return dict(reversed(super().ended(sizes, wait=wait).items())) if wait else {}


DEAD = object()


@pytest.mark.parametrize("at", [(1,), (2, 3, 9), tuple(range(2, 40, 3))], ids=str)
def test_a_task_whose_worker_died_runs_again_with_what_it_was_given(at: Sequence[int]) -> None:
    journal, undisturbed = Journal(), Journal()
    expected = summed(start(read=undisturbed)).digest
    workers = Dying(at)
    assert summed(start(workers, read=journal), shuffled(5)).digest == expected
    assert workers.submitted > max(at)
    assert sorted(journal.reads) == sorted(undisturbed.reads)


def test_a_task_that_takes_every_worker_down_ends_the_reduction() -> None:
    with pytest.raises(UnavailableError, match="the same task 6 times"):
        summed(start(Dying(range(1, 10_000))))


@pytest.mark.parametrize("rule", ["exact", "fedit", "hetlora", "rbla", "flora"])
def test_weights_of_updates_read_one_by_one_are_those_of_all_at_hand(rule: str) -> None:
    adapters = [u.adapter for u in UPDATES.values()]
    given = {key: u.weight for key, u in UPDATES.items()}
    journal = Journal()
    assert weigh(rule, given, journal, list(SHAPES)) == dict(
        zip(UPDATES, RULES[rule].weigh(adapters, list(given.values())), strict=True)
    )
    assert len(journal.reads) == (COUNT if rule == "hetlora" else 0)


def test_weights_of_a_rule_that_compares_whole_updates_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="ffa cannot be summed as updates come"):
        weigh("ffa", {"m": 1.0}, Journal(), [])


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
@pytest.mark.parametrize("memory_bytes", [1, 2**30])
def test_updates_that_are_compared_bit_by_bit_are_compared_module_by_module(rule: str, memory_bytes: int) -> None:
    common = update(1)
    alike = {
        key: {path: LoraPair(common.modules[path].a, pair.b) for path, pair in update(seed).modules.items()}
        for key, seed in (("m0", 1), ("m1", 6), ("m2", 11))
    }
    weights, sizes = {"m0": 0.5, "m1": 0.25, "m2": 0.25}, extents_of([LoraAdapter(each) for each in alike.values()])

    def read(key: str, paths: Sequence[str]) -> Mapping[str, LoraPair]:
        return {path: alike[key][path] for path in paths}

    assert admitted(rule, weights, read, sizes, memory_bytes=memory_bytes) == weights
    path = sorted(SHAPES)[-1]
    alike["m2"][path] = LoraPair(alike["m2"][path].a + 1e-6, alike["m2"][path].b)
    with pytest.raises(InvalidInputError, match="unlike A"):
        admitted(rule, weights, read, sizes, memory_bytes=memory_bytes)


def test_the_result_comes_window_by_window_too() -> None:
    reduction = start(memory_bytes=20_000)
    for key in UPDATES:
        reduction.add(key, UPDATES[key].weight)
    parts = [part.adapter for part in reduction.parts()]
    assert len(parts) == reduction.windows > 1
    assert [path for part in parts for path in part.modules] == sorted(SHAPES)
    whole = summed(start())
    assert LoraAdapter({path: pair for part in parts for path, pair in part.modules.items()}).digest == whole.digest


def test_members_are_named_once_and_all_of_them() -> None:
    reduction = start()
    reduction.add("m00", 1.0)
    with pytest.raises(InvalidInputError, match="a second time"):
        reduction.skip("m00")
    with pytest.raises(InvalidInputError, match="'stranger'"):
        reduction.add("stranger", 1.0)
    with pytest.raises(InvalidInputError, match="finite"):
        reduction.add("m01", float("nan"))
    with pytest.raises(InvalidInputError, match="22 of 23 members are neither added nor skipped"):
        reduction.result()


def test_nobody_at_all_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="found no updates"):
        summed(start(), missing=list(UPDATES))


@pytest.mark.parametrize(("rule", "wrong"), [("exact", (24, 33, 2)), ("fedex", (24, 32, 3))])
def test_an_update_of_another_shape_is_refused(rule: str, wrong: tuple[int, int, int]) -> None:
    d_out, d_in, rank = wrong
    modules = {"a": LoraPair(torch.ones(2, 32), torch.ones(24, 2))}
    other = {"a": LoraPair(torch.ones(rank, d_in), torch.ones(d_out, rank))}
    reduction = Reduction(
        rule, ["x", "y"], lambda key, _: modules if key == "x" else other, {"a": Extent(24, 32, 4)}, Here()
    )
    reduction.add("x", 0.5)
    with pytest.raises(BaseMismatchError, match="expected"):
        reduction.add("y", 0.5)


def test_a_member_without_a_module_adds_nothing_there() -> None:
    some = {"m0": Weighted(update(1, {"a": (4, 6)}), 1.0), "m1": Weighted(update(2, {"b": (4, 6)}), 2.0)}
    total = LocalReducer().reduce("exact", some)
    torch.testing.assert_close(total.delta("a"), some["m0"].adapter.delta("a").double())
    torch.testing.assert_close(total.delta("b"), 2 * some["m1"].adapter.delta("b").double())


def test_pieces_cover_every_module_once_in_order() -> None:
    sizes = dict.fromkeys(SHAPES, 10)
    assert [path for piece in cut(sizes, 25) for path in piece] == sorted(SHAPES)
    assert [len(piece) for piece in cut(sizes, 25)] == [2, 2, 2]
    assert cut(sizes, 1) == [[path] for path in sorted(SHAPES)]


def test_slots_cover_the_members_in_order() -> None:
    slots = Slots(reversed([f"m{k:02}" for k in range(21)]))
    assert [key for leaf in slots.leaves for key in slots.members(leaf)] == slots.keys == sorted(slots.keys)
    assert [len(slots.members(leaf)) for leaf in slots.leaves] == [4, 4, 4, 4, 4, 1]
    assert slots.levels == 3 and [slot.number for slot in slots.below(slots.root)] == [0, 1]


def test_packing_keeps_types_and_bits() -> None:
    half = LoraPair(torch.randn(2, 3, dtype=torch.bfloat16), torch.randn(3, 2).T.contiguous().T)
    back = unpack(pack({"a": half}))["a"]
    assert isinstance(back, LoraPair)
    torch.testing.assert_close(back.a, half.a.float(), rtol=0, atol=0)
    torch.testing.assert_close(back.b, half.b, rtol=0, atol=0)
