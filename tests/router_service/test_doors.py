"""Every method of gRPC and every route of HTTP, asked without a right to it; and what else the doors ask for."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lorafleet.errors import OverloadedError, UnauthenticatedError
from lorafleet.proto.registry.v1 import adapters_pb2
from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc
from lorafleet.registry import Registry, keys
from lorafleet.router_service import grpc_door
from lorafleet.router_service.http import door as http_door
from lorafleet.router_service.http.app import HttpApp
from lorafleet.router_service.origins import origin
from lorafleet.router_service.server import Server
from lorafleet.router_service.shares import Shares
from tests.router_service.conftest import Connect, Experts, Fleet, Serve, bearer
from tests.waiting import wait_until

METHODS: list[MethodDescriptor] = [
    method
    for file in (router_pb2.DESCRIPTOR, adapters_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
]
SCOPES = {method: grpc_door.scope_of(f"{method.containing_service.full_name}/{method.name}") for method in METHODS}
REFUSED = {"anonymous", "malformed", "wrong secret", "expired", "revoked"}


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve(http_address="127.0.0.1:0")


@pytest.fixture
def tokens(fleet: Fleet) -> dict[str, str | None]:
    """Of every kind that opens nothing, and one whose scope opens none of these."""
    registry: Registry = fleet.registry
    revoked = registry.create_key("acme")
    registry.revoke_key("acme", revoked.key.key_id)
    good = registry.create_key("acme").token
    expired = registry.create_key("acme", expires_at=time.time() + 0.001).token
    return {
        "anonymous": None,
        "malformed": "not-a-key",
        "wrong secret": good[:-1] + ("A" if good[-1] != "A" else "B"),
        "expired": expired,
        "revoked": revoked.token,
        "without the scope": fleet.token("acme", "adapters:read"),
    }


def call(server: Server, method: MethodDescriptor, metadata: Any, timeout: float | None = 30) -> None:
    """An empty message to any method, whatever it takes."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    with grpc.insecure_channel(server.address) as channel:
        if method.client_streaming:
            answer = channel.stream_stream(path)(iter([b""]), metadata=metadata, timeout=timeout)
        elif method.server_streaming:
            answer = channel.unary_stream(path)(b"", metadata=metadata, timeout=timeout)
        else:
            answer = [channel.unary_unary(path)(b"", metadata=metadata, timeout=timeout)]
        list(answer)


def test_every_service_has_an_entry_at_the_door(server: Server, fleet: Fleet) -> None:
    described = {method.containing_service.full_name for method in METHODS}
    assert described == grpc_door.SCOPES.keys()
    with grpc.insecure_channel(server.address) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        metadata = bearer(fleet.token("acme", "adapters:read"))
        (answer,) = stub.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=30)
    served = {service.name for service in answer.list_services_response.service}
    assert served == described | {grpc_door.OPEN}
    assert health_pb2.DESCRIPTOR.services_by_name["Health"].full_name == grpc_door.OPEN


def test_every_grpc_method_asks_for_a_key_that_opens_it(
    server: Server, fleet: Fleet, tokens: dict[str, str | None]
) -> None:
    opens = {scope: fleet.token("acme", scope) for scope in keys.SCOPES}
    for method, needed in SCOPES.items():
        words = set()
        for kind in REFUSED:
            token = tokens[kind]
            with pytest.raises(grpc.RpcError) as caught:
                call(server, method, () if token is None else bearer(token))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED, (method.name, kind)
            if kind != "anonymous":
                words.add(caught.value.details())
        assert len(words) == 1, method.name
        for scope in opens.keys() - {needed, "admin"} if needed is not None else ():
            with pytest.raises(grpc.RpcError) as caught:
                call(server, method, bearer(opens[scope]))
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED, (method.name, scope)


# Far deadlines are rounded on the wire.
@pytest.mark.parametrize(("timeout", "found"), [(None, "no deadline"), (3600.0, r"a deadline 36\d\d s away")])
def test_every_grpc_method_asks_for_a_deadline_within_the_limit(
    server: Server, fleet: Fleet, timeout: float | None, found: str
) -> None:
    token = fleet.token("acme", "admin")
    for method in METHODS:
        with pytest.raises(grpc.RpcError) as caught:
            call(server, method, bearer(token), timeout)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, method.name
        assert re.search(f"{found}, expected one of at most 600 s", caught.value.details()), method.name


def test_what_changes_adapters_and_what_looks_at_them_need_scopes_of_their_own() -> None:
    found = {method.name: scope for method, scope in SCOPES.items() if "registry" in method.full_name}
    reading = {name for name, scope in found.items() if scope == "adapters:read"}
    assert reading == {name for name in found if name.startswith(("Get", "List", "Download"))} - {"GetUpload"}
    assert set(found.values()) == {"adapters:read", "adapters:write"}
    assert grpc_door.scope_of("lorafleet.registry.v1.AdapterService/Anything") == "adapters:write"
    assert grpc_door.scope_of("some.Other/Method") == "admin"


