"""What a federation does against bad members in its rounds: formulas, attacks, what is refused, and what is said."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.cli.federation import _head, _tables
from lorafleet.coordinator.clusters import SHARED
from lorafleet.coordinator.defence import Ballots, Robust
from lorafleet.coordinator.experts import MemberUpdate, NextExpert, next_experts
from lorafleet.coordinator.privacy import Privacy
from lorafleet.coordinator.recompute import recompute
from lorafleet.coordinator.robust import WRAPPERS, get_wrapper, multi_krum
from lorafleet.coordinator.schedulers.scheduler import Blend
from lorafleet.coordinator.settings import FederationSettings, Scheduling, Training
from lorafleet.coordinator.standing import Standing
from lorafleet.coordinator.status import status_of
from lorafleet.coordinator.transport import Order, Reply
from lorafleet.coordinator.tree import LocalReducer
from lorafleet.errors import InvalidInputError, UnknownNameError
from tests.coordinator.scripted import SHAPES, Answer, Timed, honest, reply_with, residual
from tests.coordinator.sources import source_of
from tests.coordinator.test_life import Place
from tests.registry.conftest import FOLDER

SELECTIONS, STATISTICS = ("krum", "multi_krum"), ("trimmed_mean", "median")
# Two bad members of nine: 2 f + 3 are seven.
TWO_BAD = FederationSettings(
    tenant="operator", name="fleet", rounds=1, quorum=7, deadline_s=500.0, expert_rank=24, min_cluster_size=7,
    evaluate_last=False, clusters=False, training=Training(steps=5), scheduling=Scheduling(buffer=7, min_steps=2),
)  # fmt: skip
GOOD = [f"good{number}" for number in range(7)]
BAD = ["evil", "rogue"]


def wrapped(name: str, byzantine: int | None = 2, clip: float = 0.0) -> Robust:
    return Robust(wrapper=name, byzantine=byzantine, clip=clip)


def scaled(adapter: LoraAdapter, factor: float) -> LoraAdapter:
    pairs = {path: LoraPair(pair.a, pair.b * factor) for path, pair in adapter.modules.items()}
    return replace(adapter, modules=pairs)


def attack(factor: float, *, examples: int = 10) -> Answer:
    """What a good member would have sent, scaled."""
    return lambda order: reply_with(order, scaled(residual(order, 6, 1), factor), examples=examples)


def same_for_all(order: Order) -> Reply:
    return reply_with(order, scaled(random(6, 77), 0.05))


def random(rank: int, seed: int) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    return LoraAdapter(
        {
            path: LoraPair(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))
            for path, (d_out, d_in) in SHAPES.items()
        }
    )


ATTACKS: dict[str, Answer] = {
    "sign-flipped": attack(-3.0),
    "scaled": attack(100.0),
    "one bad update sent by both": same_for_all,
}


def nine(bad: Answer) -> Timed:
    return Timed({**dict.fromkeys(GOOD, honest(6, 1)), **dict.fromkeys(BAD, bad)}, dict.fromkeys([*GOOD, *BAD], 1.0))


@pytest.fixture
def place() -> Iterator[Callable[..., Place]]:
    with tempfile.TemporaryDirectory(prefix="lorafleet-defence-", dir=FOLDER) as folder:
        made: list[Place] = []

        def make(transport: Timed, settings: FederationSettings = TWO_BAD, **changes: object) -> Place:
            changed = replace(settings, **changes)  # type: ignore[arg-type]
            made.append(Place(Path(folder) / str(len(made)), changed, transport))
            return made[-1]

        yield make
        for each in made:
            each.registry.close()


def dense(adapter: LoraAdapter) -> Tensor:
    """The whole product as one vector, float64; zero where it adapts no module."""
    zero = {path: torch.zeros(shape, dtype=torch.float64) for path, shape in SHAPES.items()}
    found = {path: pair.b.double() @ pair.a.double() for path, pair in adapter.modules.items()}
    return torch.cat([(found.get(path, zero[path])).flatten() for path in SHAPES])


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def honest_mean(here: Place) -> Tensor:
    journal = here.registry.journal(here.federation)
    return torch.stack([dense(here.registry.update_factors(u)) for u in journal if u.member in GOOD]).mean(dim=0)


# Formulas


def member_updates(
    residuals: Mapping[str, LoraAdapter], held: Mapping[str, LoraAdapter | None], discounts: Mapping[str, float]
) -> dict[str, MemberUpdate]:
    """Of updates named ``member/number``, whose members say that they saw anything between 10 and 10 ** 5 sequences."""
    shapes = source_of(residuals).extents
    return {
        name: MemberUpdate(
            name.partition("/")[0], update.digest, 10 ** (1 + place % 5), held[name], shapes[name], discounts[name]
        )
        for place, (name, update) in enumerate(sorted(residuals.items()))
    }


def experts_of(
    residuals: Mapping[str, LoraAdapter], updates: Mapping[str, MemberUpdate], blend: Blend, robust: Robust,
    current: LoraAdapter, *, rank: int = 64, reducer: LocalReducer | None = None, rule: str = "exact",
) -> NextExpert:  # fmt: skip
    assignment = {update.member: SHARED for update in updates.values()}
    (expert,) = next_experts(
        updates, source_of(residuals).read, assignment, {SHARED: current}, blend=blend, population=9, rule=rule,
        reducer=reducer or LocalReducer(), rank=rank, robust=robust,
    )  # fmt: skip
    return expert


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
@pytest.mark.parametrize("blend", ["mean", "residuals"])
def test_experts_follow_the_formula_of_their_wrapper(wrapper: str, blend: Blend) -> None:
    """keep · E + Σ w'_k (c E_k + R_k), or the statistic in the place of the residuals' sum; dense and in float64."""
    experts = [random(4, seed) for seed in (900, 901)]
    names = [f"m{number}/1" for number in range(7)]
    if blend == "residuals":
        names += ["m0/2", "m0/3", "m4/2"]  # members that were fast
    residuals = {name: random(3 + place % 3, place) for place, name in enumerate(names)}
    held = {name: experts[place % 2] for place, name in enumerate(names)}
    discounts = dict.fromkeys(names, 1.0)
    if blend == "residuals":
        discounts = {name: 0.9 / math.sqrt(1 + place % 3) for place, name in enumerate(names)}
    updates = member_updates(residuals, held, discounts)
    found = experts_of(residuals, updates, blend, wrapped(wrapper), experts[0])

    plain = dict.fromkeys(names, 1 / 7) if blend == "mean" else {n: discounts[n] / len(names) for n in names}
    total = sum(plain.values())
    own: dict[str, list[str]] = {}
    for name in names:
        own.setdefault(updates[name].member, []).append(name)
    votes = {
        m: sum(plain[n] * dense(residuals[n]) for n in of) / sum(plain[n] for n in of) for m, of in sorted(own.items())
    }
    flat = torch.stack(list(votes.values()))
    along = torch.nn.functional.normalize(flat)
    agree = [float((along @ along[i])[torch.arange(7) != i].quantile(0.5)) for i in range(7)]
    against = [i for i in sorted(range(7), key=lambda i: agree[i])[:2] if agree[i] < 0]
    left = [i for i in range(7) if i not in against]
    byzantine = min(2, (len(left) - 3) // 2)
    chosen = get_wrapper(wrapper)
    if chosen.select is not None:
        left = [left[i] for i in chosen.select(flat[left] @ flat[left].T, 2 - len(against))]
    kept = {list(votes)[i] for i in left}
    assert found.left_out == tuple(sorted(votes.keys() - kept)) and found.members == len(kept)
    assert {p for p in found.parents if p in {r.digest for r in residuals.values()}} == {
        residuals[n].digest for n in names if updates[n].member in kept
    }
    if chosen.statistic is None:
        scale = total / sum(plain[n] for n in names if updates[n].member in kept)
        shares = {n: plain[n] * scale if updates[n].member in kept else 0.0 for n in names}
        largest = 1.5 * float(flat[left].norm(dim=1).quantile(0.5)) if wrapper == "cosine" else math.inf
        sizes = {m: min(1.0, largest / float(vote.norm())) for m, vote in votes.items()}
        assert found.clipped == tuple(sorted(m for m in kept if sizes[m] < 1))
        moved = sum(shares[n] * sizes[updates[n].member] * dense(residuals[n]) for n in names)
    else:
        each = {n: total / len(kept) * plain[n] / sum(plain[o] for o in own[updates[n].member]) for n in names}
        shares = {n: share if updates[n].member in kept else 0.0 for n, share in each.items()}
        moved = total * chosen.statistic(flat[left], byzantine)
    assert found.shares == pytest.approx(shares) and sum(found.shares.values()) == pytest.approx(total)
    expected = moved + (dense(experts[0]) if blend == "residuals" else sum(shares[n] * dense(held[n]) for n in names))
    assert distance(dense(found.weights), expected) < 1e-6


@pytest.mark.parametrize("rule", ["fedit", "hetlora", "rbla"])
def test_a_rule_about_factors_sums_those_who_are_left(rule: str) -> None:
    residuals = {f"m{number}/1": random(4, number) for number in range(7)}
    updates = member_updates(residuals, dict.fromkeys(residuals), dict.fromkeys(residuals, 1.0))
    found = experts_of(residuals, updates, "mean", wrapped("multi_krum"), random(2, 5), rule=rule)
    left = {name: r for name, r in residuals.items() if updates[name].member not in found.left_out}
    alone = experts_of(
        left, {name: replace(updates[name], num_examples=1) for name in left}, "mean", Robust(), random(2, 5), rule=rule
    )
    assert len(left) == 5 and distance(dense(found.weights), dense(alone.weights)) < 1e-6


@pytest.mark.parametrize("wrapper", [*sorted(WRAPPERS), ""])
def test_the_bits_do_not_depend_on_how_much_is_read_at_a_time(wrapper: str) -> None:
    residuals = {f"m{number}/1": random(3 + number % 4, number) for number in range(9)}
    updates = member_updates(residuals, dict.fromkeys(residuals, random(4, 900)), dict.fromkeys(residuals, 1.0))
    robust = Robust(wrapper=wrapper, clip=5.0)
    digests = {
        experts_of(
            residuals, updates, "mean", robust, random(4, 900), reducer=LocalReducer(memory_bytes=memory), rank=8
        ).weights.digest
        for memory in (1, 5_000, 2**30)
    }
    assert len(digests) == 1


def test_a_members_votes_are_one_by_what_its_updates_weigh() -> None:
    weights = {"a/1": 0.3, "a/2": 0.1, "b/1": 0.6}
    ballots = Ballots.of(weights, {"a/1": "a", "a/2": "a", "b/1": "b"})
    assert ballots.members == ["a", "b"]
    assert ballots.updates[0] == pytest.approx({"a/1": 0.75, "a/2": 0.25}) and ballots.updates[1] == {"b/1": 1.0}


def test_clipped_updates_are_as_large_as_agreed_and_the_others_as_they_came() -> None:
    residuals = {f"m{number}/1": random(4, number) for number in range(4)}
    residuals["m2/1"] = scaled(residuals["m2/1"], 50.0)
    limit = 1.01 * max(float(dense(r).norm()) for name, r in residuals.items() if name != "m2/1")
    updates = {n: replace(u, num_examples=1) for n, u in member_updates(
        residuals, dict.fromkeys(residuals), dict.fromkeys(residuals, 1.0)
    ).items()}  # fmt: skip
    found = experts_of(residuals, updates, "mean", Robust(clip=limit), random(2, 5))
    vectors = [dense(r) for r in residuals.values()]
    expected = torch.stack([v * min(1.0, limit / float(v.norm())) for v in vectors]).mean(dim=0)
    assert found.clipped == ("m2",) and found.left_out == ()
    assert distance(dense(found.weights), expected) < 1e-6


# Attacks


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_with_two_bad_members_of_nine_the_expert_is_near_the_honest_mean(
    name: str, wrapper: str, place: Callable[..., Place]
) -> None:
    here = place(nine(ATTACKS[name]), robust=wrapped(wrapper))
    found = distance(dense(here.run().experts[SHARED]), honest_mean(here))
    # Krum takes one member as it is, whose own noise is a tenth; a mean of half the coordinates is a little off. What
    # points nowhere in particular is no opposition: cosine only keeps it from being large.
    unopposed = wrapper == "cosine" and name == "one bad update sent by both"
    assert found < (2 * 1.5 / 9 + 0.15 if unopposed else 0.15)
    report = here.registry.rounds(here.federation)[0].report
    if wrapper in SELECTIONS:
        assert set(BAD) <= set(report["robust"]["left_out"])
        shares = {u.member: u.share for u in here.registry.journal(here.federation)}
        assert shares["evil"] == shares["rogue"] == 0.0 and sum(shares.values()) == pytest.approx(1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ATTACKS)
def test_without_a_wrapper_the_same_members_spoil_it(name: str, place: Callable[..., Place]) -> None:
    here = place(nine(ATTACKS[name]))
    assert distance(dense(here.run().experts[SHARED]), honest_mean(here)) > 0.4


def test_who_says_that_it_saw_more_does_not_weigh_more(place: Callable[..., Place]) -> None:
    """The update passes as good; with the weight that it claims it would be the expert."""
    claims = attack(1.15, examples=40)  # all that an order may have seen; the others say 10
    found = []
    for robust in (Robust(), wrapped("multi_krum")):
        here = place(nine(claims), robust=robust)
        here.run()
        found.append({u.member: u.share or 0.0 for u in here.registry.journal(here.federation)})
    assert found[0]["evil"] == pytest.approx(40 / 150)
    assert [share for share in found[1].values() if share] == pytest.approx([1 / 7] * 7)


@pytest.mark.parametrize("wrapper", ["multi_krum", "median"])
def test_a_cluster_of_bad_members_never_gets_an_expert(wrapper: str, place: Callable[..., Place]) -> None:
    other = honest(6, 2)
    here = place(nine(other), clusters=True, rounds=2, robust=wrapped(wrapper))
    standing = here.run()
    assert sorted(standing.versions) == ["expert-1", SHARED]
    assert {standing.assignment[member] for member in BAD} == {SHARED}
    assert {standing.assignment[member] for member in GOOD} == {"expert-1"}


def test_a_large_update_moves_a_clipped_round_no_further_than_the_clip(place: Callable[..., Place]) -> None:
    here = place(nine(attack(100.0)), robust=Robust(clip=3.0), scheduler="compass", rounds=2, quorum=1)
    standing = here.run()
    reports = [r.report for r in here.registry.rounds(here.federation)]
    assert any(r["robust"]["clipped"] for r in reports) and not any(r["robust"]["left_out"] for r in reports)
    assert float(dense(standing.experts[SHARED]).norm()) <= 2 * 3.0


# Groups that are too small


def test_a_cluster_that_is_too_small_keeps_its_expert_or_its_members_learn_the_shared_one(
    place: Callable[..., Place],
) -> None:
    here = place(nine(honest(4, 1)), clusters=True, rounds=2, robust=wrapped("median"))

    def groups(number: int) -> Mapping[str, str]:
        few = {"evil": "expert-2", "rogue": "expert-2"}
        if number == 1:
            return dict.fromkeys(GOOD, "expert-1") | few
        return dict.fromkeys(GOOD[:3], "expert-1") | dict.fromkeys(GOOD[3:], SHARED) | few

    standing = here.run(groups=groups)
    assert standing.versions["expert-1"].number == 1 and standing.versions[SHARED].number == 2
    assert "expert-2" not in standing.versions and standing.assignment["evil"] == SHARED
    assert {standing.assignment[m] for m in GOOD[:3]} == {"expert-1"}
    again = {e.label: e for e in recompute(here.registry, here.federation)}
    assert {label: e.weights.digest for label, e in again.items()} == {
        label: v.digest for label, v in standing.versions.items()
    }


def test_a_buffered_round_waits_for_as_many_members_as_can_be_told_apart(place: Callable[..., Place]) -> None:
    """Two fast members fill the buffer; they are two votes, however much they send."""
    fleet = nine(attack(-3.0))
    fleet.speeds = dict.fromkeys(GOOD, 6.0) | dict.fromkeys(BAD, 1.0)
    here = place(fleet, scheduler="buffered", rounds=2, robust=wrapped("multi_krum"))
    standing = here.run()
    reports = [r.report for r in here.registry.rounds(here.federation)]
    assert all(len({c["member"] for c in r["counted"]}) >= 7 for r in reports)
    assert max(len(r["counted"]) for r in reports) > 15
    assert all(set(BAD) <= set(r["robust"]["left_out"]) for r in reports)
    journal = {u.key: u for u in here.registry.journal(here.federation)}
    assert all(u.share == 0.0 for u in journal.values() if u.member in BAD and u.counted_in)
    first = torch.stack([dense(here.registry.update_factors(u)) for u in journal.values() if u.member in GOOD])
    direction = torch.nn.functional.cosine_similarity(dense(standing.experts[SHARED]), first.mean(dim=0), dim=0)
    assert float(direction) > 0.95


# The same again


def digests(standing: Standing) -> dict[str, str]:
    return {label: version.digest for label, version in standing.versions.items()}


@pytest.mark.parametrize(
    ("scheduler", "robust"),
    [
        ("sync", wrapped("multi_krum", 1, clip=2.0)),
        ("sync", wrapped("trimmed_mean", None)),
        ("buffered", wrapped("krum", 1)),
        ("compass", Robust(clip=2.0)),
    ],
    ids=str,
)
def test_the_journal_gives_the_committed_experts_again(
    robust: Robust, scheduler: str, place: Callable[..., Place]
) -> None:
    """In a second run, and from the journal alone: with everybody bit for bit, and without a member."""
    found = []
    for _ in range(2):
        fleet = nine(attack(-3.0))
        fleet.speeds = {member: 1.0 + place % 4 for place, member in enumerate(fleet.answers)}
        settings = replace(TWO_BAD, scheduler=scheduler, clusters=True, rounds=2, robust=robust)
        here = place(fleet, settings)
        found.append(digests(here.run()))
    assert found[0] == found[1]
    again = {e.label: e.weights.digest for e in recompute(here.registry, here.federation)}
    assert again == found[0]
    without = {e.label: e.weights.digest for e in recompute(here.registry, here.federation, without=["evil"])}
    assert without.keys() == again.keys()


def test_a_round_that_too_few_are_left_of_is_not_computed_again(place: Callable[..., Place]) -> None:
    here = place(nine(attack(-3.0)), rounds=2, robust=wrapped("median"))
    here.run()
    assert len(list(recompute(here.registry, here.federation, without=GOOD[:2]))) == 1
    with pytest.raises(InvalidInputError, match=r"round 1 cannot .* without good0, good1, good2: 6 .* at least 7"):
        recompute(here.registry, here.federation, without=GOOD[:3])


def test_a_member_that_was_left_out_changes_nothing_where_it_is_left_out_again(place: Callable[..., Place]) -> None:
    here = place(nine(attack(100.0)), robust=wrapped("multi_krum", byzantine=1), quorum=5, min_cluster_size=5)
    fleet = here.transport
    fleet.answers["rogue"] = honest(4, 1)
    standing = here.run()
    (again,) = recompute(here.registry, here.federation, without=["evil"])
    # One of the others is left out in its place.
    assert again.weights.digest != standing.versions[SHARED].digest
    mean = honest_mean(here)
    assert distance(dense(again.weights), mean) < 0.1 and distance(dense(standing.experts[SHARED]), mean) < 0.1


# What is said


def test_who_was_left_out_is_in_the_report_the_log_and_the_status(
    place: Callable[..., Place], caplog: pytest.LogCaptureFixture
) -> None:
    here = place(nine(attack(-3.0)), robust=wrapped("multi_krum", clip=0.5))
    with caplog.at_level(logging.INFO, "lorafleet"):
        made = here.run().versions[SHARED]
    assert made.lineage is not None and made.lineage.members == len(GOOD)
    said = [record.getMessage() for record in caplog.records]
    assert "round 1: left out of shared: evil, rogue" in said
    assert "round 1: scaled down for shared: " + ", ".join(GOOD) in said
    status = status_of(here.registry, here.registry.federation("operator", "fleet"), now=0.0)
    assert (status.rounds[0].left_out, status.rounds[0].clipped) == (BAD, GOOD)
    assert "against bad members: multi_krum, f 2, updates clipped at 0.5" in _head(status)
    rounds = next(iter(_tables(status)))
    shown = dict(zip(rounds.columns, rounds.rows[0], strict=True))
    assert shown["left out"] == "evil, rogue" and shown["clipped"] == "good0, good1, good2 and 4 others"


def test_a_federation_that_does_nothing_of_it_says_nothing_of_it(place: Callable[..., Place]) -> None:
    here = place(nine(honest(4, 1)))
    here.run()
    assert "robust" not in here.registry.rounds(here.federation)[0].report
    status = status_of(here.registry, here.registry.federation("operator", "fleet"), now=0.0)
    assert "left out" not in next(iter(_tables(status))).columns
    assert not any("bad members" in line for line in _head(status))


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quorum": 6}, "robust.wrapper 'multi_krum' cannot hold: federation.quorum is 6, expected at least 7"),
        ({"scheduler": "compass"}, "found the scheduler compass, whose rounds close with as little as one update"),
        ({"scheduler": "buffered", "scheduling": Scheduling(buffer=6)}, "scheduling.buffer is 6, expected at least 7"),
        ({"scheduler": "buffered", "scheduling": Scheduling()}, "scheduling.buffer is 0, expected at least 7"),
        ({"clusters": True, "min_cluster_size": 2}, "min_cluster_size is 2, expected at least 7, 2 f \\+ 3 with"),
        ({"robust": wrapped("median"), "rule": "fedit"}, "median takes the place of the sum of products, and fedit"),
        ({"robust": wrapped("krum", None), "quorum": 2}, "quorum is 2, .* 3, 2 f \\+ 3 with f left open"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_under_which_it_would_not_hold_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        replace(replace(TWO_BAD, robust=wrapped("multi_krum")), **changes)  # type: ignore[arg-type]


def test_settings_under_which_it_holds_are_taken() -> None:
    robust = wrapped("multi_krum")
    replace(TWO_BAD, robust=robust, scheduler="buffered")
    replace(TWO_BAD, robust=robust, rule="fedit")
    replace(TWO_BAD, robust=robust, clusters=True)
    replace(TWO_BAD, robust=wrapped("median", None), quorum=3)
    for scheduler in ("sync", "compass", "buffered"):
        replace(TWO_BAD, robust=Robust(clip=1.0), scheduler=scheduler, quorum=1, clusters=True, min_cluster_size=2)


@pytest.mark.parametrize("robust", [Robust(clip=1.0), wrapped("multi_krum")], ids=["clip", "wrapper"])
def test_with_central_privacy_nothing_follows_from_single_updates(robust: Robust) -> None:
    private = {"clip_norm": 1.0, "noise_multiplier": 1.0, "epsilon": 100.0, "delta": 1e-3}
    settings = replace(TWO_BAD, rule="ffa", training=Training(rank=4), robust=robust)
    with pytest.raises(InvalidInputError, match=r"found \[robust\] with privacy\.mode 'central'"):
        replace(settings, privacy=Privacy(mode="central", **private))
    replace(settings, privacy=Privacy(mode="local", **private))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"clip": -1.0}, "robust.clip is -1.0"),
        ({"clip": math.inf}, "robust.clip is inf"),
        ({"clip": "large"}, "clip is 'large', expected a number"),
        ({"byzantine": 1}, "robust.byzantine is 1 without a wrapper"),
        ({"wrapper": "krum", "byzantine": -1}, "robust.byzantine is -1"),
        ({"wrapper": "krum", "byzantine": 1.5}, "byzantine is 1.5, expected a whole number"),
        ({"wrapper": "krum", "f": 1}, r"\[robust\]: unknown keys f; known are byzantine, clip, wrapper"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        FederationSettings.from_dict({**TWO_BAD.to_dict(), "robust": values})


def test_an_unknown_wrapper_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UnknownNameError, match="unknown wrapper 'bulyan'; known are: cosine, krum, median"):
        FederationSettings.from_dict({**TWO_BAD.to_dict(), "robust": {"wrapper": "bulyan"}})


def test_a_federation_of_before_there_was_such_a_table_does_nothing_of_it() -> None:
    settings = TWO_BAD.to_dict()
    del settings["robust"]
    assert FederationSettings.from_dict(settings).robust == Robust()
    with_it = replace(TWO_BAD, robust=wrapped("krum", None))
    assert FederationSettings.from_dict(with_it.to_dict()) == with_it


def test_selection_needs_distances_alone() -> None:
    """Bad members that are near one another are no majority: each has f others at most at its side."""
    points = torch.tensor([[0.0], [0.1], [0.2], [0.3], [0.4], [50.0], [50.0]], dtype=torch.float64)
    assert multi_krum((points - points.T).square(), 2) == [0, 1, 2, 3, 4]
