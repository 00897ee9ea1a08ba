"""Private federations: what is refused, what is spent, and what the round loop does with updates that need noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.adapters.frozen import frozen_factor
from lorafleet.adapters.privacy import clipped, gaussian, trained_norm
from lorafleet.cli.federation import _head
from lorafleet.coordinator import launch
from lorafleet.coordinator.accountant import composed, delta_of, epsilon_of
from lorafleet.coordinator.privacy import Privacy, check_budget, members_spent, seed_for
from lorafleet.coordinator.recompute import recompute
from lorafleet.coordinator.rounds import run_federation
from lorafleet.coordinator.settings import CoordinatorConfig, FederationSettings, Scheduling, Training
from lorafleet.coordinator.standing import Standing
from lorafleet.coordinator.status import status_of
from lorafleet.coordinator.transport import Order, Reply
from lorafleet.errors import BudgetSpentError, InvalidInputError, UnavailableError
from lorafleet.registry import Registry, Round, UpdateRecord
from tests.coordinator.scripted import SHAPES, Scripted, reply_with, start

RANK, CLIP, Z = 4, 0.5, 8.0
CENTRAL = Privacy(mode="central", clip_norm=CLIP, noise_multiplier=Z, epsilon=8.0, delta=1e-5)
LOCAL = replace(CENTRAL, mode="local")
PER_SAMPLE = replace(CENTRAL, mode="per_sample")
FFA = FederationSettings(
    tenant="operator", name="fleet", rounds=3, rule="ffa", quorum=2, deadline_s=30.0, expert_rank=16, clusters=False,
    evaluate_last=False, training=Training(steps=5, rank=RANK), privacy=CENTRAL,
)  # fmt: skip
ROLORA = replace(FFA, rule="rolora", rounds=4)


def trained(order: Order, *, scale: float = 0.1) -> LoraAdapter:
    """An update as the order asks for, clipped by nobody."""
    generator = torch.Generator().manual_seed(order.order.seed)
    modules = {}
    for path, (d_out, d_in) in SHAPES.items():
        frozen = frozen_factor(order.order, order.expert, path, width=d_in)
        assert frozen is not None
        if order.order.trains == "b":
            modules[path] = LoraPair(frozen, scale * torch.randn(d_out, len(frozen), generator=generator))
        else:
            modules[path] = LoraPair(scale * torch.randn(frozen.shape[1], d_in, generator=generator), frozen)
    return LoraAdapter(modules, order.order.base_digest)


def reply_to(order: Order, adapter: LoraAdapter) -> Reply:
    return replace(reply_with(order, adapter, examples=1), metrics={})


def careless(order: Order) -> Reply:
    """A member that does not clip."""
    return reply_to(order, trained(order))


def honest(order: Order) -> Reply:
    whole = clipped(trained(order), trains=order.order.trains, clip_norm=order.order.clip_norm)
    return reply_to(order, whole.to(torch.float32))


def counting(first: int = 1) -> Callable[[int], bytes]:
    """Randomness that a test can foretell: 1, 2, 3 …"""
    numbers = iter(range(first, 256))
    return lambda count: bytes([next(numbers)]) * count


@pytest.fixture
def opened() -> Iterator[list[Registry]]:
    registries: list[Registry] = []
    yield registries
    for registry in registries:
        registry.close()


def run(
    folder: Path,
    opened: list[Registry],
    settings: FederationSettings,
    *,
    fleet: Scripted | None = None,
    entropy: Callable[[int], bytes] | None = None,
    failpoint: Callable[[str], None] = lambda name: None,
) -> tuple[Standing, Registry]:
    folder.mkdir(exist_ok=True)
    registry, federation, parts = start(folder, fleet or members(), settings)
    opened.append(registry)
    parts = replace(parts, entropy=entropy or counting(), failpoint=failpoint)
    return run_federation(settings, federation, parts), registry


def members(answer: Callable[[Order], Reply] = honest, **others: Callable[[Order], Reply]) -> Scripted:
    return Scripted(dict.fromkeys(("a", "b", "c"), answer) | others)


def digests(standing: Standing) -> dict[str, str]:
    return {label: version.digest for label, version in standing.versions.items()}


# The accountant


@pytest.mark.parametrize(
    ("multiplier", "rounds", "delta", "expected"),
    [
        # dp-accounting 0.6.0: its exact Gaussian mechanism of sensitivity 2, and its PLD accountant with replace-one.
        (1.0, 1, 1e-5, 9.997256146),
        (2.0, 1, 1e-5, 4.377178096),
        (4.0, 10, 1e-6, 8.306225050),
        (8.0, 100, 1e-5, 13.206712240),
        (0.5, 3, 1e-5, 52.770627076),
        (20.0, 3, 1e-5, 0.620004498),
        (30.0, 50, 1e-9, 2.732215536),
    ],
)
def test_epsilon_is_that_of_dp_accounting(multiplier: float, rounds: int, delta: float, expected: float) -> None:
    privacy = Privacy(mode="central", clip_norm=3.0, noise_multiplier=multiplier, epsilon=1e9, delta=delta)
    assert privacy.epsilon_after(rounds) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("mu", [0.05, 1.0, 6.0, 40.0])
def test_epsilon_is_the_least_of_its_delta_and_below_what_renyi_moments_give(mu: float, delta: float) -> None:
    epsilon = epsilon_of(mu, delta)
    assert delta_of(mu, epsilon) <= delta
    assert epsilon == 0 or delta_of(mu, epsilon * (1 - 1e-6)) > delta
    # Mironov, arXiv 1702.07476, proposition 3, at order α: α μ² / 2 + log(1/δ) / (α - 1).
    renyi = min(
        a * mu**2 / 2 + -torch.log(torch.tensor(delta)).item() / (a - 1) for a in [1 + x / 50 for x in range(1, 5000)]
    )
    assert epsilon <= renyi


def test_nothing_spent_is_no_epsilon_and_rounds_compose_in_squares() -> None:
    assert epsilon_of(0.0, 1e-5) == 0.0 and CENTRAL.epsilon_after(0) == 0.0 and Privacy().epsilon_after(5) == 0.0
    assert composed(0.5, 16) == 2.0


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rule": "exact"}, "found the rule exact, expected ffa or rolora"),
        ({"rule": "flora"}, "found the rule flora"),
        ({"rule": "fedit"}, "found the rule fedit"),
        ({"scheduler": "buffered"}, "found the scheduler buffered, expected sync"),
        ({"scheduler": "compass"}, "found the scheduler compass, expected sync"),
        ({"clusters": True}, "found clusters = true"),
        ({"evaluate_last": True}, "found evaluate_last = true"),
    ],
)
@pytest.mark.parametrize("privacy", [CENTRAL, LOCAL, PER_SAMPLE], ids=["central", "local", "per sample"])
def test_where_the_guarantee_would_not_hold_it_is_refused_with_the_reason(
    privacy: Privacy, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        replace(FFA, privacy=privacy, **changes)  # type: ignore[arg-type]
    replace(FFA, privacy=Privacy(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mode": "secure"}, "expected one of none, local, central"),
        ({"mode": "none"}, "privacy.clip_norm is 0.5"),
        ({"clip_norm": 0.0}, "privacy.clip_norm is 0.0"),
        ({"noise_multiplier": -1.0}, "privacy.noise_multiplier is -1.0"),
        ({"epsilon": float("inf")}, "privacy.epsilon is inf"),
        ({"delta": float("nan")}, "privacy.delta is nan"),
        ({"delta": 1.0}, "less than 1"),
        ({"epsilon": 0.5}, "one round with noise_multiplier 8.0 spends 0.9"),
    ],
)
def test_values_that_promise_nothing_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        replace(CENTRAL, **values)  # type: ignore[arg-type]


def test_the_file_has_a_table_for_it_and_it_cannot_be_changed_later(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text(
        '[federation]\ntenant = "t"\nname = "f"\nrule = "ffa"\nclusters = false\nevaluate_last = false\n'
        "[training]\nrank = 4\n"
        '[privacy]\nmode = "central"\nclip_norm = 0.5\nnoise_multiplier = 8\nepsilon = 8.0\ndelta = 1e-5\n'
        '[coordinator]\nregistry = "sqlite:///r.db"\nblobs = "b"\nray_address = "local"\nsuperlink = "127.0.0.1:1"\n'
    )
    settings = CoordinatorConfig.load(file).federation
    assert settings.privacy == CENTRAL
    assert FederationSettings.from_dict(settings.to_dict()) == settings
    assert FederationSettings.from_dict({"tenant": "t", "name": "f"}).privacy == Privacy()
    with pytest.raises(InvalidInputError, match=r"\[privacy\]: unknown keys noise"):
        FederationSettings.from_dict({"tenant": "t", "name": "f", "privacy": {"noise": 1.0}})


# The budget


def test_a_federation_ends_before_the_round_that_would_pass_its_budget_and_its_experts_stay(
    tmp_path: Path, opened: list[Registry]
) -> None:
    budget = CENTRAL.epsilon_after(2) * 1.001
    settings = replace(FFA, rounds=5, privacy=replace(CENTRAL, epsilon=budget))
    with pytest.raises(BudgetSpentError, match="budget spent: 2 rounds spent epsilon") as caught:
        run(tmp_path, opened, settings)
    assert "3 would spend" in str(caught.value) and "the experts stay" in str(caught.value)
    (registry,) = opened
    rounds = registry.rounds(registry.federation("operator", "fleet"))
    assert [r.state for r in rounds] == ["committed"] * 2
    assert [r.report["privacy"]["epsilon"] for r in rounds] == [CENTRAL.epsilon_after(1), CENTRAL.epsilon_after(2)]
    assert rounds[-1].report["privacy"]["budget"] == budget
    assert registry.load(registry.resolve("operator/fleet-shared@champion")).parameters
    with pytest.raises(BudgetSpentError):
        run(tmp_path, opened, settings)


def test_local_noise_is_spent_by_rounds_that_were_abandoned_central_noise_is_not() -> None:
    def rounds(*states: str) -> list[Round]:
        return [Round(n, 1, n, state, 0.0, None, {}) for n, state in enumerate(states, 1)]  # type: ignore[arg-type]

    two = CENTRAL.epsilon_after(2) * 1.001
    central, local = replace(CENTRAL, epsilon=two), replace(LOCAL, epsilon=two)
    check_budget(central, rounds("committed", "abandoned", "abandoned"))
    check_budget(central, rounds("committed", "abandoned", "open"))
    check_budget(local, rounds("abandoned"))
    check_budget(local, rounds("abandoned", "open"))  # a round that goes on asks for nothing new
    for spent in (rounds("abandoned", "abandoned"), rounds("committed", "abandoned"), rounds("committed", "committed")):
        with pytest.raises(BudgetSpentError):
            check_budget(local, spent)
    with pytest.raises(BudgetSpentError):
        check_budget(central, rounds("committed", "committed"))
    check_budget(Privacy(), rounds("committed", "committed"))


def test_what_per_sample_privacy_costs_is_the_members_to_know() -> None:
    # One round of this noise would pass the budget in another mode.
    thin = replace(PER_SAMPLE, noise_multiplier=0.5)
    check_budget(thin, [Round(n, 1, n, "committed", 0.0, None, {}) for n in range(1, 99)])  # type: ignore[arg-type]
    assert thin.member_noise_std == 0.0 and thin.update_clip_norm == 0.0


@pytest.mark.parametrize(
    ("refused", "words"),
    [((), ""), (("a",), ""), (("a", "b"), "2 of 3 members would pass epsilon 8.0"), (("a", "b", "c"), "3 of 3"),
     (("a", "gone"), "")],
)  # fmt: skip
def test_a_federation_of_per_sample_privacy_is_spent_where_too_few_members_are_left(
    refused: tuple[str, ...], words: str
) -> None:
    def record(member: str, reason: str) -> UpdateRecord:
        return UpdateRecord(
            member=member, attempt=1, accepted=not reason, reason=reason, digest="", num_examples=0, rank=0,
            size_bytes=0,
        )  # fmt: skip

    records = [record(m, "budget: spent") for m in refused] + [record("c", "norm: found 9"), record("b", "")]
    found = members_spent(PER_SAMPLE, records, here=["a", "b", "c"], quorum=2)
    assert found == "" if not words else words in found and found.startswith("budget spent: ")


def test_a_spent_federation_is_not_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f.toml"
    file.write_text(
        '[federation]\ntenant = "t"\nname = "f"\nrule = "ffa"\nclusters = false\nevaluate_last = false\n'
        "[training]\nrank = 4\n"
        '[privacy]\nmode = "local"\nclip_norm = 0.5\nnoise_multiplier = 8\nepsilon = 1.0\ndelta = 1e-5\n'
        '[coordinator]\nregistry = "sqlite:///r.db"\nblobs = "b"\nray_address = "local"\nsuperlink = "127.0.0.1:1"\n'
    )
    submitted: list[object] = []
    monkeypatch.setattr(launch, "submit", lambda *_, **__: submitted.append(1))
    launch.run(file)
    config = CoordinatorConfig.load(file)
    with Registry.open(config.registry, config.blobs) as registry:
        registry.abandon_round(registry.open_round(registry.federation("t", "f"), 1), "nobody answered")
    with pytest.raises(BudgetSpentError, match="1 rounds spent"):
        launch.run(file)
    assert submitted == [1]


def test_the_status_says_what_is_spent(tmp_path: Path, opened: list[Registry]) -> None:
    _, registry = run(tmp_path / "private", opened, replace(FFA, rounds=2))
    found = status_of(registry, registry.federation("operator", "fleet"), now=0.0)
    assert found.privacy == {
        "mode": "central", "clip_norm": CLIP, "noise_multiplier": Z, "rounds": 2, "delta": 1e-5, "budget": 8.0,
        "epsilon": CENTRAL.epsilon_after(2),
    }  # fmt: skip
    assert "central privacy: 2 rounds spent epsilon 1.3" in "\n".join(_head(found))
    assert all(member.loss is None for member in found.members)


# Rounds


@pytest.mark.parametrize("settings", [FFA, ROLORA], ids=["ffa", "rolora"])
def test_the_expert_is_the_mean_of_clipped_updates_with_one_noise_of_the_sums_size(
    settings: FederationSettings, tmp_path: Path, opened: list[Registry]
) -> None:
    settings = replace(settings, rounds=2)
    fleet = members(careless)
    standing, registry = run(tmp_path, opened, settings, fleet=fleet)
    assert standing.committed == 2
    journals = [registry.updates(r) for r in registry.rounds(registry.federation("operator", "fleet"))]
    for path in SHAPES:
        expected = torch.zeros(SHAPES[path], dtype=torch.float64)
        for number in (1, 2):
            orders = [o for o in fleet.ordered if o.order.round == number]
            trains = orders[0].order.trains
            seed = seed_for(bytes([number]) * 32, journals[number - 1])
            parts = [clipped(trained(o), trains=trains, clip_norm=CLIP).modules[path] for o in orders]
            factor = torch.stack([p.a if trains == "a" else p.b for p in parts]).mean(0)
            noise = gaussian(factor.numel(), seed=seed, name=path).view_as(factor)
            factor = factor + Z * CLIP / 3 * noise
            expected += parts[0].b @ factor if trains == "a" else factor @ parts[0].a
        found = standing.experts["shared"].to(torch.float64).delta(path)
        assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


def test_the_noise_that_was_added_is_normal(tmp_path: Path, opened: list[Registry]) -> None:
    fleet = members()
    standing, _ = run(tmp_path, opened, replace(FFA, rounds=1), fleet=fleet)
    noises = []
    for path in SHAPES:
        pairs = [clipped(trained(o), trains="b", clip_norm=CLIP).modules[path] for o in fleet.ordered]
        found = standing.experts["shared"].to(torch.float64).delta(path) @ torch.linalg.pinv(pairs[0].a)
        noises.append((found - torch.stack([p.b for p in pairs]).mean(0)).flatten())
    assert stats.kstest(torch.cat(noises).numpy() / (Z * CLIP / 3), "norm").pvalue > 0.01


def test_a_member_that_does_not_clip_moves_the_expert_no_further_than_one_that_does(
    tmp_path: Path, opened: list[Registry]
) -> None:
    def loud(order: Order) -> Reply:
        return reply_to(order, trained(order, scale=10.0))

    one_round = replace(FFA, rounds=1)
    quiet, _ = run(tmp_path / "quiet", opened, one_round, fleet=members(honest))
    found, registry = run(tmp_path / "loud", opened, one_round, fleet=members(honest, c=loud))
    assert registry.journal(registry.federation("operator", "fleet"))[2].digest  # it is accepted
    # The bound holds for the sum; the noise is another, as it covers other updates: take both away by their seeds.
    means = []
    for standing, each in ((quiet, opened[0]), (found, registry)):
        seed = seed_for(bytes([1]) * 32, each.journal(each.federation("operator", "fleet")))
        modules = {}
        for path, (d_out, d_in) in SHAPES.items():
            a = frozen_a(path, d_in)
            noise = gaussian(d_out * RANK, seed=seed, name=path).view(d_out, RANK)
            b = standing.experts["shared"].to(torch.float64).delta(path) @ torch.linalg.pinv(a)
            modules[path] = LoraPair(a, b - Z * CLIP / 3 * noise)
        means.append(LoraAdapter(modules))
    apart = {p: LoraPair(means[0].modules[p].a, means[0].modules[p].b - means[1].modules[p].b) for p in SHAPES}
    assert trained_norm(LoraAdapter(apart), "b") <= 2 * CLIP / 3 * (1 + 1e-3)


def frozen_a(path: str, d_in: int) -> torch.Tensor:
    from lorafleet.adapters.frozen import nested_rows
    from lorafleet.coordinator.orders import stable_seed

    return nested_rows(path, rank=RANK, width=d_in, init_seed=stable_seed(0, 0)).double()


@pytest.mark.parametrize(
    ("failpoint", "times"), [("update written", 5), ("round complete", 2), ("experts made", 2), ("round committed", 2)]
)
def test_a_crash_ends_with_the_bits_of_the_run_that_was_not_disturbed_and_draws_no_second_noise(
    failpoint: str, times: int, tmp_path: Path, opened: list[Registry]
) -> None:
    undisturbed, _ = run(tmp_path / "whole", opened, ROLORA, entropy=counting())

    class Crashed(Exception):
        pass

    passed = 0

    def crash(name: str) -> None:
        nonlocal passed
        passed += name == failpoint
        if passed == times:
            raise Crashed

    with pytest.raises(Crashed):
        run(tmp_path / "crashed", opened, ROLORA, entropy=counting(), failpoint=crash)
    # Where the second round's seed was drawn before the crash, what is drawn for it now must not be used.
    drawn = {"update written": [2], "round complete": [2], "experts made": [99], "round committed": []}[failpoint]
    numbers = iter([*drawn, 3, 4])
    resumed, registry = run(tmp_path / "crashed", opened, ROLORA, entropy=lambda count: bytes([next(numbers)]) * count)
    assert digests(resumed) == digests(undisturbed) and resumed.committed == 4
    assert [r.report["privacy"]["rounds"] for r in registry.rounds(registry.federation("operator", "fleet"))] == [
        1,
        2,
        3,
        4,
    ]


def test_a_seed_is_kept_while_its_round_is_open_and_is_in_no_record(tmp_path: Path, opened: list[Registry]) -> None:
    registry, federation, _ = start(tmp_path, members(), FFA)
    opened.append(registry)
    opening = registry.open_round(federation, 1)
    assert registry.noise_seed(opening, b"\1" * 32) == registry.noise_seed(opening, b"\2" * 32) == b"\1" * 32
    assert "01010101" not in repr(registry.rounds(federation))
    assert not any("seed" in field.name for field in dataclasses.fields(Round))
    registry.abandon_round(opening, "no answers")
    with pytest.raises(InvalidInputError, match="abandoned: its noise is drawn, and the seed forgotten"):
        registry.noise_seed(opening, b"\3" * 32)


def test_other_updates_get_other_noise_from_the_same_secret(tmp_path: Path, opened: list[Registry]) -> None:
    _, registry = run(tmp_path, opened, replace(FFA, rounds=1))
    records = registry.journal(registry.federation("operator", "fleet"))
    seeds = {seed_for(b"s" * 32, part) for part in (records, records[1:], records[:1])}
    assert len(seeds) == 3 and seed_for(b"s" * 32, records[::-1]) in seeds


@pytest.mark.parametrize("privacy", [CENTRAL, LOCAL], ids=["central", "local"])
def test_orders_say_what_a_private_federation_asks_and_wants_to_know_nothing_else(
    privacy: Privacy, tmp_path: Path, opened: list[Registry]
) -> None:
    fleet = members()
    settings = replace(FFA, privacy=privacy)
    standing, registry = run(tmp_path, opened, settings, fleet=fleet)
    std = Z * CLIP if privacy is LOCAL else 0.0
    assert {(o.order.clip_norm, o.order.noise_std, o.order.reports) for o in fleet.ordered} == {(CLIP, std, "nothing")}
    assert registry.evaluations(standing.versions["shared"]) == []
    records = registry.journal(registry.federation("operator", "fleet"))
    assert {(r.num_examples, tuple(r.metrics), r.share) for r in records} == {(1, (), 1 / 3)}


def test_local_updates_are_summed_as_they_came(tmp_path: Path, opened: list[Registry]) -> None:
    fleet = members(careless)
    standing, _ = run(tmp_path, opened, replace(FFA, rounds=1, privacy=LOCAL), fleet=fleet)
    for path in SHAPES:
        expected = torch.stack([trained(o).to(torch.float64).delta(path) for o in fleet.ordered]).mean(0)
        found = standing.experts["shared"].to(torch.float64).delta(path)
        assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


def test_lineage_names_no_update_of_central_privacy(tmp_path: Path, opened: list[Registry]) -> None:
    _, registry = run(tmp_path, opened, replace(FFA, rounds=2))
    first, second = registry.versions("operator", "fleet-shared")
    assert first.lineage is not None and first.lineage.parents == ()
    assert second.lineage is not None and second.lineage.parents == (first.digest,)
    # How many they were is published with every round's report.
    reports = [round.report["members"] for round in registry.rounds(registry.federation("operator", "fleet"))]
    assert [{"shared": first.lineage.members}, {"shared": second.lineage.members}] == reports == [{"shared": 3}] * 2


def test_experts_with_central_noise_are_not_computed_again_without_it_those_with_local_noise_are(
    tmp_path: Path, opened: list[Registry]
) -> None:
    _, registry = run(tmp_path / "central", opened, replace(FFA, rounds=1))
    with pytest.raises(InvalidInputError, match="the noise of its rounds was drawn once"):
        recompute(registry, registry.federation("operator", "fleet"), without=["a"])
    standing, registry = run(tmp_path / "local", opened, replace(FFA, rounds=1, privacy=LOCAL))
    (shared,) = recompute(registry, registry.federation("operator", "fleet"))
    assert shared.weights.digest == standing.versions["shared"].digest


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda r: replace(r, metrics={"train_loss": 1.0}), "metrics: found train_loss"),
        (lambda r: replace(r, header={**r.header, "num_examples": 7}), "count: num_examples is 7"),
    ],
)
def test_a_member_that_tells_of_its_data_costs_its_own_update_alone_and_nothing_of_it_is_kept(
    spoil: Callable[[Reply], Reply], reason: str, tmp_path: Path, opened: list[Registry]
) -> None:
    fleet = members(honest, chatty=lambda order: spoil(honest(order)))
    standing, registry = run(tmp_path, opened, replace(FFA, rounds=1), fleet=fleet)
    assert standing.committed == 1
    records = registry.updates(registry.rounds(registry.federation("operator", "fleet"))[0], accepted_only=False)
    (rejected,) = [r for r in records if r.member == "chatty"]
    assert not rejected.accepted and rejected.reason.startswith(reason)
    assert not rejected.metrics and not rejected.num_examples


def test_members_that_are_not_drawn_are_charged_as_if_they_were(tmp_path: Path, opened: list[Registry]) -> None:
    settings = replace(FFA, rounds=2, scheduling=Scheduling(goal=2, over_selection=1.0))
    _, registry = run(tmp_path, opened, settings)
    last = registry.rounds(registry.federation("operator", "fleet"))[-1]
    assert last.report["privacy"]["epsilon"] == CENTRAL.epsilon_after(2)


def test_below_the_quorum_nothing_is_published_or_spent(tmp_path: Path, opened: list[Registry]) -> None:
    fleet = Scripted(dict.fromkeys(("a", "b"), lambda order: replace(honest(order), metrics={"x": 1.0})))
    with pytest.raises(UnavailableError, match="abandoned"):
        run(tmp_path, opened, FFA, fleet=fleet)
    registry = opened[0]
    check_budget(
        replace(CENTRAL, epsilon=CENTRAL.epsilon_after(1)), registry.rounds(registry.federation("operator", "fleet"))
    )