def test_who_has_no_key_does_not_learn_which_methods_there_are(server: Server, fleet: Fleet) -> None:
    def refusal(path: str, metadata: Any) -> grpc.StatusCode:
        with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(path)(b"", metadata=metadata, timeout=30)
        code: grpc.StatusCode = caught.value.code()
        return code

    for path in (
        "/lorafleet.router.v1.RouterService/Nothing",
        "/nobody.v1.Nothing/Nothing",
        "/grpc.health.v1.Health/No",
    ):
        assert refusal(path, ()) == grpc.StatusCode.UNAUTHENTICATED
        assert refusal(path, bearer(fleet.token("acme"))) == grpc.StatusCode.UNIMPLEMENTED


def routes() -> list[tuple[str, str]]:
    app = HttpApp(None, None, None, max_calls=1, longest_call_s=1.0)  # type: ignore[arg-type]
    app.close()
    return [
        (method, route.path.replace("{model:path}", "base")) for route in app.routes for method in route.methods or ()
    ]


UNKNOWN = [("GET", "/"), ("GET", "/v1/nothing"), ("POST", "/health/"), ("GET", "/docs"), ("GET", "/openapi.json")]


@pytest.mark.parametrize(("method", "path"), sorted(set(routes()) | set(UNKNOWN)))
def test_every_http_route_asks_for_a_key_that_opens_it(
    server: Server, tokens: dict[str, str | None], method: str, path: str
) -> None:
    if path in http_door.OPEN:
        assert httpx.request(method, f"http://{server.http_address}{path}").status_code == 200
        return
    words = set()
    for kind, token in tokens.items():
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        answer = httpx.request(method, f"http://{server.http_address}{path}", headers=headers)
        assert answer.status_code == (401 if kind in REFUSED else 403), kind
        if method != "HEAD":
            error = answer.json()["error"]
            assert error["code"] == ("invalid_api_key" if kind in REFUSED else "permission_denied")
            if kind in REFUSED - {"anonymous"}:
                words.add(error["message"])
    assert len(words) <= 1


def test_the_metrics_are_for_a_scope_that_admin_does_not_include(server: Server, fleet: Fleet) -> None:
    def read(*scopes: str) -> int:
        headers = {"authorization": f"Bearer {fleet.token('acme', *scopes)}"}
        return httpx.get(f"http://{server.http_address}/metrics", headers=headers).status_code

    assert [read("infer"), read("admin"), read("metrics")] == [403, 403, 200]


def test_a_newline_at_the_end_of_a_path_does_not_change_its_scope(server: Server, fleet: Fleet) -> None:
    headers = {"authorization": f"Bearer {fleet.token('acme', 'infer')}"}
    assert httpx.get(f"http://{server.http_address}/metrics%0A", headers=headers).status_code == 403


@pytest.fixture
def refused_within(server: Server, fleet: Fleet, connect: Connect) -> Callable[[Callable[[], object]], float]:
    """Seconds from the revocation of acme's key until the last call began that was still answered: what a call takes
    on a busy machine is not in them."""

    def measure(ask: Callable[[], object]) -> float:
        ask()
        (key,) = fleet.registry.keys("acme")
        fleet.registry.revoke_key("acme", key.key_id)
        revoked, answered = time.monotonic(), 0.0
        while answered < 10.0:
            began = time.monotonic() - revoked
            try:
                ask()
            except (UnauthenticatedError, httpx.HTTPStatusError):
                break
            answered = began
        return answered

    return measure


def test_a_revoked_key_opens_nothing_within_a_second(
    server: Server, fleet: Fleet, connect: Connect, refused_within: Callable[[Callable[[], object]], float]
) -> None:
    client = connect(server)
    assert refused_within(client.list_adapters) < 1.0


def test_a_revoked_key_opens_nothing_over_http_within_a_second(
    server: Server, fleet: Fleet, refused_within: Callable[[Callable[[], object]], float]
) -> None:
    headers = {"authorization": f"Bearer {fleet.token('acme')}"}

    def ask() -> None:
        httpx.get(f"http://{server.http_address}/v1/models", headers=headers).raise_for_status()

    assert refused_within(ask) < 1.0


