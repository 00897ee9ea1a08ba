"""The HTTP API as OpenAI's own client sees it, beside what the engine says without it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from lorafleet.assets.chat_template import PLAIN_TEMPLATE
from lorafleet.engine import Engine, Generation, SamplingParams
from lorafleet.router_service.http import server as http_server
from lorafleet.router_service.http.bodies import MAX_BODY_BYTES
from lorafleet.router_service.server import Server
from tests.router_service.conftest import Experts, Fleet, Serve
from tests.router_service.statements import statements
from tests.router_service.test_service import tokens_until_idle

PROMPT = "31415926"
MESSAGES: list[Any] = [{"role": "system", "content": "Count."}, {"role": "user", "content": PROMPT}]
CHAT_TEXT = f"System: Count.\nUser: {PROMPT}\nAssistant:"
LONG = {"max_tokens": 480, "extra_body": {"ignore_eos": True}}


def directly(engine: Engine, prompt: Any, mix: dict[str, float], **sampling: Any) -> Generation:
    return engine.generate([prompt], mixes=[mix], sampling=SamplingParams(**sampling))[0]


@pytest.fixture
def server(fleet: Fleet, experts: Experts, serve: Serve) -> Server:
    fleet.add("acme/digits", experts.digits)
    fleet.add("acme/letters", experts.letters)
    fleet.add("rival/secret", experts.other)
    return serve(http_address="127.0.0.1:0")


@pytest.fixture
def client(server: Server, openai_client: Callable[..., openai.OpenAI]) -> openai.OpenAI:
    return openai_client(server)


def post(server: Server, fleet: Fleet, body: Any, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        f"http://{server.http_address}{path}",
        content=content,
        headers={"authorization": f"Bearer {fleet.token('acme')}", **headers},
        timeout=60.0,
    )


# Models


def test_models_are_the_base_the_router_and_the_callers_own(
    client: openai.OpenAI, engine: Engine, experts: Experts
) -> None:
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert list(cards) == ["base", "auto", "acme/digits", "acme/letters"]
    assert cards["base"]["root"] == engine.base_digest and cards["base"]["parent"] is None
    digits = cards["acme/digits"]
    assert (digits["root"], digits["parent"], digits["owned_by"]) == (experts.digits.digest, "base", "acme")
    assert digits["max_model_len"] == engine.context_tokens
    assert client.models.retrieve("acme/digits:1").model_dump()["root"] == experts.digits.digest


def test_a_granted_adapter_is_used_alone_and_in_a_mix_until_it_is_taken_back(
    server: Server, fleet: Fleet, experts: Experts, openai_client: Callable[..., openai.OpenAI]
) -> None:
    rival = openai_client(server, tenant="rival")

    def answered(**asked: Any) -> list[str]:
        answer = rival.completions.create(prompt=PROMPT, max_tokens=1, **asked).model_dump()
        return [part["name"] for part in answer["lorafleet"]["mix"]]

    mix = {"model": "base", "extra_body": {"mix": {"acme/digits": 0.5, "rival/secret": 0.5}}}
    for asked in ({"model": "acme/digits"}, mix):
        with pytest.raises(openai.NotFoundError):
            answered(**asked)
    fleet.registry.grant("acme", "digits", to="rival")
    assert [card.id for card in rival.models.list()] == ["base", "auto", "acme/digits", "rival/secret"]
    assert answered(model="acme/digits:1") == ["acme/digits:1"]
    assert sorted(answered(**mix)) == ["acme/digits:1", "rival/secret:1"]
    fleet.registry.revoke_grant("acme", "digits", to="rival")
    with pytest.raises(openai.NotFoundError):
        answered(model="acme/digits")


# Completions


@pytest.mark.parametrize("prompt", [PROMPT, [5, 6, 7, 8]], ids=["text", "token ids"])
def test_a_completion_is_what_the_engine_says(
    client: openai.OpenAI, engine: Engine, experts: Experts, prompt: Any
) -> None:
    answer = client.completions.create(model="acme/digits", prompt=prompt, max_tokens=12, temperature=0)
    expected = directly(engine, prompt, {experts.digits.digest: 1.0}, max_tokens=12)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    used = (expected.prompt_tokens, len(expected.token_ids))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == used
    assert answer.usage.total_tokens == sum(used)
    assert answer.model_dump()["lorafleet"] == {
        "mix": [{"name": "acme/digits:1", "digest": experts.digits.digest, "weight": 1.0}],
        "route": None,
    }


def test_sampling_is_openais_where_nothing_is_said(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(model="base", prompt=PROMPT, seed=3)
    assert answer.choices[0].text == directly(engine, PROMPT, {}, max_tokens=16, temperature=1.0, seed=3).text


def test_every_setting_reaches_the_engine(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=20, temperature=1.5, top_p=0.9, seed=7, stop=["xyz"],
        presence_penalty=-0.5, frequency_penalty=0.75, logit_bias={"3": 2.5, "200": -100},
        extra_body={
            "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.25, "min_tokens": 5, "stop_token_ids": [17],
            "ignore_eos": True,
        },
    )  # fmt: skip
    expected = directly(
        engine, PROMPT, {}, max_tokens=20, temperature=1.5, top_p=0.9, seed=7, stop=["xyz"], presence_penalty=-0.5,
        frequency_penalty=0.75, logit_bias={3: 2.5, 200: -100.0}, top_k=50, min_p=0.01, repetition_penalty=1.25,
        min_tokens=5, stop_token_ids=[17], ignore_eos=True,
    )  # fmt: skip
    assert answer.choices[0].text == expected.text


def test_a_mix_answers_with_the_weights_as_given(client: openai.OpenAI, engine: Engine, experts: Experts) -> None:
    mix = {"acme/digits": 0.75, "acme/letters:1": -0.5}
    answer = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"mix": mix}
    )
    by_digest = {experts.digits.digest: 0.75, experts.letters.digest: -0.5}
    assert answer.choices[0].text == directly(engine, PROMPT, by_digest, max_tokens=12).text
    assert {part["name"]: part["weight"] for part in answer.model_dump()["lorafleet"]["mix"]} == {
        "acme/digits:1": 0.75,
        "acme/letters:1": -0.5,
    }


def test_auto_says_what_the_router_chose_and_why(client: openai.OpenAI) -> None:
    told = client.completions.create(model="auto", prompt=PROMPT, max_tokens=2).model_dump()["lorafleet"]
    assert told["mix"][0]["name"] == "acme/digits:1"
    assert told["route"]["router"] == "likelihood" and "acme/digits:1" in told["route"]["reason"]
    assert {candidate["name"] for candidate in told["route"]["candidates"]} == {
        "base",
        "acme/digits:1",
        "acme/letters:1",
    }


def test_choices_differ_by_their_seed_and_prompts_keep_their_order(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(model="base", prompt=[PROMPT, "abc"], n=2, seed=5, max_tokens=6, temperature=2.0)
    expected = [
        directly(engine, prompt, {}, max_tokens=6, temperature=2.0, seed=seed)
        for prompt in (PROMPT, "abc")
        for seed in (5, 6)
    ]
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert len({one.text for one in expected}) == 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        9 + 4,
        sum(len(one.token_ids) for one in expected),
    )


def test_a_completions_log_probabilities_are_the_engines(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(model="base", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=2)
    expected = directly(engine, PROMPT, {}, max_tokens=5, logprobs=True, top_logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None and found.tokens is not None and found.text_offset is not None
    assert found.token_logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert found.tokens == [engine.tokenizer.decode([token]) for token in expected.token_ids]
    # By text: of two tokens that are parts of characters, and so have the same one, the likelier stays.
    assert [max(place.values()) for place in found.top_logprobs or ()] == pytest.approx(
        [place[0].logprob for place in expected.top_logprobs], abs=1e-5
    )
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(5)]


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, experts: Experts, include_usage: bool) -> None:
    asked: dict[str, Any] = {
        "model": "acme/digits",
        "prompt": PROMPT,
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 1,
    }
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": include_usage}))
    assert len(chunks) > 5
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == whole.choices[0].text
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["length"]
    offsets = [o for c in chunks for choice in c.choices if choice.logprobs for o in choice.logprobs.text_offset or ()]
    assert whole.choices[0].logprobs is not None and offsets == whole.choices[0].logprobs.text_offset
    assert [chunk.model_dump().get("lorafleet") is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].model_dump()["lorafleet"] == whole.model_dump()["lorafleet"]
    assert chunks[-1].usage == (whole.usage if include_usage else None)
    assert all(chunk.choices for chunk in chunks[: -1 if include_usage else None])


def test_streamed_choices_are_told_apart_by_their_index(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "base", "prompt": PROMPT, "n": 3, "seed": 1, "max_tokens": 8}
    whole = client.completions.create(**asked)
    texts = ["", "", ""]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


# Chat


def test_a_base_without_a_chat_template_reads_roles_in_words(
    client: openai.OpenAI, engine: Engine, experts: Experts
) -> None:
    assert engine.tokenizer.chat_template is None and PLAIN_TEMPLATE
    answer = client.chat.completions.create(
        model="acme/digits", messages=MESSAGES, max_completion_tokens=8, temperature=0
    )
    expected = directly(engine, CHAT_TEXT, {experts.digits.digest: 1.0}, max_tokens=8)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.text)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.model_dump()["lorafleet"]["mix"][0]["name"] == "acme/digits:1"


def test_a_bases_own_chat_template_is_used(
    client: openai.OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    said: list[Any] = [
        {"role": "developer", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    answer = client.chat.completions.create(model="base", messages=said, max_tokens=4, temperature=0)
    assert answer.choices[0].message.content == directly(engine, "[system]x[user]ab>", {}, max_tokens=4).text


def test_a_chat_stream_begins_with_the_role_and_has_the_log_probabilities(
    client: openai.OpenAI, engine: Engine
) -> None:
    asked: dict[str, Any] = {
        "model": "base", "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 2
    }  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    content = [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content or ()]
    assert whole.logprobs is not None and content == whole.logprobs.content
    expected = directly(engine, CHAT_TEXT, {}, max_tokens=6, logprobs=True, top_logprobs=2)
    assert [one.logprob for one in content] == pytest.approx(expected.logprobs, abs=1e-5)
    assert all(len(one.top_logprobs) == 2 for one in content)
    readable = [one for one in content if "\ufffd" not in one.token]
    assert readable and all(bytes(one.bytes or ()).decode() == one.token for one in readable)


def test_without_a_limit_a_chat_answer_ends_with_the_context(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.chat.completions.create(
        model="base", messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == engine.context_tokens + 1


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="base", messages=MESSAGES, max_tokens=2)
    again = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "on"}]
    assert client.chat.completions.create(model="base", messages=again, max_tokens=2).choices


def test_the_asynchronous_client_streams_two_answers_at_once(server: Server, fleet: Fleet) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"http://{server.http_address}/v1", api_key=fleet.token("acme"), max_retries=0
        ) as client:

            async def one(model: str) -> str:
                stream = await client.chat.completions.create(
                    model=model, messages=MESSAGES, max_tokens=8, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(one("base"), one("acme/digits"), one("base")))

    first, other, again = asyncio.run(ask())
    assert first == again != other


# Errors


def test_missing_and_foreign_models_are_the_same_answer(client: openai.OpenAI) -> None:
    """In words, and of names that are not the caller's in statements: the time tells nothing either."""
    words, asked_of_others = set(), set()
    calls: list[Callable[[str], Any]] = [
        lambda name: client.completions.create(prompt=PROMPT, model=name),
        lambda name: client.completions.create(prompt=PROMPT, model="base", extra_body={"mix": {name: 1.0}}),
        lambda name: client.models.retrieve(name),
    ]
    others = ("rival/secret", "rival/nothing", "nobody/nothing")
    with statements() as asked:
        for name in (*others, "acme/nothing", "acme/digits:9", "acme/digits@x"):
            for call in calls:
                asked.clear()
                with pytest.raises(openai.NotFoundError) as caught:
                    call(name)
                words.add((str(caught.value).replace(name, "NAME"), caught.value.code))
                if name in others:
                    asked_of_others.add(tuple(asked))
    assert len(words) == len(asked_of_others) == 1 and asked_of_others != {()}


