from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorafleet.engine import Engine
from lorafleet.errors import (
    BackendError,
    BaseMismatchError,
    InvalidInputError,
    LorafleetError,
    OverloadedError,
    UnavailableError,
    UnknownNameError,
)
from lorafleet.router_service import status
from lorafleet.router_service.admission import Admission
from lorafleet.router_service.grpc_server import SERVICE_NAME
from lorafleet.router_service.server import Server, ServerConfig
from tests.router_service.conftest import Connect, Fleet, Serve, run_in_thread

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_taken_port_is_refused(engine: Engine, fleet: Fleet, serve: Serve) -> None:
    taken = serve().address
    with pytest.raises(UnavailableError, match="choose another port"):
        Server(engine, fleet.registry, ServerConfig(address=taken)).start()


def test_an_unknown_router_is_refused_with_those_that_are_known(engine: Engine, fleet: Fleet) -> None:
    with pytest.raises(UnknownNameError, match=r"known are: cards, cards\+likelihood, likelihood"):
        Server(engine, fleet.registry, ServerConfig(router="oracle"))


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve(drain_s=60.0)


def watched(server: Server, service: str) -> Iterator[int]:
    with grpc.insecure_channel(server.address) as channel:
        for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service)):
            yield answer.status


@pytest.mark.parametrize("service", ["", SERVICE_NAME])
def test_health_is_served_without_a_key(server: Server, service: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
    assert answer.status == SERVING


def test_health_is_answered_when_the_server_is_full(serve: Serve, connect: Connect) -> None:
    server = serve(max_calls=1)
    with connect(server).stream("314", max_tokens=400, ignore_eos=True) as stream:
        next(iter(stream))
        assert next(watched(server, "")) == SERVING


def test_a_burst_of_clients_on_one_connection_is_served_whole_or_told_to_come_again(
    serve: Serve, connect: Connect
) -> None:
    server = serve(max_calls=4)
    outcomes: list[type[BaseException] | None] = []
    start = threading.Barrier(48)

    def call() -> None:
        client = connect(server)
        start.wait()
        try:
            client.generate("314", max_tokens=2)
        except LorafleetError as error:
            outcomes.append(type(error))
        else:
            outcomes.append(None)

    threads = [run_in_thread(call) for _ in range(48)]
    for thread in threads:
        thread.join()
    assert len(outcomes) == 48 and None in outcomes
    assert set(outcomes) <= {None, OverloadedError}


def test_stopping_says_so_first_then_lets_calls_end_and_refuses_new_ones(server: Server, connect: Connect) -> None:
    client = connect(server)
    health = watched(server, SERVICE_NAME)
    assert next(health) == SERVING
    with client.stream("314", max_tokens=200, ignore_eos=True) as stream:
        chunks = iter(stream)
        next(chunks)
        stopping = run_in_thread(server.stop)
        assert next(health) == NOT_SERVING
        assert server.closed.wait(30.0)
        with pytest.raises(UnavailableError, match="shutting down"):
            client.generate("314", max_tokens=1)
        for _ in chunks:
            pass
        assert len(stream.result.token_ids) == 200
    health.close()  # type: ignore[attr-defined]
    stopping.join(30.0)
    assert not stopping.is_alive()
    with pytest.raises(UnavailableError, match="no server answers"):
        connect(server).list_adapters()


def test_calls_that_outlast_the_drain_are_cut_off(
    serve: Serve, connect: Connect, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a second for its last words, a fast machine ends the call in time.
    monkeypatch.setattr("lorafleet.router_service.grpc_server._LAST_WORDS_S", 0.0)
    server = serve(drain_s=0.0)
    with connect(server).stream("314", max_tokens=500, ignore_eos=True) as stream:
        chunks = iter(stream)
        next(chunks)
        server.stop()
        with pytest.raises(UnavailableError):
            list(chunks)
    assert server.wait_idle(timeout_s=30.0)


def test_an_unexpected_error_says_nothing_outside_and_all_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = status.to_status(KeyError("secret of a tenant"))
    assert answer.code == grpc.StatusCode.INTERNAL.value[0]
    assert "secret" not in str(answer)
    assert "secret of a tenant" in caplog.text
    assert answer.message.rsplit(" ", 1)[1] in caplog.text


def test_what_a_driver_or_the_file_system_says_is_for_the_log(caplog: pytest.LogCaptureFixture) -> None:
    error = BackendError("cannot read /srv/secret")
    with caplog.at_level(logging.ERROR):
        answer = status.to_status(error)
    assert answer.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert "secret" not in str(answer) and "/srv/secret" in caplog.text
    assert answer.message.rsplit(" ", 1)[1] in caplog.text


def test_what_we_say_ourselves_of_a_part_that_is_away_is_for_callers() -> None:
    error = UnavailableError("the server is stopping")
    error.__cause__ = KeyError("what it came from")
    assert status.to_status(error).message == "the server is stopping"


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (BaseMismatchError("words"), grpc.StatusCode.FAILED_PRECONDITION, b"BASE_MISMATCH"),
        (UnknownNameError("router", "x", ()), grpc.StatusCode.INVALID_ARGUMENT, b"UNKNOWN_NAME"),
        (LorafleetError("words"), grpc.StatusCode.INTERNAL, b"LORAFLEET"),
    ],
)
def test_errors_of_ours_keep_their_words_and_have_a_reason(
    error: LorafleetError, code: grpc.StatusCode, reason: bytes
) -> None:
    answer = status.to_status(error)
    assert (answer.code, answer.message) == (code.value[0], str(error))
    assert reason in answer.details[0].value


def test_admission_lets_no_more_in_than_its_limit() -> None:
    admission = Admission(3)
    outcomes: list[bool] = []
    start = threading.Barrier(10)

    def enter() -> None:
        start.wait()
        try:
            admission.enter()
        except LorafleetError:
            outcomes.append(False)
        else:
            outcomes.append(True)

    threads = [run_in_thread(enter) for _ in range(10)]
    for thread in threads:
        thread.join()
    assert outcomes.count(True) == 3
    assert not admission.wait_idle(timeout_s=0.0)
    for _ in range(3):
        admission.leave()
    assert admission.wait_idle(timeout_s=0.0)


def test_admission_without_room_for_anybody_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least 1"):
        Admission(0)
