from __future__ import annotations

import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lorafleet.api_client import RouterClient
from lorafleet.engine import Engine, Generation, SamplingParams
from lorafleet.errors import DeadlineExceededError, InvalidInputError, NotFoundError, OverloadedError, UnavailableError
from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc
from lorafleet.registry import NewExpert
from lorafleet.router_service.failures import failure
from lorafleet.router_service.server import Server
from tests.router_service.conftest import Connect, Experts, Fleet, Serve, bearer
from tests.router_service.models import DIGITS, LETTERS
from tests.router_service.statements import statements

PROMPT = "31415926"
LONG = {"max_tokens": 500, "ignore_eos": True}


def directly(engine: Engine, prompt: str, mix: dict[str, float], **sampling: object) -> Generation:
    """What the engine says without the service."""
    return engine.generate([prompt], mixes=[mix], sampling=SamplingParams(**sampling))[0]  # type: ignore[arg-type]


@pytest.fixture
def client(fleet: Fleet, experts: Experts, serve: Serve, connect: Connect) -> RouterClient:
    """Tenant acme with the experts of both texts, beside a rival with an adapter of its own."""
    fleet.add("acme/digits", experts.digits)
    fleet.add("acme/letters", experts.letters)
    fleet.add("rival/secret", experts.other)
    return connect(serve())


# Generate


@pytest.mark.parametrize("model", ["", "base"])
def test_the_bare_base_answers_without_a_model(client: RouterClient, engine: Engine, model: str) -> None:
    result = client.generate(PROMPT, model=model, max_tokens=12)
    expected = directly(engine, PROMPT, {}, max_tokens=12)
    assert list(result.token_ids) == expected.token_ids
    assert (result.text, result.finish_reason) == (expected.text, expected.finish_reason)
    assert result.mix == () and result.route is None
    assert result.prompt_tokens == 1 + len(PROMPT)


def test_an_adapter_answers_by_reference_and_is_named_by_number_and_digest(
    client: RouterClient, engine: Engine, experts: Experts
) -> None:
    result = client.generate(PROMPT, model="acme/digits", max_tokens=12)
    assert list(result.token_ids) == directly(engine, PROMPT, {experts.digits.digest: 1.0}, max_tokens=12).token_ids
    assert list(result.token_ids) != directly(engine, PROMPT, {}, max_tokens=12).token_ids
    (part,) = result.mix
    assert (part.reference, part.digest, part.weight) == ("acme/digits:1", experts.digits.digest, 1.0)


def test_a_mix_of_different_ranks_answers_with_the_weights_as_given(
    client: RouterClient, engine: Engine, experts: Experts
) -> None:
    result = client.generate(PROMPT, mix={"acme/digits": 0.75, "acme/letters:1": -0.5}, max_tokens=12)
    mix = {experts.digits.digest: 0.75, experts.letters.digest: -0.5}
    assert list(result.token_ids) == directly(engine, PROMPT, mix, max_tokens=12).token_ids
    assert {part.reference: part.weight for part in result.mix} == {"acme/digits:1": 0.75, "acme/letters:1": -0.5}


def test_two_references_to_the_same_weights_add_up(client: RouterClient, fleet: Fleet, experts: Experts) -> None:
    fleet.add("acme/twin", experts.digits)
    result = client.generate(PROMPT, mix={"acme/digits": 0.5, "acme/twin": 0.25}, max_tokens=4)
    (part,) = result.mix
    assert (part.digest, part.weight) == (experts.digits.digest, 0.75)


def test_aliases_and_numbers_choose_the_version(client: RouterClient, fleet: Fleet, experts: Experts) -> None:
    fleet.add("acme/digits", experts.other)
    fleet.registry.set_alias("acme", "digits", "old", 1)
    digests = {
        reference: client.generate(PROMPT, model=reference, max_tokens=2).mix[0].digest
        for reference in ("acme/digits", "acme/digits:1", "acme/digits@old")
    }
    assert digests == {
        "acme/digits": experts.other.digest,
        "acme/digits:1": experts.digits.digest,
        "acme/digits@old": experts.digits.digest,
    }


