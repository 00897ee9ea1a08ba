"""Sampling settings through the engine, against plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorafleet.engine import Engine, SamplingParams
from lorafleet.errors import InvalidInputError
from tests.engine.bases import EOS, PROMPTS, logits_of, to_length


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.3}, {"repetition_penalty": 0.8}, {"sequence_bias": {(9,): 6.0}}, {"min_new_tokens": 25}],
    ids=str,
)
def test_greedy_tokens_are_those_of_transformers(
    engine: Engine, plain_model: Callable[[], Any], settings: dict[str, Any]
) -> None:
    model = plain_model()
    sampling = SamplingParams(
        max_tokens=30,
        repetition_penalty=settings.get("repetition_penalty", 1.0),
        logit_bias={token: bias for (token,), bias in settings.get("sequence_bias", {}).items()},
        min_tokens=settings.get("min_new_tokens", 0),
    )
    for prompt, generation in zip(PROMPTS, engine.generate(PROMPTS, sampling=sampling), strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=30, pad_token_id=EOS, **settings
        )
        assert generation.token_ids == expected[0, len(prompt) :].tolist()


def test_frequency_penalty_ends_repetition(engine: Engine) -> None:
    free, penalised = engine.generate(
        [PROMPTS[1]] * 2, sampling=[to_length(40), to_length(40, frequency_penalty=2.0, presence_penalty=2.0)]
    )
    assert len(set(penalised.token_ids)) > len(set(free.token_ids))


def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch_with_any_settings(engine: Engine) -> None:
    sampling = [
        to_length(15, temperature=1.0, seed=1, repetition_penalty=1.4),
        to_length(15, temperature=1.5, seed=2, min_p=0.02, frequency_penalty=0.7, logit_bias={5: 3.0}),
        to_length(15),
        to_length(15, temperature=0.8, seed=3, top_k=40, top_p=0.9, min_tokens=10, stop_token_ids=[3]),
        to_length(15, presence_penalty=1.0, logprobs=True, top_logprobs=2),
    ]
    alone = [engine.generate([p], sampling=s)[0].token_ids for p, s in zip(PROMPTS, sampling, strict=True)]
    assert [g.token_ids for g in engine.generate(PROMPTS, sampling=sampling)] == alone
    backwards = engine.generate(PROMPTS[::-1], sampling=sampling[::-1])
    assert [g.token_ids for g in backwards] == alone[::-1]


def test_min_tokens_puts_off_the_end_of_text(engine: Engine) -> None:
    for first in range(200):
        ended = engine.generate([[first]], sampling=SamplingParams(max_tokens=40))[0]
        if ended.finish_reason == "stop":
            break
    count = len(ended.token_ids)
    later = engine.generate([[first]], sampling=SamplingParams(max_tokens=60, min_tokens=count))[0]
    assert EOS not in later.token_ids[:count]
    assert later.token_ids[: count - 1] == ended.token_ids[:-1]
    assert len(later.token_ids) > count


def test_a_stop_token_ends_the_generation(engine: Engine) -> None:
    free = engine.generate([PROMPTS[0]], sampling=to_length(30))[0]
    stop = free.token_ids[10]
    count = free.token_ids.index(stop) + 1
    result = engine.generate([PROMPTS[0]], sampling=to_length(30, stop_token_ids=[stop]))[0]
    assert (result.finish_reason, result.token_ids) == ("stop", free.token_ids[:count])
    assert result.text == engine.tokenizer.decode(free.token_ids[: count - 1], skip_special_tokens=True)
    put_off = engine.generate([PROMPTS[0]], sampling=to_length(30, stop_token_ids=[stop], min_tokens=count))[0]
    assert stop not in put_off.token_ids[:count]


def test_top_logprobs_are_those_of_the_model(engine: Engine, plain_model: Callable[[], Any]) -> None:
    prompt = PROMPTS[4]
    sampling = to_length(6, temperature=2.0, seed=0, repetition_penalty=1.5, logprobs=True, top_logprobs=5)
    ticket = engine.submit(prompt, sampling=sampling)
    chunks = list(ticket.stream())
    generation = ticket.result()
    tokens = prompt + generation.token_ids
    expected = logits_of(plain_model(), tokens).log_softmax(-1)[len(prompt) - 1 : -1]
    values, ids = expected.topk(5)
    got = generation.top_logprobs
    assert [place for chunk in chunks for place in chunk.top_logprobs] == got
    assert [[one.token for one in place] for place in got] == ids.tolist()
    torch.testing.assert_close(
        torch.tensor([[one.logprob for one in place] for place in got]), values, rtol=1e-4, atol=1e-4
    )
    chosen = expected.gather(1, torch.tensor(generation.token_ids)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(generation.logprobs), chosen, rtol=1e-4, atol=1e-4)
    assert engine.generate([prompt], sampling=to_length(2, logprobs=True))[0].top_logprobs == []


@pytest.mark.parametrize("wrong", [{"logit_bias": {257: 1.0}}, {"stop_token_ids": [257]}], ids=str)
def test_tokens_beyond_the_vocabulary_are_refused_with_the_request(engine: Engine, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="token 257, expected ids from 0 to 256"):
        engine.submit([1], sampling=SamplingParams(**wrong))
    assert engine.stats().requests_waiting == 0
