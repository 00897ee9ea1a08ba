"""The life of a federation in the registry: states, invitations, revoked members, and updates that are not kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from lorafleet.errors import (
    AlreadyExistsError,
    InvalidInputError,
    NotFoundError,
    RejectedUpdateError,
    UnavailableError,
)
from lorafleet.registry import Federation, NewExpert, Registry, UpdateKey, UpdateRecord, claims
from lorafleet.registry.blobs import BlobStore
from lorafleet.registry.database import Database, make_engine, parse_url
from lorafleet.registry.files import Deletion
from tests.registry.conftest import Clock, again, make_adapter

KEY = "ecdsa-sha2-nistp384 AAAA"


@pytest.fixture
def federation(registry: Registry) -> Federation:
    """Owned by ``acme``, without members."""
    return registry.create_federation("acme", "fed", base="tiny", settings={})


def accepted(member: str, seed: int, attempt: int = 1) -> UpdateRecord:
    factors = make_adapter(seed)
    return UpdateRecord(member, attempt, True, "", factors.digest, 10, factors.rank, 500, {}, factors)


def commit(registry: Registry, federation: Federation, number: int, *, seed: int = 100, **counted: int) -> None:
    """A round with the update of each member from its seed, all counted; ``seed`` is that of its expert."""
    opened = registry.open_round(federation, number)
    for member, own in counted.items():
        assert registry.record_update(opened, accepted(member, own))
    keys = {UpdateKey(member, number, 1): 1.0 for member in counted}
    registry.commit_round(opened, [NewExpert("shared", make_adapter(seed), "exact")], report={}, counted=keys)


# States


def test_a_federation_is_paused_goes_on_and_is_stopped_for_good(
    registry: Registry, federation: Federation, clock: Clock
) -> None:
    assert (federation.state, federation.state_at) == ("active", 1000.0)
    clock.now = 1010.0
    paused = registry.set_federation_state(federation, "paused", by="ada", reason="a look at round 3")
    said = (paused.state, paused.state_at, paused.state_by, paused.state_reason)
    assert said == ("paused", 1010.0, "ada", "a look at round 3")
    clock.now = 1020.0
    assert registry.set_federation_state(federation, "paused", by="bob") == paused
    assert registry.set_federation_state(federation, "active").state_at == 1020.0
    stopped = registry.set_federation_state(federation, "stopped", reason="done \0")
    assert (stopped.state, stopped.state_reason) == ("stopped", "done \N{REPLACEMENT CHARACTER}")
    assert registry.set_federation_state(federation, "stopped", reason="again") == stopped
    for state in ("active", "paused"):
        with pytest.raises(InvalidInputError, match=r"acme/fed was stopped, which is for good"):
            registry.set_federation_state(federation, state)  # type: ignore[arg-type]
    assert registry.federation("acme", "fed") == stopped


def test_what_is_no_state_and_nobody_is_refused(registry: Registry, federation: Federation) -> None:
    with pytest.raises(InvalidInputError, match="active, paused, stopped"):
        registry.set_federation_state(federation, "asleep")  # type: ignore[arg-type]
    for by in ("a\nb", "x" * 101):
        with pytest.raises(InvalidInputError, match="who does it"):
            registry.set_federation_state(federation, "paused", by=by)
    assert registry.federation("acme", "fed").state == "active"


def test_the_lease_is_shown_while_somebody_holds_it(registry: Registry, federation: Federation, clock: Clock) -> None:
    assert registry.lease(federation) is None
    taken = registry.take_lease(federation, "mine", for_s=5.0)
    assert registry.lease(federation) == taken
    clock.now += 5.0
    assert registry.lease(federation) is None


# Members and their keys


def test_a_public_key_is_one_members_and_can_be_added_later(registry: Registry, federation: Federation) -> None:
    registry.add_member(federation, "a", tenant="acme")
    assert registry.add_member(federation, "a", tenant="acme", public_key=KEY).public_key == KEY
    assert registry.add_member(federation, "a", tenant="acme").public_key == KEY
    with pytest.raises(AlreadyExistsError, match="registered"):
        registry.add_member(federation, "a", tenant="acme", public_key=KEY + "B")
    with pytest.raises(AlreadyExistsError, match="another member's"):
        registry.add_member(federation, "b", tenant="rival", public_key=KEY)
    with pytest.raises(InvalidInputError, match="one line"):
        registry.add_member(federation, "b", tenant="rival", public_key="two\nlines")
    other = registry.create_federation("acme", "other", base="tiny", settings={})
    assert registry.add_member(other, "b", tenant="rival", public_key=KEY).public_key == KEY
    assert [member.key for member in registry.members(federation)] == ["a"]


def test_a_revoked_member_stays_in_the_list_and_nothing_of_it_is_accepted(
    registry: Registry, federation: Federation, clock: Clock
) -> None:
    for member in ("a", "b"):
        registry.add_member(federation, member, tenant="rival")
    opened = registry.open_round(federation, 1)
    assert registry.record_update(opened, accepted("a", 1))
    revision, clock.now = registry.revision(), 1050.0
    revoked = registry.revoke_member(federation, "a", by="ada", reason="left")
    said = (revoked.revoked_at, revoked.revoked_by, revoked.revoked_reason)
    assert said == (1050.0, "ada", "left") and registry.revision() > revision
    assert registry.revoke_member(federation, "a", reason="another") == revoked
    assert [(m.key, m.revoked_at) for m in registry.members(federation)] == [("a", 1050.0), ("b", None)]
    with pytest.raises(RejectedUpdateError) as caught:
        registry.record_update(opened, accepted("a", 2, attempt=2))
    assert caught.value.reason == "revoked"
    rejected = UpdateRecord("a", 2, False, "revoked: left", "", 0, 0, 0)
    assert registry.record_update(opened, rejected) and registry.record_update(opened, accepted("b", 3))
    assert registry.add_member(federation, "a", tenant="rival") == revoked
    with pytest.raises(NotFoundError, match="'ghost'"):
        registry.revoke_member(federation, "ghost")


def test_what_a_tenant_was_granted_stays_and_what_is_made_afterwards_is_not_granted(
    registry: Registry, federation: Federation, clock: Clock
) -> None:
    for member in ("a", "b"):
        registry.add_member(federation, member, tenant="rival")
    registry.create_tenant("outsider")

    def live() -> list[str]:
        return [version.reference for version in registry.live("rival")]

    for number in (1, 2, 3):
        clock.now = 1000.0 + 10 * number
        commit(registry, federation, number, seed=number)
        if number == 1:
            registry.revoke_member(federation, "a")
        if number == 2:
            assert live() == ["acme/shared:2"]  # its other member is in
            clock.now += 5
            registry.revoke_member(federation, "b")
    first, second, third = registry.versions("acme", "shared")
    assert live() == ["acme/shared:2"]
    assert [registry.may_use("rival", version) for version in (first, second, third)] == [True, True, False]
    assert not registry.may_use("outsider", first) and registry.may_use("acme", third)
    registry.set_state(second, "retired")
    assert live() == ["acme/shared:1"]
    assert [version.reference for version in registry.all_live()] == ["acme/shared:3"]
    registry.add_member(federation, "c", tenant="rival")
    assert live() == ["acme/shared:3"] and registry.may_use("rival", third)


# Invitations


def test_an_invitation_makes_one_member_once(registry: Registry, federation: Federation, clock: Clock) -> None:
    invitation, token = registry.invite(federation, tenant="rival", for_s=60.0)
    assert (invitation.tenant, invitation.created_at, invitation.expires_at) == ("rival", 1000.0, 1060.0)
    assert invitation.code in token and registry.invitations(federation) == [invitation]
    clock.now = 1059.0
    member = registry.accept_invitation(token, key="a", public_key=KEY)
    assert (member.key, member.tenant, member.public_key, member.joined_at) == ("a", "rival", KEY, 1059.0)
    # Whoever did not hear the answer asks again.
    clock.now = 2000.0
    assert registry.accept_invitation(token, key="a", public_key=KEY) == member
    with pytest.raises(AlreadyExistsError, match="accepted already"):
        registry.accept_invitation(token, key="b", public_key=KEY + "B")
    registry.revoke_member(federation, "a")
    with pytest.raises(AlreadyExistsError, match="accepted already"):
        registry.accept_invitation(token, key="a", public_key=KEY)
    (used,) = registry.invitations(federation)
    assert (used.accepted_at, used.member) == (1059.0, "a")


def test_an_invitation_that_is_taken_back_opens_nothing_and_is_in_the_audit(
    registry: Registry, federation: Federation
) -> None:
    (kept, _), (gone, token) = (registry.invite(federation, tenant="rival", for_s=60.0) for _ in range(2))
    assert registry.withdraw_invitation(federation, gone.code, by="ada") == gone
    assert registry.invitations(federation) == [kept]
    with pytest.raises(NotFoundError, match="is not there, or is not yours"):
        registry.accept_invitation(token, key="a", public_key=KEY)
    other = registry.create_federation("acme", "other", base="tiny", settings={})
    for where, code in ((federation, gone.code), (other, kept.code), (federation, ""), (federation, "../x")):
        with pytest.raises(NotFoundError):
            registry.withdraw_invitation(where, code)
    entry = next(entry for entry in reversed(registry.audit("acme")) if entry.action == "invitation.withdraw")
    assert (entry.action, entry.subject, entry.by) == ("invitation.withdraw", gone.code, "ada")
    assert entry.details == {"federation": federation.reference, "invited": "rival"}


def test_an_invitation_that_was_accepted_is_not_taken_back(registry: Registry, federation: Federation) -> None:
    invitation, token = registry.invite(federation, tenant="rival", for_s=60.0)
    registry.accept_invitation(token, key="a", public_key=KEY)
    with pytest.raises(InvalidInputError, match="accepted by 'a'; revoke that member instead"):
        registry.withdraw_invitation(federation, invitation.code)
    assert len(registry.invitations(federation)) == 1


def test_what_is_no_invitation_always_gets_the_same_answer(registry: Registry, federation: Federation) -> None:
    invitation, token = registry.invite(federation, tenant="rival", for_s=60.0)
    other = registry.invite(federation, tenant="acme", for_s=60.0).token
    secret = other.split("_", 2)[2]
    said = set()
    for bad in ("", "lfi", f"lfi_{invitation.code}_", f"lfi_{invitation.code}_{secret}", token[:-1], token + "x",
                token.replace("lfi", "key"), f"lfi_{'0' * 16}_{secret}", "lfi_é_x", "\ud800"):  # fmt: skip
        with pytest.raises(NotFoundError) as caught:
            registry.accept_invitation(bad, key="a")
        said.add(str(caught.value))
    assert len(said) == 1 and registry.members(federation) == []


def test_who_guesses_a_token_does_not_wait_for_who_writes(url: str, registry: Registry, federation: Federation) -> None:
    token = registry.invite(federation, tenant="rival", for_s=60.0).token
    writer = Database(parse_url(url))
    with writer.write() as session:
        session.execute(text("SELECT 1"))  # with the database's lock, on SQLite
        with pytest.raises(NotFoundError):
            registry.accept_invitation(token[:-1], key="a")
    writer.close()


def test_an_invitation_that_expired_or_whose_key_is_taken_or_federation_stopped_makes_nobody(
    registry: Registry, federation: Federation, clock: Clock
) -> None:
    registry.add_member(federation, "a", tenant="acme", public_key=KEY)
    token = registry.invite(federation, tenant="rival", for_s=60.0).token
    with pytest.raises(AlreadyExistsError, match="a member's already"):
        registry.accept_invitation(token, key="a")
    with pytest.raises(AlreadyExistsError, match="another member's"):
        registry.accept_invitation(token, key="b", public_key=KEY)
    clock.now += 60.0
    with pytest.raises(InvalidInputError, match="expired"):
        registry.accept_invitation(token, key="b")
    for for_s in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InvalidInputError):
            registry.invite(federation, tenant="rival", for_s=for_s)
    token = registry.invite(federation, tenant="rival", for_s=60.0).token
    registry.set_federation_state(federation, "stopped")
    with pytest.raises(InvalidInputError, match="stopped"):
        registry.accept_invitation(token, key="b")
    with pytest.raises(InvalidInputError, match="stopped"):
        registry.invite(federation, tenant="rival", for_s=60.0)
    assert [member.key for member in registry.members(federation)] == ["a"]


@pytest.mark.parametrize("change", ["expires_at = 1e9", "tenant_id = 1", "federation_id = 2", "code = 'abcdef'"])
def test_the_database_neither_holds_the_secret_nor_can_widen_what_it_grants(
    registry: Registry, federation: Federation, url: str, change: str
) -> None:
    registry.create_federation("acme", "other", base="tiny", settings={})
    invitation, token = registry.invite(federation, tenant="rival", for_s=60.0)
    secret = token.removeprefix(f"lfi_{invitation.code}_")
    engine = make_engine(parse_url(url))
    with engine.begin() as connection:
        (row,) = connection.execute(text("SELECT * FROM invitations")).all()
        assert secret not in repr(row)
        connection.execute(text(f"UPDATE invitations SET {change}"))
    engine.dispose()
    with pytest.raises(NotFoundError):
        registry.accept_invitation(token.replace(invitation.code, "abcdef") if "code" in change else token, key="a")


# The audit


def said(registry: Registry, *, after: int) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Who did what, on what, with which details, in the entries behind one."""
    return [(e.by, e.action, e.subject, dict(e.details)) for e in registry.audit("acme") if e.id > after]


