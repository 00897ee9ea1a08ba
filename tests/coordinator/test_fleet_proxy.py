"""What passes between members and a SuperLink: calls of the Fleet API by members' nodes, and nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from fastapi.routing import APIRoute, iter_route_contexts
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from flwr.superlink.main import create_app
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from lorafleet.clients.standing import is_out
from lorafleet.coordinator import acceptance, fleet_proxy
from lorafleet.coordinator.fleet_proxy import (
    ACTIVATE,
    FLEET_PATHS,
    KEYS_S,
    PUSH,
    REGISTER,
    FleetProxy,
    Members,
    ProxySettings,
)
from lorafleet.coordinator.node_keys import header_of, pem_of, read_public_key, registered_form
from lorafleet.errors import InvalidInputError, NotFoundError, UnavailableError
from lorafleet.registry import Federation, Registry
from tests.coordinator.scripted import BASE
from tests.router_service.certificates import Authority

PULL = "/v1/fleet/pull-messages"


class SuperLink:
    """What a SuperLink is asked in the end, and what it answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes, httpx.Headers]] = []
        self.error: Exception | None = None

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.url.path, await request.aread(), request.headers))
        if self.error is not None:
            raise self.error
        headers = {"content-type": "application/protobuf", "server": "secret", "set-cookie": "a=b"}
        return httpx.Response(200, content=answer(), headers=headers)


async def answer() -> AsyncIterator[bytes]:
    yield b"ans"
    yield b"wer"


class Control:
    def __init__(self) -> None:
        self.registered: list[bytes] = []

    def register(self, public_key: bytes) -> None:
        self.registered.append(public_key)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


Call = Callable[..., httpx.Response]


def caller(superlink: SuperLink, members: Members | None = None, **options: Any) -> Call:
    """Calls the proxy as a member's HTTP client would."""

    def call(path: str, content: Any = b"", *, method: str = "POST", headers: Any = None) -> httpx.Response:
        async def once() -> httpx.Response:
            link = httpx.MockTransport(superlink)
            async with httpx.AsyncClient(transport=link, base_url="http://superlink") as upstream:
                app = FleetProxy(upstream, members, **options)
                proxied = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
                async with httpx.AsyncClient(transport=proxied, base_url="http://proxy") as client:
                    return await client.request(method, path, content=content, headers=headers)

        return asyncio.run(once())

    return call


# What passes


def routes() -> dict[str, set[str]]:
    """API → the paths that the installed Flower's SuperLink serves."""
    found: dict[str, set[str]] = {}
    for context in iter_route_contexts(create_app().routes):
        path = context.route.path if isinstance(context.route, APIRoute) else getattr(context.route, "path", "")
        found.setdefault(path.split("/")[2] if path.startswith("/v1/") else "", set()).add(path)
    return found


def test_the_list_is_the_fleet_api_of_the_installed_flower_and_nothing_of_the_others(superlink: SuperLink) -> None:
    served = routes()
    assert served["fleet"] == FLEET_PATHS and {"control", "runtime"} <= served.keys()
    assert len(served["control"]) > 20 and len(served["runtime"]) > 10
    call = caller(superlink)
    refused = {call(path).content for api, paths in served.items() if api != "fleet" for path in paths}
    assert superlink.asked == [] and len(refused) == 1
    assert call("/v1/control/start-run").status_code == 403


def test_a_fleet_call_passes_with_what_it_needs_and_no_more(superlink: SuperLink) -> None:
    needed = {"content-type": "application/protobuf", "flwr-signature": "s", "flwr-timestamp": "t"}
    more = {"authorization": "Bearer x", "cookie": "c=d", "x-forwarded-for": "1.2.3.4", "flwr-task-token": "x"}
    answer = caller(superlink)(PULL, b"question", headers=needed | more)
    assert (answer.status_code, answer.content) == (200, b"answer")
    assert answer.headers.keys() == {"content-type"}
    ((path, content, headers),) = superlink.asked
    assert (path, content) == (PULL, b"question") and needed.items() <= dict(headers).items()
    assert not more.keys() & headers.keys() and headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", PULL), ("PUT", PULL), ("POST", PULL + "/"), ("POST", PULL + "?x=1"), ("POST", "/v1/fleet/"),
        ("POST", "/v1/fleet/../control/start-run"), ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("POST", "//v1/fleet/pull-messages"), ("POST", "/V1/FLEET/PULL-MESSAGES"), ("GET", "/docs"),
        ("GET", "/openapi.json"), ("GET", "/health"), ("POST", acceptance.PATH),
    ],
)  # fmt: skip
def test_what_only_looks_like_a_fleet_call_does_not_pass(superlink: SuperLink, method: str, path: str) -> None:
    assert caller(superlink)(path, method=method).status_code == 403
    assert superlink.asked == []