def test_errors_raise_what_openais_client_has_for_them(
    server: Server, fleet: Fleet, openai_client: Callable[..., openai.OpenAI]
) -> None:
    with pytest.raises(openai.AuthenticationError) as unknown:
        openai_client(server, key="lf_nobody").models.list()
    assert unknown.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError, match="needs 'infer'"):
        openai_client(server, key=fleet.token("acme", "metrics")).models.list()
    with pytest.raises(openai.BadRequestError, match="weight") as weight:
        openai_client(server).completions.create(model="base", prompt="x", extra_body={"mix": {"acme/digits": 9.0}})
    assert weight.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="context"):
        openai_client(server).completions.create(model="base", prompt="x" * 2000)


def test_a_refused_field_is_the_errors_param(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'echo' is not implemented") as caught:
        client.completions.create(model="base", prompt="x", echo=True)
    assert caught.value.param == "echo"


def test_what_is_no_json_object_is_refused(server: Server, fleet: Fleet) -> None:
    for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"model": "\\ud800", "prompt": "x"}'):
        answer = post(server, fleet, body)
        assert answer.status_code == 400, body[:20]
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_large_or_encoded_is_refused(server: Server, fleet: Fleet) -> None:
    large = post(server, fleet, {"model": "base", "prompt": "x" * MAX_BODY_BYTES})
    assert large.status_code == 400 and "bytes" in large.json()["error"]["message"]
    encoded = post(server, fleet, b"", **{"content-encoding": "gzip"})
    assert encoded.status_code == 400 and "gzip" in encoded.json()["error"]["message"]


