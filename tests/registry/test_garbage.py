"""Weights that nothing needs are deleted, and no others, whoever stores, names and deletes at the same time."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from lorafleet.adapters import LoraAdapter
from lorafleet.errors import InvalidInputError, LorafleetError, NotFoundError, UnavailableError
from lorafleet.registry import NewExpert, Registry, UpdateRecord, claims
from lorafleet.registry.blobs import BlobStore
from lorafleet.registry.database import Database, parse_url
from lorafleet.registry.files import Deletion
from lorafleet.registry.local_files import LocalFiles
from tests.registry.conftest import Clock, again, make_adapter

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

    def slowly(self: BlobStore, adapter: LoraAdapter) -> str:
        digest = put(self, adapter)
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

    def and_drop(self: BlobStore, adapter: LoraAdapter) -> str:
        digest = put(self, adapter)
        clock.now += claims.LASTS_S - 0.5
        sql.drop_factors(federation, through=1)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(claims, "begin_deleting", and_wait)
        patch.setattr(BlobStore, "put", and_drop)
        version = sql.add_version("acme", "sql", weights)
    assert sql.load(version).digest == weights.digest


def test_a_call_that_fails_leaves_no_claim(sql: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise UnavailableError("a full disk")

    sql._blobs.put(make_adapter(3))
    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "put", fail)
        with pytest.raises(UnavailableError):
            sql.add_version("acme", "sql", make_adapter(3))
    assert sql.collect_garbage(older_than_s=0.0).deleted == tuple(digests(3))


@pytest.mark.parametrize("after", [False, True])
def test_a_collection_that_dies_while_it_deletes_is_made_good_by_a_later_one(
    sql: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    sql._blobs.put(make_adapter(3))
    sql.retire(sql.version("acme", "sql", 1))
    delete = BlobStore.delete

    def die(self: BlobStore, some: Sequence[str]) -> Deletion:
        if after:
            delete(self, some[:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "delete", die)
        with pytest.raises(KeyboardInterrupt):
            sql.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0)
    assert sql.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0).deleted == ()
    clock.now += claims.UNSURE_S
    found = sql.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0)
    assert found.purged == () and len(found.deleted) == (1 if after else 2)
    assert stored(sql) == digests(2)
    assert sql.add_version("acme", "sql", make_adapter(3)).number == 3


# Deletions that nobody has seen the end of


class LateFiles:
    """A folder that carries deletions out when it is told to, long after their callers have gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        self._delete, self._error, self._waiting = LocalFiles.delete, error, list[tuple[LocalFiles, list[str]]]()
        monkeypatch.setattr(LocalFiles, "delete", lambda files, some, *, until: self._take(files, list(some)))

    def _take(self, files: LocalFiles, some: list[str]) -> Deletion:
        self._waiting.append((files, some))
        if isinstance(self._error, OSError):
            return Deletion([], [], some, self._error)
        raise self._error

    def carry_out(self) -> None:
        for files, some in self._waiting:
            assert self._delete(files, some, until=time.monotonic() + 60).gone == some


@pytest.mark.parametrize("error", [OSError("timed out"), KeyboardInterrupt()], ids=["gave up", "killed"])
@pytest.mark.parametrize("dropped", [False, True], ids=["collected", "dropped"])
def test_a_deletion_that_outlives_its_caller_takes_no_weights_that_are_named(
    sql: Registry, folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, error: BaseException, dropped: bool
) -> None:
    weights = make_adapter(3)
    weights.save(folder / "given")
    federation = sql.create_federation("acme", "fed", base="tiny", settings={})
    sql.add_member(federation, "k", tenant="rival")
    opened = sql.open_round(federation, 1)
    update = UpdateRecord("k", 1, False, "norm", weights.digest, 9, 3, 5, {}, weights)
    if dropped:
        assert sql.record_update(opened, update)
    else:
        sql._blobs.put(weights)
    sql.commit_round(opened, [], report={})
    second = sql.open_round(federation, 2)

    def delete() -> None:
        if dropped:
            sql.drop_factors(federation, through=1)
        else:
            sql.collect_garbage(older_than_s=0.0)

    calls = (
        lambda: sql.add_version("acme", "sql", weights),
        lambda: sql.import_version("acme", "sql", folder / "given"),
        lambda: sql.record_update(second, update),
        lambda: sql.commit_round(second, [NewExpert("shared", weights, "exact")], report={}),
    )
    with monkeypatch.context() as patch:
        late = LateFiles(patch, error)
        with pytest.raises(UnavailableError if isinstance(error, OSError) else KeyboardInterrupt):
            delete()
        for call in calls:  # the weights are there, and sound
            with pytest.raises(UnavailableError, match=r"being deleted.*call again in 960 s"):
                call()
        clock.now += claims.UNSURE_S - 0.5
        with pytest.raises(UnavailableError, match="call again in 1 s"):
            calls[0]()
        late.carry_out()
    assert weights.digest not in stored(sql)
    clock.now += 0.5
    for call in calls:
        call()
    named = [*sql.versions("acme", "sql"), *sql.versions("acme", "shared")]
    assert len(named) == 5 and all(sql.load(version).digest == version.digest for version in named)
    assert sql.collect_garbage(older_than_s=0.0).deleted == ()


