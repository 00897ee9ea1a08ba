"""The round loop over a federation's life: it is paused and stopped, members are revoked, old updates are not kept."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lorafleet.coordinator.rounds import run_federation
from lorafleet.coordinator.settings import FederationSettings, Scheduling, Training
from lorafleet.coordinator.standing import Standing
from lorafleet.coordinator.transport import Order, Reply
from lorafleet.errors import NotFoundError, UnavailableError
from lorafleet.registry import UpdateKey
from lorafleet.registry.blobs import BlobStore
from tests.coordinator.scripted import Timed, honest, start
from tests.registry.conftest import FOLDER

SYNC = FederationSettings(
    tenant="operator", name="fleet", rounds=3, quorum=2, deadline_s=500.0, expert_rank=24, evaluate_last=False,
    training=Training(steps=10), scheduling=Scheduling(buffer=2, min_steps=4),
)  # fmt: skip
SCHEDULERS = ["sync", "compass", "buffered"]
SPEEDS = {"a1": 1.0, "a2": 2.0, "b1": 3.0, "b2": 8.0}


def settings_for(scheduler: str) -> FederationSettings:
    return SYNC if scheduler == "sync" else replace(SYNC, scheduler=scheduler, rounds=6, quorum=1)


def members() -> Timed:
    answers = {"a1": honest(4, 1), "a2": honest(8, 1, 30), "b1": honest(6, 2), "b2": honest(5, 2, 20)}
    return Timed(answers, SPEEDS)


class Place:
    """A registry with the federation, its members, and what the loop works with."""

    def __init__(self, folder: Path, settings: FederationSettings, transport: Timed) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.settings, self.transport = folder, settings, transport
        self.registry, self.federation, parts = start(folder, transport, settings)
        self.parts = replace(parts, clock=transport.clock)

    def run(self, **parts: object) -> Standing:
        return run_federation(self.settings, self.federation, replace(self.parts, **parts))  # type: ignore[arg-type]

    def then(self, member: str, do: Callable[[], object], *, at: int = 1) -> None:
        """Do something when a member works at its ``at``-th order, before it answers."""
        answer, count = self.transport.answers[member], [0]

        def first(order: Order) -> Reply:
            count[0] += 1
            if count[0] == at:
                do()
            return answer(order)

        self.transport.answers[member] = first

    def states(self) -> list[str]:
        return [r.state for r in self.registry.rounds(self.federation)]

    def revoke(self, member: str) -> Callable[[], object]:
        return lambda: self.registry.revoke_member(self.federation, member, reason="left")


@pytest.fixture
def place() -> Iterator[Callable[..., Place]]:
    made: list[Place] = []
    folder = tempfile.TemporaryDirectory(prefix="lorafleet-life-", dir=FOLDER)

    def make(scheduler: str = "sync", name: str = "one", **changes: object) -> Place:
        settings = replace(settings_for(scheduler), **changes)  # type: ignore[arg-type]
        made.append(Place(Path(folder.name) / name, settings, members()))
        return made[-1]

    yield make
    for each in made:
        each.registry.close()
    folder.cleanup()


# Paused and stopped


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_paused_federation_opens_no_round_until_it_is_resumed(
    scheduler: str, place: Callable[..., Place], caplog: pytest.LogCaptureFixture
) -> None:
    here = place(scheduler)
    here.registry.set_federation_state(here.federation, "paused", by="ada", reason="a look")
    naps: list[list[str]] = []

    def sleep(seconds: float) -> None:
        naps.append(here.states())
        if len(naps) == 3:
            here.registry.set_federation_state(here.federation, "active")

    with caplog.at_level(logging.INFO, "lorafleet"):
        standing = here.run(sleep=sleep)
    assert naps == [[], [], []] and standing.committed == here.settings.rounds
    said = [r.getMessage() for r in caplog.records if "paused" in r.getMessage()]
    assert len(said) == 1 and "operator/fleet is paused at " in said[0] and "by ada (a look)" in said[0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_round_that_is_open_when_it_is_paused_is_still_committed(scheduler: str, place: Callable[..., Place]) -> None:
    here = place(scheduler)
    here.then("a1", lambda: here.registry.set_federation_state(here.federation, "paused"))
    found: list[list[str]] = []

    def sleep(seconds: float) -> None:
        found.append(here.states())
        here.registry.set_federation_state(here.federation, "active")

    here.run(sleep=sleep)
    assert found == [["committed"]]


def test_who_waits_in_a_pause_and_loses_the_lease_ends(place: Callable[..., Place]) -> None:
    here = place()
    here.registry.set_federation_state(here.federation, "paused")
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise UnavailableError("another coordinator runs it")

    with pytest.raises(UnavailableError, match="another coordinator"):
        here.run(sleep=lambda seconds: None, check_lease=check)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_stopped_federation_ends_before_the_next_round_and_says_why(
    scheduler: str, place: Callable[..., Place]
) -> None:
    here = place(scheduler)
    here.then(
        "a1", lambda: here.registry.set_federation_state(here.federation, "stopped", by="ada", reason="enough"), at=2
    )
    with pytest.raises(UnavailableError, match=r"operator/fleet was stopped at .* by ada \(enough\): no further round"):
        here.run()
    committed = here.states()
    assert committed and set(committed) == {"committed"}
    orders = len(here.transport.ordered)
    with pytest.raises(UnavailableError, match="was stopped"):
        here.run()
    assert here.states() == committed and len(here.transport.ordered) == orders


# Revoked members


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_revoked_member_gets_no_more_orders_and_its_late_reply_is_rejected(
    scheduler: str, place: Callable[..., Place]
) -> None:
    here = place(scheduler)
    here.then("a1", here.revoke("a1"))
    standing = here.run()
    assert standing.committed == here.settings.rounds
    assert [order.order.member for order in here.transport.ordered].count("a1") == 1
    journal = [u for r in here.registry.rounds(here.federation) for u in here.registry.updates(r, accepted_only=False)]
    (mine,) = [update for update in journal if update.member == "a1"]
    assert not mine.accepted and mine.reason == "revoked: the member was revoked before its update came (left)"
    assert all("a1" not in r.report["assignment"] for r in here.registry.rounds(here.federation))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_a_revoked_member_sent_and_has_not_counted_never_does(scheduler: str, place: Callable[..., Place]) -> None:
    here = place(scheduler, rounds=10)
    receive = here.transport.receive

    def mine() -> list[UpdateKey]:
        return [u.key for u in here.registry.journal(here.federation, uncounted_only=True) if u.member == "a1"]

    def watched(timeout_s: float) -> list[Reply]:
        if mine():
            here.revoke("a1")()
        return receive(timeout_s)

    here.transport.receive = watched  # type: ignore[method-assign]
    standing = here.run()
    assert standing.committed == here.settings.rounds and len(mine()) == 1
    assert all(r.report["population"] == 3 for r in here.registry.rounds(here.federation)[-1:])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_loop_that_resumes_does_not_count_what_a_revoked_member_left_behind(
    scheduler: str, place: Callable[..., Place]
) -> None:
    class Crash(Exception):
        pass

    here = place(scheduler)

    def crash(name: str) -> None:
        waiting = here.registry.journal(here.federation, uncounted_only=True)
        if name == "update written" and any(update.member == "a1" for update in waiting):
            raise Crash

    with pytest.raises(Crash):
        here.run(failpoint=crash)
    here.revoke("a1")()
    again = place(scheduler)
    again.run()
    mine = [update for update in again.registry.journal(again.federation) if update.member == "a1"]
    assert mine and mine[-1].counted_in is None
    assert "a1" not in {order.order.member for order in again.transport.ordered}


def test_an_order_that_waits_for_its_turn_is_not_sent_to_who_is_revoked(place: Callable[..., Place]) -> None:
    here = place(at_once=1)
    here.then("a1", here.revoke("b2"))
    here.run()
    assert "b2" not in {order.order.member for order in here.transport.ordered}
    assert here.states() == ["committed"] * 3


def test_a_federation_whose_members_are_revoked_below_the_quorum_says_so(place: Callable[..., Place]) -> None:
    here = place()
    for member in ("a1", "a2", "b1"):
        here.then("b2", here.revoke(member), at=2)
    with pytest.raises(UnavailableError, match="round 2 was abandoned"):
        here.run()
    with pytest.raises(UnavailableError, match="1 of 1 members are here, the quorum is 2"):
        here.run()


# What is kept of updates


@pytest.mark.parametrize(("scheduler", "keep"), [("sync", 2), ("compass", 1), ("buffered", 1)])
def test_the_same_experts_come_of_it_however_long_updates_are_kept(
    scheduler: str, keep: int, place: Callable[..., Place]
) -> None:
    for_good = place(scheduler, "for-good").run()
    here = place(scheduler, "kept", keep_updates=keep)
    standing = here.run()
    assert {k: v.digest for k, v in standing.versions.items()} == {k: v.digest for k, v in for_good.versions.items()}
    last = here.registry.rounds(here.federation)[-1].number
    gone = 0
    for update in here.registry.journal(here.federation):
        if update.counted_in is not None and update.counted_in > last - keep:
            assert here.registry.update_factors(update).digest == update.digest
        elif update.dropped_at is not None:
            gone += 1
            assert not BlobStore(here.folder / "blobs").path(update.digest).exists()
            with pytest.raises(NotFoundError, match="keep_updates"):
                here.registry.update_factors(update)
    assert gone >= 2


def test_a_commit_stands_where_old_updates_cannot_be_deleted(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = place(keep_updates=1)

    def fail(self: BlobStore, digests: Sequence[str]) -> None:
        raise UnavailableError("a disk that is read-only")

    monkeypatch.setattr(BlobStore, "delete", fail)
    standing = here.run()
    assert standing.committed == 3 and "updates of rounds up to 2 are deleted later: a disk" in caplog.text
