"""``Route`` alone, with a hundred adapters, by every router: calls a second, and how long they take.

Each adapter has a model card of its own topic; each text is about one of them, and none is asked twice. Callers who
wait for their answers tell how many a second there can be; calls that come at random, at half of that and at the wanted
rate, tell how long they take when nobody waits for them. Beside routers that do not run the model, the same callers ask
a server that does nothing (:mod:`.bare`): no route can do better than that.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorafleet.bench.neighbours import Neighbours
from lorafleet.bench.service.asks import Ask, Outcome, poisson
from lorafleet.bench.service.figures import Verdict, quantile
from lorafleet.bench.service.harness import Service, Tenants, random_adapter
from lorafleet.registry import Registry
from lorafleet.router_service.routers import ROUTERS

SCENARIO = "route"
WANTED_PER_S = {False: 1500.0, True: 100.0}
"""Whether the router runs the model → calls a second."""
MOST_P99_S = 0.010
"""Of routers that do not run the model."""
LEAST_RIGHT = 0.9
TENANT = "library"


@dataclass(frozen=True, kw_only=True)
class RouteSettings:
    routers: tuple[str, ...] = ("cards", "cards+likelihood", "likelihood")
    adapters: int = 100
    seconds: float = 10.0
    """Of each phase."""
    callers: int = 16
    words: int = 24
    """Of a text."""
    seed: int = 1


class Topic(NamedTuple):
    """What an adapter is about."""

    name: str
    words: tuple[str, ...]
    card: str


class Phases(NamedTuple):
    """What became of one router's calls."""

    router: str
    waiting: Sequence[Outcome]
    """of callers that wait for their answers"""
    halved: Sequence[Outcome]
    """of those that come at random, half as many as were answered to callers that wait"""
    arriving: Sequence[Outcome]
    """of those that come at the wanted rate"""
    cpu_s: float
    """of the server, a call, while callers wait"""
    right: float
    """share of the routes whose largest weight is that of the text's topic; of all answers"""


def topics(settings: RouteSettings) -> list[Topic]:
    """Made of syllables: words of a topic's own, and words that all cards share."""
    rng = random.Random(f"{settings.seed}/topics")
    common = [_word(rng) for _ in range(400)]
    found = []
    for number in range(settings.adapters):
        own = tuple(_word(rng) for _ in range(20))
        body = rng.choices(common, k=120) + [word for word in own for _ in range(2)]
        rng.shuffle(body)
        found.append(Topic(f"{own[0]}-{number:03}", own, f"# {own[0]} {own[1]}\n\n{' '.join(body)}.\n"))
    return found


def texts(settings: RouteSettings, about: Sequence[Topic], count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Texts, each with the name of its topic: a fifth of its words are the topic's own."""
    found = []
    for _ in range(count):
        topic = rng.choice(about)
        own = settings.words // 5 + 1
        words = rng.choices(topic.words, k=own) + [_word(rng) for _ in range(settings.words - own)]
        rng.shuffle(words)
        found.append((" ".join(words), topic.name))
    return found


def bench_routes(
    settings: RouteSettings, *, work: Path, registry_url: str, threads: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Verdict]]:
    """Figures of the record, and what they come to."""
    about = topics(settings)
    with Registry.open(registry_url, work / "blobs") as registry:
        tenants = Tenants(registry)
        key = tenants.add(TENANT)
        named = {}
        for number, topic in enumerate(about):
            weights = random_adapter(number, rank=2, targets=("q_proj", "v_proj"))
            named[tenants.add_adapter(TENANT, topic.name, weights, card=topic.card).digest] = topic.name
    phases, taken = [], {}
    for router in settings.routers:
        arguments = ["--threads", str(threads), "--router", router]
        with Service.of(work / router, registry=registry_url, blobs=work / "blobs", arguments=arguments) as service:
            say(f"{router}: {settings.callers} callers, {settings.seconds:g} s")
            neighbours = Neighbours()
            phases.append(_phases(settings, router, service, key, about, named, say))
            taken[router] = neighbours.share()
    bare = None
    if any(not ROUTERS[router].runs_model for router in settings.routers):
        with Service(work / "bare", [sys.executable, "-m", "lorafleet.bench.service.bare"]) as service:
            say(f"a server that does nothing: {settings.callers} callers, {settings.seconds:g} s")
            neighbours = Neighbours()
            bare = _bare(settings, service, key, about, say)
            bare["taken_by_others"] = neighbours.share()
    record = {
        found.router: {
            "runs_model": ROUTERS[found.router].runs_model,
            "per_s": per_s(found.waiting, settings.seconds),
            "latency_s": _latencies(found.waiting),
            "server_cpu_s_a_call": found.cpu_s,
            "statuses": dict(Counter(outcome.status for outcome in found.waiting)),
            "at_half": _at(per_s(found.waiting, settings.seconds) / 2, found.halved),
            "at_rate": _at(WANTED_PER_S[ROUTERS[found.router].runs_model], found.arriving),
            "right": found.right,
            "taken_by_others": taken[found.router],
        }
        for found in phases
    }
    made = [verdict for found in phases for verdict in verdicts(found, settings.seconds)]
    if bare is not None:
        record["bare"] = bare
        nothing = "a server that does nothing"
        made += [
            Verdict(SCENARIO, f"{nothing}: routes a second", bare["per_s"], "for comparison", met=True),
            Verdict(SCENARIO, f"{nothing}: p99 at {WANTED_PER_S[False]:g} a second, ms",
                    1e3 * bare["at_rate"]["latency_s"]["p99"], "for comparison", met=True),
        ]  # fmt: skip
    return record, made


