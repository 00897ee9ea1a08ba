from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lorafleet.engine import Engine, SamplingParams
from lorafleet.registry.records import Key
from lorafleet.router_service.admission import Admission
from lorafleet.router_service.call import Call
from lorafleet.router_service.metering import Metering
from lorafleet.router_service.metrics import MAX_TENANTS, OTHER_TENANTS, Metrics
from tests.router_service.conftest import Connect, Fleet, Serve

Samples = dict[tuple[str, ...], float]


def read(text: str) -> Samples:
    """(name, label values …) → value."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def metrics(engine: Engine) -> Metrics:
    return Metrics(engine)


def ask(engine: Engine, metrics: Metrics, tenant: str, tokens: int = 3) -> None:
    unmetered = Metering(None)  # type: ignore[arg-type]  # asked for nothing here
    call = Call(engine, Admission(1), unmetered, Key("id", tenant, "", ("infer",), 0.0, None, None))
    ticket = call.submit("314", mix={}, sampling=SamplingParams(max_tokens=tokens, ignore_eos=True))
    metrics.follow(ticket, call)
    try:
        ticket.result()
    finally:
        ticket.subscribe(lambda: None)  # returns once the others have heard of the end
        call.end()


def test_requests_and_their_tokens_are_counted_for_each_tenant(engine: Engine, metrics: Metrics) -> None:
    for tenant in ("acme", "acme", "rival"):
        ask(engine, metrics, tenant)
    found = read(metrics.text().decode())
    assert found["lorafleet:request_success_total", "length", "acme"] == 2
    assert found["lorafleet:request_success_total", "length", "rival"] == 1
    assert found["lorafleet:prompt_tokens_total", "acme"] == 2 * 4
    assert found["lorafleet:generation_tokens_total", "acme"] == 2 * 3
    assert found["lorafleet:time_to_first_token_seconds_count",] == 3
    assert found["lorafleet:inter_token_latency_seconds_count",] == 3 * 2
    assert found["lorafleet:e2e_request_latency_seconds_count",] == 3
    whole = found["lorafleet:e2e_request_latency_seconds_sum",]
    parts = found["lorafleet:time_to_first_token_seconds_sum",] + found["lorafleet:inter_token_latency_seconds_sum",]
    assert 0 < parts <= whole


def test_tenants_beyond_the_limit_share_a_label(engine: Engine, metrics: Metrics) -> None:
    for number in range(MAX_TENANTS - 1):
        metrics._label(f"t{number}")
    for tenant in ("last", "late", "later", "last", "t0"):
        ask(engine, metrics, tenant, tokens=1)
    found = read(metrics.text().decode())
    assert found["lorafleet:generation_tokens_total", "last"] == 2
    assert found["lorafleet:generation_tokens_total", OTHER_TENANTS] == 2
    assert found["lorafleet:generation_tokens_total", "t0"] == 1
    assert ("lorafleet:generation_tokens_total", "late") not in found


def test_a_request_that_fails_is_counted_as_one(
    engine: Engine, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(engine._runner, "run", fail)
    with pytest.raises(RuntimeError):
        ask(engine, metrics, "acme")
    assert read(metrics.text().decode())["lorafleet:request_failure_total", "acme"] == 1


def test_the_engines_state_is_that_of_the_moment(serve: Serve, connect: Connect, fleet: Fleet) -> None:
    server = serve(http_address="127.0.0.1:0")
    headers = {"authorization": f"Bearer {fleet.token('rival', 'metrics')}"}

    def now() -> Samples:
        answer = httpx.get(f"http://{server.http_address}/metrics", headers=headers)
        assert answer.headers["content-type"].startswith("text/plain")
        return read(answer.text)

    assert now()["lorafleet:num_requests_running",] == 0
    with connect(server).stream("314", max_tokens=480, ignore_eos=True) as stream:
        next(iter(stream))
        found = now()
        assert found["lorafleet:num_requests_running",] == 1 and found["lorafleet:num_requests_waiting",] == 0
        assert 0 < found["lorafleet:kv_cache_usage_perc",] <= 1
    assert server.wait_idle(timeout_s=30.0)


def test_the_page_names_every_metric_and_no_other(metrics: Metrics, engine: Engine) -> None:
    ask(engine, metrics, "acme")
    families = text_string_to_metric_families(metrics.text().decode())
    exported = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    exported = {name for name in exported if not name.endswith("_created")}
    page = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
    named = set(re.findall(r"`(lorafleet:[a-z0-9_]+)`", page))
    # Which there are only once a request has failed.
    assert named == exported | {"lorafleet:request_failure_total"}
