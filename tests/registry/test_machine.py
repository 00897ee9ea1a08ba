"""The registry against a model of plain dicts: any order of calls gives the same answers, and leaves the same state."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorafleet.errors import (
    AlreadyExistsError,
    InvalidInputError,
    NotFoundError,
    PromotionRefusedError,
    UnauthenticatedError,
)
from lorafleet.registry import Registry, Version
from tests.registry.conftest import make_adapter
from tests.registry.machines import outcome, run

TENANTS = ("a", "b", "c")
USABLE = ("staged", "evaluated")

# Mostly one adapter and versions that are there, so that calls meet one another.
tenants = st.sampled_from(TENANTS)
adapters = st.sampled_from([*[("a", "x")] * 6, ("a", "y"), ("b", "x")])
numbers = st.sampled_from([1, 2, 3, 1, 2, 3, 4])
aliases = st.sampled_from(["champion", "champion", "champion", "canary"])


@dataclass
class Model:
    """One adapter; numbers count from 1."""

    states: list[str] = field(default_factory=list)
    losses: dict[int, dict[str, float]] = field(default_factory=dict)
    stacks: dict[str, list[int]] = field(default_factory=dict)
    """Alias → where it pointed, the last being where it does."""
    seeds: list[int] = field(default_factory=list)
    """Of each version's weights"""
    purged: set[int] = field(default_factory=set)

    def state(self, number: int) -> str:
        if number > len(self.states):
            raise NotFoundError
        return self.states[number - 1]

    def usable(self, number: int) -> bool:
        return self.state(number) in USABLE

    def current(self) -> int | None:
        """What the bare reference gives."""
        stack = self.stacks.get("champion")
        if stack and self.usable(stack[-1]):
            return stack[-1]
        return max((n for n in range(1, len(self.states) + 1) if self.usable(n)), default=None)

    def move(self, alias: str, number: int) -> None:
        if not self.usable(number):
            raise InvalidInputError
        stack = self.stacks.setdefault(alias, [])
        if stack[-1:] != [number]:
            stack.append(number)

    def back(self, alias: str) -> int | None:
        stack = self.stacks[alias]
        for height in range(len(stack) - 1, 0, -1):
            if self.usable(stack[height - 1]) and stack[height - 1] != stack[-1]:
                del stack[height:]
                return stack[-1]
        return None

    def promote(self, alias: str, number: int, force: bool) -> int | None:
        self.state(number)
        before = self.stacks[alias][-1] if alias in self.stacks else None
        if not (force or before in (None, number) or self.state(before) == "quarantined"):
            new, old = self.losses.get(number, {}), self.losses.get(before, {})
            both = new.keys() & old.keys() or new.keys() | old.keys()
            medians = [
                statistics.median([loss for member, loss in each.items() if member in both] or [9.0])
                for each in (new, old)
            ]
            if not (new and old and medians[0] < medians[1]):
                raise PromotionRefusedError
        self.move(alias, number)
        return before