def test_the_stream_adds_up_to_the_whole_answer(client: RouterClient) -> None:
    with client.stream(PROMPT, model="acme/digits", max_tokens=12, logprobs=True) as stream:
        with pytest.raises(UnavailableError, match="iterate"):
            _ = stream.result
        chunks = list(stream)
    result = stream.result
    assert len(chunks) > 1
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == result.token_ids
    assert len(result.logprobs) == len(result.token_ids)


def test_log_likelihoods_are_those_of_the_engine(client: RouterClient, engine: Engine, experts: Experts) -> None:
    result = client.generate(PROMPT, model="acme/digits", max_tokens=4, logprobs=True, prompt_logprobs=True)
    expected = directly(engine, PROMPT, {experts.digits.digest: 1.0}, max_tokens=4, logprobs=True, prompt_logprobs=True)
    assert list(result.logprobs) == pytest.approx(expected.logprobs, abs=1e-5)
    assert len(result.prompt_logprobs) == len(PROMPT)
    assert list(result.prompt_logprobs) == pytest.approx(expected.prompt_logprobs, abs=1e-5)


def test_a_text_can_be_scored_without_generating(client: RouterClient) -> None:
    result = client.generate(PROMPT, max_tokens=0, prompt_logprobs=True)
    assert result.token_ids == () and result.text == ""
    assert len(result.prompt_logprobs) == len(PROMPT)