def test_the_audit_says_who_made_a_federation_and_put_it_into_which_state(registry: Registry) -> None:
    start = registry.audit()[-1].id
    made = registry.create_federation("acme", "fed", base="tiny", settings={"rule": "exact"}, by="ada")
    with pytest.raises(AlreadyExistsError):
        registry.create_federation("acme", "fed", base="tiny", settings={}, by="bob")
    registry.set_federation_state(made, "active", by="bob")
    registry.set_federation_state(made, "paused", by="bob", reason="a look \0")
    registry.set_federation_state(made, "paused", by="eve", reason="again")
    registry.set_federation_state(made, "active", by="ada")
    registry.set_federation_state(made, "stopped", by="ada", reason="done")
    with pytest.raises(InvalidInputError):
        registry.set_federation_state(made, "active", by="eve")
    looked = "a look \N{REPLACEMENT CHARACTER}"
    assert said(registry, after=start) == [
        ("ada", "federation.create", "acme/fed", {"base": "tiny"}),
        ("bob", "federation.state", "acme/fed", {"state": "paused", "before": "active", "reason": looked}),
        ("ada", "federation.state", "acme/fed", {"state": "active", "before": "paused", "reason": ""}),
        ("ada", "federation.state", "acme/fed", {"state": "stopped", "before": "active", "reason": "done"}),
    ]