def test_weights_that_were_not_begun_to_be_deleted_may_be_stored_at_once(
    sql: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql._blobs.put(make_adapter(3))

    def refuse(files: LocalFiles, some: Sequence[str], *, until: float) -> Deletion:
        return Deletion([], list(some), [], PermissionError("403"))

    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "delete", refuse)
        with pytest.raises(UnavailableError, match=r"^0 weights were deleted .* 1 could not be \(403\); call again"):
            sql.collect_garbage(older_than_s=0.0)
    assert sql.load(sql.add_version("acme", "sql", make_adapter(3))).digest == make_adapter(3).digest


def test_a_slow_deletion_makes_progress_and_counts_it(sql: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (3, 4, 5):
        sql._blobs.put(make_adapter(seed))
    delete, calls = LocalFiles.delete, 0

    def one_at_a_time(files: LocalFiles, some: Sequence[str], *, until: float) -> Deletion:
        nonlocal calls
        calls += 1
        done = delete(files, some[:1], until=until)
        return done._replace(untouched=list(some[1:]), error=TimeoutError("it takes too long") if some[1:] else None)

    monkeypatch.setattr(LocalFiles, "delete", one_at_a_time)
    assert set(sql.collect_garbage(older_than_s=0.0).deleted) == digests(3, 4, 5)
    assert calls == 3 and stored(sql) == digests(1, 2)


def test_what_one_deletes_is_not_anothers_to_delete_or_to_store(
    sql: Registry, url: str, folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql._blobs.put(make_adapter(3))
    delete = LocalFiles.delete

    def meanwhile(files: LocalFiles, some: Sequence[str], *, until: float) -> Deletion:
        monkeypatch.undo()
        for dry_run in (True, False):
            assert other.collect_garbage(older_than_s=0.0, dry_run=dry_run).deleted == ()
        with pytest.raises(UnavailableError, match="being deleted"):
            other.add_version("acme", "sql", make_adapter(3))
        assert other.add_version("acme", "sql", make_adapter(4)).number == 3  # nobody waits for a lock
        return delete(files, some, until=until)

    monkeypatch.setattr(LocalFiles, "delete", meanwhile)
    with Registry.open(url, folder / "blobs", clock=clock) as other:
        assert sql.collect_garbage(older_than_s=0.0).deleted == tuple(digests(3))
    assert sql.load(sql.add_version("acme", "sql", make_adapter(3))).digest == make_adapter(3).digest


def test_a_mark_that_was_taken_over_is_not_removed_by_who_had_it_before(registry: Registry, url: str) -> None:
    database, some = Database(parse_url(url)), sorted(digests(3, 4))

    def mark(now: float) -> claims.Mark:
        with database.write() as session:
            claims.begin_deleting(session, some, now)
            return claims.mark(session, some, now, marked_at=now)

    first, second, third = mark(0.0), mark(1.0), mark(claims.UNSURE_S)
    assert (first.digests, second.digests, third.digests) == (tuple(some), (), tuple(some))
    with database.write() as session:
        claims.unmark(session, first, gone=some[:1], untouched=some[1:], now=claims.UNSURE_S)
    assert mark(claims.UNSURE_S + 1).digests == ()
    with database.write() as session:
        claims.unmark(session, third, gone=some[:1], untouched=[], now=claims.UNSURE_S)
    assert mark(claims.UNSURE_S + 1).digests == tuple(some[:1])
    database.close()


def _store_and_check(url: str, place: Path, number: int, start: Barrier) -> None:
    """Adds versions whose weights others delete, drop and add again, and reads each."""
    with Registry.open(url, place, clock=Clock()) as registry:
        start.wait(timeout=60)
        until = time.monotonic() + 1.0
        turn = 0
        while time.monotonic() < until or turn < 3:
            version = again(partial(registry.add_version, "acme", f"w{number}", make_adapter(turn % 3)))
            assert registry.load(version).digest == version.digest
            registry.retire(version)
            turn += 1
    os._exit(0)


def _collect(url: str, place: Path, start: Barrier, deleted: Synchronized[int]) -> None:
    with Registry.open(url, place, clock=Clock()) as registry:
        start.wait(timeout=60)
        until = time.monotonic() + 1.0
        while time.monotonic() < until or not deleted.value:  # of both: one may always find the other's marks
            assert time.monotonic() < until + 30
            found = registry.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0).deleted
            with deleted:
                deleted.value += len(found)
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
    start, deleted = spawn.Barrier(5), spawn.Value("i", 0)
    children = [spawn.Process(target=_store_and_check, args=(url, place, number, start)) for number in (1, 2)]
    children += [spawn.Process(target=_collect, args=(url, place, start, deleted)) for _ in range(2)]
    for child in children:
        child.start()
    try:
        start.wait(timeout=60)
        for _ in range(3):
            try:
                again(lambda: registry.add_version("acme", kept.name, make_adapter(0)))
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
