"""Sampling over gRPC: every setting has a field, reaches the engine, and is refused in the engine's words."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import pytest
from google.protobuf.descriptor import FieldDescriptor

from lorafleet.api_client import RouterClient, SamplingOptions
from lorafleet.engine import Engine, SamplingParams
from lorafleet.errors import InvalidInputError
from lorafleet.proto.router.v1 import router_pb2
from lorafleet.router_service.messages import sampling_params
from tests.router_service.conftest import Connect, Serve

PROMPT = "31415926"
FIELDS = router_pb2.Sampling.DESCRIPTOR.fields

# Each one far from its default.
GIVEN: dict[str, Any] = {
    "max_tokens": 20,
    "temperature": 1.5,
    "top_p": 0.9,
    "top_k": 50,
    "seed": 7,
    "stop": ("xyz", "é"),
    "ignore_eos": True,
    "logprobs": True,
    "min_p": 0.01,
    "repetition_penalty": 1.25,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.75,
    "logit_bias": {3: 2.5, 200: -100.0},
    "min_tokens": 5,
    "stop_token_ids": (17, 4),
    "top_logprobs": 3,
}


@pytest.fixture
def client(serve: Serve, connect: Connect) -> RouterClient:
    return connect(serve())


def test_engine_protocol_and_client_have_the_same_settings() -> None:
    engine = {field.name for field in dataclasses.fields(SamplingParams)}
    protocol = {field.name for field in FIELDS}
    assert protocol == engine - {"prompt_logprobs"}  # a field of the request
    assert protocol == set(get_type_hints(SamplingOptions)) == set(GIVEN)


def test_a_message_without_settings_is_the_engines_defaults() -> None:
    assert sampling_params(router_pb2.GenerateRequest(prompt="x")) == SamplingParams()


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_each_setting_arrives(name: str) -> None:
    needed = {"logprobs": True} if name == "top_logprobs" else {}
    request = router_pb2.GenerateRequest(sampling=router_pb2.Sampling(**needed, **{name: GIVEN[name]}))
    arrived = sampling_params(router_pb2.GenerateRequest.FromString(request.SerializeToString()))
    assert arrived == SamplingParams(**needed, **{name: GIVEN[name]})
    assert arrived != SamplingParams(**needed)


def test_a_zero_that_was_set_is_not_the_default() -> None:
    given = {"temperature": 0.0, "repetition_penalty": 0.0}
    with pytest.raises(InvalidInputError, match="found repetition_penalty 0"):
        sampling_params(router_pb2.GenerateRequest(sampling=router_pb2.Sampling(**given)))
    for field in FIELDS:
        if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
            assert field.has_presence


def test_numbers_of_the_first_protocol_stay() -> None:
    old = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "logprobs")
    assert {router_pb2.Sampling.DESCRIPTOR.fields_by_number[number].name for number in range(1, 9)} == set(old)
    assert [router_pb2.Sampling.DESCRIPTOR.fields_by_name[name].number for name in old] == list(range(1, 9))
    numbers = {field.name: field.number for field in router_pb2.GenerateResponse.DESCRIPTOR.fields}
    assert numbers == {"text": 1, "token_ids": 2, "logprobs": 3, "summary": 4, "top_logprobs": 5}


def test_all_of_it_reaches_the_engine_and_comes_back(client: RouterClient, engine: Engine) -> None:
    expected = engine.generate([PROMPT], sampling=SamplingParams(**GIVEN))[0]
    with client.stream(PROMPT, **GIVEN) as stream:
        chunks = list(stream)
    result = stream.result
    assert list(result.token_ids) == expected.token_ids
    assert (result.text, result.finish_reason) == (expected.text, expected.finish_reason)
    assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert [[one.token_id for one in place] for place in result.top_logprobs] == [
        [one.token for one in place] for place in expected.top_logprobs
    ]
    assert [one.logprob for place in result.top_logprobs for one in place] == pytest.approx(
        [one.logprob for place in expected.top_logprobs for one in place], abs=1e-5
    )
    assert len(result.top_logprobs) == len(result.token_ids) and all(len(place) == 3 for place in result.top_logprobs)
    assert tuple(place for chunk in chunks for place in chunk.top_logprobs) == result.top_logprobs


def test_top_logprobs_stay_empty_unless_asked_for(client: RouterClient) -> None:
    assert client.generate(PROMPT, max_tokens=2, logprobs=True).top_logprobs == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"min_p": 2.0}, "found min_p 2.0, expected"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {1: 1000.0}}, "logit_bias"),
        ({"logit_bias": {100_000: 1.0}}, "token 100000, expected ids from 0 to 256"),
        ({"stop_token_ids": [100_000]}, "token 100000, expected ids from 0 to 256"),
        ({"min_tokens": 10, "max_tokens": 9}, "min_tokens"),
        ({"top_logprobs": 3}, "expected logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "from 0 to 20"),
        ({"logit_bias": {-1: 1.0}}, "cannot be sent"),
        ({"stop_token_ids": [-1]}, "cannot be sent"),
        ({"top_q": 1.0}, "cannot be sent"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_the_reason(
    client: RouterClient, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        client.generate(PROMPT, **arguments)
