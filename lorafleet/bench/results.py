"""What became of the rows, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, NamedTuple, TypeAlias

from lorafleet.bench.floor import Work, floor_s
from lorafleet.bench.rows import BEST_OF_PEERS, COMPARED, Row
from lorafleet.bench.timing import Timing

Status: TypeAlias = Literal["measured", "left out", "refused", "failed"]


@dataclass
class RowResult:
    """A row and what came of it; only a measured one has figures."""

    row: Row
    status: Status
    reason: str = ""
    """why there are no figures"""
    timings: list[Timing] = field(default_factory=list)
    """one for each repeat"""
    memory_bytes_per_s: float | None = None
    """of the device, by a copy; where the row is compared with the reading of the weights"""


class Figures(NamedTuple):
    """Medians over a row's repeats, each on its own: prefill and decode need not add up to the whole."""

    tokens_per_s: float
    total_s: float
    prefill_s: float
    decode_s: float


class Ratio(NamedTuple):
    of: str
    to: str
    ratio: float
    """of tokens per second; above 1, ``of`` is the faster one"""


class Floor(NamedTuple):
    floor_s: float
    share: float
    """floor : ours; below 1 we are slower than the floor"""
    work: Work


class WeightFloor(NamedTuple):
    floor_s: float
    """in which a copy moves as many bytes as the row's decoding reads weights"""
    share: float
    """floor : ours; below 1 we are slower than the floor"""


def decode_s(timing: Timing) -> float:
    """The whole run without the prefill."""
    return timing.total_s - timing.prefill_s


def figures(timings: Sequence[Timing]) -> Figures:
    """Medians of at least one repeat."""
    total = median(timing.total_s for timing in timings)
    return Figures(
        tokens_per_s=timings[0].tokens / total,
        total_s=total,
        prefill_s=median(timing.prefill_s for timing in timings),
        decode_s=median(map(decode_s, timings)),
    )


def all_figures(results: Sequence[RowResult]) -> dict[str, Figures]:
    """Of the rows that were measured."""
    return {result.row.name: figures(result.timings) for result in results if result.status == "measured"}


def ratios(found: Mapping[str, Figures]) -> list[Ratio]:
    """Every row against our base, then our rows against the peers that do the same."""
    pairs = [(name, "base") for name in found if name != "base" and "base" in found]
    for ours, peers in COMPARED.items():
        there = [peer for peer in peers if peer in found]
        if ours in found and there:
            if ours in BEST_OF_PEERS:
                there = [max(there, key=lambda peer: found[peer].tokens_per_s)]
            pairs.extend((ours, peer) for peer in there)
    return [Ratio(of, to, found[of].tokens_per_s / found[to].tokens_per_s) for of, to in pairs]


def weight_floors(results: Sequence[RowResult], *, step_bytes: int, new_tokens: int) -> dict[str, WeightFloor]:
    """Of the measured rows whose device's memory was timed; each token but the first is a step that reads weights."""
    found = all_figures(results)
    least = {
        result.row.name: (new_tokens - 1) * step_bytes / result.memory_bytes_per_s
        for result in results
        if result.row.name in found and result.memory_bytes_per_s is not None
    }
    return {name: WeightFloor(seconds, seconds / found[name].decode_s) for name, seconds in least.items()}


def floors(found: Mapping[str, Figures], works: Mapping[str, Work]) -> dict[str, Floor]:
    """Of the measured rows whose adapters' work is known; empty where the bare base was not measured."""
    base = found.get("base")
    least = {
        name: floor_s(work, base_prefill_s=base.prefill_s, base_decode_s=base.decode_s)
        for name, work in works.items()
        if base is not None and name in found
    }
    return {name: Floor(seconds, seconds / found[name].total_s, works[name]) for name, seconds in least.items()}