def test_the_audit_says_who_added_and_revoked_a_member(registry: Registry, federation: Federation) -> None:
    start = registry.audit()[-1].id
    for public_key in ("", "", KEY, KEY, ""):
        registry.add_member(federation, "a", tenant="rival", public_key=public_key, by="ada")
    with pytest.raises(AlreadyExistsError):
        registry.add_member(federation, "a", tenant="acme", by="eve")
    for reason in ("left", "another"):
        registry.revoke_member(federation, "a", by="bob", reason=reason)
    with pytest.raises(NotFoundError):
        registry.revoke_member(federation, "ghost", by="eve")
    where = {"federation": "acme/fed", "whose": "rival"}
    assert said(registry, after=start) == [
        ("ada", "member.add", "a", where),
        ("ada", "member.public_key", "a", where),
        ("bob", "member.revoke", "a", {**where, "reason": "left"}),
    ]
    assert KEY not in repr(registry.audit()) and [e.tenant for e in registry.audit("rival")] == ["rival"]


def test_the_audit_says_who_invited_and_who_accepted_and_never_the_token(
    registry: Registry, federation: Federation
) -> None:
    start, long = registry.audit()[-1].id, "m" * 500
    made = [registry.invite(federation, tenant="rival", for_s=60.0, by="ada") for _ in range(3)]
    for _ in range(2):
        registry.accept_invitation(made[0].token, key="a", public_key=KEY)
        registry.accept_invitation(made[1].token, key=long)
        registry.accept_invitation(made[2].token, key="c", by="bob")
    with pytest.raises(AlreadyExistsError):
        registry.accept_invitation(made[0].token, key="d", by="eve")
    where = {"federation": "acme/fed", "invited": "rival"}
    first, second, third = (each.invitation.code for each in made)
    assert said(registry, after=start) == [
        *(("ada", "invitation.create", code, {**where, "expires_at": 1060.0}) for code in (first, second, third)),
        ("member a", "invitation.accept", first, {**where, "member": "a"}),
        (f"member {long}"[:100], "invitation.accept", second, {**where, "member": long}),
        ("bob", "invitation.accept", third, {**where, "member": "c"}),
    ]
    assert not any(each.token.split("_", 2)[2] in repr(registry.audit()) for each in made)


