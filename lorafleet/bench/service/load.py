"""The service at most of what it can do, for long, and at twice that.

First callers who wait for their answers keep it full: what it completes is its capacity. Then calls come at random,
80 % of that, for minutes: none may fail, and the server's memory may not grow. Then twice the capacity: every call has
to end with an answer, or with RESOURCE_EXHAUSTED (429) that says when to try again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafleet.bench.neighbours import Neighbours
from lorafleet.bench.service.asks import LOST, Ask, Outcome, poisson
from lorafleet.bench.service.figures import Verdict, quantile, slope
from lorafleet.bench.service.harness import MemorySample, Service, Tenants, random_adapter
from lorafleet.errors import UnavailableError
from lorafleet.registry import Registry

SCENARIO = "load"
SHARE, OVER = 0.8, 2.0
MOST_GROWTH = 2**20
"""Bytes a minute."""
TIMEOUT_S = 60.0
REFUSED = "RESOURCE_EXHAUSTED"
_TEXT = (
    "the of and to a in that it was his he with as for had you not be her is on at by which have or from this him but "
    "all she they were my are me one their so an said them we who would been will no when there if more out up into do "
    "any your what has man could other than our some very time upon about may its only now like little then can made "
    "select from where join value count table index name order group limit return class import self none true def"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    minutes: float = 10.0
    capacity_s: float = 30.0
    overload_s: float = 30.0
    tenants: int = 20
    callers: int = 64
    """That keep it full while its capacity is taken."""
    least_words: int = 8
    most_words: int = 64
    least_tokens: int = 8
    most_tokens: int = 32
    seed: int = 1


def ask(settings: LoadSettings, keys: Mapping[str, str], rng: random.Random, *, at_s: float = 0.0) -> Ask:
    """A call like any other: its tenant's adapter, a mixture or the base, a fifth of them over HTTP."""
    tenant = rng.choice(list(keys))
    own = f"{tenant}/own"
    model, mix = rng.choices([(own, {}), ("base", {}), ("", {own: 0.5})], weights=[6, 2, 2])[0]
    return Ask(
        key=keys[tenant],
        prompt=" ".join(rng.choices(_WORDS, k=rng.randint(settings.least_words, settings.most_words))),
        door="completion" if rng.random() < 0.2 else "generate",
        at_s=at_s,
        model=model,
        mix=mix,
        max_tokens=rng.randint(settings.least_tokens, settings.most_tokens),
    )


def capacity(outcomes: Sequence[Outcome], seconds: float) -> float:
    """Completed calls a second, without the first quarter of the time, in which callers begin together."""
    begun = seconds / 4
    ended = [outcome for outcome in outcomes if outcome.status == "OK" and begun <= outcome.ended_s < seconds]
    return len(ended) / (seconds - begun)


def growth(samples: Sequence[MemorySample]) -> float:
    """Bytes a minute, from the slope of a line through the samples behind the first minute, or the first third of a
    shorter run: until then caches fill, and threads start."""
    last = samples[-1].at_s if samples else 0.0
    kept = [sample for sample in samples if sample.at_s >= min(60.0, last / 3)]
    return 60.0 * slope([sample.at_s for sample in kept], [sample.bytes for sample in kept])


def unanswered(outcomes: Sequence[Outcome]) -> Counter[str]:
    """Calls that ended neither with an answer nor with a refusal that says when to try again, by what they had."""
    found: Counter[str] = Counter()
    for outcome in outcomes:
        if outcome.status == REFUSED:
            found["refused without a time to try again"] += outcome.retry_after_s is None
        elif outcome.status != "OK":
            found[outcome.status] += 1
    return +found


