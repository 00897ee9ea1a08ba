"""A federation in the registry against a model of plain dicts: members, invitations, rounds, and who may use what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorafleet.errors import AlreadyExistsError, InvalidInputError, NotFoundError, RejectedUpdateError
from lorafleet.registry import NewExpert, Registry
from lorafleet.registry.records import Federation, UpdateKey, UpdateRecord
from tests.registry.conftest import Clock, make_adapter
from tests.registry.machines import outcome, run

OWNER, TENANTS, OUTSIDER = "a", ("b", "c"), "d"
EXPERT = make_adapter(0, rank=1)
FACTORS = make_adapter(1, rank=1)

members = st.sampled_from("mmnno")
tenants = st.sampled_from(TENANTS)
backs = st.sampled_from([0, 0, 0, 0, 1, 2, -1])
"""How many rounds before the newest: mostly it, so that there are some."""


@dataclass
class Model:
    """One federation; times are the clock's."""

    state: str = "active"
    members: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    """Key → tenant, when it was revoked."""
    invited: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """Token → tenant, who accepted it."""
    rounds: list[str] = field(default_factory=list)
    updates: dict[tuple[int, str, int], bool] = field(default_factory=dict)
    """Round, member and attempt → whether it was accepted."""
    made_in: dict[int, int] = field(default_factory=dict)
    """Round → the number of the version that it made."""
    made_at: list[float] = field(default_factory=list)
    """Of each version"""

    def round(self, number: int) -> str:
        if not 0 < number <= len(self.rounds):
            raise NotFoundError
        return self.rounds[number - 1]

    def ends(self, tenant: str) -> float | None:
        """Up to when versions are a tenant's to use; None: those to come, too."""
        if tenant == OWNER:
            return None
        mine = [revoked for owner, revoked in self.members.values() if owner == tenant]
        return None if None in mine else max((revoked for revoked in mine if revoked is not None), default=0.0)

    def usable(self, tenant: str) -> list[int]:
        until = self.ends(tenant)
        return [n for n, made_at in enumerate(self.made_at, start=1) if until is None or made_at <= until]