def test_an_invitation_is_accepted_by_somebody_who_can_be_named_or_not_at_all(
    registry: Registry, federation: Federation
) -> None:
    token = registry.invite(federation, tenant="rival", for_s=60.0).token
    with pytest.raises(InvalidInputError, match="who does it"):
        registry.accept_invitation(token, key="a", by="two\nlines")
    assert registry.members(federation) == [] and registry.invitations(federation)[0].member is None
    assert registry.accept_invitation(token, key="a").key == "a"


def test_the_audit_has_one_entry_for_a_round_that_was_committed(registry: Registry, federation: Federation) -> None:
    start, opened = registry.audit()[-1].id, registry.open_round(federation, 1)
    experts = [NewExpert(name, make_adapter(seed), "exact") for seed, name in enumerate(("shared", "expert-1"))]
    for by in ("me", "other"):
        registry.commit_round(opened, experts, report={}, by=by)
    commit(registry, federation, 2)
    registry.abandon_round(registry.open_round(federation, 3), "no quorum")
    assert said(registry, after=start) == [
        ("me", "round.commit", "acme/fed round 1", {"experts": ["acme/shared:1", "acme/expert-1:1"]}),
        ("", "round.commit", "acme/fed round 2", {"experts": ["acme/shared:2"]}),
    ]


