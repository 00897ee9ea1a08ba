"""What must not wait on an event loop does not, leaves nothing behind, and is done on a thread instead."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator, Iterator

import grpc
import pytest
import sqlalchemy
from sqlalchemy import event

from lorafleet.engine import Engine
from lorafleet.errors import UnavailableError
from lorafleet.registry.quotas import DAY_S
from lorafleet.registry.records import Key
from lorafleet.router_service.admission import Admission
from lorafleet.router_service.answering import Answering
from lorafleet.router_service.event_loop import EventLoop
from lorafleet.router_service.grpc_blocking import Blocking
from lorafleet.router_service.metering import Metering
from lorafleet.router_service.residency import Residency
from lorafleet.router_service.trail import Trail, current_trail
from lorafleet.router_service.waiting import Workers, WouldWait
from tests.router_service.conftest import Connect, Experts, Fleet, Serve

TEXT = "3.14, digits of pi"


@pytest.fixture
def metering(fleet: Fleet) -> Iterator[Metering]:
    metering = Metering(fleet.registry)
    metering.start()
    yield metering
    metering.stop()


@pytest.fixture
def answering(engine: Engine, fleet: Fleet, experts: Experts, metering: Metering) -> Answering:
    """By cards, with an adapter that is not loaded yet."""
    fleet.add("acme/digits", experts.digits)
    residency, admission = Residency(engine, fleet.registry), Admission(8)
    return Answering(
        engine, fleet.registry, residency, admission, metering, router="cards", follow=lambda _ticket, _call: None
    )


@pytest.fixture
def key(fleet: Fleet) -> Key:
    return fleet.registry.authenticate(fleet.token("acme"))


def test_a_route_that_would_wait_is_refused_until_all_that_it_needs_is_at_hand(
    answering: Answering, metering: Metering, engine: Engine, fleet: Fleet, key: Key
) -> None:
    """First nothing is; then all but the weights, which a route does not keep; then those, too."""
    call = answering.call(key)
    with pytest.raises(WouldWait):
        answering.route(call, TEXT, wait=False)
    decision = answering.route(call, TEXT)
    assert [answering.engine.adapters(), len(decision.route.mix)] == [{}, 1]
    with pytest.raises(WouldWait):
        answering.route(call, TEXT, wait=False)
    residency = answering._residency
    residency.keep(decision.versions)
    answering.route(call, TEXT)
    asked: list[str] = []
    here = threading.current_thread()

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if threading.current_thread() is here:
            asked.append(statement)

    event.listen(sqlalchemy.Engine, "before_cursor_execute", note)
    try:
        assert answering.route(call, TEXT, wait=False).route == decision.route
    finally:
        event.remove(sqlalchemy.Engine, "before_cursor_execute", note)
    assert asked == []
    call.end()
    metering.stop()
    assert sum(usage.requests for usage in fleet.registry.usage("acme") if usage.window.period_s == DAY_S) == 3
    residency.keep([])
    assert engine.adapters() == {}


def test_a_router_that_runs_the_model_always_waits(engine: Engine, fleet: Fleet, metering: Metering, key: Key) -> None:
    residency = Residency(engine, fleet.registry)
    answering = Answering(engine, fleet.registry, residency, Admission(1), metering, follow=lambda _ticket, _call: None)
    call = answering.call(key)
    answering.route(call, TEXT)
    with pytest.raises(WouldWait):
        answering.route(call, TEXT, wait=False)
    call.end()


def test_what_waits_runs_on_a_thread_with_the_context_of_its_call() -> None:
    workers, loop = Workers(1, "a worker"), EventLoop("a loop")
    trail = Trail("grpc", "method")

    def work(number: int) -> tuple[str, int, object]:
        if number < 0:
            raise UnavailableError("words")
        return threading.current_thread().name, number, current_trail()

    async def ask(number: int) -> tuple[str, int, object]:
        trail.enter()
        return await workers.run(work, number)

    try:
        assert loop.run(ask(3)) == ("a worker_0", 3, trail)
        with pytest.raises(UnavailableError, match="words"):
            loop.run(ask(-1))
    finally:
        loop.stop()
        workers.close()


def test_a_loop_that_stops_cancels_what_runs_on_it() -> None:
    loop, began, cancelled = EventLoop("a loop"), threading.Event(), threading.Event()

    async def forever() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def begin() -> asyncio.Task[None]:
        return asyncio.create_task(forever())

    task = loop.run(begin())
    assert began.wait(30.0)
    loop.stop()
    assert cancelled.is_set() and task.cancelled()


class Slow:
    """A caller that takes an answer when it is told to, as gRPC's context shows it."""

    def __init__(self) -> None:
        self.wanted, self.taken = asyncio.Semaphore(0), 0

    async def write(self, _answer: int) -> None:
        await self.wanted.acquire()
        self.taken += 1


def test_no_more_is_made_than_the_caller_takes_and_nothing_once_the_call_has_ended(key: Key) -> None:
    workers, loop = Workers(1, "a worker"), EventLoop("a loop")
    made: list[int] = []
    told, ended = threading.Event(), threading.Event()

    def answers() -> Generator[int]:
        try:
            for number in range(10):
                made.append(number)
                if number == 2:
                    told.set()
                yield number
        except BaseException:
            ended.set()
            raise

    async def scenario() -> None:
        caller = Slow()
        call = Blocking(caller, key, Trail())
        running = asyncio.create_task(call.run(workers, lambda: call.write(answers)))
        caller.wanted.release()
        caller.wanted.release()
        await asyncio.to_thread(told.wait, 30.0)
        assert (made, caller.taken) == ([0, 1, 2], 2)
        running.cancel()
        await asyncio.wait([running])
        caller.wanted.release()  # what gRPC does with a step of a call that has ended

    try:
        loop.run(scenario())
        assert ended.wait(30.0)
        assert made == [0, 1, 2]
    finally:
        workers.close()
        loop.stop()


def test_generations_that_wait_for_the_engine_hold_no_thread(serve: Serve, connect: Connect) -> None:
    """More of them than there are threads, and listings are answered between them."""
    server = serve(max_calls=64)
    client = connect(server)
    pool = server._grpc._workers._pool
    streams = [client.stream("314", max_tokens=300, ignore_eos=True) for _ in range(12)]
    try:
        for stream in streams:
            next(iter(stream))
        assert client.list_adapters() == []
        assert pool._idle_semaphore._value == len(pool._threads) > 0
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)


def test_a_method_nobody_knows_is_one_however_many_are_asked_for(serve: Serve, fleet: Fleet) -> None:
    server = serve()
    door = server._grpc._door
    before = dict(door._opened)
    metadata = (("authorization", f"Bearer {fleet.token('acme')}"),)
    with grpc.insecure_channel(server.address) as channel:
        for number in range(5):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/lorafleet.router.v1.RouterService/N{number}")(b"", metadata=metadata, timeout=30)
    assert door._opened == before