def test_an_unknown_path_or_method_is_told_in_the_same_form(server: Server, fleet: Fleet) -> None:
    assert post(server, fleet, {}, "/v1/embeddings").json()["error"]["type"] == "not_found_error"
    wrong = post(server, fleet, {}, "/v1/models")
    assert wrong.status_code == 405 and wrong.json()["error"]["message"]


def test_request_ids_are_the_callers_where_they_are_sane(server: Server, fleet: Fleet) -> None:
    def answered(**headers: str) -> str:
        return post(server, fleet, b"", **headers).headers["x-request-id"]

    assert answered(**{"x-request-id": "trace-1.2_3"}) == "trace-1.2_3"
    assert answered(**{"x-request-id": "a b"}) not in ("a b", answered())
    assert len(answered(**{"x-request-id": "x" * 200})) == 32
    with_none = httpx.get(f"http://{server.http_address}/v1/models")
    assert with_none.status_code == 401 and len(with_none.headers["x-request-id"]) == 32
    assert with_none.headers["www-authenticate"] == "Bearer"


def test_a_full_server_says_when_to_come_again(
    serve: Serve, fleet: Fleet, engine: Engine, openai_client: Callable[..., openai.OpenAI]
) -> None:
    server = serve(http_address="127.0.0.1:0", max_calls=1)
    client = openai_client(server)
    with client.completions.create(model="base", prompt=PROMPT, stream=True, **LONG) as stream:  # type: ignore[call-overload]
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="base", prompt=PROMPT, max_tokens=1)
        assert int(caught.value.response.headers["retry-after"]) >= 1
    tokens_until_idle(server, engine)
    assert client.completions.create(model="base", prompt=PROMPT, max_tokens=1).choices


