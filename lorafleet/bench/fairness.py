"""``lorafleet bench fairness``: a tenant that uses half of its share, alone, and while another tenant floods.

A real ``lorafleet serve`` with a registry of two tenants of the same weight; callers in open loop over gRPC, each
tenant's in a process of its own (:mod:`lorafleet.bench.service.harness`). First the capacity is measured: answers a
second where more callers wait than the engine runs at a time. A tenant's share is half of it, and the quiet tenant
offers half of its share, by Poisson arrivals.

Arms take turns, with the same arrivals and lengths and new prompts each time: the quiet tenant ``alone``; beside a
flood of requests like its own (``alike``); beside one with longer prompts (``long``); and, for comparison, beside a
flood that comes under its own key (``one tenant``), which no queue among tenants helps against.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from lorafleet.assets import base_path
from lorafleet.bench.machine import commit, cpu_device, versions
from lorafleet.bench.record import append, head, plain
from lorafleet.bench.service.asks import Ask, Outcome, poisson
from lorafleet.bench.service.harness import Service, Tenants
from lorafleet.errors import InvalidInputError, UnavailableError
from lorafleet.registry import Registry

Arm: TypeAlias = Literal["alone", "alike", "long", "one tenant"]

QUIET: Final = "quiet"
FLOOD: Final = "flood"
WANTED_THROUGHPUT: Final = 0.95
WANTED_RATIO: Final = 2.0
CALLERS: Final = 96
"""Whose capacity is measured: more than the engine runs at a time by default."""
LONGEST_CAPACITY_S: Final = 160.0
"""Of measuring it. Callers start all at once and are answered all at once for a while: until each of them has had an
answer or so, what has ended says little of what ends in a second."""
FLOOD_TIMEOUT_S: Final = 20.0
"""Of a call of the flood: so long the next arm waits for its end at most."""


class Lengths(NamedTuple):
    """Tokens of prompts and answers, each drawn evenly."""

    prompt: tuple[int, int]
    answer: tuple[int, int] = (16, 64)


USUAL: Final = Lengths((32, 256))
LONG: Final = Lengths((320, 440))


@dataclass(frozen=True, kw_only=True)
class FairnessSettings:
    seconds: float = 20.0
    """Of each arm, in each turn."""
    turns: int = 3
    part: float = 0.5
    """Of its share that the quiet tenant offers."""
    flood: float = 2.0
    """What the other offers, times the capacity."""
    compare: bool = True
    """With the arm of one tenant."""
    threads: int = 1
    """Of the engine; callers have the other cores."""
    warm_s: float = 3.0
    """Until the service is at its pace, and the flood has filled it; as long again for callers to start."""
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.part <= 1 or self.flood <= 0:
            raise InvalidInputError(
                f"found a part of {self.part} and a flood of {self.flood}, expected above 0, and a part of at most 1"
            )
        if self.seconds <= 0 or self.turns < 1:
            raise InvalidInputError(f"found {self.turns} turns of {self.seconds} s, expected at least 1, above 0 s")

    @property
    def arms(self) -> list[Arm]:
        return ["alone", "alike", "long", *(["one tenant"] if self.compare else [])]  # type: ignore[list-item]


class ArmResult(NamedTuple):
    """One arm in one turn."""

    arm: Arm
    turn: int
    offered: int
    """requests of the quiet tenant"""
    latencies_s: list[float]
    """from when a request should have been sent to its end, of those that were answered"""
    first_tokens_s: list[float]
    failures: dict[str, int]
    """by status"""
    flood_rate: float
    """answers a second to the flood"""
    flood_refused: int


class Ratios(NamedTuple):
    """An arm beside the quiet tenant alone, over all turns."""

    arm: Arm
    throughput: float
    """answers : answers"""
    latency: float
    """95th percentile : 95th percentile; infinity where nothing was answered"""
    first_token: float

    @property
    def met(self) -> bool:
        return self.throughput >= WANTED_THROUGHPUT and self.latency <= WANTED_RATIO >= self.first_token


class FairnessBenchmark(NamedTuple):
    record: dict[str, Any]
    file: Path
    capacity: float
    """answers a second"""
    results: list[ArmResult]
    ratios: list[Ratios]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many per cent of all do not exceed; infinity of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else math.inf


def ratios(results: Sequence[ArmResult]) -> list[Ratios]:
    """Of every arm but the first one's kind, in order."""
    alone = [result for result in results if result.arm == "alone"]
    found = []
    for arm in dict.fromkeys(result.arm for result in results if result.arm != "alone"):
        beside = [result for result in results if result.arm == arm]
        found.append(
            Ratios(
                arm,
                sum(len(r.latencies_s) for r in beside) / max(1, sum(len(r.latencies_s) for r in alone)),
                _p95(beside, "latencies_s") / _p95(alone, "latencies_s"),
                _p95(beside, "first_tokens_s") / _p95(alone, "first_tokens_s"),
            )
        )
    return found


