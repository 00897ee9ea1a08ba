"""What a service tells the registry of its engine, and when."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from lorafleet.errors import BackendError
from lorafleet.registry import Registry
from lorafleet.router_service.holds import LASTS_S, RENEWED_S, Holds
from lorafleet.router_service.residency import Residency
from tests.router_service.conftest import Experts, Fleet


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Calls:
    """Counts what is written to a registry."""

    def __init__(self, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[set[str]] = []
        hold = registry.hold

        def counted(service: str, digests: Collection[str], *, for_s: float) -> None:
            assert for_s == LASTS_S
            self.held.append(set(digests))
            hold(service, digests, for_s=for_s)

        monkeypatch.setattr(registry, "hold", counted)


def purgeable(fleet: Fleet) -> set[str]:
    found = fleet.registry.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0, dry_run=True)
    return set(found.purged)


def test_what_is_taken_is_written_once_and_renewed_in_time(
    fleet: Fleet, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, clock = Calls(fleet.registry, monkeypatch), Clock()
    holds = Holds(fleet.registry, clock=clock)
    one, two = experts.digits.digest, experts.letters.digest
    holds.take([one])
    holds.take([one, two])
    holds.take([one, two])
    assert calls.held == [{one}, {two}]
    clock.now = RENEWED_S - 1
    holds.renew(lambda: {one})
    assert len(calls.held) == 2
    clock.now = RENEWED_S
    holds.renew(lambda: {one})
    holds.renew(lambda: {one})
    assert calls.held[2:] == [{one}]
    holds.take([two])  # let go of, and asked for again
    assert calls.held[3:] == [{two}]
    assert 3 * RENEWED_S < LASTS_S


def test_an_engine_keeps_what_it_has_from_being_purged(
    engine: object, fleet: Fleet, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(fleet.registry, monkeypatch)
    residency = Residency(engine, fleet.registry)  # type: ignore[arg-type]
    old, new = fleet.add("acme/digits", experts.digits), fleet.add("acme/digits", experts.other)
    residency.keep([new])
    fleet.registry.retire(old)
    fleet.registry.set_state(new, "retired")
    assert calls.held == [{new.digest}]
    assert purgeable(fleet) == {old.reference}
    with residency.hold([old, new]):
        assert calls.held == [{new.digest}, {old.digest}]
        assert purgeable(fleet) == set()
    residency.release_holds()
    assert purgeable(fleet) == {old.reference, new.reference}
    with residency.hold([old]):
        pass


def test_what_cannot_be_held_is_not_loaded(
    engine: object, fleet: Fleet, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BackendError("a database that is gone")

    residency = Residency(engine, fleet.registry)  # type: ignore[arg-type]
    version = fleet.add("acme/digits", experts.digits)
    with monkeypatch.context() as patch:
        patch.setattr(fleet.registry, "hold", fail)
        with pytest.raises(BackendError), residency.hold([version]):
            pytest.fail("the block must not run")
    with residency.hold([version]):
        pass