def test_a_message_beyond_the_limit_is_refused(server: Server, fleet: Fleet) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Route(
                    router_pb2.RouteRequest(text="x" * 2**21),
                    metadata=bearer(fleet.token("acme")),
                    timeout=30,
                    compression=compression,
                )
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def silent_calls(
    channel: grpc.Channel, method: str, number: int, metadata: Any = ()
) -> tuple[threading.Event, list[Any]]:
    """Calls that are begun and send no message; the event lets them end."""
    go_on = threading.Event()

    def nothing() -> Iterator[bytes]:
        go_on.wait()
        yield from ()

    begun = channel.stream_stream(method)
    return go_on, [begun(nothing(), metadata=metadata, timeout=30) for _ in range(number)]


def wait_ended(calls: list[Any], number: int) -> None:
    """Until so many of the calls have ended, whichever."""
    ended = threading.Semaphore(0)
    for call in calls:
        call.add_done_callback(lambda _call: ended.release())
    for _ in range(number):
        assert ended.acquire(timeout=30.0)


ROUTE = "/lorafleet.router.v1.RouterService/Route"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def test_who_has_no_key_holds_no_thread_by_sending_nothing(serve: Serve, connect: Connect) -> None:
    server = serve(max_calls=1)
    with grpc.insecure_channel(server.address) as channel:
        go_on, calls = silent_calls(channel, ROUTE, 20)
        for call in calls:
            assert call.code() == grpc.StatusCode.UNAUTHENTICATED
        assert connect(server, timeout_s=10.0).list_adapters() == []
        go_on.set()


def test_a_call_whose_message_does_not_come_is_ended(
    serve: Serve, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_door, "_MESSAGE_S", 0.1)
    server = serve()
    with grpc.insecure_channel(server.address) as channel:
        go_on, (call,) = silent_calls(channel, ROUTE, 1, bearer(fleet.token("acme")))
        assert call.code() == grpc.StatusCode.CANCELLED
        go_on.set()


def test_strangers_who_ask_for_health_take_nothing_from_callers(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_door, "_MESSAGE_S", 60.0)
    server = serve(max_calls=2)
    with grpc.insecure_channel(server.address) as channel:
        go_on, calls = silent_calls(channel, "/grpc.health.v1.Health/Check", 60)
        wait_ended(calls, 58)
        assert connect(server, timeout_s=10.0).list_adapters() == []
        go_on.set()
        codes = Counter(call.code() for call in calls)
        assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED: 58, grpc.StatusCode.INVALID_ARGUMENT: 2}
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status == health_pb2.HealthCheckResponse.SERVING


def test_health_is_answered_again_after_the_server_was_full_to_the_brim(
    serve: Serve, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_door, "_MESSAGE_S", 60.0)
    server = serve(max_calls=1)
    with grpc.insecure_channel(server.address) as channel:
        begun = []
        for number, share in enumerate((18, 9, 5, 2, 1, 1)):  # of 36 places; each tenant has half of what is left
            fleet.registry.create_tenant(f"tenant-{number}")
            token = fleet.token(f"tenant-{number}")
            begun.append(silent_calls(channel, ROUTE, 20, bearer(token)))
            wait_ended(begun[-1][1], 20 - share)
        stub = health_pb2_grpc.HealthStub(channel)
        for _ in range(3):
            with pytest.raises(grpc.RpcError, match="Concurrent RPC limit"):
                stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
        for go_on, calls in begun:
            go_on.set()
            for call in calls:
                call.code()
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status == health_pb2.HealthCheckResponse.SERVING


def test_one_tenants_silent_streams_leave_room_for_anothers_calls(serve: Serve, fleet: Fleet, connect: Connect) -> None:
    server = serve(max_calls=1)
    with grpc.insecure_channel(server.address) as channel:
        go_on, calls = silent_calls(channel, REFLECTION, 60, bearer(fleet.token("acme", "adapters:read")))
        wait_ended(calls, 60 - 18)  # half of 36 places
        refused = [call for call in calls if call.done()]
        assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert {call.details() for call in refused} == {
            "too many of your calls are here at once; try again when one has ended"
        }
        with pytest.raises(OverloadedError, match="too many of your calls"):
            connect(server).list_adapters()
        assert connect(server, tenant="rival").list_adapters() == []
        go_on.set()
        assert {call.code() for call in calls} == {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OK}
    assert connect(server).list_adapters() == []


def test_each_tenant_has_as_many_places_as_it_leaves_free() -> None:
    shares, places, running = Shares(), 12, 0

    def begun(tenant: str) -> int:
        """How many calls begin before one is refused."""
        nonlocal running
        for number in range(places + 1):
            try:
                shares.take(tenant, free=places - running)
            except OverloadedError:
                return number
            running += 1
        raise AssertionError("nothing was refused")

    assert [begun(tenant) for tenant in "abcde"] == [6, 3, 2, 1, 0]
    for tenant, number in (("a", 6), ("b", 3), ("c", 2), ("d", 1)):
        for _ in range(number):
            shares.give_back(tenant)
    assert shares._running == {}


