"""What routers choose among: how long it is kept, and by what."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import event

from lorafleet.errors import UnavailableError
from lorafleet.registry import Registry, Version
from lorafleet.router_service import candidates as module
from lorafleet.router_service.candidates import CACHED_S, Candidates
from lorafleet.router_service.routers import Pool
from lorafleet.router_service.waiting import WouldWait
from tests.registry.conftest import BASE_DIGEST, Clock, make_adapter


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(f"sqlite:///{tmp_path / 'registry.db'}", tmp_path / "blobs") as opened:
        opened.register_base("tiny", BASE_DIGEST, architecture="L", parameters=1)
        for tenant in ("acme", "rival"):
            opened.create_tenant(tenant)
            opened.create_adapter(tenant, "own", base="tiny")
        yield opened


@pytest.fixture
def candidates(registry: Registry, clock: Clock) -> Candidates:
    return Candidates(registry, base_digest=BASE_DIGEST, reads_cards=True, clock=lambda: clock.now)


def numbers(candidates: Candidates, tenant: str = "acme") -> list[int]:
    return [version.number for version in candidates.usable(tenant)]


def add(registry: Registry, seed: int, *, tenant: str = "acme", card: str = "") -> Version:
    return registry.add_version(tenant, "own", make_adapter(seed), card=card)


def test_a_change_is_seen_after_half_a_second_or_when_the_watcher_tells(
    registry: Registry, candidates: Candidates, clock: Clock
) -> None:
    add(registry, 1)
    assert numbers(candidates) == [1]
    add(registry, 2)
    clock.now += 0.4 * CACHED_S
    assert numbers(candidates) == [1]
    clock.now += 0.6 * CACHED_S
    assert numbers(candidates) == [2]
    add(registry, 3)
    candidates.forget()
    clock.now += 0.001
    assert numbers(candidates) == [3]


def test_one_who_does_not_wait_is_sent_to_look_again_and_the_others_go_on(
    registry: Registry, candidates: Candidates, clock: Clock
) -> None:
    add(registry, 1)
    assert numbers(candidates) == [1]
    add(registry, 2)
    clock.now += 0.6 * CACHED_S
    with pytest.raises(WouldWait):
        candidates.usable("acme", wait=False)
    assert [version.number for version in candidates.usable("acme", wait=False)] == [1]
    assert numbers(candidates) == [2]
    assert [version.number for version in candidates.usable("acme", wait=False)] == [2]
    clock.now += 0.6 * CACHED_S
    for _ in range(2):  # whoever is sent and does not come leaves it to all once nothing counts any more
        with pytest.raises(WouldWait):
            candidates.usable("acme", wait=False)
        clock.now += 0.5 * CACHED_S


def test_a_database_that_is_away_while_a_look_still_counts_fails_nobody(
    registry: Registry, candidates: Candidates, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, 1)
    assert numbers(candidates) == [1]

    def away() -> int:
        raise UnavailableError("the database is away")

    monkeypatch.setattr(registry, "revision", away)
    clock.now += 0.8 * CACHED_S
    assert numbers(candidates) == [1]
    clock.now += 0.2 * CACHED_S
    with pytest.raises(UnavailableError):
        candidates.usable("acme")


def test_a_revoked_grant_ends_with_what_is_kept(registry: Registry, candidates: Candidates, clock: Clock) -> None:
    add(registry, 1)
    registry.grant("acme", "own", to="rival")
    assert numbers(candidates, "rival") == [1]
    registry.revoke_grant("acme", "own", to="rival")
    clock.now += CACHED_S
    assert numbers(candidates, "rival") == []


def test_between_changes_a_route_asks_the_database_for_nothing_but_a_number(
    registry: Registry, candidates: Candidates, clock: Clock
) -> None:
    add(registry, 1, card="orders")
    candidates.pool("acme", candidates.usable("acme"))
    statements: list[str] = []

    def note(*arguments: Any) -> None:
        if arguments[2] != "BEGIN":
            statements.append(arguments[2])

    event.listen(sqlalchemy.Engine, "before_cursor_execute", note)
    try:
        for _ in range(10):
            candidates.pool("acme", candidates.usable("acme"))
        assert statements == []
        clock.now += CACHED_S
        candidates.pool("acme", candidates.usable("acme"))
        (only,) = statements
        assert "revision" in only
    finally:
        event.remove(sqlalchemy.Engine, "before_cursor_execute", note)


def test_a_version_under_the_same_name_is_another_candidate_with_its_own_card(
    registry: Registry, candidates: Candidates, clock: Clock
) -> None:
    add(registry, 1, card="orders")
    before = candidates.pool("acme", candidates.usable("acme"))
    second = add(registry, 2, card="poems")
    clock.now += CACHED_S
    after = candidates.pool("acme", candidates.usable("acme"))
    assert [(one.digest, one.card) for one in after.candidates] == [(second.digest, "poems")]
    assert before.candidates[0].card == "orders"
    assert after.index.match("poems", most=1).best and not after.index.match("orders", most=1).best


def test_equal_sets_share_one_index(registry: Registry, candidates: Candidates) -> None:
    add(registry, 1, card="orders")
    registry.grant("acme", "own", to="rival")
    mine, theirs = (candidates.pool(tenant, candidates.usable(tenant)) for tenant in ("acme", "rival"))
    assert mine is theirs


def test_of_versions_with_the_same_weights_one_stands_for_all(registry: Registry, candidates: Candidates) -> None:
    add(registry, 1)
    registry.create_adapter("acme", "twin", base="tiny")
    registry.add_version("acme", "twin", make_adapter(1))
    assert len(candidates.usable("acme")) == 2
    (only,) = candidates.pool("acme", candidates.usable("acme")).candidates
    assert only.name == "own"


def test_indexes_are_let_go_of_where_they_grow_too_large(
    registry: Registry, candidates: Candidates, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(module, "_POSTINGS", 10)
    first = add(registry, 1, card="many words of the first card")
    kept = candidates.pool("acme", [first])
    assert candidates.pool("acme", [first]) is kept  # one that is too large by itself is kept while it is the last
    second = add(registry, 2, tenant="rival", card="many words of the second card")
    candidates.pool("rival", [second])
    assert candidates.pool("acme", [first]) is not kept


def test_of_many_cards_each_is_read_the_less_far(
    registry: Registry, candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST", 60)
    card = "letters " * 9
    versions = [add(registry, 1, card=card), add(registry, 2, tenant="rival", card=card)]
    assert [len(one.card) for one in candidates.pool("acme", versions[:1]).candidates] == [60]
    assert [len(one.card) for one in candidates.pool("acme", versions).candidates] == [30, 30]


def test_callers_that_want_the_same_pool_at_once_get_one(registry: Registry, candidates: Candidates) -> None:
    version = add(registry, 1, card="orders")
    ready = threading.Barrier(4)

    def ask(tenant: int) -> Pool:
        ready.wait(30.0)
        return candidates.pool(f"tenant {tenant}", [version])

    with ThreadPoolExecutor(4) as threads:
        assert len(set(map(id, threads.map(ask, range(4))))) == 1