def test_a_header_that_is_there_twice_does_not_pass(superlink: SuperLink) -> None:
    answer = caller(superlink)(PULL, headers=[("flwr-public-key", "mine"), ("flwr-public-key", "another's")])
    assert answer.status_code == 400 and superlink.asked == []


def test_a_body_of_two_lengths_does_not_pass(superlink: SuperLink) -> None:
    answer = caller(superlink)(PULL, b"abc", headers={"content-length": "9", "transfer-encoding": "chunked"})
    assert answer.status_code == 400 and superlink.asked == []


def test_a_header_in_no_alphabet_reaches_the_superlink_as_it_is(superlink: SuperLink) -> None:
    assert caller(superlink)(PULL, headers={b"flwr-signature": b"\xe9\xff"}).status_code == 200
    assert (b"flwr-signature", b"\xe9\xff") in superlink.asked[0][2].raw


async def endless() -> AsyncIterator[bytes]:
    for _ in range(1000):
        yield b"x" * 100


@pytest.mark.parametrize("content", [b"x" * 2000, endless])
def test_what_is_too_large_does_not_pass(superlink: SuperLink, content: Any) -> None:
    call = caller(superlink, max_request_bytes=1000)
    assert call(PULL, content if isinstance(content, bytes) else content()).status_code == 413
    assert call(PULL, b"x" * 1000).status_code == 200
    large = fleet_proxy.MAX_PUSH_BYTES + 1
    assert call(PUSH, b"x", headers={"content-length": str(large)}).status_code == 413


@pytest.mark.parametrize(
    ("error", "status"), [(httpx.ConnectError("down"), 502), (httpx.ReadTimeout("slow"), 504), (TimeoutError(), 504)]
)
def test_a_superlink_that_does_not_answer_is_said_so_that_a_node_tries_again(
    superlink: SuperLink, error: Exception, status: int
) -> None:
    superlink.error = error
    assert caller(superlink)(PULL).status_code == status


# What a node may push


def push(node: int, *messages: Metadata) -> bytes:
    body = PushMessagesRequest(node=Node(node_id=node), messages_list=[Message(metadata=m) for m in messages])
    return body.SerializeToString()


REPLY = {"run_id": 1, "dst_node_id": 1, "reply_to_message_id": "abc", "message_type": "train"}


def test_a_node_pushes_replies_under_its_own_id(superlink: SuperLink) -> None:
    body = push(7, Metadata(src_node_id=7, **REPLY))
    assert caller(superlink)(PUSH, body).status_code == 200
    assert superlink.asked[0][1] == body


@pytest.mark.parametrize(
    "body",
    [
        # As from the SuperLink, to another node: an order.
        push(7, Metadata(src_node_id=1, dst_node_id=8, run_id=1, message_type="train")),
        push(7, Metadata(src_node_id=7, dst_node_id=8, run_id=1, message_type="train")),
        push(7, Metadata(src_node_id=8, **REPLY)),
        push(7, Metadata(src_node_id=7, **REPLY), Metadata(src_node_id=8, **REPLY)),
    ],
    ids=["an order of the SuperLink", "an order of its own", "another's reply", "another's beside its own"],
)
def test_a_node_pushes_no_orders_and_nothing_of_others(superlink: SuperLink, body: bytes) -> None:
    assert caller(superlink)(PUSH, body).status_code == 403
    assert caller(superlink)(PUSH, body + b"\xff").status_code == 400
    assert superlink.asked == []


# Whose nodes


def new_key() -> str:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(f"sqlite:///{tmp_path / 'registry.db'}", tmp_path / "blobs") as opened:
        opened.create_tenant("acme")
        opened.register_base("base", BASE, architecture="L", parameters=1)
        opened.create_federation("acme", "fleet", base=BASE, settings={})
        yield opened


