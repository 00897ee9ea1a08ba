"""A call's trace, over either door and down to the engine; and that there is none unless it was asked for."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lorafleet.adapters_client import AdapterClient
from lorafleet.api_client import RouterClient
from lorafleet.cli import main
from lorafleet.engine import Engine
from lorafleet.errors import LorafleetError
from lorafleet.router_service.server import Server, ServerConfig
from lorafleet.router_service.tracing import Tracing
from lorafleet.router_service.waiting import WouldWait
from tests.router_service.conftest import Experts, Fleet

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, SPAN = int(PARENT.split("-")[1], 16), int(PARENT.split("-")[2], 16)
ENGINE = ["queue", "prefill", "decode"]


class Spans:
    """What was exported in this process."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(SimpleSpanProcessor(self._exporter))

    def of_trace(self, trace_id: int) -> dict[str, list[ReadableSpan]]:
        found: dict[str, list[ReadableSpan]] = {}
        for span in self._exporter.get_finished_spans():
            if span.context.trace_id == trace_id:
                found.setdefault(span.name, []).append(span)
        return found

    def one(self, name: str) -> ReadableSpan:
        (span,) = (span for span in self._exporter.get_finished_spans() if span.name == name)
        return span


@pytest.fixture
def spans() -> Iterator[Spans]:
    spans = Spans()
    yield spans
    spans.tracing.close()


@pytest.fixture
def server(engine: Engine, fleet: Fleet, experts: Experts, spans: Spans) -> Iterator[Server]:
    fleet.add("acme/digits", experts.digits)
    fleet.add("rival/secret", experts.other)
    config = ServerConfig(http_address="127.0.0.1:0", drain_s=30.0)
    server = Server(engine, fleet.registry, config, begin=spans.tracing.begin)
    server.start()
    yield server
    server.stop()