def test_places_of_calls_that_were_refused_or_cancelled_are_free_again(
    serve: Serve, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    door = server._grpc._door
    metadata = bearer(fleet.token("acme"))
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError):
            channel.unary_unary(ROUTE)(b"\xff", metadata=metadata, timeout=30)
        go_on, (call,) = silent_calls(channel, REFLECTION, 1, metadata)
        wait_until(lambda: door._shares._running == {"acme": 1})
        call.cancel()
        wait_until(lambda: door._shares._running == {} and door._running == 0)
        go_on.set()


def test_a_stream_whose_next_message_does_not_come_is_ended(
    serve: Serve, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_door, "_NEXT_MESSAGE_S", 0.1)
    server, go_on = serve(), threading.Event()

    def one() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        go_on.wait()

    with grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(one(), metadata=bearer(fleet.token("acme")), timeout=30)
        assert next(call).list_services_response.service
        with pytest.raises(grpc.RpcError, match="did not come within"):
            next(call)
        assert call.code() == grpc.StatusCode.CANCELLED
        go_on.set()


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        (REFLECTION, reflection_pb2.ServerReflectionRequest(list_services="")),
        ("/lorafleet.registry.v1.AdapterService/ListAdapters", adapters_pb2.ListAdaptersRequest()),
        ("/lorafleet.router.v1.RouterService/ListAdapters", router_pb2.ListAdaptersRequest()),
    ],
    ids=["a stream", "on a thread", "on the loop"],
)
def test_an_answer_that_is_too_large_is_told_as_such_and_logged(
    serve: Serve,
    fleet: Fleet,
    experts: Experts,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    path: str,
    request_: Any,
) -> None:
    monkeypatch.setattr(grpc_door, "MAX_RESPONSE_BYTES", 10)
    fleet.add("acme/sql", experts.other)
    server, metadata = serve(), bearer(fleet.token("acme", "infer", "adapters:read"))
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.unary_stream(path)(request_.SerializeToString(), metadata=metadata, timeout=30))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert re.fullmatch(r"the answer has \d+ bytes, expected at most 10; ask for less of it", caught.value.details())
    (line,) = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert re.fullmatch(rf"{path[1:]}: the answer has \d+ bytes, expected at most 10", line)


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x02\xff\xfe"], ids=["no message", "no text"])
def test_a_message_that_cannot_be_read_is_the_callers_mistake(server: Server, fleet: Fleet, body: bytes) -> None:
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(ROUTE)(body, metadata=bearer(fleet.token("acme")), timeout=30)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_who_watches_health_leaves_room_for_who_asks(serve: Serve) -> None:
    server = serve(max_calls=64)
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watching = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(grpc_door.HEALTH_PER_ADDRESS)]
        for each in watching:
            assert next(each).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError, match="too many ask"):
            next(stub.Watch(health_pb2.HealthCheckRequest()))
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status == health_pb2.HealthCheckResponse.SERVING
        for each in watching:
            each.cancel()


def test_places_are_bounded_in_all_and_for_each_address() -> None:
    places = grpc_door.Places(3, most_each=2)
    assert [places.take(address) for address in ("a", "a", "a", "b", "b")] == [True, True, False, True, False]
    places.give_back("a")
    assert [places.take(address) for address in ("b", "c")] == [True, False]


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("ipv4:127.0.0.1:5000", "127.0.0.1/32"),
        ("ipv6:%5B2001:db8:1:2:3::4%5D:5000", "2001:db8:1:2::/64"),
        ("ipv6:[::1]:5000", "::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::/64"),
        ("unix:", ""),
    ],
)
def test_a_peer_stands_for_its_address(peer: str, expected: str) -> None:
    assert origin(grpc_door._host(peer)) == expected


def test_an_ipv4_address_stands_for_itself_on_a_socket_for_both() -> None:
    assert origin("::ffff:192.0.2.7") == origin("192.0.2.7") == "192.0.2.7/32"


def test_a_connection_without_calls_is_closed_and_opened_again(
    serve: Serve, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafleet.router_service.grpc_server._IDLE_MS", 200)
    server = serve()
    states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
    with grpc.insecure_channel(server.address) as channel:
        channel.subscribe(states.put)
        listed = router_pb2_grpc.RouterServiceStub(channel).ListAdapters
        for _ in range(2):
            listed(router_pb2.ListAdaptersRequest(), metadata=bearer(fleet.token("acme")), timeout=30)
            while states.get(timeout=30) is not grpc.ChannelConnectivity.READY:
                pass
            while states.get(timeout=30) is not grpc.ChannelConnectivity.IDLE:
                pass
