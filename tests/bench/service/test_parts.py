"""The service's benchmark without its processes: what is asked, what is made of the answers, what counts as missed."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.adapters import LoraAdapter
from lorafleet.bench.service import isolation, load, names, routes, timing
from lorafleet.bench.service.asks import LOST, Ask, Outcome, Run, poisson, read_outcomes, write_outcomes
from lorafleet.bench.service.churn import Churn
from lorafleet.bench.service.figures import quantile, roc_area, slope
from lorafleet.bench.service.harness import MemorySample, Tenants, random_adapter
from lorafleet.bench.service.isolation import IsolationSettings, Judged, Planned
from lorafleet.bench.service.load import LoadSettings
from lorafleet.bench.service.reference import Likely, first_wrong
from lorafleet.bench.service.routes import RouteSettings
from lorafleet.bench.service.run import ServiceSettings, command_line
from lorafleet.bench.service.timing import TimingSettings
from lorafleet.errors import UnavailableError, UnknownNameError
from lorafleet.registry import Registry
from lorafleet.registry.records import CHAMPION


def outcome(status: str = "OK", *, at_s: float = 0.0, ended_s: float = 1.0, **fields: object) -> Outcome:
    return Outcome(status=status, at_s=at_s, sent_s=at_s, ended_s=ended_s, **fields)  # type: ignore[arg-type]


# Figures


def test_the_area_is_the_chance_that_a_positive_is_above_a_negative() -> None:
    assert roc_area([3.0, 2.0], [1.0, 0.0]).area == 1.0
    assert roc_area([0.0], [1.0, 2.0]).area == 0.0
    assert roc_area([1.0, 1.0], [1.0]).area == 0.5
    assert roc_area([2.0, 0.0], [1.0, 3.0]).area == 0.25


def test_the_interval_of_an_area_is_that_of_hanley_and_mcneil() -> None:
    rng = random.Random(1)
    found = roc_area([rng.random() for _ in range(500)], [rng.random() for _ in range(500)])
    assert found.low < 0.5 < found.high
    assert found.high - found.area == pytest.approx(1.96 * math.sqrt(1001 / (12 * 500 * 500)), rel=0.02)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_areas_of_either_side_add_up_to_one(positive: list[int], negative: list[int]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert roc_area(positive, negative).area == pytest.approx(sum(pairs) / len(pairs))
    assert roc_area(positive, negative).area + roc_area(negative, positive).area == pytest.approx(1.0)


def test_a_slope_is_that_of_the_line_and_of_less_than_two_points_none() -> None:
    assert slope([0.0, 1.0, 2.0], [5.0, 7.0, 9.0]) == pytest.approx(2.0)
    assert math.isnan(slope([1.0], [1.0]))
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and math.isnan(quantile([], 0.5))


def test_arrivals_come_at_the_rate_and_in_order() -> None:
    times = poisson(50.0, 100.0, random.Random(1))
    assert times == sorted(times) and times[0] > 0 and times[-1] < 100.0
    assert len(times) == pytest.approx(5000, abs=250)


def test_what_is_asked_and_what_came_of_it_can_be_written_down(tmp_path: Path) -> None:
    run = Run(grpc="a:1", http="b:2", asks=[Ask(key="k", prompt='é "\n', mix={"t/a": 0.5})])
    run.write(tmp_path / "run")
    assert Run.read(tmp_path / "run") == run
    found = [outcome(answer=(1, 2), digests={"sha256:a": 1.0}), None, outcome(LOST)]
    write_outcomes(found, tmp_path / "found")
    assert read_outcomes(tmp_path / "found") == found


# The reference


class Model:
    """Continues by counting up; ``ties`` maps a token to another one that is as likely."""

    def __init__(self, ties: dict[int, int] | None = None, gap: float = 0.0) -> None:
        self.ties, self.gap = ties or {}, gap
        self.asked: list[list[int]] = []

    def go(self, tokens: Sequence[int], places: int) -> list[Likely]:
        self.asked.append(list(tokens))
        found: list[Likely] = []
        last = tokens[-1]
        for _ in range(places):
            last += 1
            tied = self.ties.get(last)
            found.append([(last, -0.5), *([(tied, -0.5 - self.gap)] if tied is not None else [])])
        return found


def test_the_reference_s_own_tokens_are_right_and_asked_for_once() -> None:
    model = Model()
    assert first_wrong(model.go, [0, 1], [2, 3, 4]) is None
    assert model.asked == [[0, 1]]


def test_another_token_is_wrong_where_it_first_differs() -> None:
    wrong = first_wrong(Model({3: 9}, gap=0.2).go, [0, 1], [2, 9, 4])
    assert wrong is not None and (wrong.position, wrong.found, wrong.expected) == (1, 9, 3)
    assert wrong.gap == pytest.approx(0.2)
    assert first_wrong(Model().go, [1], [7]) == (0, 7, 2, math.inf)


def test_behind_a_near_tie_what_follows_is_held_against_the_token_that_was_taken() -> None:
    model = Model({3: 9}, gap=1e-5)
    assert first_wrong(model.go, [0, 1], [2, 9, 10, 11]) is None
    assert model.asked == [[0, 1], [0, 1, 2, 9]]
    assert first_wrong(model.go, [0, 1], [2, 9, 4]) is not None


def test_texts_of_tokens_are_compared_as_texts() -> None:
    assert first_wrong(Model().go, [1], ["two", "three"], text={2: "two", 3: "three"}.__getitem__) is None
    wrong = first_wrong(Model().go, [1], ["two", "four"], text={2: "two", 3: "three"}.__getitem__)
    assert wrong is not None and wrong.position == 1


# Isolation


def test_the_plan_names_foreign_adapters_only_where_it_says_so() -> None:
    keys = {"t1": "k1", "t2": "k2", "t3": "k3"}
    planned = isolation.plan(IsolationSettings(requests=600, tenants=3), keys)
    assert {each.kind for each in planned} == {
        "name", "alias", "first version", "version", "mix", "base", "auto", "foreign",
    }  # fmt: skip
    for each in planned:
        tenant = next(name for name, key in keys.items() if key == each.ask.key)
        named = [each.ask.model, *each.ask.mix]
        owners = {name.partition("/")[0] for name in named if "/" in name}
        assert (owners - {tenant} != set()) == each.is_foreign
    assert {each.ask.door for each in planned} == {"generate", "completion"}


def test_what_is_wrong_failed_or_foreign_and_answered_is_missed() -> None:
    ask = Ask(key="k", prompt="p")
    planned = [Planned(ask, "name"), Planned(ask, "foreign", is_foreign=True)]

    def met(judged: Judged, apart: float = 1.0, deleted: int = 1) -> list[bool]:
        return [verdict.met for verdict in isolation.verdicts(judged, apart, deleted, planned)]

    wrong = first_wrong(Model().go, [1], [7])
    assert wrong is not None
    assert all(met(Judged(1, [], 0, 1, Counter())))
    assert met(Judged(0, [(planned[0], wrong)], 0, 1, Counter())) == [False, True, True, True, True, True]
    assert not all(met(Judged(1, [], 0, 0, Counter({"answered another tenant": 1}))))
    assert not all(met(Judged(0, [], 1, 1, Counter())))
    assert not all(met(Judged(1, [], 0, 1, Counter()), apart=0.5))
    assert not all(met(Judged(1, [], 0, 1, Counter()), apart=math.nan))
    assert not all(met(Judged(1, [], 0, 1, Counter()), deleted=0))


def test_while_adapters_change_their_names_always_mean_something_and_what_is_out_of_use_is_deleted(
    tmp_path: Path,
) -> None:
    now, made = [0.0], iter(range(100, 1000))

    def make() -> LoraAdapter:
        return random_adapter(next(made), rank=1, targets=("q_proj",))

    with Registry.open(f"sqlite:///{tmp_path / 'registry.db'}", tmp_path / "blobs") as registry:
        tenants = Tenants(registry)
        tenants.add("acme")
        for name in ("a", "b"):
            tenants.add_adapter("acme", name, make())
            registry.set_alias("acme", name, CHAMPION, 1)
        churn = Churn(
            registry, [("acme", "a"), ("acme", "b")], make, a_second=1.0, rng=random.Random(1), collect_every_s=10.0,
            clock=lambda: now[0],
        )  # fmt: skip
        for _ in range(100):
            churn.turn()
            now[0] += 1.0
        several = [version for name in ("a", "b") for version in registry.versions("acme", name)]
        gone = [version for version in several if version.purged_at is not None]
        assert churn.done["replace"] > 10 and len(gone) == churn.deleted > 5
        assert {version.state for version in gone} <= {"retired", "quarantined"}
        for version in gone:
            with pytest.raises(UnavailableError):
                registry.load_digest(version.digest)
        for name in ("a", "b"):
            for version in (registry.resolve(f"acme/{name}"), registry.version("acme", name, 1)):
                assert registry.load(version).digest == version.digest


# Timing


def test_half_of_the_probes_are_of_what_was_asked_and_the_others_are_not() -> None:
    asks = timing.plan(TimingSettings(), probes=400, victim="v", prober="p", rng=random.Random(1))
    asked = timing.was_asked(asks)
    assert 160 < sum(asked) < 240 and len(asked) == 400
    assert [ask.key for ask in asks[:4]] == ["v", "p", "v", "p"]
    assert len({ask.prompt for ask in asks[1::2]}) == 400


def test_a_cache_that_others_share_is_seen_and_a_probe_without_a_token_is_an_error() -> None:
    asks = timing.plan(TimingSettings(), probes=200, victim="v", prober="p", rng=random.Random(1))
    rng = random.Random(2)

    def probed(speedup: float) -> list[Outcome]:
        times = [0.1 * rng.uniform(0.9, 1.1) * (speedup if hit else 1.0) for hit in timing.was_asked(asks)]
        return [each for took in times for each in (outcome(), outcome(first_s=took))]

    leaking, tight = timing.area(asks, probed(0.5)), timing.area(asks, probed(1.0))
    assert leaking.area > 0.99 and tight.low < 0.5 < tight.high
    assert [verdict.met for verdict in timing.verdicts(leaking, leaking)] == [False, True]
    assert [verdict.met for verdict in timing.verdicts(tight._replace(area=0.5), leaking)][1] is False
    with pytest.raises(UnavailableError, match="no first token"):
        timing.area(asks[:2], [outcome(), outcome("UNAVAILABLE")])


def test_names_that_are_there_and_that_are_not_are_asked_for_by_the_toss_of_a_coin() -> None:
    known = names.Names(("v/a:1", "v/b:1"), ("v/c:1", "v/d:1"))
    asks, there = names.plan(known, probes=400, key="p", door="completion", rng=random.Random(1))
    assert [ask.model in known.there for ask in asks] == there and 150 < sum(there) < 250
    assert {ask.model for ask in asks} == {*known.there, *known.missing}


def test_a_refusal_that_takes_longer_where_something_is_there_is_a_miss() -> None:
    rng = random.Random(1)
    tosses = [rng.random() < 0.5 for _ in range(400)]

    def refused(slower: float) -> list[Outcome | None]:
        return [
            outcome("NOT_FOUND", at_s=1.0, ended_s=1.0 + rng.uniform(0.9, 1.1) * (slower if there else 1.0))
            for there in tosses
        ]

    areas = [roc_area(*names.times(refused(slower), tosses, refused_as="NOT_FOUND")) for slower in (1.0, 1.05)]
    assert [names.verdict("generate", "left", area).met for area in areas] == [True, False]
    assert [names.verdict("generate", "control", area).met for area in areas] == [False, True]
    with pytest.raises(UnavailableError, match="'OK '"):
        names.times([outcome()], [False], refused_as="NOT_FOUND")


# Load


def test_capacity_leaves_the_beginning_out() -> None:
    outcomes = [outcome(ended_s=0.1 * number) for number in range(100)] + [outcome("UNAVAILABLE", ended_s=5.0)]
    assert load.capacity(outcomes, 10.0) == pytest.approx(10.0)


def test_growth_is_told_a_minute_and_without_the_warm_up() -> None:
    samples = [MemorySample(float(t), 10**9 if t < 60 else 10**8 + 1000 * t) for t in range(600)]
    assert load.growth(samples) == pytest.approx(60_000)


def test_a_refusal_counts_as_an_answer_only_with_a_time_to_try_again() -> None:
    refused = outcome("RESOURCE_EXHAUSTED", retry_after_s=1.0)
    assert load.unanswered([outcome(), refused]) == Counter()
    found = load.unanswered([outcome("RESOURCE_EXHAUSTED"), outcome(LOST), outcome("UNAVAILABLE")])
    assert found == {"refused without a time to try again": 1, LOST: 1, "UNAVAILABLE": 1}

    def met(steady: list[Outcome], grown: float, over: list[Outcome]) -> list[bool]:
        return [verdict.met for verdict in load.verdicts(steady, grown, over, [outcome()])]

    assert all(met([outcome()], 1000.0, [outcome(), refused]))
    assert not all(met([refused], 1000.0, [outcome(), refused]))
    assert not all(met([outcome()], 2.0 * 2**20, [outcome()]))
    assert not all(met([outcome()], math.nan, [outcome()]))
    assert not all(met([outcome()], 0.0, [outcome(), outcome(LOST)]))
    assert not all(met([outcome()], 0.0, [refused]))


def test_calls_are_of_many_kinds() -> None:
    rng = random.Random(1)
    asks = [load.ask(LoadSettings(), {"t1": "k1", "t2": "k2"}, rng) for _ in range(200)]
    assert {ask.door for ask in asks} == {"generate", "completion"}
    assert {bool(ask.mix) for ask in asks} == {True, False} and len({ask.prompt for ask in asks}) == 200


# Routes


def test_topics_have_words_of_their_own_and_texts_are_about_one_of_them() -> None:
    settings = RouteSettings(adapters=10)
    about = routes.topics(settings)
    assert len({topic.name for topic in about}) == 10
    for text, name in routes.texts(settings, about, 20, random.Random(1)):
        own = next(topic.words for topic in about if topic.name == name)
        assert sum(word in own for word in text.split()) >= settings.words // 5


def test_a_router_without_a_model_has_a_rate_and_a_latency_to_meet() -> None:
    fast = [outcome(at_s=0.0, ended_s=0.001)] * 15_000
    found = routes.Phases("cards", fast, fast, fast, 1e-4, 1.0)
    assert all(verdict.met for verdict in routes.verdicts(found, 10.0))
    slow = [*fast[:14_000], *[outcome(ended_s=0.02)] * 1000]
    for late, missed in (({"halved": slow}, 1), ({"arriving": slow}, 2)):
        met = [verdict.met for verdict in routes.verdicts(found._replace(**late), 10.0)]
        assert met == [number != missed for number in range(5)]
    few = routes.Phases("likelihood", fast[:999], [], [], 1e-4, 0.0)
    assert [verdict.met for verdict in routes.verdicts(few, 10.0)] == [False, True]


# The command


def test_an_unknown_scenario_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="isolation, load, names, route, timing"):
        ServiceSettings(scenarios=("speed",))


def test_the_command_of_a_record_names_what_was_run_and_no_database() -> None:
    words = command_line(ServiceSettings(scenarios=("timing",), registry="postgresql://someone@somewhere/x"))
    assert "--probes" in words and "--minutes" not in words
    assert not any("somewhere" in word for word in words)