# What is kept of updates


@pytest.fixture
def three_rounds(registry: Registry, federation: Federation) -> Federation:
    """Rounds 1 to 3 of ``a`` and ``b``, with weights of their own; in the third ``c`` came and did not count."""
    for member in ("a", "b", "c"):
        registry.add_member(federation, member, tenant="rival")
    commit(registry, federation, 1, seed=101, a=1, b=2)
    commit(registry, federation, 2, seed=102, a=3, b=4)
    opened = registry.open_round(federation, 3)
    registry.record_update(opened, accepted("c", 5))
    commit(registry, federation, 3, seed=103, a=6, b=7)
    return federation


def dropped(registry: Registry, federation: Federation) -> set[tuple[str, int]]:
    """Whose updates of which rounds; checks that exactly the others have factors."""
    gone = set()
    for update in registry.journal(federation):
        if update.dropped_at is None:
            assert registry.update_factors(update).digest == update.digest
        else:
            gone.add((update.member, update.ordered_in))
            with pytest.raises(NotFoundError, match="were deleted"):
                registry.update_factors(update)
    return gone


def test_factors_of_older_rounds_go_and_their_journal_stays(
    registry: Registry, three_rounds: Federation, folder: Path, clock: Clock
) -> None:
    clock.now = 5000.0
    before = registry.journal(three_rounds)
    registry.drop_factors(three_rounds, through=2, keep=[UpdateKey("b", 2, 1)])
    assert dropped(registry, three_rounds) == {("a", 1), ("b", 1), ("a", 2)}
    after = registry.journal(three_rounds)
    assert [replace(update, dropped_at=None) for update in after] == before
    assert {update.dropped_at for update in after} == {None, 5000.0}
    stored = {path.name for path in (folder / "blobs" / "sha256").glob("*/*")}
    assert {f"sha256:{name}" for name in stored} == {make_adapter(seed).digest for seed in (4, 5, 6, 7, 101, 102, 103)}
    registry.drop_factors(three_rounds, through=2)
    assert dropped(registry, three_rounds) == {("a", 1), ("b", 1), ("a", 2), ("b", 2)}