def wanted(found: Sequence[Ratios]) -> bool:
    """Whether all was met but in the comparison, which nothing is wanted of."""
    return all(ratio.met for ratio in found if ratio.arm != "one tenant")


def bench_fairness(
    settings: FairnessSettings, *, work: Path, out: Path, when: datetime, say: Callable[[str], None]
) -> FairnessBenchmark:
    """Run everything in ``work`` and append the record to ``out``; UnavailableError where the service fails."""
    out.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be made would cost a whole run
    url, blobs = f"sqlite:///{work / 'registry.db'}", work / "blobs"
    with Registry.open(url, blobs) as registry:
        tenants = Tenants(registry)
        keys = {tenant: tenants.add(tenant) for tenant in (QUIET, FLOOD)}
    arguments = ["--threads", str(settings.threads)]
    results: list[ArmResult] = []
    with Service.of(work / "service", registry=url, blobs=blobs, arguments=arguments) as service:
        say("capacity")
        capacity = measure_capacity(service, keys[QUIET], settings)
        rate = capacity / 2 * settings.part
        for turn in range(settings.turns):
            # Every second turn goes the other way round: what drifts on the machine is no arm's.
            for arm in settings.arms[:: -1 if turn % 2 else 1]:
                say(f"turn {turn + 1} of {settings.turns}: {arm}")
                results.append(run_arm(service, keys, settings, arm, turn, rate=rate, capacity=capacity))
    found = ratios(sorted(results, key=lambda result: settings.arms.index(result.arm)))
    record = make_record(settings, capacity, results, found, when=when)
    return FairnessBenchmark(record, append(record, out), capacity, results, found)


def measure_capacity(service: Service, key: str, settings: FairnessSettings) -> float:
    """Answers a second to requests of the usual lengths where more callers wait than run: in the time of an arm, or,
    where the machine is too slow to answer as many as call in it, in twice, four times … that."""
    rng = random.Random(f"{settings.seed}/capacity")
    seconds = settings.seconds
    while True:
        total_s = settings.warm_s + seconds
        asks = [ask(key, USUAL, rng) for _ in range(int(300 * total_s))]
        outcomes = service.ask(asks, callers=CALLERS, seconds=total_s)
        answered = sum(o.status == "OK" and settings.warm_s <= o.ended_s < total_s for o in outcomes)
        if answered >= CALLERS:
            return answered / seconds
        if 2 * seconds > LONGEST_CAPACITY_S:
            statuses = dict(Counter(outcome.status for outcome in outcomes))
            raise UnavailableError(
                f"{answered} calls of {CALLERS} callers were answered in {seconds:g} s ({statuses}), expected one of "
                f"each at least; the service's log is in {service.log}"
            )
        seconds *= 2


def run_arm(
    service: Service,
    keys: dict[str, str],
    settings: FairnessSettings,
    arm: Arm,
    turn: int,
    *,
    rate: float,
    capacity: float,
) -> ArmResult:
    """One arm in one turn: arrivals and lengths are the turn's, prompts are new."""
    words = random.Random(f"{settings.seed}/{turn}/{arm}")
    drawn = random.Random(f"{settings.seed}/{turn}")
    arrivals = poisson(rate, settings.seconds, drawn) or [0.0]  # a slow machine in a short run may draw none
    quiet = [ask(keys[QUIET], USUAL, drawn, words=words, at_s=at_s) for at_s in arrivals]
    flooding = None
    if arm != "alone":
        lengths = LONG if arm == "long" else USUAL
        # One of it comes with the quiet tenant's first, whatever is drawn: of a slow machine in a short run maybe none.
        times = [settings.warm_s]
        times += poisson(settings.flood * capacity, 2 * settings.warm_s + settings.seconds, words)
        key = keys[QUIET if arm == "one tenant" else FLOOD]
        asks = [ask(key, lengths, words, at_s=at_s) for at_s in times]
        flooding = service.start(asks, timeout_s=FLOOD_TIMEOUT_S)
        time.sleep(settings.warm_s)
    outcomes = [outcome for outcome in service.start(quiet).outcomes() if outcome is not None]
    flood = [] if flooding is None else [outcome for outcome in flooding.outcomes() if outcome is not None]
    return arm_result(arm, turn, outcomes, flood, warm_s=settings.warm_s, seconds=settings.seconds)