def _bare(
    settings: RouteSettings, service: Service, key: str, about: Sequence[Topic], say: Callable[[str], None]
) -> dict[str, Any]:
    """What a server gives that does nothing: to callers who wait, and to those who come at the wanted rate."""
    rng, rate = random.Random(f"{settings.seed}/texts"), WANTED_PER_S[False]
    drawn = texts(settings, about, int(5 * rate * settings.seconds), rng)
    before_s = service.cpu_s()
    waiting = [Ask(key=key, prompt=text, door="route") for text, _ in drawn]
    outcomes = service.ask(waiting, callers=settings.callers, seconds=settings.seconds)
    cpu_s = (service.cpu_s() - before_s) / max(1, len(outcomes))
    say(f"a server that does nothing: {rate:g} a second, {settings.seconds:g} s")
    times = poisson(rate, settings.seconds, rng)
    arriving = [
        Ask(key=key, prompt=text, door="route", at_s=at_s)
        for at_s, (text, _) in zip(times, texts(settings, about, len(times), rng), strict=True)
    ]
    return {
        "per_s": per_s(outcomes, settings.seconds),
        "latency_s": _latencies(outcomes),
        "server_cpu_s_a_call": cpu_s,
        "at_rate": _at(rate, service.ask(arriving, timeout_s=20.0)),
    }


def _phases(
    settings: RouteSettings,
    router: str,
    service: Service,
    key: str,
    about: Sequence[Topic],
    named: dict[str, str],
    say: Callable[[str], None],
) -> Phases:
    rng = random.Random(f"{settings.seed}/texts")
    rate = WANTED_PER_S[ROUTERS[router].runs_model]

    def asks(times: Sequence[float]) -> tuple[list[Ask], list[str]]:
        drawn = texts(settings, about, len(times), rng)
        made = [
            Ask(key=key, prompt=text, door="route", at_s=at_s) for at_s, (text, _) in zip(times, drawn, strict=True)
        ]
        return made, [topic for _, topic in drawn]

    warm, _ = asks([0.0] * 4 * settings.callers)
    service.ask(warm, callers=settings.callers)
    many, wanted = asks([0.0] * int(3 * rate * settings.seconds))
    before_s = service.cpu_s()
    waiting = service.start(many, callers=settings.callers, seconds=settings.seconds).outcomes()
    cpu_s = (service.cpu_s() - before_s) / max(1, sum(outcome is not None for outcome in waiting))

    def arrive(at: float) -> list[Outcome]:
        say(f"{router}: {at:.4g} a second, {settings.seconds:g} s")
        return service.ask(asks(poisson(at, settings.seconds, rng))[0], timeout_s=20.0)

    half = per_s([outcome for outcome in waiting if outcome is not None], settings.seconds) / 2
    halved = arrive(half) if half else []
    arriving = arrive(rate)
    found = [(outcome, topic) for outcome, topic in zip(waiting, wanted, strict=True) if outcome is not None]
    answered = [(outcome, topic) for outcome, topic in found if outcome.status == "OK"]
    right = sum(
        bool(outcome.digests) and named[max(outcome.digests, key=lambda d: outcome.digests[d])] == topic
        for outcome, topic in answered
    )
    share = right / len(answered) if answered else 0.0
    return Phases(router, [outcome for outcome, _ in found], halved, arriving, cpu_s, share)


def per_s(outcomes: Sequence[Outcome], seconds: float) -> float:
    """Answers a second."""
    return sum(outcome.status == "OK" and outcome.ended_s <= seconds for outcome in outcomes) / seconds


def verdicts(found: Phases, seconds: float) -> list[Verdict]:
    router, runs_model = found.router, ROUTERS[found.router].runs_model
    rate, wanted = per_s(found.waiting, seconds), WANTED_PER_S[runs_model]
    failed = sum(outcome.status != "OK" for outcome in (*found.waiting, *found.halved, *found.arriving))
    made = [Verdict(SCENARIO, f"{router}: routes a second", rate, f"at least {wanted:g}", rate >= wanted)]
    if not runs_model:
        for at, outcomes in (("half of that", found.halved), (f"{wanted:g} a second", found.arriving)):
            p99 = quantile([outcome.latency_s for outcome in outcomes], 0.99)
            figure = f"{router}: p99 at {at}, ms"
            made.append(Verdict(SCENARIO, figure, 1e3 * p99, f"below {1e3 * MOST_P99_S:g}", p99 < MOST_P99_S))
        made += [
            Verdict(SCENARIO, f"{router}: routes that find the topic", found.right, f"at least {LEAST_RIGHT:g}",
                    found.right >= LEAST_RIGHT),
        ]  # fmt: skip
    return [*made, Verdict(SCENARIO, f"{router}: calls that failed", failed, "none", not failed)]


def _at(asked_per_s: float, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Of calls that came at random."""
    return {
        "asked_per_s": asked_per_s,
        "latency_s": _latencies(outcomes),
        "statuses": dict(Counter(outcome.status for outcome in outcomes)),
        "late_sent_s": quantile([outcome.sent_s - outcome.at_s for outcome in outcomes], 0.99),
    }


def _latencies(outcomes: Sequence[Outcome]) -> dict[str, float]:
    values = [outcome.latency_s for outcome in outcomes if outcome.status == "OK"]
    return {f"p{q:g}": quantile(values, q / 100) for q in (50, 95, 99)}


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))