def test_what_did_not_count_goes_only_where_it_never_will(registry: Registry, three_rounds: Federation) -> None:
    registry.drop_factors(three_rounds, through=3)
    assert ("c", 3) not in dropped(registry, three_rounds)
    registry.drop_factors(three_rounds, through=3, uncounted=True)
    assert ("c", 3) in dropped(registry, three_rounds)


def test_weights_that_something_else_names_stay(registry: Registry, federation: Federation, folder: Path) -> None:
    other = registry.create_federation("rival", "other", base="tiny", settings={})
    for member in ("a", "b", "c", "d"):
        registry.add_member(federation, member, tenant="rival")
    registry.add_member(other, "a", tenant="rival")
    registry.create_adapter("acme", "imported", base="tiny")
    registry.add_version("acme", "imported", make_adapter(1))
    # As a version, as the round's own expert, as another federation's update, and as one of a later round.
    commit(registry, federation, 1, seed=2, a=1, b=2, c=3, d=4)
    assert registry.record_update(registry.open_round(other, 1), accepted("a", 3))
    commit(registry, federation, 2, seed=5, a=4)
    registry.drop_factors(federation, through=1)
    assert all(BlobStore(folder / "blobs").path(make_adapter(seed).digest).is_dir() for seed in (1, 2, 3, 4, 5))
    registry.drop_factors(federation, through=2)
    assert not BlobStore(folder / "blobs").path(make_adapter(4).digest).exists()
    assert registry.load(registry.resolve("acme/imported")).digest == make_adapter(1).digest


def test_weights_that_somebody_is_about_to_name_stay(
    registry: Registry, three_rounds: Federation, folder: Path, clock: Clock
) -> None:
    weights = BlobStore(folder / "blobs").path(make_adapter(1).digest)
    with registry._storing([make_adapter(1).digest]):  # as another process
        registry.drop_factors(three_rounds, through=3)
        assert weights.is_dir() and not BlobStore(folder / "blobs").path(make_adapter(2).digest).exists()
    assert ("a", 1) in dropped(registry, three_rounds)
    assert registry.collect_garbage(older_than_s=0.0).deleted == ()
    clock.now += claims.LASTS_S  # and never did
    assert registry.collect_garbage(older_than_s=0.0).deleted == (make_adapter(1).digest,)
    assert not weights.exists()