def post(server: Server, token: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(
        f"http://{server.http_address}/v1/completions",
        json=body,
        headers={"authorization": f"Bearer {token}", **headers},
        timeout=60.0,
    )


def check_tree(found: dict[str, list[ReadableSpan]], call: str, parent: int, steps: dict[str, int]) -> ReadableSpan:
    """The call is the caller's child and has these parts, one after the other, within its time."""
    (top,) = found.pop(call)
    assert top.parent is not None and top.parent.span_id == parent and top.kind is trace.SpanKind.SERVER
    assert {name: len(spans) for name, spans in found.items()} == steps
    assert top.start_time is not None and top.end_time is not None
    for span in (span for spans in found.values() for span in spans):
        assert span.parent is not None and span.parent.span_id == top.context.span_id
        assert span.start_time is not None and span.end_time is not None
        # Clocks of the engine's times and of the others are compared once a span: to within a few ms.
        assert top.start_time - 5e6 <= span.start_time <= span.end_time <= top.end_time + 5e6
    for number in range(steps.get("queue", 0)):
        queue, prefill, decode = (found[name][number] for name in ENGINE)
        assert abs(prefill.start_time - queue.end_time) < 5e6 and abs(decode.start_time - prefill.end_time) < 5e6  # type: ignore[operator]
    return top


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_over_http_is_a_part_of_its_callers_trace(
    server: Server, fleet: Fleet, spans: Spans, stream: bool
) -> None:
    body = {"model": "acme/digits", "prompt": "314", "max_tokens": 3, "n": 2, "ignore_eos": True, "stream": stream}
    answer = post(server, fleet.token("acme"), body, traceparent=PARENT, **{"x-request-id": "r-1"})
    assert answer.status_code == 200
    server.stop()
    steps = {"authenticate": 1, "quota": 1, "queue": 2, "prefill": 2, "decode": 2}
    top = check_tree(spans.of_trace(TRACE), "POST /v1/completions", SPAN, steps)
    (key,) = fleet.registry.keys("acme")
    assert dict(top.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "acme/digits",
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 6,
        "lorafleet.request_id": "r-1",
        "lorafleet.key_id": key.key_id,
    }
    assert dict(top.resource.attributes)["service.name"] == "lorafleet"


def test_a_call_over_grpc_is_a_part_of_its_callers_trace(server: Server, fleet: Fleet, spans: Spans) -> None:
    caller = TracerProvider(shutdown_on_exit=False).get_tracer("an application")
    with RouterClient(server.address, key=fleet.token("acme"), timeout_s=60.0) as client:
        with caller.start_as_current_span("asks") as asks:
            client.generate("314", model="auto", max_tokens=3, ignore_eos=True)
        with caller.start_as_current_span("lists") as lists:
            client.list_adapters()
        client.list_adapters()  # of no trace
    server.stop()
    steps = {"authenticate": 1, "quota": 2, "route": 1, "queue": 1, "prefill": 1, "decode": 1}
    context = asks.get_span_context()
    name = "lorafleet.router.v1.RouterService/Generate"
    top = check_tree(spans.of_trace(context.trace_id), name, context.span_id, steps)
    told = dict(top.attributes or {})
    assert told["rpc.method"] == "Generate" and told["rpc.grpc.status_code"] == 0
    assert told["gen_ai.request.model"] == "auto" and told["gen_ai.usage.output_tokens"] == 3
    context = lists.get_span_context()
    check_tree(
        spans.of_trace(context.trace_id),
        "lorafleet.router.v1.RouterService/ListAdapters",
        context.span_id,
        {"authenticate": 1},
    )


def test_calls_of_the_adapters_client_are_parts_of_their_callers_trace(
    server: Server, fleet: Fleet, spans: Spans, tmp_path: Path
) -> None:
    caller = TracerProvider(shutdown_on_exit=False).get_tracer("an application")
    with AdapterClient(server.address, key=fleet.token("acme", "adapters:read"), timeout_s=60.0) as client:
        with caller.start_as_current_span("works") as works:
            client.adapters()
            client.download("acme/digits", tmp_path / "out")
        client.adapters()  # of no trace
    server.stop()
    context = works.get_span_context()
    found = spans.of_trace(context.trace_id)
    for method in ("ListAdapters", "DownloadVersion"):
        (span,) = found[f"lorafleet.registry.v1.AdapterService/{method}"]
        assert span.parent is not None and span.parent.span_id == context.span_id


def test_spans_name_neither_prompts_nor_keys_nor_what_is_anothers(server: Server, fleet: Fleet, spans: Spans) -> None:
    token = fleet.token("acme")
    for model in ("rival/secret", "base", "MARKER", "rival/MARKER"):
        post(server, token, {"model": model, "prompt": "MARKER", "max_tokens": 1})
        post(server, token, {"model": "base", "mix": {model: 1.0}, "prompt": "MARKER", "max_tokens": 1})
        with RouterClient(server.address, key=token, timeout_s=60.0) as client, suppress(LorafleetError):
            client.generate("MARKER", model=model, max_tokens=1)
    httpx.request("MARKER", f"http://{server.http_address}/MARKER", headers={"authorization": "Bearer MARKER"})
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/MARKER/MARKER")(b"MARKER", timeout=30)
    server.stop()
    written = "".join(span.to_json() for span in spans._exporter.get_finished_spans())
    assert written.count("gen_ai.usage.output_tokens") >= 2
    for secret in ("MARKER", "secret", token):
        assert secret not in written
    failed = spans.one("_OTHER _OTHER")
    assert dict(failed.attributes or {})["http.response.status_code"] == 401


def test_a_server_error_is_an_error_in_the_trace(
    server: Server, fleet: Fleet, spans: Spans, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(engine._runner, "run", fail)
    post(server, fleet.token("acme"), {"model": "base", "prompt": "3"})
    post(server, fleet.token("acme"), {"model": "base", "prompt": "3", "stream": True})
    server.stop()
    whole, streamed = (span for span in spans._exporter.get_finished_spans() if span.name == "POST /v1/completions")
    assert not whole.status.is_ok and not streamed.status.is_ok
    assert dict(whole.attributes or {})["error.type"] == "500"
    assert dict(streamed.attributes or {})["error.type"] == "INTERNAL"


class Collector(HTTPServer):
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Export)
        self.requests: list[ExportTraceServiceRequest] = []


class _Export(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, daemon=True)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def test_a_collector_gets_the_spans_with_their_parents(collector: Collector) -> None:
    tracing = Tracing.over_http(f"http://127.0.0.1:{collector.server_port}/v1/traces", service_name="here")
    call = tracing.begin("a call", {"traceparent": PARENT, "baggage": "secret=1"}, {"http.route": "/"})
    with call.step("authenticate"):
        pass
    call.end({"gen_ai.usage.input_tokens": 3}, failed=False)
    tracing.close()
    (of_resource,) = (one for request in collector.requests for one in request.resource_spans)
    assert {a.key: a.value.string_value for a in of_resource.resource.attributes}["service.name"] == "here"
    spans = {span.name: span for scope in of_resource.scope_spans for span in scope.spans}
    top = spans["a call"]
    assert top.trace_id.hex() == PARENT.split("-")[1] == call.trace_id
    assert top.parent_span_id.hex() == PARENT.split("-")[2]
    assert spans["authenticate"].parent_span_id == top.span_id and spans["authenticate"].trace_id == top.trace_id


def test_a_step_that_is_done_again_on_a_thread_is_told_once(spans: Spans) -> None:
    call = spans.tracing.begin("a call", {}, {})
    with pytest.raises(WouldWait), call.step("quota"):
        raise WouldWait
    with call.step("quota"):
        pass
    call.end({}, failed=False)
    assert spans.one("quota").status.is_unset


@pytest.mark.parametrize("header", ["", "nonsense", PARENT[:-1], PARENT.replace("0af7", "0000"), "00-" + "0" * 32])
def test_a_broken_trace_context_begins_a_trace_of_its_own(spans: Spans, header: str) -> None:
    call = spans.tracing.begin("a call", {"traceparent": header}, {})
    call.end({}, failed=False)
    assert spans.one("a call").parent is None or header.startswith("00-0000")


def test_without_tracing_nothing_of_opentelemetry_is_loaded() -> None:
    code = "import sys, lorafleet.router_service.server, lorafleet.api_client; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not any(name.startswith("opentelemetry") for name in result.stdout.split())


def test_a_clients_call_needs_no_opentelemetry(
    server: Server, connect: Callable[..., RouterClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    assert connect(server).list_adapters()


@pytest.mark.process
def test_a_service_traces_and_logs_as_its_command_line_says(
    collector: Collector, base_folder: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("k" * 40)
    command = [sys.executable, "-m", "lorafleet.cli", "serve", "--base", str(base_folder), "--api-key-file", str(key)]
    command += ["--grpc", "127.0.0.1:0", "--http", "", "--dtype", "float32", "--kv-tokens", "512", "--threads", "1"]
    command += ["--log-format", "json", "--log-level", "info"]
    command += ["--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            address = ready.split("grpc=")[1].split()[0]
            with RouterClient(address, key=key.read_text(), timeout_s=60.0) as client:
                client.generate("31", max_tokens=2)
        finally:
            process.terminate()
            _, log = process.communicate(timeout=60.0)
    lines = [json.loads(line) for line in log.splitlines()]
    (call,) = (line for line in lines if line["logger"] == "lorafleet.calls")
    spans = [
        span for request in collector.requests for one in request.resource_spans for scope in one.scope_spans
        for span in scope.spans
    ]  # fmt: skip
    assert {span.trace_id.hex() for span in spans} == {call["trace_id"]}
    assert {span.name for span in spans} == {call["method"], "authenticate", "quota", *ENGINE}


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--log-format", "json"], "--api-key-file"), (["--otlp-endpoint", "127.0.0.1:4318"], "--otlp-endpoint")],
)
def test_a_command_line_that_cannot_work_is_refused_before_the_base_is_loaded(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], base_folder: Path
) -> None:
    handlers, signals = list(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            main(["serve", "--base", str(base_folder), *options])
    finally:
        logging.getLogger().handlers[:] = handlers
        signal.signal(signal.SIGTERM, signals)
    assert end.value.code == 2 and said in capsys.readouterr().err