class Machine(RuleBasedStateMachine):
    """Works in three tenants of its own, so that many runs share one database."""

    def __init__(self, registry: Registry, run: int) -> None:
        super().__init__()
        self.registry = registry
        self.own = {tenant: f"{tenant}-{run}" for tenant in TENANTS}
        for name in self.own.values():
            registry.create_tenant(name)
        self.adapters: dict[tuple[str, str], Model] = {}
        self.grants: set[tuple[str, str, str | None]] = set()
        self.keys: dict[str, tuple[str, str, bool]] = {}
        """Token → tenant, key id, whether it opens."""
        self.changed = False
        self.weights = [make_adapter(4 * run + seed, rank=1) for seed in range(4)]
        """Of this run alone, so that nobody else names them."""
        self.service = f"service-{run}"
        self.held: set[str] = set()

    def expect(self, model: Callable[[], Any], real: Callable[[], Any]) -> None:
        """Both give the same, or raise the same kind of error; what fails changes no revision."""
        before = self.registry.revision()
        expected = outcome(model)
        assert outcome(real) == expected
        self.changed = not isinstance(expected, type)
        if not self.changed:
            assert self.registry.revision() == before

    def adapter(self, adapter: tuple[str, str]) -> Model:
        if adapter not in self.adapters:
            raise NotFoundError
        return self.adapters[adapter]

    def version(self, adapter: tuple[str, str], number: int) -> Version:
        for version in self.registry.versions(self.own[adapter[0]], adapter[1]):
            if version.number == number:
                return version
        raise NotFoundError

    @staticmethod
    def ignore(_: object) -> None:
        """What is checked elsewhere."""

    @initialize()
    def begin(self) -> None:
        for _ in range(3):
            self.add_version(("a", "x"), 0)

    # Few rules, as Hypothesis leaves out some of them in each run

    @precondition(lambda self: sum(len(model.states) for model in self.adapters.values()) < 7)
    @rule(adapter=adapters, seed=st.integers(0, 3))
    def add_version(self, adapter: tuple[str, str], seed: int) -> None:
        """Of an adapter that is made with its first one."""
        tenant, name = adapter

        def create() -> None:
            if adapter in self.adapters:
                raise AlreadyExistsError
            self.adapters[adapter] = Model()

        def add() -> int:
            self.adapters[adapter].states.append("staged")
            self.adapters[adapter].seeds.append(seed)
            return len(self.adapters[adapter].states)

        self.expect(create, lambda: self.ignore(self.registry.create_adapter(self.own[tenant], name, base="tiny")))
        self.expect(add, lambda: self.registry.add_version(self.own[tenant], name, self.weights[seed]).number)

    @rule(
        adapter=adapters,
        number=numbers,
        verb=st.sampled_from(["evaluate", "evaluate", "retire", "quarantine", "restore", "set"]),
        state=st.sampled_from(["staged", "evaluated", "quarantined", "retired"]),
        member=st.sampled_from("mno"),
        loss=st.integers(1, 3),
    )
    def judge(self, adapter: tuple[str, str], number: int, verb: str, state: str, member: str, loss: int) -> None:
        def model() -> Any:
            found = self.adapter(adapter)
            old = found.state(number)
            if verb == "evaluate":
                found.losses.setdefault(number, {})[member] = float(loss)
                return None
            pointing = sorted(alias for alias, stack in found.stacks.items() if stack[-1] == number)
            if (verb == "retire" and pointing) or (verb == "restore" and old in USABLE):
                raise InvalidInputError
            measured = "evaluated" if number in found.losses else "staged"
            if number in found.purged and (verb == "restore" or (verb == "set" and state in USABLE)):
                raise NotFoundError
            new = {"retire": "retired", "quarantine": "quarantined", "restore": measured, "set": state}[verb]
            found.states[number - 1] = new
            return {alias: found.back(alias) for alias in pointing} if verb == "quarantine" else new

        def real() -> Any:
            version = self.version(adapter, number)
            if verb == "evaluate":
                return self.registry.record_evaluation(version, member=member, loss=float(loss), tokens=1)
            if verb == "quarantine":
                return self.registry.quarantine(version).aliases
            if verb == "set":
                return self.registry.set_state(version, state).state  # type: ignore[arg-type]
            return getattr(self.registry, verb)(version).state

        self.expect(model, real)

    @rule(
        adapter=adapters,
        number=numbers,
        alias=aliases,
        verb=st.sampled_from(["set", "promote", "promote", "promote", "force", "rollback", "rollback"]),
    )
    def point(self, adapter: tuple[str, str], number: int, alias: str, verb: str) -> None:
        def model() -> int | None:
            found = self.adapter(adapter)
            if verb == "set":
                return found.move(alias, number)
            if verb != "rollback":
                return found.promote(alias, number, verb == "force")
            if alias not in found.stacks:
                raise NotFoundError
            back = found.back(alias)
            if back is None:
                raise InvalidInputError
            return back

        def real() -> int | None:
            tenant, name = self.own[adapter[0]], adapter[1]
            if verb == "set":
                return self.registry.set_alias(tenant, name, alias, number)
            if verb == "rollback":
                return self.registry.rollback(tenant, name, alias)
            return self.registry.promote(self.version(adapter, number), alias, force=verb == "force").before

        self.expect(model, real)

    @rule(
        adapter=adapters,
        tenant=tenants,
        to=st.sampled_from([None, *TENANTS]),
        pick=st.integers(0, 9),
        verb=st.sampled_from(["grant", "grant", "revoke_grant", "create_key", "revoke_key"]),
    )
    def admit(self, adapter: tuple[str, str], tenant: str, to: str | None, pick: int, verb: str) -> None:
        if verb in ("grant", "revoke_grant"):
            self.share(adapter, to, verb)
        elif verb == "create_key" or not self.keys:
            key, token = self.registry.create_key(self.own[tenant])
            self.keys[token] = (tenant, key.key_id, True)
        else:
            self.revoke_key(list(self.keys)[pick % len(self.keys)], tenant)

    def share(self, adapter: tuple[str, str], to: str | None, verb: str) -> None:
        def model() -> None:
            self.adapter(adapter)
            grant = (*adapter, to)
            if verb == "grant" and to == adapter[0]:
                raise InvalidInputError
            if verb == "revoke_grant" and grant not in self.grants:
                raise NotFoundError
            (self.grants.add if verb == "grant" else self.grants.remove)(grant)

        def real() -> None:
            getattr(self.registry, verb)(self.own[adapter[0]], adapter[1], to=to and self.own[to])

        self.expect(model, real)

    def revoke_key(self, token: str, tenant: str) -> None:
        owner, key_id, _ = self.keys[token]

        def model() -> None:
            if tenant != owner:
                raise NotFoundError
            self.keys[token] = (owner, key_id, False)

        self.expect(model, lambda: self.ignore(self.registry.revoke_key(self.own[tenant], key_id)))

    @rule(
        verb=st.sampled_from(["crash", "hold", "release", "collect", "collect", "purge", "purge"]),
        seed=st.integers(0, 3),
    )
    def tidy(self, verb: str, seed: int) -> None:
        digest = self.weights[seed].digest
        if verb == "crash":  # after weights were stored, and before they were named
            self.registry._blobs.put(self.weights[seed])
        elif verb == "hold":
            self.registry.hold(self.service, [digest], for_s=1.0)
            self.held.add(digest)
        elif verb == "release":
            self.registry.release(self.service)
            self.held.clear()
        else:
            self.collect(purge=verb == "purge")

    def collect(self, *, purge: bool) -> None:
        mine = {weights.digest for weights in self.weights}
        expected = []
        for (tenant, name), adapter in sorted(self.adapters.items()) if purge else ():
            for number, state in enumerate(adapter.states, start=1):
                pointed_at = any(stack[-1] == number for stack in adapter.stacks.values())
                held = self.weights[adapter.seeds[number - 1]].digest in self.held
                if state not in USABLE and number not in adapter.purged and not (pointed_at or held):
                    adapter.purged.add(number)
                    expected.append(f"{self.own[tenant]}/{name}:{number}")
        age = 0.0 if purge else None
        said = self.registry.collect_garbage(older_than_s=0.0, retired_older_than_s=age, dry_run=True)
        assert self.registry.collect_garbage(older_than_s=0.0, retired_older_than_s=age) == said
        assert [each for each in said.purged if each.partition("/")[0] in self.own.values()] == expected
        needed = self.held | {
            self.weights[seed].digest
            for adapter in self.adapters.values()
            for number, seed in enumerate(adapter.seeds, start=1)
            if number not in adapter.purged
        }
        stored = {blob.digest for blob in self.registry._blobs.stored()} & mine
        # What was held may never have been stored.
        assert stored <= needed and needed - stored <= self.held
        self.changed = True

    # What is seen

    @precondition(lambda self: self.changed)
    @invariant()
    def each_tenant_may_use_its_own_and_what_it_was_granted(self) -> None:
        for tenant in TENANTS:
            expected = [
                f"{self.own[owner]}/{name}:{current}"
                for (owner, name), adapter in sorted(self.adapters.items())
                if (owner == tenant or {(owner, name, tenant), (owner, name, None)} & self.grants)
                and (current := adapter.current()) is not None
            ]
            assert [version.reference for version in self.registry.live(self.own[tenant])] == expected

    def teardown(self) -> None:
        for (tenant, name), adapter in self.adapters.items():
            versions = self.registry.versions(self.own[tenant], name)
            assert [v.state for v in versions] == adapter.states
            assert {v.number for v in versions if v.purged_at is not None} == adapter.purged
            for version in versions:
                if version.number not in adapter.purged:
                    assert self.registry.load(version).digest == version.digest
            found = self.registry.aliases(self.own[tenant], name)
            assert found == {alias: stack[-1] for alias, stack in adapter.stacks.items()}
        for token, (tenant, key_id, opens) in self.keys.items():
            try:
                key = self.registry.authenticate(token)
            except UnauthenticatedError:
                assert not opens
            else:
                assert opens and (key.tenant, key.key_id) == (self.own[tenant], key_id)
        self.registry.release(self.service)
        for tenant, name, to in self.grants:
            self.registry.revoke_grant(self.own[tenant], name, to=to and self.own[to])


@pytest.fixture
def runs() -> Iterator[int]:
    return count()


def test_any_order_of_calls_gives_what_a_model_of_dicts_gives(registry: Registry, runs: Iterator[int]) -> None:
    run(lambda: Machine(registry, next(runs)), examples=6)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_many_orders_of_calls_give_what_a_model_of_dicts_gives(registry: Registry, runs: Iterator[int]) -> None:
    run(lambda: Machine(registry, next(runs)), examples=30, steps=60, drawn=True)