def test_sampling_reaches_the_engine(client: RouterClient, engine: Engine) -> None:
    sampling = {"max_tokens": 20, "temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 7, "ignore_eos": True}
    result = client.generate(PROMPT, **sampling)  # type: ignore[arg-type]
    assert list(result.token_ids) == directly(engine, PROMPT, {}, **sampling).token_ids
    assert list(result.token_ids) != directly(engine, PROMPT, {}, max_tokens=20, ignore_eos=True).token_ids


def test_generation_ends_before_a_stop_string(client: RouterClient) -> None:
    whole = client.generate(PROMPT, model="acme/digits", max_tokens=12)
    stop = whole.text[3:5]
    result = client.generate(PROMPT, model="acme/digits", max_tokens=12, stop=[stop])
    assert result.text == whole.text[: whole.text.index(stop)]
    assert result.finish_reason == "stop"


def test_calls_in_parallel_answer_as_they_do_alone(client: RouterClient, experts: Experts) -> None:
    requests = [("acme/digits", PROMPT), ("acme/letters", "abcdef"), ("base", "hello"), ("acme/letters", PROMPT)]
    alone = [client.generate(prompt, model=model, max_tokens=24).token_ids for model, prompt in requests]
    streams = [client.stream(prompt, model=model, max_tokens=24) for model, prompt in requests]
    for stream, tokens in zip(streams, alone, strict=True):
        assert tuple(token for chunk in stream for token in chunk.token_ids) == tokens


# Routing


@pytest.mark.parametrize(("text", "expert"), [(DIGITS[:16], "digits"), (LETTERS[:16], "letters")])
def test_the_router_finds_the_expert_of_a_text(client: RouterClient, experts: Experts, text: str, expert: str) -> None:
    decision = client.route(text)
    best = decision.candidates[0]
    assert best.reference == f"acme/{expert}:1" and best.digest == getattr(experts, expert).digest
    assert decision.router == "likelihood" and f"acme/{expert}:1" in decision.reason
    assert {c.reference for c in decision.candidates} == {"acme/digits:1", "acme/letters:1", "base"}
    assert sum(c.probability for c in decision.candidates) == pytest.approx(1.0)
    assert sum(c.weight for c in decision.candidates) == 1.0
    assert {part.reference: part.weight for part in decision.mix} == {
        c.reference: c.weight for c in decision.candidates if c.reference != "base" and c.weight > 0
    }


def test_auto_answers_with_the_mix_of_the_route(client: RouterClient, engine: Engine) -> None:
    decision = client.route(PROMPT)
    result = client.generate(PROMPT, model="auto", max_tokens=12)
    assert result.route == decision
    assert result.mix == decision.mix
    mix = {part.digest: part.weight for part in decision.mix}
    assert list(result.token_ids) == directly(engine, PROMPT, mix, max_tokens=12).token_ids


def test_a_scored_candidate_has_the_likelihood_that_the_engine_gives(
    client: RouterClient, engine: Engine, experts: Experts
) -> None:
    scores = {candidate.digest: candidate.score for candidate in client.route(PROMPT).candidates}
    for digest in ("", experts.digits.digest, experts.letters.digest):
        mix = {digest: 1.0} if digest else {}
        logprobs = directly(engine, PROMPT, mix, max_tokens=0, prompt_logprobs=True).prompt_logprobs
        assert logprobs is not None
        assert scores[digest] == pytest.approx(sum(logprobs) / len(PROMPT), abs=1e-4)


def test_a_new_adapter_takes_part_in_routes_by_itself(client: RouterClient, fleet: Fleet, experts: Experts) -> None:
    assert len(client.route(PROMPT).candidates) == 3
    fleet.add("acme/third", experts.other)
    deadline = time.monotonic() + 10.0  # after half a second, but for what else this machine does
    while "acme/third:1" not in {candidate.reference for candidate in client.route(PROMPT).candidates}:
        assert time.monotonic() < deadline


def test_a_tenant_without_adapters_is_routed_to_the_base(
    fleet: Fleet, experts: Experts, serve: Serve, connect: Connect
) -> None:
    fleet.add("rival/secret", experts.other)
    result = connect(serve()).generate(PROMPT, model="auto", max_tokens=2)
    assert result.mix == ()
    assert result.route is not None and "no live adapters" in result.route.reason


def test_a_text_without_tokens_cannot_be_routed(client: RouterClient) -> None:
    with pytest.raises(InvalidInputError, match="no tokens"):
        client.route("")


# Tenants


def test_a_tenant_sees_its_own_adapters_only(client: RouterClient, experts: Experts) -> None:
    first, second = client.list_adapters()
    assert (first.reference, first.digest, first.version, first.rank) == (
        "acme/digits:1", experts.digits.digest, 1, 4
    )  # fmt: skip
    assert (first.federation, first.round) == ("", 0)
    assert second.reference == "acme/letters:1"


def test_missing_and_foreign_adapters_give_the_same_answer(client: RouterClient) -> None:
    """In words, and of names that are not the caller's in statements: the time tells nothing either."""
    words, asked_of_others = set(), set()
    others = ("rival/secret", "rival/nothing", "nobody/nothing")
    with statements() as asked:
        for name in (*others, "acme/nothing", "acme/digits:9", "acme/digits@x"):
            for options in ({"model": name}, {"mix": {name: 1.0}}):
                asked.clear()
                with pytest.raises(NotFoundError) as caught:
                    client.generate(PROMPT, **options)  # type: ignore[arg-type]
                words.add(str(caught.value).replace(name, "NAME"))
                if name in others:
                    asked_of_others.add(tuple(asked))
    assert len(words) == len(asked_of_others) == 1 and asked_of_others != {()}


def test_members_use_the_expert_that_their_federation_made(
    fleet: Fleet, experts: Experts, serve: Serve, connect: Connect
) -> None:
    registry = fleet.registry
    registry.create_tenant("member")
    federation = registry.create_federation("rival", "fed", base=fleet.base_digest, settings={})
    registry.add_member(federation, "key-1", tenant="member")
    opened = registry.open_round(federation, 1)
    expert = NewExpert("shared", experts.digits, rule="exact", parents=())
    registry.commit_round(opened, [expert], report={})
    server = serve()
    (listed,) = connect(server, tenant="member").list_adapters()
    assert (listed.reference, listed.federation, listed.round) == ("rival/shared:1", "fed", 1)
    result = connect(server, tenant="member").generate(PROMPT, model="rival/shared", max_tokens=2)
    assert result.mix[0].digest == experts.digits.digest
    with pytest.raises(NotFoundError):
        connect(server, tenant="acme").generate(PROMPT, model="rival/shared")
    registry.grant("rival", "shared", to="acme")
    (granted,) = connect(server, tenant="acme").list_adapters()
    assert (granted.reference, granted.federation, granted.round) == ("rival/shared:1", "", 0)
    (owned,) = connect(server, tenant="rival").list_adapters()
    assert (owned.federation, owned.round) == ("fed", 1)


# Errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "acme/digits", "mix": {"acme/letters": 1.0}}, "a model .* and a mix"),
        ({"model": "base", "mix": {"acme/letters": 1.0}}, "a model .* and a mix"),
        ({"model": "not a reference"}, "expected a reference"),
        ({"mix": {"acme/digits": 9.0}}, "weight"),
        ({"mix": {"acme/digits": float("nan")}}, "weight"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": -1}, "cannot be sent"),
    ],
)
def test_a_request_that_can_never_work_is_refused_with_the_reason(
    client: RouterClient, arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        client.generate(PROMPT, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["", "acme/digits", "auto"])
def test_an_empty_prompt_is_refused(client: RouterClient, model: str) -> None:
    with pytest.raises(InvalidInputError):
        client.generate("", model=model)


def test_a_prompt_beyond_the_context_is_refused_and_others_go_on(client: RouterClient) -> None:
    with pytest.raises(InvalidInputError, match="context"):
        client.generate("x" * 2000)
    assert client.generate(PROMPT, max_tokens=2).token_ids


def test_an_error_carries_its_reason_for_machines(fleet: Fleet, serve: Serve) -> None:
    with grpc.insecure_channel(serve().address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        request = router_pb2.GenerateRequest(prompt="x", model="acme/nothing")
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request, metadata=bearer(fleet.token("acme")), timeout=30))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    assert (info.domain, info.reason) == ("lorafleet", "NOT_FOUND")


