"""The round loop on a real registry: what is journalled, grouped, summed, committed and resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorafleet.adapters import LoraAdapter
from lorafleet.coordinator.reduction import Reduction
from lorafleet.coordinator.rounds import run_federation
from lorafleet.coordinator.settings import FederationSettings, Training
from lorafleet.coordinator.transport import Order, Reply
from lorafleet.coordinator.tree import LocalReducer
from lorafleet.errors import UnavailableError
from lorafleet.registry import NewExpert, Registry
from tests.coordinator.scripted import BASE, SHAPES, Scripted, honest, reply_with, residual, start

SETTINGS = FederationSettings(
    tenant="operator", name="fleet", rounds=2, quorum=2, deadline_s=30.0, expert_rank=24, training=Training(steps=5)
)


@pytest.fixture
def four() -> Scripted:
    return Scripted({"a1": honest(4, 1), "a2": honest(8, 1, 30), "b1": honest(16, 2), "b2": honest(5, 2, 20)})


@pytest.fixture
def opened() -> Iterator[list[Registry]]:
    registries: list[Registry] = []
    yield registries
    for registry in registries:
        registry.close()


def dense(adapters: list[tuple[float, LoraAdapter]], path: str) -> torch.Tensor:
    return sum((w * a.to(torch.float64).delta(path) for w, a in adapters), torch.zeros(SHAPES[path]).double())


def test_members_that_learn_alike_share_an_expert_and_everybody_the_shared_one(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    standing = run_federation(SETTINGS, federation, parts)
    assert standing.round == 2
    assert (
        standing.assignment["a1"] == standing.assignment["a2"] != standing.assignment["b1"] == standing.assignment["b2"]
    )
    assert sorted(standing.versions) == ["expert-1", "expert-2", "shared"]
    assert {v.reference for v in standing.versions.values()} == {
        "operator/fleet-expert-1:2", "operator/fleet-expert-2:2", "operator/fleet-shared:2",
    }  # fmt: skip
    assert registry.aliases("operator", "fleet-shared") == {"champion": 2}


def test_new_expert_is_the_old_one_plus_the_weighted_residuals(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    one_round = replace(SETTINGS, rounds=1)
    registry, federation, parts = start(tmp_path, four, one_round)
    opened.append(registry)
    first = run_federation(one_round, federation, parts)
    first_orders = {o.order.member: o for o in four.ordered if o.order.round == 1 and o.order.steps}
    label = first.assignment["a1"]
    updates = [(0.25, residual(first_orders["a1"], 4, 1)), (0.75, residual(first_orders["a2"], 8, 1))]
    for path in SHAPES:  # 12 stacked rows fit into rank 24: nothing is truncated
        torch.testing.assert_close(
            first.experts[label].to(torch.float64).delta(path), dense(updates, path), rtol=1e-5, atol=1e-6
        )
    four.ordered.clear()
    second = run_federation(SETTINGS, federation, parts)
    orders = {o.order.member: o for o in four.ordered if o.order.round == 2 and o.order.steps}
    assert orders["a1"].order.expert_digest == first.experts[label].digest
    grown = [(1.0, first.experts[label]), (0.25, residual(orders["a1"], 4, 1)), (0.75, residual(orders["a2"], 8, 1))]
    for path in SHAPES:
        torch.testing.assert_close(
            second.experts[label].to(torch.float64).delta(path), dense(grown, path), rtol=1e-5, atol=1e-6
        )


def test_the_shared_expert_is_the_mean_of_all_members_models(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    registry, federation, parts = start(tmp_path, four, replace(SETTINGS, expert_rank=64))
    opened.append(registry)
    standing = run_federation(replace(SETTINGS, expert_rank=64), federation, parts)
    orders = {o.order.member: o for o in four.ordered if o.order.round == 2 and o.order.steps}
    weights = {"a1": 10, "a2": 30, "b1": 10, "b2": 20}
    ranks, directions = {"a1": 4, "a2": 8, "b1": 16, "b2": 5}, {"a1": 1, "a2": 1, "b1": 2, "b2": 2}
    terms = []
    for member, n in weights.items():
        expert = orders[member].expert
        assert expert is not None
        terms += [(n / 70, expert), (n / 70, residual(orders[member], ranks[member], directions[member]))]
    for path in SHAPES:
        found = standing.experts["shared"].to(torch.float64).delta(path)
        expected = dense(terms, path)
        # 61 stacked rows are more than min(24, 32): the rank bound of the matrix itself holds everything.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_lineage_names_round_rule_and_parents(tmp_path: Path, four: Scripted, opened: list[Registry]) -> None:
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    standing = run_federation(SETTINGS, federation, parts)
    version = standing.versions[standing.assignment["a1"]]
    lineage = version.lineage
    assert lineage is not None
    assert (lineage.round, lineage.rule) == (2, "exact")
    first = registry.versions("operator", version.adapter)[0]
    journal = {u.member: u.digest for u in registry.updates(registry.rounds(federation)[1])}
    assert lineage.parents == (first.digest, journal["a1"], journal["a2"])


def test_lineage_counts_the_members_whose_updates_of_that_round_are_in_a_version(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    run_federation(replace(SETTINGS, rounds=1), federation, parts)
    four.silent = ("b2",)  # whose group is then too small for an expert of its own
    standing = run_federation(SETTINGS, federation, parts)
    own, other = standing.versions[standing.assignment["a1"]], ({"expert-1", "expert-2"} - {standing.assignment["a1"]})
    made = {
        name: [v.lineage and (v.lineage.round, v.lineage.members) for v in registry.versions("operator", name)]
        for name in ("fleet-shared", own.adapter, f"fleet-{other.pop()}")
    }
    assert list(made.values()) == [[(1, 4), (2, 3)], [(1, 2), (2, 2)], [(1, 2)]]


def test_one_bad_update_costs_only_itself(tmp_path: Path, four: Scripted, opened: list[Registry]) -> None:
    def poisoned(order: Order) -> Reply:
        reply = honest(4, 1)(order)
        arrays = {key: array.copy() for key, array in reply.arrays.items()}
        arrays["model.q.lora_A"][0, 0] = np.nan
        return replace(reply, arrays=arrays)

    four.answers |= {"evil": poisoned, "lost": lambda order: Reply(order.order.member, error="node is gone")}
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    standing = run_federation(SETTINGS, federation, parts)
    journal = registry.updates(registry.rounds(federation)[0], accepted_only=False)
    rejected = {u.member: u.reason for u in journal if not u.accepted}
    assert rejected["evil"].startswith("factors: ")
    assert rejected["lost"].startswith("failed: node is gone")
    assert standing.round == 2
    assert set(standing.assignment) == {"a1", "a2", "b1", "b2"}


def test_a_silent_member_costs_the_deadline_and_the_round_commits(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    four.silent = ("b2",)
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    standing = run_federation(SETTINGS, federation, parts)
    assert standing.round == 2
    # b1 is alone in its direction: no expert of its own, lest it were one owner's data in disguise.
    assert standing.assignment["b1"] == "shared"


def test_a_round_below_its_quorum_is_abandoned_with_the_reason(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    four.silent = ("a1", "b1", "b2")
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    with pytest.raises(UnavailableError, match="1 accepted updates at the deadline, the quorum is 2"):
        run_federation(SETTINGS, federation, parts)
    assert [r.state for r in registry.rounds(federation)] == ["abandoned"]


def test_after_an_abandoned_round_a_new_loop_commits(tmp_path: Path, four: Scripted, opened: list[Registry]) -> None:
    four.silent = ("a1", "b1", "b2")
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    with pytest.raises(UnavailableError):
        run_federation(SETTINGS, federation, parts)
    four.silent = ()
    standing = run_federation(SETTINGS, federation, parts)
    assert [r.state for r in registry.rounds(federation)] == ["abandoned", "committed", "committed"]
    assert (standing.round, standing.committed) == (3, 2)


def test_a_rejected_member_is_asked_again_by_a_loop_that_resumes_the_round(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    class Interrupted(Scripted):
        def receive(self, timeout_s: float) -> list[Reply]:
            if not self.waiting:
                raise Crash
            return super().receive(timeout_s)

    def unreadable(order: Order) -> Reply:
        return Reply(order.order.member, error="its reply cannot be read", reason="unreadable")

    first = Interrupted(four.answers | {"a1": unreadable}, ("b2",))
    registry, federation, parts = start(tmp_path, first, SETTINGS)
    opened.append(registry)
    with pytest.raises(Crash):
        run_federation(SETTINGS, federation, parts)
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    run_federation(SETTINGS, federation, parts)
    asked = {o.order.member: o.order.attempt for o in four.ordered if o.order.round == 1}
    assert asked == {"a1": 2, "b2": 1}
    assert {u.member for u in registry.updates(registry.rounds(federation)[0])} == {"a1", "a2", "b1", "b2"}


def test_silent_members_cost_the_others_no_turn(tmp_path: Path, four: Scripted, opened: list[Registry]) -> None:
    four.silent = ("a1",)
    one_by_one = replace(SETTINGS, at_once=1, rounds=1)
    registry, federation, parts = start(tmp_path, four, one_by_one)
    opened.append(registry)
    run_federation(one_by_one, federation, parts)
    assert {u.member for u in registry.updates(registry.rounds(federation)[0])} == {"a2", "b1", "b2"}


def test_no_more_members_work_at_once_than_agreed(tmp_path: Path, four: Scripted, opened: list[Registry]) -> None:
    out: list[int] = []

    class Counting(Scripted):
        def send(self, orders: Mapping[str, Order]) -> None:
            super().send(orders)
            out.append(len(self.waiting))

        def receive(self, timeout_s: float) -> list[Reply]:
            return [self.waiting.pop(0)]

    counting = Counting(four.answers)
    settings = replace(SETTINGS, at_once=2, rounds=1, evaluate_last=False)
    registry, federation, parts = start(tmp_path, counting, settings)
    opened.append(registry)
    run_federation(settings, federation, parts)
    assert max(out) == 2
    assert len(counting.ordered) == 4


def test_groups_can_be_given_in_the_place_of_clustering(tmp_path: Path, four: Scripted, opened: list[Registry]) -> None:
    given = {"a1": "expert-1", "b1": "expert-1", "a2": "expert-2", "b2": "expert-2"}
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    standing = run_federation(SETTINGS, federation, replace(parts, groups=lambda number: given))
    assert standing.assignment == given


def test_too_few_members_start_no_round(tmp_path: Path, opened: list[Registry]) -> None:
    registry, federation, parts = start(tmp_path, Scripted({"a1": honest(4, 1)}), SETTINGS)
    opened.append(registry)
    with pytest.raises(UnavailableError, match="1 of 1 members are here, the quorum is 2"):
        run_federation(SETTINGS, federation, parts)
    assert registry.rounds(federation) == []


def test_a_member_that_comes_late_gets_work_from_the_next_round_on_and_one_that_is_gone_gets_none(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    late, leaving = four.answers.pop("b2"), four.answers["a1"]

    def last_words(order: Order) -> Reply:
        del four.answers["a1"]
        four.answers["b2"] = late
        return leaving(order)

    four.answers["a1"] = last_words
    standing = run_federation(SETTINGS, federation, parts)
    asked = [{o.order.member for o in four.ordered if o.order.round == number} for number in (1, 2, 3)]
    assert asked == [{"a1", "a2", "b1"}, {"a2", "b1", "b2"}, {"a2", "b1", "b2"}]
    assert standing.assignment["b1"] == standing.assignment["b2"] == "expert-2"


def test_a_round_that_loses_the_quorum_before_it_starts_is_not_opened(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    answer = four.answers["b2"]

    def last_words(order: Order) -> Reply:
        for member in ("a1", "a2", "b1"):
            del four.answers[member]
        return answer(order)

    four.answers["b2"] = last_words  # the last to be asked
    with pytest.raises(UnavailableError, match="1 of 4 members are here, the quorum is 2"):
        run_federation(SETTINGS, federation, parts)
    assert [r.state for r in registry.rounds(federation)] == ["committed"]


def test_rounds_that_are_done_are_measured_by_whoever_is_left(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    run_federation(replace(SETTINGS, evaluate_last=False), federation, parts)
    four.answers = {"b1": four.answers["b1"]}
    standing = run_federation(SETTINGS, federation, parts)
    version = standing.versions[standing.assignment["b1"]]
    assert {e.member for e in registry.evaluations(version)} == {"b1"}


def test_a_stranger_gets_no_work(tmp_path: Path, four: Scripted, opened: list[Registry]) -> None:
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    four.answers["stranger"] = honest(4, 1)
    run_federation(SETTINGS, federation, parts)
    assert "stranger" not in {order.order.member for order in four.ordered}


class Crash(Exception):
    pass


def test_a_loop_that_crashed_in_mid_round_asks_only_for_what_the_journal_lacks_and_ends_the_same(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    registry, federation, parts = start(tmp_path / "undisturbed", four, SETTINGS)
    opened.append(registry)
    expected = run_federation(SETTINGS, federation, parts)

    def crash(order: Order) -> Reply:
        raise Crash

    class Dying(Scripted):
        """Hands out the replies one by one and dies before the third."""

        given = 0

        def receive(self, timeout_s: float) -> list[Reply]:
            self.given += 1
            if self.given == 3:
                raise Crash
            return [self.waiting.pop(0)]

    (tmp_path / "crashed").mkdir()
    dying = Dying(four.answers)
    registry, federation, parts = start(tmp_path / "crashed", dying, SETTINGS)
    opened.append(registry)
    with pytest.raises(Crash):
        run_federation(SETTINGS, federation, parts)
    again = Scripted(four.answers)
    registry, federation, parts = start(tmp_path / "crashed", again, SETTINGS)
    opened.append(registry)
    found = run_federation(SETTINGS, federation, parts)
    first_round = [o.order.member for o in again.ordered if o.order.round == 1]
    assert len(first_round) == 2
    assert {k: v.digest for k, v in found.versions.items()} == {k: v.digest for k, v in expected.versions.items()}


def test_a_federation_that_is_done_does_nothing_again(tmp_path: Path, four: Scripted, opened: list[Registry]) -> None:
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    first = run_federation(SETTINGS, federation, parts)
    four.ordered.clear()
    second = run_federation(SETTINGS, federation, parts)
    assert [o for o in four.ordered if o.order.steps] == []
    assert second.versions == first.versions


def test_members_evaluate_the_expert_that_they_were_given(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    standing = run_federation(SETTINGS, federation, parts)
    first, second = registry.versions("operator", standing.versions[standing.assignment["a1"]].adapter)
    assert {e.member for e in registry.evaluations(first)} == {"a1", "a2"}
    assert {e.member for e in registry.evaluations(second)} == {"a1", "a2"}


def test_updates_are_for_the_base_that_was_ordered(tmp_path: Path, four: Scripted, opened: list[Registry]) -> None:
    def foreign(order: Order) -> Reply:
        reply = reply_with(order, residual(order, 4, 1))
        return replace(reply, header={**reply.header, "base_digest": "sha256:" + "c" * 64})

    four.answers["foreign"] = foreign
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    run_federation(SETTINGS, federation, parts)
    journal = registry.updates(registry.rounds(federation)[0], accepted_only=False)
    reason = next(u.reason for u in journal if u.member == "foreign")
    assert reason == f"order: base_digest is 'sha256:{'c' * 64}', the order said '{BASE}'"


def test_what_a_member_says_is_journalled_and_logged_as_one_line(
    tmp_path: Path, four: Scripted, opened: list[Registry], caplog: pytest.LogCaptureFixture
) -> None:
    words = "lost\nINFO lorafleet: Successfully started run 99\x1b[2J" + "x" * 10_000
    four.answers["evil"] = lambda order: Reply(order.order.member, error=words)
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)
    four.answers["str\nange"] = honest(4, 1)
    run_federation(SETTINGS, federation, parts)
    journal = registry.updates(registry.rounds(federation)[0], accepted_only=False)
    (reason,) = [update.reason for update in journal if update.member == "evil"]
    assert reason.startswith("failed: lost") and reason.isprintable() and len(reason) < 600
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert "str" in caplog.text


def test_nodes_that_are_busy_are_said_where_the_quorum_is_missed(tmp_path: Path, opened: list[Registry]) -> None:
    one = Scripted({"a1": honest(4, 1)})
    one.busy_nodes = 3
    registry, federation, parts = start(tmp_path, one, SETTINGS)
    opened.append(registry)
    with pytest.raises(UnavailableError, match="3 nodes are here, but busy"):
        run_federation(SETTINGS, federation, parts)


def test_a_coordinator_without_the_lease_journals_and_commits_nothing(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)

    def check() -> None:
        if four.ordered:
            raise UnavailableError("another coordinator runs it")

    with pytest.raises(UnavailableError, match="another coordinator runs it"):
        run_federation(SETTINGS, federation, replace(parts, check_lease=check))
    (opened_round,) = registry.rounds(federation)
    assert opened_round.state == "open" and registry.updates(opened_round) == []


def test_a_round_that_another_coordinator_committed_is_said(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    registry, federation, parts = start(tmp_path, four, SETTINGS)
    opened.append(registry)

    class Overtaken(LocalReducer):
        """While it reduces, another coordinator commits the same round with experts of its own."""

        def start(self, rule: str, keys: Sequence[str], *arguments: Any, **options: Any) -> Reduction:
            (current,) = registry.rounds(federation)
            weights = LoraAdapter(residual(four.ordered[0], 4, 3).modules, BASE)
            report = {"assignment": {}, "members": {"shared": 4}}
            registry.commit_round(current, [NewExpert("fleet-shared", weights, "exact", ())], report=report)
            return super().start(rule, keys, *arguments, **options)

    with pytest.raises(UnavailableError, match="another coordinator committed round 1 of operator/fleet"):
        run_federation(SETTINGS, federation, replace(parts, reducer=Overtaken()))


def test_ranks_are_learned_from_what_orders_gain_for_each_second_and_a_resumed_loop_goes_on(
    tmp_path: Path, four: Scripted, opened: list[Registry]
) -> None:
    def learning(order: Order) -> Reply:
        rank = order.order.rank
        reply = reply_with(order, residual(order, rank, 1))
        return replace(
            reply, metrics={**reply.metrics, "first_loss": 3.0, "last_loss": 3.0 - (0.9 if rank == 2 else 0.1)}
        )

    four.answers = dict.fromkeys(("a1", "a2"), learning)
    training = Training(steps=5, rank_choices=(1, 2, 4, 64))
    settings = replace(SETTINGS, rounds=4, evaluate_last=False, training=training)
    registry, federation, parts = start(tmp_path, four, settings)
    opened.append(registry)
    run_federation(settings, federation, parts)
    run_federation(replace(settings, rounds=12), federation, parts)
    asked = [o.order.rank for o in four.ordered if o.order.member == "a1"]
    # Members afford rank 4: 64 is never asked.
    assert asked[:3] == [1, 2, 4] and set(asked) == {1, 2, 4}
    assert asked.count(2) > len(asked) / 2


def test_experts_do_not_depend_on_the_number_of_threads(tmp_path: Path, four: Scripted, opened: list[Registry]) -> None:
    before, digests = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            (tmp_path / str(threads)).mkdir()
            registry, federation, parts = start(tmp_path / str(threads), four, SETTINGS)
            opened.append(registry)
            standing = run_federation(SETTINGS, federation, parts)
            digests.append({label: version.digest for label, version in standing.versions.items()})
    finally:
        torch.set_num_threads(before)
    assert digests[0] == digests[1] == digests[2]