def bench_load(
    settings: LoadSettings, *, work: Path, registry_url: str, threads: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Verdict]]:
    """Figures of the record, and what they come to."""
    with Registry.open(registry_url, work / "blobs") as registry:
        tenants = Tenants(registry)
        for number in range(settings.tenants):
            tenants.add(f"tenant-{number:03}")
            tenants.add_adapter(f"tenant-{number:03}", "own", random_adapter(number, rank=4 + 4 * (number % 2)))
    rng = random.Random(f"{settings.seed}/asks")

    def arriving(rate: float, seconds: float) -> list[Ask]:
        return [ask(settings, tenants.keys, rng, at_s=at_s) for at_s in poisson(rate, seconds, rng)]

    with Service.of(
        work, registry=registry_url, blobs=work / "blobs", arguments=["--threads", str(threads)]
    ) as service:
        neighbours, taken = Neighbours(), {}
        say(f"capacity, {settings.capacity_s:.0f} s")
        some = [ask(settings, tenants.keys, rng) for _ in range(int(2000 * settings.capacity_s))]
        full = service.ask(some, callers=settings.callers, seconds=settings.capacity_s, timeout_s=TIMEOUT_S)
        taken["capacity"] = neighbours.share()
        most = capacity(full, settings.capacity_s)
        if most == 0.0:
            statuses = dict(Counter(outcome.status for outcome in full))
            raise UnavailableError(f"the service completed nothing in {settings.capacity_s:g} s ({statuses})")
        say(f"{SHARE * most:.1f} calls a second for {settings.minutes:g} min")
        steady, samples = service.ask_sampled(arriving(SHARE * most, 60.0 * settings.minutes), timeout_s=TIMEOUT_S)
        taken["steady"] = neighbours.share()
        say(f"{OVER * most:.1f} calls a second for {settings.overload_s:g} s")
        over = service.ask(arriving(OVER * most, settings.overload_s), timeout_s=TIMEOUT_S)
        taken["over"] = neighbours.share()
        # Whoever was refused or cut off may not be what keeps others out for good.
        after = service.ask(arriving(SHARE * most, min(10.0, settings.overload_s)), timeout_s=TIMEOUT_S)
        taken["after"] = neighbours.share()
    grown = growth(samples)
    record = {
        "capacity_per_s": most,
        "capacity_tokens_per_s": most * _mean([outcome.tokens for outcome in full if outcome.status == "OK"]),
        "steady": {**_seen(steady), "growth_bytes_per_minute": grown, "memory": _thinned(samples)},
        "over": _seen(over),
        "after": _seen(after),
        "taken_by_others": taken,
    }
    made = verdicts(steady, grown, over, after)
    if (share := taken["steady"]) is not None:
        figure = f"processors' time that the host gave to others, at {SHARE:.0%}"
        made.append(Verdict(SCENARIO, figure, share, "for comparison", met=True))
    return record, made


def verdicts(
    steady: Sequence[Outcome], grown: float, over: Sequence[Outcome], after: Sequence[Outcome]
) -> list[Verdict]:
    failed, later = (sum(one.status != "OK" for one in outcomes) for outcomes in (steady, after))
    lost = sum(one.status in (LOST, "DEADLINE_EXCEEDED") for one in (*steady, *over, *after))
    bad, answered = sum(unanswered(over).values()), sum(one.status == "OK" for one in over)
    return [
        Verdict(SCENARIO, f"calls that failed at {SHARE:.0%} of the capacity", failed, "none", not failed),
        Verdict(SCENARIO, "growth of memory, MiB a minute", grown / 2**20, "below 1", grown < MOST_GROWTH),
        Verdict(SCENARIO, f"calls at {OVER:.0%} without an answer or a time to try again", bad, "none", not bad),
        Verdict(SCENARIO, f"calls at {OVER:.0%} that were answered", answered, "at least one", answered > 0),
        Verdict(SCENARIO, "calls that hung or were lost", lost, "none", not lost),
        Verdict(SCENARIO, f"calls that failed at {SHARE:.0%} after that", later, "none", not later),
    ]


def _seen(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    answered = [outcome for outcome in outcomes if outcome.status == "OK"]
    firsts = [outcome.first_token_s for outcome in answered if outcome.first_token_s is not None]
    latencies = [outcome.latency_s for outcome in answered]
    return {
        "calls": len(outcomes),
        "statuses": dict(Counter(outcome.status for outcome in outcomes)),
        "messages": dict(Counter(outcome.message for outcome in outcomes if outcome.message).most_common(5)),
        "latency_s": {f"p{q:g}": quantile(latencies, q / 100) for q in (50, 95, 99)},
        "first_token_s": {f"p{q:g}": quantile(firsts, q / 100) for q in (50, 95, 99)},
        "late_sent_s": quantile([outcome.sent_s - outcome.at_s for outcome in outcomes], 0.99),
    }


def _thinned(samples: Sequence[MemorySample], most: int = 120) -> list[MemorySample]:
    """Every so many, each with what others took on the average of those that it stands for."""
    each = max(1, len(samples) // most)
    kept = []
    for first in range(0, len(samples), each):
        shares = [one.taken_by_others for one in samples[first : first + each] if one.taken_by_others is not None]
        kept.append(samples[first]._replace(taken_by_others=_mean(shares) if shares else None))
    return kept


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