@pytest.mark.parametrize("letter", ["x", "ü", "😀"])
def test_a_quoted_value_of_any_size_does_not_break_the_error(client: RouterClient, letter: str) -> None:
    with pytest.raises(InvalidInputError, match=f"found '{letter * 3}"):
        client.generate(PROMPT, model=letter * 100_000)


# The end of a call


def tokens_until_idle(server: Server, engine: Engine) -> int:
    """Tokens that the engine has generated when no call runs; nothing may be left in the engine then."""
    assert server.wait_idle(timeout_s=30.0)
    directly(engine, PROMPT, {}, max_tokens=1)  # a step, in which cancelled requests go
    stats = engine.stats()
    assert (stats.requests_running, stats.requests_waiting) == (0, 0)
    return stats.generated_tokens_total


def test_a_cancelled_call_ends_its_generation(serve: Serve, connect: Connect, engine: Engine) -> None:
    server = serve()
    before = engine.stats().generated_tokens_total
    with connect(server).stream(PROMPT, **LONG) as stream:  # type: ignore[arg-type]
        next(iter(stream))
        stream.cancel()
    assert tokens_until_idle(server, engine) - before < LONG["max_tokens"]


def test_a_call_beyond_its_deadline_ends_its_generation(serve: Serve, connect: Connect, engine: Engine) -> None:
    server = serve()
    before = engine.stats().generated_tokens_total
    with pytest.raises(DeadlineExceededError, match="in time"):
        connect(server, timeout_s=0.05).generate(PROMPT, **LONG)  # type: ignore[arg-type]
    assert tokens_until_idle(server, engine) - before < LONG["max_tokens"]
    assert engine.stats().kv_pages_in_use == 0


def test_one_call_too_many_is_told_to_come_again(serve: Serve, connect: Connect, engine: Engine) -> None:
    server = serve(max_calls=1)
    client = connect(server)
    with client.stream(PROMPT, **LONG) as stream:  # type: ignore[arg-type]
        next(iter(stream))
        with pytest.raises(OverloadedError, match="try again") as caught:
            client.generate(PROMPT, max_tokens=1)
        assert failure(caught.value).retry_after_s == 1.0  # which RetryInfo tells over gRPC
        assert client.list_adapters() == []
    tokens_until_idle(server, engine)
    assert client.generate(PROMPT, max_tokens=1).token_ids
