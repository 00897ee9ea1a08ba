"""Many threads, several registries on one database, and a database that dies under them."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from lorafleet.errors import AlreadyExistsError, LorafleetError, RejectedUpdateError, UnavailableError
from lorafleet.registry import NewExpert, Registry, UpdateRecord, Version, claims, schema
from lorafleet.registry.local_files import LocalFiles
from tests.registry.conftest import Clock, PostgresServer, make_adapter

THREADS = 20
T = TypeVar("T")


def at_once(work: Callable[[int], T], *, threads: int = THREADS) -> list[T]:
    """``work(0) … work(n - 1)``, each in a thread of its own, all let go at the same moment."""
    gate = threading.Barrier(threads)

    def run(index: int) -> T:
        gate.wait(timeout=60)
        return work(index)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


@pytest.fixture
def second(registry: Registry, url: str, folder: Path, clock: Clock) -> Iterator[Registry]:
    """Another process's view: its own connections, the same database and blobs."""
    with Registry.open(url, folder / "blobs", clock=clock) as opened:
        yield opened


def test_versions_added_at_once_have_contiguous_numbers(registry: Registry, second: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    before = registry.revision()
    made = at_once(lambda i: (registry, second)[i % 2].add_version("acme", "sql", make_adapter(i)))
    assert sorted(version.number for version in made) == list(range(1, THREADS + 1))
    stored = registry.versions("acme", "sql")
    assert sorted(made, key=lambda version: version.number) == stored
    assert registry.revision() == before + THREADS
    assert all(second.load(version).digest == version.digest for version in stored)


def test_name_asked_for_at_once_is_given_once(registry: Registry, second: Registry) -> None:
    def create(index: int) -> bool:
        try:
            (registry, second)[index % 2].create_adapter("acme", "sql", base="tiny")
        except AlreadyExistsError:
            return False
        return True

    assert at_once(create).count(True) == 1
    assert len(registry.adapters("acme")) == 1


def test_update_sent_many_times_at_once_is_journalled_once(registry: Registry, second: Registry) -> None:
    federation = registry.create_federation("acme", "fed", base="tiny", settings={})
    registry.add_member(federation, "key", tenant="acme")
    round = registry.open_round(federation, 1)
    factors = make_adapter(0)

    def record(index: int) -> bool:
        update = UpdateRecord("key", index % 3, True, "", factors.digest, 10, 3, 500, {}, factors)
        return (registry, second)[index % 2].record_update(round, update)

    assert at_once(record).count(True) == 1
    assert len(registry.updates(round, accepted_only=False)) == 1


def test_round_opened_and_committed_by_two_coordinators_has_one_result(registry: Registry, second: Registry) -> None:
    federation = registry.create_federation("acme", "fed", base="tiny", settings={})

    def commit(index: int) -> list[str]:
        store = (registry, second)[index % 2]
        round = store.open_round(federation, 1)
        experts = [NewExpert(name, make_adapter(index), "exact") for name in ("a", "b", "c")]
        # In different orders, so that taking locks in the order of the experts would deadlock.
        versions = store.commit_round(round, experts if index % 4 < 2 else experts[::-1], report={"by": index})
        return sorted(f"{version.reference} {version.digest}" for version in versions)

    results = at_once(commit, threads=8)
    assert all(result == results[0] for result in results)
    assert [len(registry.versions("acme", name)) for name in ("a", "b", "c")] == [1, 1, 1]
    assert len(registry.rounds(federation)) == 1
    assert [entry.action for entry in registry.audit("acme")].count("round.commit") == 1


def test_no_update_enters_a_round_after_its_commit_read_the_journal(registry: Registry, second: Registry) -> None:
    federation = registry.create_federation("acme", "fed", base="tiny", settings={})
    for member in range(THREADS):
        registry.add_member(federation, f"key-{member}", tenant="acme")
    round = registry.open_round(federation, 1)
    factors = make_adapter(0)

    def act(index: int) -> str:
        if index == 0:
            second.commit_round(round, [NewExpert("shared", factors, "exact")], report={})
            return "committed"
        try:
            registry.record_update(
                round, UpdateRecord(f"key-{index}", 1, True, "", factors.digest, 10, 3, 500, {}, factors)
            )
        except RejectedUpdateError as error:
            return error.reason
        return "recorded"

    outcomes = at_once(act)
    assert set(outcomes) <= {"committed", "recorded", "round_closed"}
    assert len(registry.updates(round)) == outcomes.count("recorded")
    assert registry.rounds(federation)[0].state == "committed"


@pytest.mark.parametrize("imported", [False, True])
def test_a_repair_does_no_harm_to_what_another_one_stored_and_named_since_the_damage_was_found(
    registry: Registry, second: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch, imported: bool
) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    weights, mend, replace = make_adapter(0), LocalFiles.mend, Path.replace
    place = registry.path(registry.add_version("acme", "sql", weights))
    weights.save(folder / "given")
    os.truncate(place / "adapter_model.safetensors", 100)
    seen: list[str] = []

    def step(source: Path, target: Path) -> Path:
        done = replace(source, target)
        seen.append(second.load(second.version("acme", "sql", 2)).digest)
        return done

    def late(files: LocalFiles, digest: str, folder: Path) -> None:
        monkeypatch.undo()
        second.add_version("acme", "sql", weights)
        monkeypatch.setattr(Path, "replace", step)
        mend(files, digest, folder)

    monkeypatch.setattr(LocalFiles, "mend", late)
    if imported:
        registry.import_version("acme", "sql", folder / "given")
    else:
        registry.add_version("acme", "sql", weights)
    assert seen == [weights.digest] * 2  # at every step
    assert all(registry.load(version).digest == weights.digest for version in second.versions("acme", "sql"))


def test_weights_that_many_repair_while_others_collect_are_there_for_each_that_named_them(
    registry: Registry, second: Registry
) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    weights = make_adapter(0)
    place = registry.path(registry.add_version("acme", "sql", weights))

    def act(index: int) -> None:
        store = (registry, second)[index % 2]
        if index < 2:
            assert store.collect_garbage(older_than_s=0.0).deleted == ()
        else:
            version = store.add_version("acme", "sql", weights)
            assert store.load(version).digest == weights.digest

    for _ in range(5):
        os.truncate(place / "adapter_model.safetensors", 100)
        at_once(act, threads=8)


def test_watcher_that_sees_a_revision_sees_every_change_up_to_it(registry: Registry, second: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    before = registry.revision()
    done = threading.Event()
    seen: list[tuple[int, int]] = []

    def watch() -> None:
        while not done.is_set():
            revision = second.revision()
            seen.append((revision - before, len(second.versions("acme", "sql"))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        at_once(lambda i: registry.add_version("acme", "sql", make_adapter(i)))
    finally:
        done.set()
        watcher.join(timeout=60)
    assert seen and all(versions >= changes for changes, versions in seen)


def test_states_aliases_and_versions_change_at_once_without_deadlock(registry: Registry, second: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    first = registry.add_version("acme", "sql", make_adapter(0))

    def act(index: int) -> None:
        store = (registry, second)[index % 2]
        if index % 3 == 0:
            store.set_state(first, "evaluated")
        elif index % 3 == 1:
            store.set_alias("acme", "sql", "champion", 1)
        else:
            store.add_version("acme", "sql", make_adapter(index))

    at_once(act)
    assert registry.resolve("acme/sql").number == 1
    assert len(registry.versions("acme", "sql")) == 1 + sum(index % 3 == 2 for index in range(THREADS))


def test_every_verb_on_one_adapter_at_once_ends_without_deadlock(registry: Registry, second: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    versions = [registry.add_version("acme", "sql", make_adapter(seed)) for seed in range(3)]
    registry.set_alias("acme", "sql", "champion", 1)
    verbs: list[Callable[[Registry, Version], object]] = [
        lambda store, version: store.promote(version, force=True),
        lambda store, version: store.promote(version, "canary"),
        lambda store, _: store.rollback("acme", "sql"),
        lambda store, version: store.quarantine(version),
        lambda store, version: store.restore(version),
        lambda store, version: store.retire(version),
        lambda store, version: store.record_evaluation(version, member="m", loss=1.0, tokens=1),
        lambda store, _: store.grant("acme", "sql", to="rival"),
        lambda store, _: store.revoke_grant("acme", "sql", to="rival"),
    ]

    def act(index: int) -> None:
        for turn in range(4):
            verb, version = verbs[(index + 2 * turn) % len(verbs)], versions[(index + turn) % 3]
            try:
                verb((registry, second)[index % 2], version)
            except UnavailableError:
                raise
            except LorafleetError:
                pass  # what a verb finds depends on who was faster

    at_once(act, threads=len(verbs))
    numbers = {version.number: version.state for version in registry.versions("acme", "sql")}
    assert registry.aliases("acme", "sql")["champion"] in numbers
    assert "retired" not in {numbers[number] for number in registry.aliases("acme", "sql").values()}


# On SQLite a writer is alone.
@pytest.mark.parametrize("url", [pytest.param("postgresql", marks=pytest.mark.postgres)], indirect=True)
def test_claims_and_holds_are_made_renewed_and_forgotten_at_once_without_deadlock(
    registry: Registry, second: Registry, clock: Clock
) -> None:
    until = time.monotonic() + 1.0
    known = [make_adapter(seed, rank=1).digest for seed in range(12)]

    def act(index: int) -> None:
        chance, store = random.Random(index), (registry, second)[index % 2]
        while time.monotonic() < until:
            # In another order on the disk each time, and all of it is over at once.
            some = chance.sample(known, 6)
            if index % 4 == 0:
                store.collect_garbage(older_than_s=0.0)
            elif index % 4 == 1:
                store.release("service", keep=some[:3])
            elif index % 4 == 2:
                store.hold("service", some, for_s=0.0)
            else:
                with store._database.write() as session:
                    claim = claims.take(session, some, clock.now - claims.LASTS_S)
                with store._database.write() as session:
                    claims.begin_deleting(session, known[:6], clock.now)
                with store._database.write() as session:
                    claims.release(session, claim)

    at_once(act, threads=8)
    registry.hold("service", known, for_s=1.0)
    with registry._database.read() as session:
        assert claims.unreferenced(session, known, clock.now) == []


def test_new_database_opened_at_once_is_migrated_once(url: str, folder: Path) -> None:
    def open_and_use(index: int) -> int:
        with Registry.open(url, folder / "blobs") as opened:
            return opened.create_tenant(f"tenant-{index}").id

    assert len(set(at_once(open_and_use, threads=8))) == 8
    assert schema.check(url) == []


@pytest.mark.postgres
def test_registry_goes_on_after_its_server_was_killed(postgres_server: PostgresServer, folder: Path) -> None:
    with Registry.open(postgres_server.url("killed"), folder / "blobs") as registry:
        registry.create_tenant("acme")
        registry.register_base("tiny", "sha256:" + "a" * 64, architecture="LlamaForCausalLM", parameters=1)
        registry.create_adapter("acme", "sql", base="tiny")
        first = registry.add_version("acme", "sql", make_adapter(0))
        postgres_server.control("stop")
        try:
            with pytest.raises(UnavailableError):
                registry.add_version("acme", "sql", make_adapter(1))
        finally:
            postgres_server.control("start")
        assert registry.versions("acme", "sql") == [first]
        assert registry.add_version("acme", "sql", make_adapter(1)).number == 2
