"""PostgreSQL is killed, or falls silent, under a service that is in use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from itertools import count, pairwise
from pathlib import Path

import httpx
import pytest

from lorafleet.api_client import RouterClient
from lorafleet.engine import Engine
from lorafleet.errors import LorafleetError, OverloadedError, UnavailableError
from lorafleet.registry import Registry, Version, postgres
from lorafleet.router_service.authentication import Authenticator
from lorafleet.router_service.metering import WAIT_S
from lorafleet.router_service.server import Server, ServerConfig
from tests.registry.conftest import PostgresServer, make_adapter, postgres_server
from tests.registry.tcp import Wire, wire_to
from tests.router_service.conftest import Experts, Fleet
from tests.waiting import wait_until

__all__ = ["postgres_server"]  # a fixture
pytestmark = pytest.mark.postgres

WRITERS = 20
RECOVERED_S = 5.0
# Of a wait that has an end: threads that have to be woken on a machine that does something else, too.
LATE_S = 2.0

_schemas = count()


@pytest.fixture
def serving(engine: Engine) -> Iterator[Callable[[Registry], Server]]:
    """Starts a server with both doors on a registry."""
    with ExitStack() as stack:

        def start(registry: Registry) -> Server:
            server = Server(engine, registry, ServerConfig(http_address="127.0.0.1:0", drain_s=0.0))
            server.start()
            stack.callback(server.stop)
            return server

        yield start


def over_http(server: Server, token: str, model: str) -> None:
    """One answer; raises UnavailableError where it is 503, and AssertionError for any other error."""
    answer = httpx.post(
        f"http://{server.http_address}/v1/completions",
        headers={"authorization": f"Bearer {token}"},
        json={"model": model, "prompt": "3141", "max_tokens": 1, "temperature": 0},
        timeout=60.0,
    )
    if answer.status_code == 503:
        raise UnavailableError(answer.text)
    assert answer.status_code == 200, answer.text


def test_a_killed_database_leaves_whole_versions_and_aliases_and_the_service_comes_back_by_itself(
    postgres_server: PostgresServer,
    tmp_path: Path,
    engine: Engine,
    experts: Experts,
    serving: Callable[[Registry], Server],
) -> None:
    """20 threads register versions of one adapter, one moves its champion, and both doors answer calls, throughout."""
    url, blobs = postgres_server.url("killed_in_use"), tmp_path / "blobs"
    stop, killed = threading.Event(), threading.Event()
    made: list[Version] = []
    moved: list[tuple[int | None, int]] = []
    refused: list[Exception] = []
    answered: list[float] = []
    with Registry.open(url, blobs) as registry, Registry.open(url, blobs) as others:
        fleet = Fleet(registry, engine.base_digest)
        first = fleet.add("acme/sql", experts.digits)
        fleet.add("acme/sql", experts.letters)
        registry.promote(first)
        registry.create_adapter("acme", "many", base=fleet.base_digest)
        token = fleet.token("acme")
        server = serving(registry)

        def until_stopped(act: Callable[[int], None]) -> None:
            for turn in count():
                if stop.is_set():
                    return
                try:
                    act(turn)
                except (UnavailableError, OverloadedError) as error:
                    refused.append(error)
                    stop.wait(0.05)

        def register(writer: int, turn: int) -> None:
            store = (registry, others)[writer % 2]
            made.append(store.add_version("acme", "many", make_adapter(1000 * writer + turn % 7)))

        def move(turn: int) -> None:
            done = others.promote(others.version("acme", "sql", 1 + turn % 2), force=True)
            moved.append((done.before, 1 + turn % 2))

        with RouterClient(server.address, key=token, timeout_s=60.0) as client:

            def call(turn: int) -> None:
                if turn % 2:
                    client.generate("3141", model="acme/sql", max_tokens=1)
                else:
                    over_http(server, token, "acme/sql")
                answered.append(time.monotonic())

            with ThreadPoolExecutor(WRITERS + 3) as pool:
                work = [
                    pool.submit(until_stopped, lambda turn, writer=writer: register(writer, turn))
                    for writer in range(WRITERS)
                ]
                work += [pool.submit(until_stopped, act) for act in (move, call, call)]
                try:
                    wait_until(lambda: len(made) >= 2 * WRITERS and len(moved) >= 3 and len(answered) >= 4)
                    postgres_server.control("restart")
                    restarted = time.monotonic()
                    before = len(made), len(moved)
                    wait_until(
                        lambda: len(made) > before[0] + WRITERS and len(moved) > before[1] + 1
                        and len([at for at in answered if at > restarted]) >= 4
                    )  # fmt: skip
                    recovered_s = sorted(at for at in answered if at > restarted)[3] - restarted
                    killed.set()
                finally:
                    stop.set()
                assert not wait(work, timeout=60.0).not_done, "something hangs"
                for each in work:
                    each.result()
        assert refused, "the database was not missed by anybody: it was not killed in the middle"
        assert recovered_s < RECOVERED_S

        numbers = {version.number: version.digest for version in registry.versions("acme", "many")}
        assert sorted(numbers) == list(range(1, len(numbers) + 1))
        # Who was told a version has it, alone; who was told nothing may have one or not.
        assert len({version.number for version in made}) == len(made)
        assert all(numbers[version.number] == version.digest for version in made)
        assert len(numbers) - len(made) <= WRITERS

        # Every move begins where the one before it ended, in the audit, too, which is written with it.
        audited = [each for each in registry.audit("acme", limit=10**6) if each.action == "alias.promote"]
        moves = [(each.details["before"], each.details["now"]) for each in audited]
        assert all(earlier[1] == later[0] for earlier, later in pairwise(moves))
        assert registry.aliases("acme", "sql") == {"champion": moves[-1][1]}
        assert len(moves) >= len(moved) + 1

        # And what is promoted now is served, within the time that a promotion may take.
        now = 3 - moves[-1][1]
        registry.promote(registry.version("acme", "sql", now), force=True)
        wait_until(lambda: answers(server, token, f"acme/sql:{now}"), timeout_s=5.0)


def answers(server: Server, token: str, reference: str) -> bool:
    """Whether the bare name is answered by a version."""
    with RouterClient(server.address, key=token, timeout_s=30.0) as client:
        return client.generate("3141", model=reference.partition(":")[0], max_tokens=1).mix[0].reference == reference


# A server that says nothing, on a connection that looks alive


@pytest.fixture
def wire(postgres_server: PostgresServer) -> Iterator[Wire]:
    with wire_to(postgres_server.folder) as made:
        yield made


def url_over(wire: Wire, server: PostgresServer) -> str:
    name = f"silent_{next(_schemas)}"
    server.url(name)
    return f"postgresql://postgres@127.0.0.1:{wire.port}/postgres?options=-csearch_path%3D{name}"


def took(act: Callable[[], object], expected: type[LorafleetError]) -> float:
    began = time.monotonic()
    with pytest.raises(expected):
        act()
    return time.monotonic() - began


def test_a_server_that_falls_silent_in_the_middle_of_a_transaction_is_given_up(
    postgres_server: PostgresServer, wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "READ_S", 0.5)
    monkeypatch.setattr(postgres, "WRITE_S", 1.0)

    class Cutting:
        """A clock that is asked twice for a new tenant: at the beginning, and for the audit, when the row is there."""

        def __init__(self) -> None:
            self.asked = 0

        def __call__(self) -> float:
            self.asked += 1
            if self.asked == 2:
                wire.cut.set()
            return 1000.0

    with Registry.open(url_over(wire, postgres_server), tmp_path / "blobs", clock=Cutting()) as registry:
        registry.tenants()
        seconds = took(lambda: registry.create_tenant("acme"), UnavailableError)
        assert 0.9 < seconds < 1.0 + LATE_S
        wire.cut.clear()
        assert registry.tenants() == []


def test_who_waits_for_a_lock_that_is_never_let_go_is_told(
    postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "_SESSION", postgres._SESSION.replace("lock_timeout = 5000", "lock_timeout = 300"))
    url = postgres_server.url(f"locked_{next(_schemas)}")
    with Registry.open(url, tmp_path / "blobs") as registry:
        registry.register_base("tiny", "sha256:" + "a" * 64, architecture="L", parameters=1)
        registry.create_tenant("acme")
        registry.create_adapter("acme", "sql", base="tiny")
        with registry._database.write() as holding:
            holding.connection().exec_driver_sql("LOCK TABLE versions IN ACCESS EXCLUSIVE MODE")
            assert took(lambda: registry.add_version("acme", "sql", make_adapter(1)), UnavailableError) < 0.3 + LATE_S
        assert registry.add_version("acme", "sql", make_adapter(1)).number == 1


def test_a_silent_database_holds_no_call_and_no_thread_and_is_noticed_when_it_speaks(
    postgres_server: PostgresServer,
    wire: Wire,
    tmp_path: Path,
    engine: Engine,
    experts: Experts,
    serving: Callable[[Registry], Server],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgres, "PING_S", 0.5)
    with Registry.open(url_over(wire, postgres_server), tmp_path / "blobs") as registry:
        fleet = Fleet(registry, engine.base_digest)
        fleet.add("acme/sql", experts.digits)
        token = fleet.token("acme")
        authenticator = Authenticator(registry, cached_s=600.0)
        known = authenticator.key(token)
        server = serving(registry)
        with RouterClient(server.address, key=token, timeout_s=60.0) as client:
            over_http(server, token, "acme/sql")
            client.generate("3141", model="acme/sql", max_tokens=1)
            wire.cut.set()
            # The look at the pooled connection, another one that does not come about, a request's wait for its quota.
            most = 2.0 + postgres.CONNECT_S + WAIT_S + LATE_S
            acts: list[Callable[[], object]] = [
                lambda: client.generate("3141", model="acme/sql", max_tokens=1),
                lambda: over_http(server, token, "acme/sql"),
                registry.tenants,
                lambda: authenticator.key("lf_unknown"),
                lambda: registry.create_tenant("late"),
            ]
            with ThreadPoolExecutor(15) as pool:
                asked = [pool.submit(took, act, UnavailableError) for act in acts for _ in range(3)]
                began = time.monotonic()
                assert authenticator.key(token) == known  # without the database, as long as it is known
                assert time.monotonic() - began < 0.5
                assert httpx.get(f"http://{server.http_address}/health", timeout=10.0).status_code == 200
                assert max(each.result() for each in asked) < most
            wire.cut.clear()
            began = time.monotonic()
            wait_until(lambda: comes_back(client, server, token), timeout_s=RECOVERED_S)
            assert time.monotonic() - began < RECOVERED_S
            assert [tenant.name for tenant in registry.tenants()] == ["acme", "rival"]


def comes_back(client: RouterClient, server: Server, token: str) -> bool:
    try:
        client.generate("3141", model="acme/sql", max_tokens=1)
        over_http(server, token, "acme/sql")
    except UnavailableError:
        return False
    return True
