"""The description of the HTTP API says what the server does: of every field, bound, path and answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from lorafleet.cli import main
from lorafleet.errors import InvalidInputError
from lorafleet.router_service.http import openapi
from lorafleet.router_service.http.app import HttpApp
from lorafleet.router_service.http.requests import (
    NOT_IMPLEMENTED,
    WITHOUT_EFFECT,
    ChatQuestion,
    CompletionQuestion,
    Message,
    Question,
    parse,
)
from lorafleet.router_service.server import Server
from tests.router_service.conftest import Experts, Fleet, Serve

DOCUMENT = openapi.document()
MINIMAL: dict[type[Question], dict[str, Any]] = {
    CompletionQuestion: {"model": "base", "prompt": "x"},
    ChatQuestion: {"model": "base", "messages": [{"role": "user", "content": "x"}]},
}
by_kind = pytest.mark.parametrize("kind", MINIMAL, ids=lambda kind: kind.__name__)


def schema_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = DOCUMENT["components"]["schemas"][name]
    return found


def conforms(value: Any, name: str) -> bool:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def accepted(kind: type[Question], body: dict[str, Any]) -> bool:
    """Whether the server would answer it, as far as that does not depend on its base."""
    try:
        question = parse(kind, body)
        if isinstance(question, CompletionQuestion):
            question.prompts()
            question.sampling()
        elif isinstance(question, ChatQuestion):
            question.sampling(context_tokens=512)
    except InvalidInputError:
        return False
    return True


@by_kind
def test_the_fields_are_those_that_are_read(kind: type[Question]) -> None:
    described = schema_of(kind.__name__)
    assert described["properties"].keys() == kind.model_fields.keys() | NOT_IMPLEMENTED.keys() | WITHOUT_EFFECT
    required = {name for name, field in kind.model_fields.items() if field.is_required()}
    assert set(described["required"]) == required
    for name, field in kind.model_fields.items():
        if name not in required:
            # A null is a field that is not there; what is not there has this value.
            assert conforms({**MINIMAL[kind], name: None}, kind.__name__)
            default = field.get_default(call_default_factory=True)
            plain = default.model_dump() if hasattr(default, "model_dump") else default
            assert described["properties"][name].get("default") == plain, name
    assert schema_of("Message")["properties"].keys() == Message.model_fields.keys()


# Field → values that are just within its bounds, and just beyond.
BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, 16], [0, 17, 1.5, "1", True]),
    "max_tokens": ([1, 10**6], [0, -1, 1.5]),
    "temperature": ([0, 0.0, 100.0], [-0.01, "1", True]),
    "top_p": ([0.001, 1], [0, 1.01, -1]),
    "top_k": ([0, 10**9], [-1, 0.5]),
    "min_p": ([0, 1], [-0.01, 1.01]),
    "presence_penalty": ([-2, 2], [-2.01, 2.01]),
    "frequency_penalty": ([-2, 2], [-2.01, 2.01]),
    "repetition_penalty": ([0.01, 100], [0.009, 100.1, 0]),
    "logit_bias": ([{}, {"5": 100, "6": -100.0}], [{"5": 100.1}, {"5": -101}, {"x": 1}, {"-1": 1}, {"1" * 10: 1}, []]),
    "min_tokens": ([0, 1], [-1, 0.5]),
    "seed": ([0, -5, 2**63], [0.5, "1"]),
    "stop": (["x", [], ["x"] * 64], ["", [""], ["x"] * 65, [1], {}]),
    "stop_token_ids": ([[], [0], [5] * 64], [[-1], [5] * 65, ["x"], 5]),
    "ignore_eos": ([True, False], [0, "yes"]),
    "stream": ([True, False], [1, "yes"]),
    "stream_options": ([{}, {"include_usage": True}], [{"include_usage": 1}, {"include_all": True}, []]),
    "mix": ([{}, {"a/b": 8, "c/d": -8.0}], [{"a/b": "1"}, []]),  # sizes of weights are the engine's to check
    "model": (["base", "auto", "a/b"], [5]),
}
OF_KIND: dict[type[Question], dict[str, tuple[list[Any], list[Any]]]] = {
    CompletionQuestion: {
        "prompt": (["x", ["x"] * 16, [5, 6], [[5], [6]]], [[], ["x"] * 17, [[5]] * 17, 5, [1.5], {}]),
        "logprobs": ([0, 20], [-1, 21, True]),
    },
    ChatQuestion: {
        "messages": (
            [[{"role": "developer", "content": [{"type": "text", "text": "x"}]}]],
            [[], [{"role": "tool", "content": "x"}], [{"role": "user"}], ["x"], [{"role": "user", "content": 5}]],
        ),
        "max_completion_tokens": ([1], [0, 1.5]),
        "logprobs": ([True, False], [1, 5]),
        "top_logprobs": ([0, 20], [-1, 21]),
    },
}


@by_kind
def test_the_bounds_are_those_that_are_checked(kind: type[Question]) -> None:
    bounds = {**BOUNDS, **OF_KIND[kind]}
    assert bounds.keys() == kind.model_fields.keys()
    beside = {"top_logprobs": {"logprobs": True}, "min_tokens": {"max_tokens": 5}}
    for name, (within, beyond) in bounds.items():
        for value, good in [*((v, True) for v in within), *((v, False) for v in beyond)]:
            body = {**MINIMAL[kind], **beside.get(name, {}), name: value}
            assert conforms(body, kind.__name__) is good, (name, value)
            assert accepted(kind, body) is good, (name, value)


@by_kind
def test_what_is_not_implemented_is_taken_where_it_asks_for_nothing(kind: type[Question]) -> None:
    for name, neutral in NOT_IMPLEMENTED.items():
        if name in kind.model_fields:
            continue
        for value in (*neutral, None, 0, 2, "other", ["x"], {"type": "json_object"}):
            body = {**MINIMAL[kind], name: value}
            assert conforms(body, kind.__name__) is accepted(kind, body), (name, value)
    for name in WITHOUT_EFFECT:
        assert conforms({**MINIMAL[kind], name: ["whatever"]}, kind.__name__)
    unknown = {**MINIMAL[kind], "temprature": 1.0}
    assert not conforms(unknown, kind.__name__) and not accepted(kind, unknown)


def test_the_description_has_every_route_and_no_other() -> None:
    app = HttpApp(None, None, None, max_calls=1, longest_call_s=1.0)  # type: ignore[arg-type]
    app.close()
    served = {
        (route.path.replace(":path", ""), method.lower())
        for route in app.routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert served == {(path, method) for path, operations in DOCUMENT["paths"].items() for method in operations}


def test_every_reference_leads_somewhere() -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [found for one in value.values() for found in references(one)]
        return [found for one in value for found in references(one)] if isinstance(value, list) else []

    named = set(references(DOCUMENT))
    for reference in named:
        value: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            value = value[part]
    unused = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]} - named
    assert unused == set()
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.fixture
def server(fleet: Fleet, experts: Experts, serve: Serve) -> Server:
    fleet.add("acme/digits", experts.digits)
    return serve(http_address="127.0.0.1:0")


def test_it_is_served_to_whoever_has_a_key(server: Server, fleet: Fleet) -> None:
    url = f"http://{server.http_address}/openapi.json"
    assert httpx.get(url).status_code == 401
    answer = httpx.get(url, headers={"authorization": f"Bearer {fleet.token('acme')}"})
    assert answer.headers["content-type"] == "application/json" and answer.json() == DOCUMENT


def test_the_command_prints_it_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["openapi"])
    assert not end.value.code and json.loads(capsys.readouterr().out) == DOCUMENT


def test_answers_are_as_described(server: Server, fleet: Fleet, openai_client: Callable[..., openai.OpenAI]) -> None:
    client = openai_client(server)
    asked: dict[str, Any] = {"max_tokens": 2, "n": 2, "extra_body": {"ignore_eos": True}}
    told = {"messages": [{"role": "user", "content": "31"}], "logprobs": True, "top_logprobs": 2}
    whole = [
        (client.models.with_raw_response.list(), "ModelList"),
        (client.models.with_raw_response.retrieve("acme/digits"), "Model"),
        (client.completions.with_raw_response.create(model="base", prompt="3", logprobs=2, **asked), "Completion"),
        (client.completions.with_raw_response.create(model="auto", prompt="3", max_tokens=1), "Completion"),
        (client.chat.completions.with_raw_response.create(model="acme/digits", **told, **asked), "ChatCompletion"),
    ]
    for answer, name in whole:
        assert conforms(json.loads(answer.text), name), answer.text

    def streamed(path: str, body: dict[str, Any]) -> list[Any]:
        with httpx.stream(
            "POST",
            f"http://{server.http_address}/v1/{path}",
            json={**body, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 2},
            headers={"authorization": f"Bearer {fleet.token('acme')}"},
            timeout=60.0,
        ) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            events = answer.read().decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    for chunk in streamed("completions", {"model": "auto", "prompt": "31", "logprobs": 1, "n": 2}):
        assert conforms(chunk, "CompletionChunk"), chunk
    for chunk in streamed("chat/completions", {"model": "base", **told}):
        assert conforms(chunk, "ChatCompletionChunk"), chunk


def test_the_descriptions_own_checks_can_fail() -> None:
    assert not conforms({"object": "list", "data": [{}]}, "ModelList")
    assert not conforms({"model": "base"}, "CompletionQuestion")