def arm_result(
    arm: Arm, turn: int, quiet: Sequence[Outcome], flood: Sequence[Outcome], *, warm_s: float, seconds: float
) -> ArmResult:
    """UnavailableError where there should have been a flood and none of it was served: that is ``alone`` again; and
    where nothing was answered ``alone``, which leaves nothing to compare with."""
    answered = [outcome for outcome in quiet if outcome.status == "OK"]
    if arm == "alone" and not any(outcome.first_token_s is not None for outcome in answered):
        statuses = dict(Counter(outcome.status for outcome in quiet))
        raise UnavailableError(
            f"found no answer to the quiet tenant alone in {seconds:g} s ({statuses}), expected some to compare with; "
            "give more --seconds"
        )
    end_s = warm_s + seconds
    served = [o for o in flood if o.status == "OK" and o.sent_s < end_s and o.ended_s >= warm_s]
    if arm != "alone" and not served:
        statuses = dict(Counter(outcome.status for outcome in flood))
        raise UnavailableError(
            f"no call of the flood was served between {warm_s:g} and {end_s:g} s ({statuses}); expected some; "
            "see that the service answers at all"
        )
    return ArmResult(
        arm,
        turn,
        len(quiet),
        [outcome.latency_s for outcome in answered],
        [outcome.first_token_s for outcome in answered if outcome.first_token_s is not None],
        dict(Counter(outcome.status for outcome in quiet if outcome.status != "OK")),
        sum(outcome.ended_s < end_s for outcome in served) / seconds,
        sum(outcome.status == "RESOURCE_EXHAUSTED" for outcome in flood),
    )


def ask(
    key: str, lengths: Lengths, drawn: random.Random, *, words: random.Random | None = None, at_s: float = 0.0
) -> Ask:
    """A request of random words; ``words`` draws them apart from the lengths."""
    tokens, answer = drawn.randint(*lengths.prompt), drawn.randint(*lengths.answer)
    text = "".join((words or drawn).choices(_pieces(), k=tokens))
    return Ask(key=key, prompt=text, at_s=at_s, max_tokens=answer)


@cache
def _pieces() -> list[str]:
    """Words of the tiny base's vocabulary, which are a token each behind a space."""
    vocabulary = json.loads((base_path("tiny") / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = [piece[1:] for piece in sorted(vocabulary) if piece[0] == "Ġ"]
    return [f" {word}" for word in words if word.isascii() and word.isalpha()]


def _p95(results: Sequence[ArmResult], field: Literal["latencies_s", "first_tokens_s"]) -> float:
    return percentile([value for result in results for value in getattr(result, field)], 95)


def make_record(
    settings: FairnessSettings,
    capacity: float,
    results: Sequence[ArmResult],
    found: Sequence[Ratios],
    *,
    when: datetime,
) -> dict[str, Any]:
    return {
        **head(
            "fairness",
            when=when,
            command=command_line(settings),
            shape={"name": "fairness"},
            device=cpu_device(settings.threads),
            versions=versions(),
            commit=commit(),
        ),
        "settings": asdict(settings),
        "capacity_per_s": capacity,
        "arms": [
            {
                **{name: value for name, value in result._asdict().items() if not name.endswith("_s")},
                "answered": len(result.latencies_s),
                **{
                    f"{name}_p{percent}_s": percentile(values, percent) if values else None
                    for name, values in (("latency", result.latencies_s), ("first_token", result.first_tokens_s))
                    for percent in (50, 95, 99)
                },
            }
            for result in results
        ],
        "wanted": {"throughput": WANTED_THROUGHPUT, "latency": WANTED_RATIO, "first_token": WANTED_RATIO},
        "ratios": [{**plain(ratio._asdict()), "met": ratio.met} for ratio in found],
    }


def command_line(settings: FairnessSettings) -> list[str]:
    """The command that does this again."""
    words = ["lorafleet", "bench", "fairness", "--seconds", f"{settings.seconds:g}", "--turns", str(settings.turns)]
    words += ["--part", f"{settings.part:g}", "--flood", f"{settings.flood:g}", "--threads", str(settings.threads)]
    return [*words, "--seed", str(settings.seed), *([] if settings.compare else ["--no-compare"])]