# The end of a call


def test_a_caller_that_leaves_its_stream_ends_the_generation(
    client: openai.OpenAI, server: Server, engine: Engine
) -> None:
    before = engine.stats().generated_tokens_total
    with client.completions.create(model="base", prompt=PROMPT, stream=True, **LONG) as stream:  # type: ignore[call-overload]
        next(iter(stream))
    assert tokens_until_idle(server, engine) - before < LONG["max_tokens"]
    assert engine.stats().kv_pages_in_use == 0


def test_a_caller_that_does_not_wait_ends_the_generation(
    server: Server, fleet: Fleet, engine: Engine, openai_client: Callable[..., openai.OpenAI]
) -> None:
    before = engine.stats().generated_tokens_total
    with pytest.raises(openai.APITimeoutError):
        openai_client(server).completions.create(model="base", prompt=PROMPT, timeout=0.2, n=8, **LONG)  # type: ignore[call-overload]
    assert tokens_until_idle(server, engine) - before < 8 * LONG["max_tokens"]


def test_a_call_beyond_the_servers_limit_is_ended(
    serve: Serve, fleet: Fleet, engine: Engine, openai_client: Callable[..., openai.OpenAI]
) -> None:
    server = serve(http_address="127.0.0.1:0", longest_call_s=0.2)
    client = openai_client(server)
    with pytest.raises(openai.InternalServerError, match="longer than a call may") as caught:
        client.completions.create(model="base", prompt=PROMPT, n=8, **LONG)  # type: ignore[call-overload]
    assert caught.value.status_code == 504
    with pytest.raises(openai.APIError, match="longer than a call may"):  # in mid-stream, as an event
        list(client.completions.create(model="base", prompt=PROMPT, n=8, stream=True, **LONG))  # type: ignore[call-overload]
    tokens_until_idle(server, engine)
    assert engine.stats().kv_pages_in_use == 0


def test_stopping_says_so_and_lets_streams_end(
    serve: Serve, fleet: Fleet, openai_client: Callable[..., openai.OpenAI]
) -> None:
    server = serve(http_address="127.0.0.1:0", drain_s=60.0)
    client = openai_client(server)
    stream = client.completions.create(model="base", prompt=PROMPT, stream=True, **LONG)  # type: ignore[call-overload]
    chunks = iter(stream)
    next(chunks)
    stopping = threading.Thread(target=server.stop, daemon=True)
    stopping.start()
    assert server.closed.wait(30.0)
    assert httpx.get(f"http://{server.http_address}/health").status_code == 503
    with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
        client.completions.create(model="base", prompt=PROMPT)
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
    stopping.join(60.0)
    assert not stopping.is_alive()


def test_streams_that_outlast_the_drain_are_cut_off(
    serve: Serve,
    fleet: Fleet,
    engine: Engine,
    openai_client: Callable[..., openai.OpenAI],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "_LAST_WORDS_S", 0)  # in a second a small model may be done
    server = serve(http_address="127.0.0.1:0", drain_s=0.0)
    with openai_client(server).completions.create(model="base", prompt=PROMPT, n=8, stream=True, **LONG) as stream:  # type: ignore[call-overload]
        chunks = iter(stream)
        next(chunks)
        server.stop()
        with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
            list(chunks)
    tokens_until_idle(server, engine)
