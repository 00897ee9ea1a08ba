"""Weights that nothing needs are deleted, and no others, whoever stores, names and deletes at the same time."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from lorafleet.adapters import LoraAdapter
from lorafleet.errors import InvalidInputError, LorafleetError, NotFoundError, UnavailableError
from lorafleet.registry import NewExpert, Registry, UpdateRecord, claims
from lorafleet.registry.blobs import Alone, BlobStore
from tests.registry.conftest import Clock, make_adapter

DAY = 86400.0


def stored(registry: Registry) -> set[str]:
    return {blob.digest for blob in registry._blobs.stored()}


def digests(*seeds: int) -> set[str]:
    return {make_adapter(seed).digest for seed in seeds}


@pytest.fixture
def sql(registry: Registry) -> Registry:
    """With two versions of acme/sql, of the seeds 1 and 2."""
    registry.create_adapter("acme", "sql", base="tiny")
    for seed in (1, 2):
        registry.add_version("acme", "sql", make_adapter(seed))
    return registry


def test_weights_that_nothing_names_go_once_they_are_old(sql: Registry, folder: Path, clock: Clock) -> None:
    sql._blobs.put(make_adapter(3))  # and then a crash
    left = BlobStore(folder / "blobs").path(make_adapter(3).digest)
    os.utime(left, (clock.now - 100, clock.now - 100))
    assert sql.collect_garbage(older_than_s=101.0).deleted == ()
    said = sql.collect_garbage(older_than_s=99.0, dry_run=True)
    assert said.deleted == tuple(digests(3)) and said.size_bytes == sum(f.stat().st_size for f in left.iterdir())
    assert stored(sql) == digests(1, 2, 3)
    assert sql.collect_garbage(older_than_s=99.0) == said
    assert stored(sql) == digests(1, 2)
    assert sql.collect_garbage(older_than_s=99.0).deleted == ()


def test_a_version_that_is_out_of_use_for_long_loses_its_weights_and_stays_on_record(
    sql: Registry, clock: Clock
) -> None:
    first = sql.retire(sql.version("acme", "sql", 1))
    clock.now += DAY
    assert sql.collect_garbage(older_than_s=0.0, retired_older_than_s=DAY + 1).purged == ()
    assert sql.collect_garbage(older_than_s=0.0).purged == ()
    found = sql.collect_garbage(older_than_s=0.0, retired_older_than_s=DAY, by="ada")
    assert (found.purged, set(found.deleted)) == (("acme/sql:1",), digests(1))
    assert stored(sql) == digests(2)
    purged = sql.version("acme", "sql", 1)
    assert (purged.purged_at, purged.state, purged.digest) == (clock.now, "retired", first.digest)
    assert (sql.audit("acme")[-1].action, sql.audit("acme")[-1].by) == ("version.purge", "ada")
    for call in (
        lambda: sql.load(first),  # from before
        lambda: sql.load(purged),
        lambda: sql.path(purged),
        lambda: sql.resolve("acme/sql:1"),
        lambda: sql.restore(purged),
        lambda: sql.set_state(purged, "staged"),
    ):
        with pytest.raises(NotFoundError):
            call()
    with pytest.raises(InvalidInputError):
        sql.set_alias("acme", "sql", "champion", 1)
    assert sql.quarantine(purged).version.state == "quarantined"
    assert sql.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0).purged == ()
    assert sql.add_version("acme", "sql", make_adapter(1)).number == 3
    assert sql.load(sql.version("acme", "sql", 3)).digest == first.digest


def test_the_time_counts_from_the_last_change_of_the_state(sql: Registry, clock: Clock) -> None:
    version = sql.retire(sql.version("acme", "sql", 1))
    clock.now += DAY
    sql.restore(version)
    sql.retire(version)
    sql.set_state(version, "retired")  # nothing new
    assert sql.collect_garbage(older_than_s=0.0, retired_older_than_s=DAY).purged == ()
    clock.now += DAY
    assert sql.collect_garbage(older_than_s=0.0, retired_older_than_s=DAY).purged == ("acme/sql:1",)


def test_what_an_alias_an_engine_or_another_version_needs_stays(sql: Registry, clock: Clock) -> None:
    sql.set_alias("acme", "sql", "pinned", 1)
    sql.quarantine(sql.version("acme", "sql", 1))  # the alias has nowhere to go
    sql.retire(sql.version("acme", "sql", 2))
    sql.hold("a service", digests(2), for_s=10.0)
    assert sql.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0).purged == ()
    clock.now += 9.0
    sql.hold("a service", digests(2), for_s=10.0)
    clock.now += 9.0
    assert sql.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0).purged == ()
    sql.create_adapter("rival", "same", base="tiny")
    sql.add_version("rival", "same", make_adapter(2))
    clock.now += 1.0
    found = sql.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0)
    assert (found.purged, found.deleted) == (("acme/sql:2",), ())
    assert sql.load(sql.resolve("rival/same")).digest == make_adapter(2).digest
    assert stored(sql) == digests(1, 2)


def test_a_service_lets_go_of_all_but_what_it_keeps(sql: Registry) -> None:
    for number in (1, 2):
        sql.retire(sql.version("acme", "sql", number))
    sql.hold("one", digests(1, 2), for_s=10.0)
    sql.hold("two", digests(2), for_s=10.0)
    sql.release("one", keep=digests(1))
    assert sql.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0).purged == ()
    sql.release("two")
    assert sql.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0).purged == ("acme/sql:2",)
    sql.release("one")
    assert sql.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0).purged == ("acme/sql:1",)


def test_an_expert_that_an_update_was_trained_on_stays_until_the_update_counted(registry: Registry) -> None:
    federation = registry.create_federation("acme", "fed", base="tiny", settings={})
    registry.add_member(federation, "k", tenant="rival")
    first = registry.open_round(federation, 1)
    [expert] = registry.commit_round(first, [NewExpert("shared", make_adapter(1), "exact")], report={})
    second = registry.open_round(federation, 2)
    factors = make_adapter(2)
    update = UpdateRecord("k", 1, True, "", factors.digest, 9, 3, 5, {}, factors, expert_digest=expert.digest)
    assert registry.record_update(second, update)
    registry.set_state(expert, "retired")
    found = registry.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0)
    assert (found.purged, found.deleted) == ((), ())
    assert registry.load_digest(expert.digest).digest == expert.digest


def test_who_stores_for_longer_than_a_claim_lasts_names_nothing(
    sql: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = BlobStore.put

    def slowly(self: BlobStore, adapter: LoraAdapter, *, alone: Alone) -> str:
        digest = put(self, adapter, alone=alone)
        assert sql.collect_garbage(older_than_s=0.0).deleted == ()
        clock.now += claims.LASTS_S
        assert sql.collect_garbage(older_than_s=0.0).deleted == (digest,)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "put", slowly)
        with pytest.raises(UnavailableError, match="longer than 3600 s"):
            sql.add_version("acme", "sql", make_adapter(3))
    assert [version.number for version in sql.versions("acme", "sql")] == [1, 2]
    assert sql.add_version("acme", "sql", make_adapter(3)).number == 3


def test_a_claim_that_ends_while_updates_are_dropped_is_gone_or_keeps_its_weights(
    sql: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = sql.create_federation("acme", "fed", base="tiny", settings={})
    sql.add_member(federation, "k", tenant="rival")
    opened, weights = sql.open_round(federation, 1), make_adapter(3)
    assert sql.record_update(opened, UpdateRecord("k", 1, False, "norm", weights.digest, 9, 3, 5, {}, weights))
    sql.commit_round(opened, [], report={})
    put, begin = BlobStore.put, claims.begin_deleting

    def and_wait(session: Session, some: Sequence[str], now: float) -> None:
        begin(session, some, now)
        clock.now += 1.0

    def and_drop(self: BlobStore, adapter: LoraAdapter, *, alone: Alone) -> str:
        digest = put(self, adapter, alone=alone)
        clock.now += claims.LASTS_S - 0.5
        sql.drop_factors(federation, through=1)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(claims, "begin_deleting", and_wait)
        patch.setattr(BlobStore, "put", and_drop)
        version = sql.add_version("acme", "sql", weights)
    assert sql.load(version).digest == weights.digest


def test_a_call_that_fails_leaves_no_claim(sql: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, alone: Alone) -> str:
        raise UnavailableError("a full disk")

    sql._blobs.put(make_adapter(3))
    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "put", fail)
        with pytest.raises(UnavailableError):
            sql.add_version("acme", "sql", make_adapter(3))
    assert sql.collect_garbage(older_than_s=0.0).deleted == tuple(digests(3))


@pytest.mark.parametrize("after", [False, True])
def test_a_collection_that_dies_while_it_deletes_is_made_good_by_the_next(
    sql: Registry, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    sql._blobs.put(make_adapter(3))
    sql.retire(sql.version("acme", "sql", 1))
    delete = BlobStore.delete

    def die(self: BlobStore, some: Sequence[str]) -> None:
        if after:
            delete(self, some[:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "delete", die)
        with pytest.raises(KeyboardInterrupt):
            sql.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0)
    found = sql.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0)
    assert found.purged == () and len(found.deleted) == (1 if after else 2)
    assert stored(sql) == digests(2)
    assert sql.add_version("acme", "sql", make_adapter(3)).number == 3


def _store_and_check(url: str, place: Path, number: int) -> None:
    """Adds versions whose weights others delete, drop and add again, and reads each."""
    until = time.monotonic() + 1.0
    with Registry.open(url, place, clock=Clock()) as registry:
        turn = 0
        while time.monotonic() < until or turn < 3:
            version = registry.add_version("acme", f"w{number}", make_adapter(turn % 3))
            assert registry.load(version).digest == version.digest
            registry.retire(version)
            turn += 1
    os._exit(0)


def _collect(url: str, place: Path) -> None:
    until = time.monotonic() + 1.0
    with Registry.open(url, place, clock=Clock()) as registry:
        deleted = 0
        while time.monotonic() < until or not deleted:
            deleted += len(registry.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0).deleted)
            assert time.monotonic() < until + 30
    os._exit(0)


@pytest.mark.process
def test_processes_that_store_and_delete_the_same_weights_never_lose_any_that_are_named(
    registry: Registry, url: str, folder: Path
) -> None:
    for number in (1, 2):
        registry.create_adapter("acme", f"w{number}", base="tiny")
    kept = registry.create_adapter("acme", "kept", base="tiny")
    # Not forked: torch's threads are not there in a fork, which waits for them for ever.
    spawn, place = multiprocessing.get_context("spawn"), folder / "blobs"
    children = [spawn.Process(target=_store_and_check, args=(url, place, number)) for number in (1, 2)]
    children += [spawn.Process(target=_collect, args=(url, place)) for _ in range(2)]
    for child in children:
        child.start()
    try:
        for _ in range(3):
            try:
                registry.add_version("acme", kept.name, make_adapter(0))
            except LorafleetError as error:
                pytest.fail(str(error))
    finally:
        for child in children:
            child.join(timeout=60)
            if child.exitcode is None:
                child.kill()
    assert [child.exitcode for child in children] == [0, 0, 0, 0]
    for version in registry.versions("acme", "kept"):
        assert registry.load(version).digest == make_adapter(0).digest
