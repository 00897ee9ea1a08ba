"""Quotas as callers of both doors meet them, and what goes on record.

Limits are budgets of a period of centuries, where the border of a minute would change what a test sees.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import openai
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lorafleet.engine import Engine, Ticket, TokenChunk
from lorafleet.errors import LorafleetError, QuotaExceededError
from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc
from lorafleet.registry import Quota
from lorafleet.registry.quotas import DAY_S
from lorafleet.router_service.accounts import Use
from lorafleet.router_service.metering import WAIT_S, Reservation
from lorafleet.router_service.server import Server
from tests.router_service.conftest import Connect, Experts, Fleet, Serve, bearer, run_in_thread

PROMPT = "31415926"
PROMPT_TOKENS = 1 + len(PROMPT)
ANSWER = {"max_tokens": 11, "ignore_eos": True}
WHOLE = PROMPT_TOKENS + 11
"""Tokens of such a request."""
FOREVER_S = 10**10

OpenAI = Callable[..., openai.OpenAI]


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve(http_address="127.0.0.1:0")


@pytest.fixture
def limit(fleet: Fleet) -> Callable[[int], None]:
    """Gives acme a budget."""

    def set_budget(tokens: int) -> None:
        fleet.registry.set_quota("acme", Quota(budget_tokens=tokens, budget_period_s=FOREVER_S))

    return set_budget


def ask(client: openai.OpenAI) -> None:
    client.completions.create(model="base", prompt=PROMPT, max_tokens=11, extra_body={"ignore_eos": True})


def on_record(fleet: Fleet, tenant: str = "acme") -> Use:
    """In all days."""
    used = Use()
    for usage in fleet.registry.usage(tenant):
        if usage.window.period_s == DAY_S:
            used = used.plus(Use(usage.requests, usage.prompt_tokens, usage.generated_tokens))
    return used


def seconds_until(works: Callable[[], object], error: type[Exception], *, at_most: float = 10.0) -> float:
    """Until the last call began that fails: what a call takes on a busy machine is not in them."""
    first, failed = time.monotonic(), 0.0
    while True:
        began = time.monotonic() - first
        try:
            works()
        except error:
            failed = began
            if failed > at_most:
                raise
        else:
            return failed


def test_over_http_a_used_quota_is_429_and_headers_say_what_is_left(
    server: Server, fleet: Fleet, openai_client: OpenAI
) -> None:
    fleet.registry.set_quota("acme", Quota(requests_per_minute=4, tokens_per_minute=1000))
    client = openai_client(server)
    answer = client.completions.with_raw_response.create(model="base", prompt=PROMPT, max_tokens=2)
    assert answer.headers["x-ratelimit-limit-requests"] == "4"
    assert answer.headers["x-ratelimit-remaining-requests"] == "3"
    assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
    assert 980 <= int(answer.headers["x-ratelimit-remaining-tokens"]) < 1000
    assert 1 <= int(answer.headers["x-ratelimit-reset-tokens"].removesuffix("s")) <= 60
    with pytest.raises(openai.RateLimitError) as caught:
        for _ in range(8):  # two minutes' worth
            ask(client)
    refused = caught.value.response
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert caught.value.code == "quota_exceeded" and "requests_per_minute of 4" in str(caught.value)
    free = openai_client(server, tenant="rival").completions.with_raw_response.create(model="base", prompt="3")
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]


def test_what_no_time_helps_is_not_to_be_retried(server: Server, fleet: Fleet, openai_client: OpenAI) -> None:
    fleet.registry.set_quota("acme", Quota(tokens_per_minute=WHOLE - 1))
    with pytest.raises(openai.RateLimitError, match=f"the request needs {WHOLE}") as caught:
        ask(openai_client(server))
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "retry-after" not in caught.value.response.headers


def test_over_grpc_a_used_quota_has_details(
    server: Server, fleet: Fleet, connect: Connect, limit: Callable[[int], None]
) -> None:
    limit(WHOLE)
    connect(server).generate(PROMPT, **ANSWER)  # type: ignore[arg-type]
    request = router_pb2.GenerateRequest(prompt=PROMPT, sampling=router_pb2.Sampling(max_tokens=2))
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(
            router_pb2_grpc.RouterServiceStub(channel).Generate(
                request, metadata=bearer(fleet.token("acme")), timeout=30
            )
        )
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    info, retry, quota = rpc_status.from_call(caught.value).details
    assert b"QUOTA_EXCEEDED" in info.value
    assert error_details_pb2.RetryInfo.FromString(retry.value).retry_delay.seconds > DAY_S
    (violation,) = error_details_pb2.QuotaFailure.FromString(quota.value).violations
    assert f"budget_tokens of {WHOLE}" in violation.description


def test_the_client_says_when_a_used_quota_helps_to_wait_for_and_when_not(
    server: Server, fleet: Fleet, connect: Connect
) -> None:
    client = connect(server)
    fleet.registry.set_quota("acme", Quota(requests_per_minute=2))
    with pytest.raises(QuotaExceededError, match="requests_per_minute of 2") as caught:
        for _ in range(5):  # more than two minutes' worth
            client.generate(PROMPT, max_tokens=1)
    assert caught.value.retry_after_s is not None and 0 < caught.value.retry_after_s <= 60
    fleet.registry.set_quota("acme", Quota(tokens_per_minute=WHOLE - 1))

    def ask_for_more_than_ever() -> None:
        with pytest.raises(QuotaExceededError, match=f"the request needs {WHOLE}") as refused:
            client.generate(PROMPT, **ANSWER)  # type: ignore[arg-type]
        assert refused.value.retry_after_s is None

    seconds_until(ask_for_more_than_ever, AssertionError)  # a quota is looked at again every second


def test_one_tenants_quota_is_not_anothers(server: Server, connect: Connect, limit: Callable[[int], None]) -> None:
    limit(0)
    with pytest.raises(LorafleetError, match="budget_tokens is 0"):
        connect(server).generate(PROMPT, max_tokens=1)
    connect(server, tenant="rival").generate(PROMPT, max_tokens=1)


@pytest.mark.parametrize("budget", [None, 100_000])
def test_what_is_on_record_is_what_was_generated_whole_or_cut_off(
    server: Server,
    fleet: Fleet,
    engine: Engine,
    connect: Connect,
    openai_client: OpenAI,
    limit: Callable[[int], None],
    budget: int | None,
) -> None:
    if budget is not None:
        limit(budget)
    before = engine.stats().generated_tokens_total
    client = openai_client(server)
    client.completions.create(model="base", prompt=[PROMPT, "27"], n=2, max_tokens=5)
    ask(client)
    with connect(server).stream(PROMPT, max_tokens=480, ignore_eos=True) as stream:
        next(iter(stream))
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="acme/nothing", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="base", prompt=PROMPT, temperature=-1.0)
    server.stop()
    used = on_record(fleet)
    assert used.requests == 3
    assert used.prompt_tokens == 3 * PROMPT_TOKENS + 3  # a prompt once, however many answers it has
    assert used.generated_tokens == engine.stats().generated_tokens_total - before
    for usage in fleet.registry.usage("acme"):
        assert usage.taken == used.amount


def test_what_a_failed_request_generated_counts() -> None:
    ended: list[Use] = []
    ticket = Ticket(advance=lambda _ready, _timeout_s: False, cancel=lambda _ticket: None)
    with Reservation(1, ended.append) as reservation:
        reservation.follow(ticket, prompt_tokens=4)
    ticket.put(TokenChunk("a", [7, 8], []))
    assert not ended
    ticket.fail(OSError("gone"))
    assert ended == [Use(1, 4, 2)]


def test_a_request_that_was_refused_before_it_ran_counts_nothing() -> None:
    ended: list[Use] = []
    with pytest.raises(LorafleetError), Reservation(1, ended.append):
        raise LorafleetError("refused")
    assert ended == [Use()]


def test_a_route_counts_what_it_scores_under_every_candidate(
    server: Server, fleet: Fleet, experts: Experts, connect: Connect
) -> None:
    fleet.add("acme/digits", experts.digits)
    fleet.add("acme/letters", experts.letters)
    client = connect(server)
    client.route(PROMPT)
    client.generate(PROMPT, model="auto", max_tokens=2, ignore_eos=True)
    server.stop()
    assert on_record(fleet) == Use(2, 3 * PROMPT_TOKENS + 4 * PROMPT_TOKENS, 2)


def test_services_share_a_quota(serve: Serve, fleet: Fleet, connect: Connect, limit: Callable[[int], None]) -> None:
    limit(16 * WHOLE)
    servers = [serve(), serve()]
    answered: list[int] = []

    def use(server: Server) -> None:
        client = connect(server)
        for _ in range(16):
            try:
                client.generate(PROMPT, **ANSWER)  # type: ignore[arg-type]
            except LorafleetError:
                return
            answered.append(WHOLE)

    threads = [run_in_thread(lambda server=server: use(server)) for server in servers]  # type: ignore[misc]
    for thread in threads:
        thread.join()
    for server in servers:
        server.stop()
    # Each service may hold an eighth that it does not use, and a rest that is too small for a request.
    assert 16 - 2 * (2 + 1) <= len(answered) <= 16
    assert on_record(fleet).amount.tokens == sum(answered)


def test_a_raised_quota_is_used_within_a_second(
    server: Server, connect: Connect, openai_client: OpenAI, limit: Callable[[int], None]
) -> None:
    limit(WHOLE)
    client = openai_client(server)
    ask(client)
    with pytest.raises(openai.RateLimitError):
        ask(client)
    limit(2 * WHOLE)
    assert seconds_until(lambda: ask(client), openai.RateLimitError) < 1.0


def test_calls_at_the_same_time_are_limited_over_both_doors(
    server: Server, fleet: Fleet, connect: Connect, openai_client: OpenAI
) -> None:
    fleet.registry.set_quota("acme", Quota(concurrent_requests=1))
    client = openai_client(server)
    with connect(server).stream("314", max_tokens=480, ignore_eos=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="concurrent_requests is 1"):
            ask(client)
    seconds_until(lambda: ask(client), openai.RateLimitError)


def test_without_the_database_blocks_serve_and_others_are_told_in_time(
    server: Server, fleet: Fleet, openai_client: OpenAI, tmp_path: Path
) -> None:
    for tenant in ("acme", "rival"):
        fleet.registry.set_quota(tenant, Quota(budget_tokens=10**6, budget_period_s=FOREVER_S))
    acme, rival = openai_client(server), openai_client(server, tenant="rival")
    ask(acme)
    writer = sqlite3.connect(tmp_path / "registry.db", isolation_level=None)
    try:
        writer.execute("BEGIN IMMEDIATE")  # nobody else writes
        began = time.monotonic()
        with pytest.raises(openai.InternalServerError) as caught:
            rival.completions.create(model="base", prompt=PROMPT, max_tokens=1)
        assert caught.value.status_code == 503 and time.monotonic() - began < WAIT_S + 2.0
        ask(acme)
    finally:
        writer.close()
    assert seconds_until(lambda: ask(rival), openai.InternalServerError, at_most=20.0) < 20.0