@pytest.fixture
def federation(registry: Registry) -> Federation:
    return registry.federation("acme", "fleet")


def test_only_nodes_with_a_members_key_pass_until_it_is_revoked_or_the_federation_stopped(
    superlink: SuperLink, registry: Registry, federation: Federation
) -> None:
    mine, other, clock, control = new_key(), new_key(), Clock(), Control()
    registry.add_member(federation, "mine", tenant="acme", public_key=mine)
    registry.add_member(federation, "wordy", tenant="acme")
    registry.add_member(federation, "odd", tenant="acme", public_key="no key")
    call = caller(superlink, Members(registry, control, clock))  # type: ignore[arg-type]

    def status(path: str, key: str) -> int:
        return call(path, headers={"flwr-public-key": header_of(key)}).status_code

    assert [status(PULL, mine), status(PULL, other), call(PULL).status_code] == [200, 401, 401]
    # Where a SuperNode begins, an answer that it shows its owner.
    refused = call(ACTIVATE, headers={"flwr-public-key": header_of(other)})
    assert refused.status_code == call(REGISTER).status_code == 412
    assert refused.json() == {"code": 412, "detail": "this node's key is no member's"}
    assert control.registered == []
    assert status(ACTIVATE, mine) == 200 and control.registered == [pem_of(mine)]
    registry.add_member(federation, "other", tenant="acme", public_key=other)
    registry.revoke_member(federation, "mine")
    assert status(PULL, mine) == 200  # what was seen last
    clock.now += KEYS_S
    assert [status(PULL, mine), status(PULL, other)] == [401, 200]
    registry.set_federation_state(federation, "stopped")
    clock.now += KEYS_S
    assert status(PULL, other) == 401


def test_who_was_invited_becomes_a_member_and_its_node_passes_at_once(
    superlink: SuperLink, registry: Registry, federation: Federation
) -> None:
    key, control = new_key(), Control()
    call = caller(superlink, Members(registry, control, Clock()))  # type: ignore[arg-type]
    headers = {"flwr-public-key": header_of(key)}
    assert call(PULL, headers=headers).status_code == 401
    token = registry.invite(federation, tenant="acme", for_s=60.0).token

    def accept(**changes: Any) -> httpx.Response:
        said = {"token": token, "member": "alder", "public_key": key, **changes}
        return call(acceptance.PATH, json.dumps(said).encode())

    assert accept(token=token[:-1]).status_code == 404
    assert accept(public_key="ssh-ed25519 AAAA").status_code == 400
    assert accept(token=None).status_code == call(acceptance.PATH, b"[1]").status_code == 400
    assert call(acceptance.PATH, b"x" * (fleet_proxy.MAX_ACCEPT_BYTES + 1)).status_code == 413
    answer = accept()
    assert (answer.status_code, answer.json()) == (200, {"member": "alder", "tenant": "acme"})
    assert accept().status_code == 200 and accept(member="birch").status_code == 409
    assert control.registered[0] == pem_of(key)
    assert call(PULL, headers=headers).status_code == 200
    (member,) = registry.members(federation)
    assert (member.key, member.public_key) == ("alder", key)
    accepted = [(e.by, e.details["member"]) for e in registry.audit() if e.action == "invitation.accept"]
    assert accepted == [("member alder", "alder")]


def test_a_registry_that_does_not_answer_lets_nobody_pass_and_nobody_know(
    superlink: SuperLink, caplog: pytest.LogCaptureFixture
) -> None:
    class Down:
        def public_keys(self) -> list[str]:
            raise UnavailableError("the database at 10.0.0.7 is down")

    members = Members(Down(), Control(), Clock())  # type: ignore[arg-type]
    answer = caller(superlink, members)(PULL)
    assert answer.status_code == 503 and "10.0.0.7" not in answer.text and "10.0.0.7" in caplog.text
    assert superlink.asked == []


def test_a_members_requests_leave_a_place_for_others(
    superlink: SuperLink, registry: Registry, federation: Federation
) -> None:
    keys = [new_key(), new_key()]
    for name, key in zip(["greedy", "other"], keys, strict=True):
        registry.add_member(federation, name, tenant="acme", public_key=key)
    members = Members(registry, Control(), Clock())  # type: ignore[arg-type]
    call = caller(superlink, members)
    statuses = []
    with ExitStack() as stack:
        for _ in range(fleet_proxy.MAX_AT_ONCE):
            stack.enter_context(members.one_of(keys[0]))
        statuses += [call(PULL, headers={"flwr-public-key": header_of(key)}).status_code for key in keys]
    statuses.append(call(PULL, headers={"flwr-public-key": header_of(keys[0])}).status_code)
    assert statuses == [503, 200, 200]