class Machine(RuleBasedStateMachine):
    """Works in tenants of its own, so that many runs share one database."""

    def __init__(self, registry: Registry, clock: Clock, run: int) -> None:
        super().__init__()
        self.registry, self.clock, self.model = registry, clock, Model()
        self.own = {tenant: f"{tenant}-{run}" for tenant in (OWNER, *TENANTS, OUTSIDER)}
        self.codes: dict[str, str] = {}
        self.changed = False
        for name in self.own.values():
            registry.create_tenant(name)

    @property
    def federation(self) -> Federation:
        return self.registry.federation(self.own[OWNER], "fed")

    def same(self, model: Callable[[], Any], real: Callable[[], Any]) -> None:
        self.clock.now += 1.0
        before = self.registry.revision()
        expected = outcome(model)
        assert outcome(real) == expected
        self.changed = not isinstance(expected, type)
        if not self.changed:
            assert self.registry.revision() == before

    @initialize()
    def begin(self) -> None:
        self.registry.create_federation(self.own[OWNER], "fed", base="tiny", settings={})
        self.add("m", "b")
        self.add("n", "c")
        self.open(0)
        self.close(0, "commit")
        self.revoke("n")

    # Few rules, as Hypothesis leaves out some of them in each run

    @rule(
        verb=st.sampled_from(["add", "add", "revoke", "revoke", "active", "paused", "stopped"]),
        member=members,
        tenant=tenants,
        seldom=st.integers(0, 3),
    )
    def govern(self, verb: str, member: str, tenant: str, seldom: int) -> None:
        if verb == "add":
            self.add(member, tenant)
        elif verb == "revoke":
            self.revoke(member)
        elif verb != "stopped" or not seldom:
            self.put(verb)

    @rule(
        verb=st.sampled_from(["open", "record", "record", "commit", "commit", "abandon"]),
        back=backs,
        member=st.sampled_from("mmmnox"),
        attempt=st.integers(0, 1),
        accepted=st.booleans(),
    )
    def work(self, verb: str, back: int, member: str, attempt: int, accepted: bool) -> None:
        if verb == "open" or (back == 0 and self.model.rounds[-1] != "open"):
            self.open(back)
        elif verb == "record":
            self.record(back, member, attempt, accepted)
        else:
            self.close(back, verb)

    @rule(pick=st.integers(0, 3), member=members, tenant=tenants, withdrawn=st.sampled_from([False, False, True]))
    def admit(self, pick: int, member: str, tenant: str, withdrawn: bool) -> None:
        if pick >= len(self.model.invited):
            self.invite(tenant)
        else:
            self.answer(list(self.model.invited)[pick], member, withdrawn)

    # What they do

    def add(self, member: str, tenant: str) -> None:
        def model() -> str:
            if self.model.members.setdefault(member, (tenant, None))[0] != tenant:
                raise AlreadyExistsError
            return member

        self.same(model, lambda: self.registry.add_member(self.federation, member, tenant=self.own[tenant]).key)

    def revoke(self, member: str) -> None:
        def model() -> float:
            if member not in self.model.members:
                raise NotFoundError
            tenant, revoked_at = self.model.members[member]
            self.model.members[member] = (tenant, self.clock.now if revoked_at is None else revoked_at)
            return self.model.members[member][1] or 0.0

        self.same(model, lambda: self.registry.revoke_member(self.federation, member).revoked_at)

    def put(self, state: str) -> None:
        def model() -> str:
            if self.model.state == "stopped" != state:
                raise InvalidInputError
            self.model.state = state
            return state

        self.same(model, lambda: self.registry.set_federation_state(self.federation, state).state)  # type: ignore[arg-type]

    def invite(self, tenant: str) -> None:
        invited: list[Any] = []

        def model() -> None:
            if self.model.state == "stopped":
                raise InvalidInputError

        def real() -> None:
            invited.append(self.registry.invite(self.federation, tenant=self.own[tenant], for_s=1e6))

        self.same(model, real)
        for made in invited:
            self.model.invited[made.token] = (tenant, None)
            self.codes[made.token] = made.invitation.code

    def answer(self, token: str, member: str, withdrawn: bool) -> None:
        tenant, accepted = self.model.invited[token]

        def accept() -> str:
            if accepted is not None:
                if accepted != member or self.model.members[member][1] is not None:
                    raise AlreadyExistsError
                return member
            if self.model.state == "stopped":
                raise InvalidInputError
            if member in self.model.members:
                raise AlreadyExistsError
            self.model.invited[token] = (tenant, member)
            self.model.members[member] = (tenant, None)
            return member

        def withdraw() -> None:
            if accepted is not None:
                raise InvalidInputError
            del self.model.invited[token]

        if withdrawn:
            self.same(
                withdraw,
                lambda: self.registry.withdraw_invitation(self.federation, self.codes[token]).member,
            )
        else:
            self.same(accept, lambda: self.registry.accept_invitation(token, key=member).key)

    def open(self, back: int) -> None:
        number = len(self.model.rounds) + 1 - back

        def model() -> str:
            if not 0 < number <= len(self.model.rounds) + 1:
                raise InvalidInputError
            if number == len(self.model.rounds) + 1:
                self.model.rounds.append("open")
            return self.model.round(number)

        self.same(model, lambda: self.registry.open_round(self.federation, number).state)

    def record(self, back: int, member: str, attempt: int, accepted: bool) -> None:
        number = len(self.model.rounds) - back
        updates, key = self.model.updates, (number, member, attempt)

        def model() -> bool:
            state = self.model.round(number)
            if member not in self.model.members:
                raise NotFoundError
            if accepted and self.model.members[member][1] is not None:
                raise RejectedUpdateError("revoked", "")
            if state != "open" and key not in updates:
                raise RejectedUpdateError("round_closed", "")
            if key in updates or (accepted and any(updates.get((number, member, other)) for other in (0, 1))):
                return False
            updates[key] = accepted
            return True

        def real() -> bool:
            factors = FACTORS if accepted else None
            reason, digest = ("", FACTORS.digest) if accepted else ("norm: too large", "")
            update = UpdateRecord(member, attempt, accepted, reason, digest, 10, 1, 500, {}, factors)
            return self.registry.record_update(self.round(number), update)

        self.same(model, real)

    def close(self, back: int, how: str) -> None:
        number = len(self.model.rounds) - back
        counted = [key for key, accepted in self.model.updates.items() if key[0] == number and accepted]

        def commit() -> list[int]:
            state = self.model.round(number)
            if state == "abandoned":
                raise InvalidInputError
            if state == "open":
                self.model.rounds[number - 1] = "committed"
                self.model.made_at.append(self.clock.now)
                self.model.made_in[number] = len(self.model.made_at)
            return [self.model.made_in[number]]

        def abandon() -> None:
            if self.model.round(number) == "committed":
                raise InvalidInputError
            self.model.rounds[number - 1] = "abandoned"

        def real_commit() -> list[int]:
            shares = {UpdateKey(member, number, attempt): 1.0 / len(counted) for _, member, attempt in counted}
            expert = NewExpert("shared", EXPERT, "exact", members=len(counted) or None)
            made = self.registry.commit_round(self.round(number), [expert], report={}, counted=shares)
            return [version.number for version in made]

        if how == "commit":
            self.same(commit, real_commit)
        else:
            self.same(abandon, lambda: self.registry.abandon_round(self.round(number), "too few"))

    def round(self, number: int) -> Any:
        found = [each for each in self.registry.rounds(self.federation) if each.number == number]
        if not found:
            raise NotFoundError
        return found[0]

    # What is seen

    @precondition(lambda self: self.changed and self.model.made_at)
    @invariant()
    def each_tenant_may_use_what_was_made_while_it_had_a_member(self) -> None:
        name = f"{self.own[OWNER]}/shared"
        for tenant in (OWNER, *TENANTS, OUTSIDER):
            own, usable = self.own[tenant], self.model.usable(tenant)
            is_current = tenant == OWNER or self.model.ends(tenant) is None
            assert [version.reference for version in self.registry.live(own)] == [f"{name}:{n}" for n in usable[-1:]]
            seen = self.registry.versions(self.own[OWNER], "shared", usable_by=own)
            assert [version.number for version in seen] == usable
            for version in self.registry.versions(self.own[OWNER], "shared"):
                assert self.registry.may_use(own, version) == (version.number in usable)
            shown = self.registry.aliases(self.own[OWNER], "shared", shown_to=own)
            assert shown == ({"champion": len(self.model.made_at)} if is_current else {})
            for reference in (name, f"{name}@champion"):  # where both point is of today

                def resolved(reference: str = reference, own: str = own) -> int:
                    return self.registry.resolve(reference, usable_by=own).number

                assert outcome(resolved) == (len(self.model.made_at) if is_current else NotFoundError)

    def teardown(self) -> None:
        found = {member.key: member for member in self.registry.members(self.federation)}
        assert {key: (each.tenant, each.revoked_at) for key, each in found.items()} == {
            key: (self.own[tenant], revoked_at) for key, (tenant, revoked_at) in self.model.members.items()
        }
        assert [each.state for each in self.registry.rounds(self.federation)] == self.model.rounds
        invited = {(self.codes[token], member) for token, (_, member) in self.model.invited.items()}
        assert {(each.code, each.member) for each in self.registry.invitations(self.federation)} == invited
        for each in self.registry.rounds(self.federation):
            kept = self.registry.updates(each, accepted_only=False)
            expected = {key[1:]: accepted for key, accepted in self.model.updates.items() if key[0] == each.number}
            assert {(update.member, update.attempt): update.accepted for update in kept} == expected
            counts = {update.member for update in kept if update.counted_in == each.number}
            accepted = {member for (member, _), is_accepted in expected.items() if is_accepted}
            assert counts == (accepted if each.state == "committed" else set())
        for version in self.registry.versions(self.own[OWNER], "shared") if self.model.made_at else ():
            (number,) = [number for number, made in self.model.made_in.items() if made == version.number]
            members = sum(accepted for key, accepted in self.model.updates.items() if key[0] == number)
            assert version.lineage is not None
            assert (version.lineage.round, version.lineage.members) == (number, members or None)


@pytest.fixture
def runs() -> Iterator[int]:
    return count()


def test_any_order_of_a_federations_calls_gives_what_a_model_gives(
    registry: Registry, clock: Clock, runs: Iterator[int]
) -> None:
    run(lambda: Machine(registry, clock, next(runs)), examples=4)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_many_orders_of_a_federations_calls_give_what_a_model_gives(
    registry: Registry, clock: Clock, runs: Iterator[int]
) -> None:
    run(lambda: Machine(registry, clock, next(runs)), examples=25, steps=60, drawn=True)
