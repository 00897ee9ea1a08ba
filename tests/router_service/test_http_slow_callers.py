from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

import httpx
import openai
import pytest

from lorafleet.engine import Engine
from lorafleet.router_service.http.connection import Connection
from lorafleet.router_service.server import Server
from tests.router_service.conftest import Fleet, Serve
from tests.router_service.test_service import tokens_until_idle


def said_to(server: Server, head: bytes) -> bytes:
    """What the server answers to bytes after which nothing comes, until it closes the connection."""
    assert server.http_address is not None
    host, port = server.http_address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=30.0) as connection:
        connection.sendall(head)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    return answer


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve(http_address="127.0.0.1:0")


@pytest.mark.parametrize("head", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\n"], ids=["nothing", "half a head"])
def test_a_connection_without_a_request_is_cut_off(
    server: Server, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr("lorafleet.router_service.http.connection.HEAD_S", 0.2)
    assert said_to(server, head) == b""


def test_a_body_that_does_not_come_is_told_so(server: Server, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.router_service.http.connection.HEAD_S", 1.0)
    monkeypatch.setattr("lorafleet.router_service.http.bodies._READ_S", 0.2)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {fleet.token('acme')}\r\n"
        "content-length: 100\r\n\r\n{"
    )
    answer = said_to(server, head.encode())
    assert answer.startswith(b"HTTP/1.1 400") and b"did not come within" in answer


def test_one_tenants_bodies_that_do_not_come_leave_room_for_anothers_calls(serve: Serve, fleet: Fleet) -> None:
    server = serve(http_address="127.0.0.1:0", max_calls=4)
    assert server.http_address is not None
    host, port = server.http_address.rsplit(":", 1)
    keys = [fleet.token(tenant) for tenant in ("acme", "rival")]
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {keys[0]}\r\ncontent-length: 9\r\n\r\n"
    with ExitStack() as stack:
        connections = []
        for _ in range(9):
            connections.append(stack.enter_context(socket.create_connection((host, int(port)), timeout=30.0)))
            connections[-1].sendall(head.encode())
            # The server has seen it then: of nine whose keys it had not, it would cut one off.
            assert httpx.get(f"http://{server.http_address}/health", timeout=30.0).status_code == 200
        refused, _, _ = select.select(connections, [], [], 30.0)  # half of 16 places are its own
        answer = refused[0].recv(65536)
        assert answer.startswith(b"HTTP/1.1 429") and b"too many of your calls" in answer
        for key, status in zip(keys, (429, 200), strict=True):
            asked = httpx.get(
                f"http://{server.http_address}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=30.0
            )
            assert asked.status_code == status


def test_an_answer_may_take_longer_than_a_head(
    server: Server,
    engine: Engine,
    openai_client: Callable[..., openai.OpenAI],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorafleet.router_service.http.connection.HEAD_S", 0.05)
    asked = openai_client(server).completions.create(
        model="base", prompt="x", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    assert [choice.finish_reason for chunk in asked for choice in chunk.choices][-1] == "length"
    tokens_until_idle(server, engine)


def test_a_caller_that_does_not_read_its_stream_ends_the_generation(
    server: Server, fleet: Fleet, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafleet.router_service.http.connection.UNREAD_S", 0.2)
    assert server.http_address is not None
    host, port = server.http_address.rsplit(":", 1)
    asked = {
        "model": "base",
        "prompt": "x",
        "n": 16,
        "max_tokens": 480,
        "logprobs": 20,
        "ignore_eos": True,
        "stream": True,
    }
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {fleet.token('acme')}\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(12) == b"HTTP/1.1 200"
        tokens_until_idle(server, engine)


def connected(server: Server, *, address: str = "127.0.0.1") -> socket.socket:
    """From an address of this machine, all of whose 127.0.0.0/8 are its own."""
    assert server.http_address is not None
    host, port = server.http_address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=30.0, source_address=(address, 0))


HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def test_who_opens_thousands_of_connections_closes_their_own(serve: Serve) -> None:
    server = serve(http_address="127.0.0.1:0", max_calls=1)  # two may be strangers'
    with connected(server) as patient, ExitStack() as stack:
        many = [stack.enter_context(connected(server, address="127.0.0.2")) for _ in range(6)]
        for connection in many[:5]:
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        for connection in (patient, many[5]):
            connection.sendall(HEALTH)
            assert connection.recv(12) == b"HTTP/1.1 200"


def test_a_stranger_who_reads_no_answers_holds_no_callers_place(
    serve: Serve, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(http_address="127.0.0.1:0", max_calls=2)  # eight connections
    assert server._http is not None and server._http._socket is not None
    server._http._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # else megabytes fit
    unread, pause = threading.Semaphore(0), Connection.pause_writing

    def pause_writing(connection: Connection) -> None:
        pause(connection)
        unread.release()

    monkeypatch.setattr(Connection, "pause_writing", pause_writing)
    with ExitStack() as stack:
        for _ in range(6):
            stranger = stack.enter_context(connected(server, address="127.0.0.2"))
            stranger.sendall(HEALTH * 2000)
            assert unread.acquire(timeout=30.0)
        stack.enter_context(connected(server, address="127.0.0.2"))  # the seventh; one place is always left empty
        caller = stack.enter_context(connected(server))
        key = fleet.token("acme")
        caller.sendall(f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n".encode())
        assert caller.recv(12) == b"HTTP/1.1 200"


def test_a_caller_with_a_key_is_not_closed_for_strangers(serve: Serve, fleet: Fleet) -> None:
    server = serve(http_address="127.0.0.1:0", max_calls=1)
    body = json.dumps({"model": "base", "prompt": "x", "max_tokens": 1}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {fleet.token('acme')}\r\n"
        f"content-length: {len(body)}\r\nexpect: 100-continue\r\n\r\n"
    )
    with connected(server) as caller, ExitStack() as stack:
        caller.sendall(head.encode())
        assert caller.recv(65536).startswith(b"HTTP/1.1 100")  # its key was looked at
        many = [stack.enter_context(connected(server)) for _ in range(6)]
        for connection in many[:4]:
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        caller.sendall(body)
        assert caller.recv(12) == b"HTTP/1.1 200"


def test_connections_that_wait_longest_are_closed_for_new_ones(serve: Serve) -> None:
    server = serve(http_address="127.0.0.1:0", max_calls=1)  # two may wait
    assert server.http_address is not None
    host, port = server.http_address.rsplit(":", 1)
    with ExitStack() as stack:
        waiting = [stack.enter_context(socket.create_connection((host, int(port)), timeout=30.0)) for _ in range(6)]
        for connection in waiting[:4]:
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        for connection in waiting[4:]:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