def test_a_member_that_was_put_out_is_told_so_when_it_asks_and_nobody_else_is(
    registry: Registry, federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_proxy, "KEYS_S", 0.0)
    private = ec.generate_private_key(ec.SECP384R1())
    file, authority = tmp_path / "node", Authority(tmp_path, "site")
    file.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    registry.add_member(federation, "mine", tenant="acme", public_key=public)
    certificate, key = authority.issue("proxy")
    settings = ProxySettings(
        listen="127.0.0.1:0",
        superlink="127.0.0.1:1",
        certificate=certificate,
        private_key=key,
        superlink_insecure=True,
        root_certificates=None,
    )

    async def answers() -> list[bool]:
        ready: asyncio.Queue[None] = asyncio.Queue()
        with fleet_proxy._listening("127.0.0.1:0") as listener:
            serving = asyncio.create_task(
                fleet_proxy._serve(settings, registry, listener, lambda: ready.put_nowait(None))
            )
            await ready.get()
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            found = [await asyncio.to_thread(is_out, address, file, authority.file)]
            registry.revoke_member(federation, "mine")
            found.append(await asyncio.to_thread(is_out, address, file, authority.file))
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving
        return [*found, is_out(address, file, authority.file), is_out(address, tmp_path / "site-ca.crt", None)]

    # A member's key goes on to the SuperLink, here one that does not answer; then, nobody is there any more.
    assert asyncio.run(asyncio.wait_for(answers(), 60.0)) == [False, True, False, False]


# Who does not go on


@pytest.mark.parametrize(
    ("answered", "then"),
    [
        (b"", b""),
        (b"", b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: a\r\n"),
        (b"POST /v1/control/start-run HTTP/1.1\r\nhost: a\r\ncontent-length: 9999\r\n\r\n", b"..."),
        (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"GET / HTTP/1.1\r\n"),
    ],
    ids=["says nothing", "begins a head", "goes on with a body that is refused", "begins a second head"],
)
def test_a_connection_that_does_not_go_on_is_cut_off(
    answered: bytes, then: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_proxy, "HEAD_S", 1.0 if answered else 0.1)
    settings = ProxySettings(
        listen="127.0.0.1:0",
        superlink="127.0.0.1:1",
        certificate=None,
        private_key=None,
        superlink_insecure=True,
        root_certificates=None,
    )

    async def cut_off() -> None:
        ready: asyncio.Queue[None] = asyncio.Queue()
        with fleet_proxy._listening("127.0.0.1:0") as listener:
            serving = asyncio.create_task(fleet_proxy._serve(settings, None, listener, lambda: ready.put_nowait(None)))
            await ready.get()
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            if answered:
                writer.write(answered)
                await reader.readuntil(b"}")
            writer.write(then)
            with suppress(ConnectionResetError):
                while await reader.read(1000):
                    pass
            writer.close()
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving

    asyncio.run(asyncio.wait_for(cut_off(), 60.0))


# Keys


def test_a_key_is_registered_without_its_comment_and_found_in_flowers_header(tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP384R1())
    line = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    file = tmp_path / "alder.pub"
    file.write_text(f"{line} me@here\n")
    assert read_public_key(file) == line
    request = httpx.Request("POST", "http://x")
    NodeAuthHttpInterceptor(private, private.public_key()).intercept(
        type("Context", (), {"request": request})(),
        lambda context: httpx.Response(200),  # type: ignore[arg-type]
    )
    assert request.headers["flwr-public-key"] == header_of(line)


@pytest.mark.parametrize(
    "text",
    ["", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp384 AAAA", "ssh-rsa AAAA", "-----BEGIN PUBLIC KEY-----", "é " * 5000],
)
def test_what_is_no_key_for_a_node_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"ssh-keygen|OpenSSH"):
        registered_form(text)
    with pytest.raises(NotFoundError, match="ssh-keygen"):
        read_public_key(tmp_path / "absent")