def test_weights_that_come_again_while_they_are_deleted_are_there(registry: Registry, three_rounds: Federation) -> None:
    registry.create_adapter("acme", "mine", base="tiny")
    failed: list[BaseException] = []

    def add() -> None:
        try:
            for _ in range(20):
                registry.load(again(lambda: registry.add_version("acme", "mine", make_adapter(1))))
        except BaseException as error:
            failed.append(error)

    adding = threading.Thread(target=add)
    adding.start()
    while adding.is_alive():
        registry.drop_factors(three_rounds, through=3, uncounted=True)
    adding.join()
    assert failed == []
    assert all(registry.load(version).digest == make_adapter(1).digest for version in registry.versions("acme", "mine"))


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_between_journal_and_weights_is_made_good_by_a_later_call(
    registry: Registry, three_rounds: Federation, clock: Clock, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    delete = BlobStore.delete

    def crash(self: BlobStore, digests: Sequence[str]) -> Deletion:
        if after:
            delete(self, digests)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "delete", crash)
        with pytest.raises(KeyboardInterrupt):
            registry.drop_factors(three_rounds, through=1)
    assert dropped(registry, three_rounds) == {("a", 1), ("b", 1)}
    gone = {make_adapter(seed).digest for seed in (1, 2)}

    def left() -> set[str]:
        return gone & {blob.digest for blob in registry._blobs.stored()}

    registry.drop_factors(three_rounds, through=1)
    assert left() == (set() if after else gone)  # what was under way may be still
    clock.now += claims.UNSURE_S
    registry.drop_factors(three_rounds, through=1)
    assert left() == set()
    registry.create_adapter("acme", "mine", base="tiny")
    assert registry.add_version("acme", "mine", make_adapter(1)).number == 1


def test_nobody_waits_for_a_federation_whose_factors_are_deleted(
    registry: Registry, three_rounds: Federation, url: str, folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = registry.take_lease(three_rounds, "mine", for_s=5.0)
    delete, renewed = BlobStore.delete, []

    def slowly(self: BlobStore, digests: Sequence[str]) -> Deletion:
        clock.now += 3.0
        renewed.append(other.take_lease(three_rounds, "mine", for_s=5.0).expires_at)
        other.open_round(three_rounds, 4, token=mine.token)
        return delete(self, digests)

    monkeypatch.setattr(claims, "AT_ONCE", 2)
    monkeypatch.setattr(BlobStore, "delete", slowly)
    with Registry.open(url, folder / "blobs", clock=clock) as other:  # its own connections
        registry.drop_factors(three_rounds, through=3, token=mine.token)
    assert renewed == [1008.0, 1011.0, 1014.0]
    assert len(dropped(registry, three_rounds)) == 6


def test_who_lost_the_lease_deletes_nothing(registry: Registry, three_rounds: Federation, clock: Clock) -> None:
    mine = registry.take_lease(three_rounds, "mine", for_s=5.0)
    clock.now += 6.0
    registry.take_lease(three_rounds, "other", for_s=5.0)
    with pytest.raises(UnavailableError, match="another coordinator"):
        registry.drop_factors(three_rounds, through=3, token=mine.token)
    assert dropped(registry, three_rounds) == set()


def test_each_members_last_words_are_given(registry: Registry, three_rounds: Federation, clock: Clock) -> None:
    clock.now = 7000.0
    opened = registry.open_round(three_rounds, 4)
    registry.record_update(opened, UpdateRecord("a", 1, False, "norm: too large", "", 0, 0, 0))
    registry.record_update(opened, UpdateRecord("a", 2, False, "failed", "", 0, 0, 0))
    found = [(u.member, u.ordered_in, u.reason, u.recorded_at) for u in registry.last_words(three_rounds)]
    assert found == [("c", 3, "", 1000.0), ("a", 3, "", 1000.0), ("b", 3, "", 1000.0), ("a", 4, "failed", 7000.0)]


def test_each_members_last_judged_update_is_given_whatever_came_to_nothing_after_it(
    registry: Registry, three_rounds: Federation
) -> None:
    opened = registry.open_round(three_rounds, 4)
    registry.record_update(opened, UpdateRecord("a", 1, False, "norm: too large", "", 0, 0, 0))
    registry.record_update(opened, UpdateRecord("a", 2, False, "failed: out of memory", "", 0, 0, 0))
    registry.record_update(opened, UpdateRecord("b", 1, False, "failed: its node is gone", "", 0, 0, 0))
    found = [(u.member, u.ordered_in, u.attempt, u.accepted, u.kind) for u in registry.judged(three_rounds)]
    assert found == [("a", 4, 1, False, "norm"), ("b", 3, 1, True, ""), ("c", 3, 1, True, "")]
