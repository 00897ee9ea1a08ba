"""The log has a line for every call, and of what callers send nothing: no prompt, no key, no other tenant's names."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from lorafleet.api_client import RouterClient
from lorafleet.errors import LorafleetError
from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc
from lorafleet.router_service import logs
from lorafleet.router_service.answering import Answering
from lorafleet.router_service.server import Server
from lorafleet.router_service.trail import Trail
from tests.router_service.conftest import Experts, Fleet, Serve, bearer

PROMPT = "MARKER-prompt"
GUESS = "lf_MARKERguess00_" + "x" * 43
SECRET = "MARKER-secret-adapter"
CLIENTS = ("httpx", "httpcore")  # the callers' own, in the same process here
MARKERS = re.compile("MARKER", re.IGNORECASE)


class Written:
    """What was logged, at every level of every library."""

    def __init__(self, form: logs.Form) -> None:
        self._stream = io.StringIO()
        self.handler = logging.StreamHandler(self._stream)
        self.handler.addFilter(lambda record: record.name.split(".")[0] not in CLIENTS)
        self.handler.addFilter(logs.belongs)
        self.handler.setFormatter(logs.JsonLines() if form == "json" else logs.TextLines())

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.text.splitlines()]

    def calls(self) -> list[Any]:
        return [line for line in self.lines() if line["logger"] == "lorafleet.calls"]


@pytest.fixture(params=["json", "text"])
def form(request: pytest.FixtureRequest) -> logs.Form:
    found: logs.Form = request.param
    return found


@pytest.fixture
def written(form: logs.Form) -> Iterator[Written]:
    written, root, ours = Written(form), logging.getLogger(), logging.getLogger("lorafleet")
    before = root.level, ours.level
    root.addHandler(written.handler)
    root.setLevel(logging.DEBUG)
    ours.setLevel(logging.DEBUG)
    yield written
    root.removeHandler(written.handler)
    root.setLevel(before[0])
    ours.setLevel(before[1])


@pytest.fixture
def server(written: Written, serve: Serve, fleet: Fleet, experts: Experts) -> Server:
    fleet.add("acme/digits", experts.digits)
    fleet.add(f"rival/{SECRET}", experts.other)
    return serve(http_address="127.0.0.1:0")


def post(server: Server, token: str, body: Any, path: str = "completions") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        f"http://{server.http_address}/v1/{path}",
        content=content,
        headers={"authorization": f"Bearer {token}", "x-request-id": "one.two"},
        timeout=60.0,
    )


def wait_idle(server: Server) -> None:
    """Until what was asked has been written down: trails end with their calls, or just after."""
    assert server.wait_idle(timeout_s=30.0)
    server.stop()


@pytest.mark.parametrize("form", ["json"])
def test_every_call_has_a_line(server: Server, fleet: Fleet, written: Written) -> None:
    token = fleet.token("acme")
    (key,) = fleet.registry.keys("acme")
    asked = {"model": "base", "prompt": "3", "max_tokens": 2, "n": 2, "ignore_eos": True}
    assert post(server, token, asked).status_code == 200
    assert post(server, token, {**asked, "stream": True}).status_code == 200
    assert httpx.get(f"http://{server.http_address}/v1/models/acme%2Fnothing").status_code == 401
    assert httpx.request("BREW", f"http://{server.http_address}/pot").status_code == 401
    assert httpx.get(f"http://{server.http_address}/health").status_code == 200
    with grpc.insecure_channel(server.address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        metadata = (*bearer(token), ("x-request-id", "three"))
        sampling = router_pb2.Sampling(max_tokens=2, ignore_eos=True)
        list(stub.Generate(router_pb2.GenerateRequest(prompt="3", sampling=sampling), metadata=metadata, timeout=30))
        with pytest.raises(grpc.RpcError):
            list(stub.Generate(router_pb2.GenerateRequest(prompt=""), metadata=metadata, timeout=30))
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/no.Such/Method")(b"", timeout=30)
    wait_idle(server)
    found = written.calls()
    told = [(c["door"], c["method"], c["status"], c["prompt_tokens"], c["generated_tokens"]) for c in found]
    assert sorted(told) == sorted(
        [
            ("http", "POST /v1/completions", "200", 2, 4),
            ("http", "POST /v1/completions", "200", 2, 4),
            ("http", "GET /v1/models/{model:path}", "401", 0, 0),
            ("http", "_OTHER _OTHER", "401", 0, 0),
            ("http", "GET /health", "200", 0, 0),
            ("grpc", "lorafleet.router.v1.RouterService/Generate", "OK", 2, 2),
            ("grpc", "lorafleet.router.v1.RouterService/Generate", "INVALID_ARGUMENT", 0, 0),
            ("grpc", "_OTHER", "UNAUTHENTICATED", 0, 0),
        ]
    )
    for call in found:
        known = call["status"] in ("200", "OK", "INVALID_ARGUMENT") and call["method"] != "GET /health"
        assert call.get("key_id") == (key.key_id if known else None)
        if known:
            assert call["request_id"] == ("one.two" if call["door"] == "http" else "three")
        assert call["level"] == ("debug" if call["method"] == "GET /health" else "info")
        assert call["duration_s"] >= 0 and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", call["time"])


@pytest.mark.parametrize("form", ["json"])
def test_what_is_cut_off_has_a_line_that_says_so(
    serve: Serve, fleet: Fleet, written: Written, experts: Experts
) -> None:
    server = serve(http_address="127.0.0.1:0", longest_call_s=0.2)
    token = fleet.token("acme")
    asked = {"model": "base", "prompt": "3", "max_tokens": 480, "n": 8, "ignore_eos": True}
    assert post(server, token, asked).status_code == 504
    assert post(server, token, {**asked, "stream": True}).status_code == 200
    with RouterClient(server.address, key=token, timeout_s=0.15) as client:
        with pytest.raises(LorafleetError):
            client.generate("3", max_tokens=480, ignore_eos=True)
        with client.stream("3", max_tokens=480, ignore_eos=True) as stream:
            next(iter(stream))
    wait_idle(server)
    told = [(call["status"], call.get("failure")) for call in written.calls()]
    assert told[:2] == [("504", None), ("200", "DEADLINE_EXCEEDED")]
    assert sorted(status for status, _ in told[2:]) == ["CANCELLED", "DEADLINE_EXCEEDED"]


def test_nothing_of_what_callers_send_is_written_down(
    server: Server, fleet: Fleet, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = fleet.token("acme")
    base = {"model": "base", "prompt": PROMPT, "max_tokens": 1}
    chat = {"model": "base", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1}
    others = (f"rival/{SECRET}", f"rival/{SECRET}:1", PROMPT, "base")
    for body in (
        base,
        {**base, "stream": True},
        *({**base, "model": name} for name in others),
        *({**base, "mix": {name: 1.0}} for name in others),
        {**base, PROMPT: PROMPT},
        {**base, "temperature": PROMPT},
        {**base, "stop": [PROMPT] * 99},
        {**base, "logit_bias": {PROMPT: 1}},
        {**base, "prompt": PROMPT * 99},
        f'{{"prompt": "{PROMPT}"'.encode(),
        f'"{PROMPT}"'.encode(),
        PROMPT.encode() + b"\xff",
    ):
        post(server, token, body)
    for body in (chat, {**chat, "messages": [{"role": PROMPT, "content": PROMPT}]}, {**chat, "messages": PROMPT}):
        post(server, token, body, "chat/completions")
    with httpx.Client(base_url=f"http://{server.http_address}", headers={"authorization": f"Bearer {GUESS}"}) as web:
        web.get("/v1/models", headers={"x-request-id": f"{PROMPT} {GUESS}"})
        web.get(f"/v1/models/rival/{SECRET}")
        web.request(PROMPT, f"/{PROMPT}?{PROMPT}", headers={"authorization": f"Bearer {token}"})
        web.get(f"/v1/models/rival/{SECRET}", headers={"authorization": f"Bearer {token}"})
    for key in (token, GUESS):
        with RouterClient(server.address, key=key, timeout_s=30.0) as client:
            for model, mix in [(name, {}) for name in others] + [("", {name: 1.0}) for name in others]:
                try:
                    client.generate(PROMPT, model=model, mix=mix, max_tokens=1)
                    client.route(PROMPT)
                except LorafleetError:
                    pass
    with grpc.insecure_channel(server.address) as channel:
        for path in ("/lorafleet.router.v1.RouterService/Generate", f"/{PROMPT}/{SECRET}"):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(path)(PROMPT.encode(), metadata=bearer(token), timeout=30)

    def broken(*_: object, **__: object) -> None:  # what nobody expected may quote anything
        try:
            raise KeyError(PROMPT)
        except KeyError as error:
            raise RuntimeError(f"{PROMPT} of {token} for rival/{SECRET}") from error

    with monkeypatch.context() as patched:
        patched.setattr(Answering, "answer", broken)
        assert post(server, token, base).status_code == 500
        with RouterClient(server.address, key=token, timeout_s=30.0) as client, pytest.raises(LorafleetError):
            client.generate(PROMPT)
    with monkeypatch.context() as patched:
        patched.setattr(Answering, "usable", broken)
        with RouterClient(server.address, key=token, timeout_s=30.0) as client, pytest.raises(LorafleetError):
            client.list_adapters()
    wait_idle(server)
    assert written.text.count("incident") >= 3 and "in broken" in written.text
    assert written.text.count("RouterService/Generate") >= 10
    for text in (written.text, written.text.encode().decode("unicode_escape")):
        assert MARKERS.search(text) is None, text[max(0, text.upper().find("MARKER") - 300) :][:600]
        assert token not in text and token.split("_", 2)[2] not in text


def logged(form: logs.Form, trail: Trail | None, error: BaseException | None, message: str = "words") -> str:
    """What one record looks like, inside a call or outside of any."""
    written = Written(form)
    record = logging.LogRecord(
        "a.logger", logging.ERROR, __file__, 1, message, (), None if error is None else (type(error), error, None)
    )

    def emit() -> None:
        if trail is not None:
            trail.enter()
        written.handler.handle(record)

    thread = threading.Thread(target=emit)  # a context of its own
    thread.start()
    thread.join()
    return written.text


def test_an_unexpected_errors_words_are_told_outside_of_calls_only(form: logs.Form) -> None:
    error = ValueError("quotes something")
    error.__cause__ = OSError(28, "No space left on device")
    assert "quotes something" in logged(form, None, error)
    inside = logged(form, Trail("http", "GET /", request_id="r1"), error, "failed: quotes something")
    assert "quotes something" not in inside and "ValueError" in inside and "r1" in inside
    assert "No space left on device" in inside  # the machine's words, which know no callers


def test_a_group_of_errors_and_a_circle_of_causes_are_written_down(form: logs.Form) -> None:
    first, second = ValueError("first"), KeyError("second")
    first.__context__, second.__context__ = second, first
    text = logged(form, None, ExceptionGroup("both", [first, second]))
    assert all(word in text for word in ("first", "second", "both"))


def test_a_line_is_one_line_whatever_it_quotes() -> None:
    assert len(logged("text", None, None, "a\nERROR forged\r\nb").splitlines()) == 1
    assert len(logged("json", None, None, "a\nERROR forged\r\nb\u2028").splitlines()) == 1


def test_set_up_replaces_what_wrote_to_a_stream_and_nothing_else() -> None:
    root, ours = logging.getLogger(), logging.getLogger("lorafleet")
    before, level, plain = list(root.handlers), ours.level, logging.StreamHandler(io.StringIO())
    root.addHandler(plain)
    stream = io.StringIO()
    try:
        logs.set_up(stream, form="json", level="warning")
        others = {handler for handler in before if type(handler) is not logging.StreamHandler}
        assert plain not in root.handlers and others <= set(root.handlers)
        logging.getLogger("lorafleet.x").warning("told")
        logging.getLogger("lorafleet.x").info("not told")
        assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["told"]
    finally:
        root.handlers[:] = before
        ours.setLevel(level)
