"""Federations, rounds, the journal, commits and evaluations, on every database."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lorafleet.errors import (
    AlreadyExistsError,
    BaseMismatchError,
    InvalidInputError,
    NotFoundError,
    RejectedUpdateError,
    UnavailableError,
)
from lorafleet.registry import Federation, Lease, Lineage, NewExpert, Registry, UpdateKey, UpdateRecord
from tests.registry.conftest import BASE_DIGEST, OTHER_BASE_DIGEST, Clock, make_adapter


@pytest.fixture
def federation(registry: Registry) -> Federation:
    """Owned by ``acme``; its members are ``key-a`` of ``acme`` and ``key-b`` of ``rival``."""
    made = registry.create_federation("acme", "fed", base="tiny", settings={"rule": "exact", "ranks": [2, 8]})
    registry.add_member(made, "key-a", tenant="acme")
    registry.add_member(made, "key-b", tenant="rival")
    return made


def accepted(member: str, attempt: int = 1, seed: int = 0, **metrics: float) -> UpdateRecord:
    factors = make_adapter(seed)
    return UpdateRecord(member, attempt, True, "", factors.digest, 10, factors.rank, 500, metrics, factors)


def expert(name: str, seed: int = 0, *parents: str) -> NewExpert:
    return NewExpert(name, make_adapter(seed), "exact", parents)


def test_federation_comes_back_as_it_was_made(registry: Registry, federation: Federation) -> None:
    assert registry.federation("acme", "fed") == federation
    assert (federation.base, federation.base_digest) == ("tiny", BASE_DIGEST)
    assert federation.settings == {"rule": "exact", "ranks": [2, 8]}
    with pytest.raises(AlreadyExistsError):
        registry.create_federation("acme", "fed", base="tiny", settings={})
    assert registry.create_federation("rival", "fed", base="tiny", settings={}).id != federation.id
    with pytest.raises(NotFoundError):
        registry.federation("acme", "none")


@pytest.mark.parametrize("settings", [{"loss": math.nan}, {"path": object()}, {"a": {1, 2}}])
def test_settings_that_are_no_json_are_refused(registry: Registry, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="JSON"):
        registry.create_federation("acme", "fed", base="tiny", settings=settings)


def test_members_are_listed_by_key_and_a_key_is_one_members(registry: Registry, federation: Federation) -> None:
    upper = registry.add_member(federation, "Key-c", tenant="rival")
    assert registry.add_member(federation, "Key-c", tenant="rival") == upper
    # By code point on every database, whatever its collation.
    assert [(member.key, member.tenant) for member in registry.members(federation)] == [
        ("Key-c", "rival"),
        ("key-a", "acme"),
        ("key-b", "rival"),
    ]
    with pytest.raises(AlreadyExistsError):
        registry.add_member(federation, "key-a", tenant="rival")
    with pytest.raises(NotFoundError):
        registry.add_member(federation, "key-d", tenant="ghost")
    for key in ("", "a\nb", "k" * 501):
        with pytest.raises(InvalidInputError, match="printable"):
            registry.add_member(federation, key, tenant="rival")
    assert len(registry.members(federation)) == 3


def test_rounds_are_numbered_without_gaps_and_opening_again_gives_the_same(
    registry: Registry, federation: Federation, clock: Clock
) -> None:
    with pytest.raises(InvalidInputError, match="next is 1"):
        registry.open_round(federation, 2)
    first = registry.open_round(federation, 1)
    clock.now += 5
    assert registry.open_round(federation, 1) == first
    assert (first.federation_id, first.number, first.state) == (federation.id, 1, "open")
    assert (first.opened_at, first.closed_at) == (1000.0, None)
    with pytest.raises(InvalidInputError, match="next is 2"):
        registry.open_round(federation, 3)
    with pytest.raises(InvalidInputError):
        registry.open_round(federation, 0)
    second = registry.open_round(federation, 2)
    assert registry.rounds(federation) == [first, second]


def test_journal_keeps_an_update_once(registry: Registry, federation: Federation) -> None:
    round = registry.open_round(federation, 1)
    update = accepted("key-b", loss=1.5)
    assert registry.record_update(round, update) is True
    assert registry.record_update(round, update) is False
    [found] = registry.updates(round)
    assert found == replace(update, ordered_in=1)
    assert found.factors is None
    assert registry.update_factors(found).digest == update.digest


def test_only_the_first_accepted_update_of_a_member_counts_in_a_round(
    registry: Registry, federation: Federation
) -> None:
    round = registry.open_round(federation, 1)
    assert registry.record_update(round, accepted("key-a", attempt=2, seed=0))
    assert not registry.record_update(round, accepted("key-a", attempt=2, seed=1))
    assert not registry.record_update(round, accepted("key-a", attempt=3, seed=2))
    assert [update.digest for update in registry.updates(round)] == [make_adapter(0).digest]
    following = registry.open_round(federation, 2)
    assert registry.record_update(following, accepted("key-a", attempt=2, seed=0))


def test_each_piece_of_work_counts_once_whichever_round_its_update_comes_in(
    registry: Registry, federation: Federation
) -> None:
    first, second = registry.open_round(federation, 1), registry.open_round(federation, 2)
    late = replace(accepted("key-a", attempt=2, seed=0), ordered_in=1, work=2)
    assert registry.record_update(first, accepted("key-a", seed=1))
    assert registry.record_update(second, late)
    assert not registry.record_update(second, replace(late, attempt=3))
    assert registry.record_update(second, accepted("key-a", seed=2))
    assert [(u.ordered_in, u.attempt) for u in registry.updates(second)] == [(1, 2), (2, 1)]
    assert [(u.ordered_in, u.attempt) for u in registry.journal(federation)] == [(1, 1), (1, 2), (2, 1)]


def test_a_commit_says_what_counted_and_nothing_counts_twice(registry: Registry, federation: Federation) -> None:
    first, second = registry.open_round(federation, 1), registry.open_round(federation, 2)
    for seed, member in enumerate(("key-a", "key-b")):
        assert registry.record_update(first, accepted(member, seed=seed))
    assert registry.record_update(first, UpdateRecord("key-a", 5, False, "norm", "", 0, 0, 0))
    expert = NewExpert("sql", make_adapter(7), "exact")
    counted = {UpdateKey("key-a", 1, 1): 0.25}
    registry.commit_round(first, [expert], report={}, counted=counted)
    assert [(u.counted_in, u.share) for u in registry.updates(first)] == [(1, 0.25), (None, None)]
    assert [u.member for u in registry.journal(federation, uncounted_only=True)] == ["key-b"]
    with pytest.raises(InvalidInputError, match="counted in round 1 already"):
        registry.commit_round(second, [expert], report={}, counted=counted)
    with pytest.raises(NotFoundError, match="attempt 5"):
        registry.commit_round(second, [expert], report={}, counted={UpdateKey("key-a", 1, 5): 1.0})
    assert registry.rounds(federation)[1].state == "open"
    registry.commit_round(second, [expert], report={}, counted={UpdateKey("key-b", 1, 1): 1.0})
    assert registry.journal(federation, uncounted_only=True) == []


def test_who_lost_the_lease_writes_nothing(registry: Registry, federation: Federation, clock: Clock) -> None:
    mine = registry.take_lease(federation, "mine", for_s=5.0)
    expert = NewExpert("sql", make_adapter(7), "exact")
    first = registry.open_round(federation, 1, token=mine.token)
    (version,) = registry.commit_round(first, [expert], report={}, token=mine.token)
    registry.record_evaluation(version, member="key-a", loss=1.0, tokens=2, token=mine.token)
    round = registry.open_round(federation, 2, token=mine.token)
    assert registry.take_lease(federation, "mine", for_s=5.0).token == mine.token
    clock.now += 6.0
    other = registry.take_lease(federation, "other", for_s=5.0)
    assert other.token == mine.token + 1
    for write in (
        lambda: registry.open_round(federation, 3, token=mine.token),
        lambda: registry.record_update(round, accepted("key-a"), token=mine.token),
        lambda: registry.commit_round(round, [expert], report={}, token=mine.token),
        lambda: registry.abandon_round(round, "late", token=mine.token),
        lambda: registry.noise_seed(round, b"late", token=mine.token),
        lambda: registry.drop_factors(federation, through=1, token=mine.token),
        lambda: registry.record_evaluation(version, member="key-a", loss=2.0, tokens=2, token=mine.token),
    ):
        with pytest.raises(UnavailableError, match="another coordinator works for this federation"):
            write()
    assert registry.updates(round) == [] and [r.state for r in registry.rounds(federation)] == ["committed", "open"]
    assert [e.loss for e in registry.evaluations(version)] == [1.0]
    assert registry.record_update(round, accepted("key-a"), token=other.token)
    registry.release_lease(federation, "other")
    assert registry.take_lease(federation, "third", for_s=5.0).token == other.token + 1


def test_journal_reads_in_the_order_of_member_keys(registry: Registry, federation: Federation) -> None:
    keys = ["key-b", "Z", "key-a", "a", "ä", "_"]
    for key in keys[1:2] + keys[3:]:
        registry.add_member(federation, key, tenant="acme")
    round = registry.open_round(federation, 1)
    for seed, key in enumerate(keys):
        assert registry.record_update(round, accepted(key, seed=seed))
    assert [update.member for update in registry.updates(round)] == sorted(keys)


def test_rejected_updates_are_journalled_beside_the_accepted_one(registry: Registry, federation: Federation) -> None:
    round = registry.open_round(federation, 1)
    damaged = UpdateRecord("key-a", 1, False, "not_finite", "", -1, 0, 10**12, {"loss": math.nan, "norm": math.inf})
    assert registry.record_update(round, damaged)
    assert not registry.record_update(round, damaged)
    with_factors = replace(accepted("key-a", attempt=2), accepted=False, reason="norm")
    assert registry.record_update(round, with_factors)
    assert registry.record_update(round, accepted("key-a", attempt=3, seed=3))
    assert [update.attempt for update in registry.updates(round)] == [3]
    first, second, third = registry.updates(round, accepted_only=False)
    assert (first.reason, first.num_examples, first.size_bytes) == ("not_finite", -1, 10**12)
    assert math.isnan(first.metrics["loss"]) and first.metrics["norm"] == math.inf
    with pytest.raises(NotFoundError):
        registry.update_factors(first)
    assert registry.update_factors(second).digest == with_factors.digest
    assert third.accepted


def test_words_that_a_database_cannot_hold_do_not_stop_the_journal(registry: Registry, federation: Federation) -> None:
    round = registry.open_round(federation, 1)
    hostile = UpdateRecord("key-a", 1, False, "failed: \0 \ud800 é", "", 0, 0, 0, {"lo\0ss": 1.0})
    assert registry.record_update(round, hostile)
    [found] = registry.updates(round, accepted_only=False)
    assert (found.reason, dict(found.metrics)) == ("failed: \ufffd ? é", {"lo\ufffdss": 1.0})


def test_an_update_that_could_not_be_read_again_is_not_journalled(
    registry: Registry, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    round = registry.open_round(federation, 1)
    monkeypatch.setattr("lorafleet.adapters.streaming.LARGEST_MODULE", 8)
    with pytest.raises(InvalidInputError, match="expected at most 8; compress"):
        registry.record_update(round, accepted("key-a", seed=1))
    assert registry.journal(federation) == []


def test_records_that_contradict_themselves_are_refused(registry: Registry, federation: Federation) -> None:
    round = registry.open_round(federation, 1)
    good = accepted("key-a")
    for bad in (
        replace(good, factors=None),
        replace(good, digest=make_adapter(9).digest),
        replace(good, num_examples=0),
        replace(good, attempt=-1),
        replace(good, size_bytes=2**63),
        replace(good, accepted=False),
        replace(good, accepted=False, reason="norm", factors=None, digest="md5:1"),
    ):
        with pytest.raises(InvalidInputError, match="key-a"):
            registry.record_update(round, bad)
    with pytest.raises(NotFoundError, match="stranger"):
        registry.record_update(round, replace(good, member="stranger"))
    assert registry.updates(round, accepted_only=False) == []


def test_committed_round_publishes_its_experts(registry: Registry, federation: Federation, clock: Clock) -> None:
    round = registry.open_round(federation, 1)
    before = registry.revision()
    clock.now = 2000.0
    parents = (make_adapter(5).digest, make_adapter(6).digest)
    experts = [replace(expert("shared", 1, *parents), members=2), expert("cpp", 2)]
    versions = registry.commit_round(round, experts, report={"loss": 1.25})
    assert [version.reference for version in versions] == ["acme/shared:1", "acme/cpp:1"]
    assert [version.lineage for version in versions] == [
        Lineage("fed", 1, "exact", parents, members=2), Lineage("fed", 1, "exact", ()),
    ]  # fmt: skip
    assert registry.versions("acme", "shared") == versions[:1]
    assert [registry.load(version).digest for version in versions] == [make_adapter(seed).digest for seed in (1, 2)]
    assert registry.aliases("acme", "shared") == {"champion": 1}
    assert registry.adapter("acme", "shared").federation == "fed"
    [closed] = registry.rounds(federation)
    assert (closed.state, closed.closed_at, closed.report) == ("committed", 2000.0, {"loss": 1.25})
    assert registry.revision() > before

    following = registry.open_round(federation, 2)
    [next_version] = registry.commit_round(following, [expert("shared", 3)], report={})
    assert next_version.reference == "acme/shared:2"
    assert registry.resolve("acme/shared") == next_version
    assert registry.resolve("acme/cpp") == versions[1]


def test_committing_again_gives_what_was_committed(registry: Registry, federation: Federation) -> None:
    round = registry.open_round(federation, 1)
    versions = registry.commit_round(round, [expert("b", 1), expert("a", 2)], report={"n": 1})
    revision = registry.revision()
    assert registry.commit_round(round, [expert("c", 3)], report={"n": 2}) == versions
    assert registry.revision() == revision
    assert [adapter.name for adapter in registry.adapters("acme")] == ["a", "b"]
    assert registry.rounds(federation)[0].report == {"n": 1}


def test_commit_that_fails_half_way_changes_nothing(registry: Registry, federation: Federation) -> None:
    registry.create_adapter("acme", "mine", base="tiny")
    round = registry.open_round(federation, 1)
    before = registry.revision()
    for experts, report, error in (
        ([expert("fresh"), expert("mine")], {}, AlreadyExistsError),
        ([expert("fresh"), expert("fresh", 1)], {}, InvalidInputError),
        ([expert("fresh"), replace(expert("b"), parents=("no digest",))], {}, InvalidInputError),
        ([expert("fresh"), replace(expert("b"), members=0)], {}, InvalidInputError),
        ([expert("fresh"), NewExpert("b", make_adapter(0, base=OTHER_BASE_DIGEST), "exact")], {}, BaseMismatchError),
        ([expert("fresh")], {"loss": math.nan}, InvalidInputError),
    ):
        with pytest.raises(error):
            registry.commit_round(round, experts, report=report)
        assert [adapter.name for adapter in registry.adapters("acme")] == ["mine"]
        assert registry.versions("acme", "mine") == []
        assert registry.rounds(federation) == [round]
        assert registry.revision() == before


def test_experts_are_live_for_members_and_for_nobody_else(registry: Registry, federation: Federation) -> None:
    registry.create_tenant("outsider")
    for tenant in ("acme", "rival", "outsider"):
        registry.create_adapter(tenant, "own", base="tiny")
        registry.add_version(tenant, "own", make_adapter(7))
    round = registry.open_round(federation, 1)
    registry.commit_round(round, [expert("shared")], report={})

    def live(tenant: str) -> list[str]:
        return [version.reference for version in registry.live(tenant)]

    assert live("acme") == ["acme/own:1", "acme/shared:1"]
    assert live("rival") == ["acme/shared:1", "rival/own:1"]
    assert live("outsider") == ["outsider/own:1"]
    registry.add_member(federation, "late", tenant="outsider")
    assert live("outsider") == ["acme/shared:1", "outsider/own:1"]
    assert [version.reference for version in registry.all_live()] == [
        "acme/own:1",
        "acme/shared:1",
        "outsider/own:1",
        "rival/own:1",
    ]
    with pytest.raises(NotFoundError):
        registry.live("ghost")


def test_abandoned_round_takes_nothing_more(registry: Registry, federation: Federation, clock: Clock) -> None:
    round = registry.open_round(federation, 1)
    update = accepted("key-a")
    assert registry.record_update(round, update)
    clock.now = 1100.0
    registry.abandon_round(round, "no quorum")
    registry.abandon_round(round, "another reason")
    [closed] = registry.rounds(federation)
    assert (closed.state, closed.reason, closed.closed_at) == ("abandoned", "no quorum", 1100.0)
    assert registry.record_update(round, update) is False
    with pytest.raises(RejectedUpdateError) as caught:
        registry.record_update(round, accepted("key-b"))
    assert caught.value.reason == "round_closed"
    with pytest.raises(InvalidInputError, match="no quorum"):
        registry.commit_round(round, [expert("shared")], report={})
    assert registry.open_round(federation, 1) == closed


def test_committed_round_is_never_abandoned(registry: Registry, federation: Federation) -> None:
    round = registry.open_round(federation, 1)
    registry.commit_round(round, [expert("shared")], report={})
    with pytest.raises(InvalidInputError, match="committed"):
        registry.abandon_round(round, "too late")
    with pytest.raises(RejectedUpdateError, match="round_closed"):
        registry.record_update(round, accepted("key-a"))
    assert registry.rounds(federation)[0].state == "committed"


def test_records_of_another_registry_are_not_found(registry: Registry, federation: Federation) -> None:
    round = registry.open_round(federation, 1)
    for foreign in (replace(round, id=99), replace(round, federation_id=99), replace(round, number=7)):
        with pytest.raises(NotFoundError):
            registry.updates(foreign)
        with pytest.raises(NotFoundError):
            registry.commit_round(foreign, [], report={})
    [version] = registry.commit_round(round, [expert("shared")], report={})
    for other in (replace(version, tenant="rival"), replace(version, adapter="x"), replace(version, number=2)):
        with pytest.raises(NotFoundError):
            registry.set_state(other, "retired")
    assert registry.resolve("acme/shared").state == "staged"


def test_member_evaluates_a_version_once(registry: Registry, federation: Federation, clock: Clock) -> None:
    [version] = registry.commit_round(registry.open_round(federation, 1), [expert("shared")], report={})
    registry.record_evaluation(version, member="key-b", loss=2.0, tokens=100)
    registry.record_evaluation(version, member="key-a", loss=3.0, tokens=50)
    clock.now = 1500.0
    registry.record_evaluation(version, member="key-b", loss=1.5, tokens=120)
    found = [(e.member, e.loss, e.tokens, e.created_at) for e in registry.evaluations(version)]
    assert found == [("key-a", 3.0, 50, 1000.0), ("key-b", 1.5, 120, 1500.0)]
    for loss, tokens in ((math.nan, 10), (math.inf, 10), (1.0, 0)):
        with pytest.raises(InvalidInputError, match="finite loss"):
            registry.record_evaluation(version, member="key-a", loss=loss, tokens=tokens)


def test_a_lease_is_its_owners_until_it_expires(registry: Registry, federation: Federation, clock: Clock) -> None:
    first = registry.take_lease(federation, "one", for_s=60.0)
    assert first == Lease(federation.id, "one", 1000.0, 1060.0, 1)
    clock.now += 59.0
    assert registry.take_lease(federation, "two", for_s=60.0) == first
    assert registry.take_lease(federation, "one", for_s=60.0) == Lease(federation.id, "one", 1000.0, 1119.0, 1)
    clock.now = 1119.0
    assert registry.take_lease(federation, "two", for_s=60.0) == Lease(federation.id, "two", 1119.0, 1179.0, 2)
    assert registry.take_lease(federation, "one", for_s=60.0).owner == "two"


def test_a_lease_that_is_given_back_is_free_and_only_its_owner_can_give_it(
    registry: Registry, federation: Federation
) -> None:
    registry.take_lease(federation, "one", for_s=60.0)
    registry.release_lease(federation, "two")
    assert registry.take_lease(federation, "two", for_s=60.0).owner == "one"
    registry.release_lease(federation, "one")
    registry.release_lease(federation, "one")
    assert registry.take_lease(federation, "two", for_s=60.0).owner == "two"


def test_each_federation_has_a_lease_of_its_own(registry: Registry, federation: Federation) -> None:
    other = registry.create_federation("rival", "fed", base="tiny", settings={})
    assert registry.take_lease(federation, "one", for_s=60.0).owner == "one"
    assert registry.take_lease(other, "two", for_s=60.0).owner == "two"
