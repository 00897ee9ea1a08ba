"""What comes out for the bare base: tokens, log-probabilities, ends, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.engine import Engine, SamplingParams
from lorafleet.errors import InvalidInputError, NotFoundError
from tests.engine.bases import EOS, PROMPTS, greedy, logits_of, to_length


def test_greedy_tokens_are_those_of_plain_recomputation(engine: Engine, plain_model: Callable[[], Any]) -> None:
    model = plain_model()
    for prompt, generation in zip(PROMPTS, engine.generate(PROMPTS, sampling=to_length(15)), strict=True):
        assert generation.token_ids == greedy(model, prompt, 15)
        assert generation.finish_reason == "length"
        assert generation.prompt_tokens == len(prompt)


@pytest.mark.parametrize(("sequences", "budget"), [(1, 1), (2, 7), (5, 5), (64, 1024)])
def test_tokens_do_not_depend_on_the_limits_or_on_the_batch(base_folder: Path, sequences: int, budget: int) -> None:
    def load(sequences: int, budget: int) -> Engine:
        return Engine.load(base_folder, dtype="float32", max_sequences=sequences, max_batch_tokens=budget)

    alone = load(1, 1024)
    together = load(sequences, budget).generate(PROMPTS, sampling=to_length(12))
    for prompt, generation in zip(PROMPTS, together, strict=True):
        assert generation.token_ids == alone.generate([prompt], sampling=to_length(12))[0].token_ids


def test_logprobs_are_those_of_the_model(engine: Engine, plain_model: Callable[[], Any]) -> None:
    prompt = PROMPTS[4]
    generation = engine.generate([prompt], sampling=to_length(6, logprobs=True, prompt_logprobs=True))[0]
    tokens = prompt + generation.token_ids
    expected = logits_of(plain_model(), tokens).log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]
    assert generation.prompt_logprobs is not None
    got = torch.tensor(generation.prompt_logprobs + generation.logprobs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(generation.logprobs) == 6


def test_logprobs_stay_empty_unless_asked_for(engine: Engine) -> None:
    asked, not_asked = engine.generate([[1], [1]], sampling=[to_length(2, logprobs=True), to_length(2)])
    assert len(asked.logprobs) == 2
    assert not_asked.logprobs == []
    assert not_asked.prompt_logprobs is None


def test_scoring_gives_logprobs_and_no_token(engine: Engine) -> None:
    only, with_tokens = engine.generate(
        [PROMPTS[4]] * 2,
        sampling=[SamplingParams(max_tokens=0, prompt_logprobs=True), to_length(1, prompt_logprobs=True)],
    )
    assert only.token_ids == [] and only.text == "" and only.finish_reason == "length"
    assert only.prompt_logprobs == pytest.approx(with_tokens.prompt_logprobs, rel=1e-4, abs=1e-4)
    assert engine.generate([[5]], sampling=SamplingParams(max_tokens=0, prompt_logprobs=True))[0].prompt_logprobs == []


def test_end_of_text_stops_unless_it_is_ignored(engine: Engine, base_folder: Path) -> None:
    # A prompt after which this base says end of text within 40 tokens.
    for first in range(200):
        ended = engine.generate([[first]], sampling=SamplingParams(max_tokens=40))[0]
        if ended.finish_reason == "stop":
            break
    assert ended.token_ids[-1] == EOS
    assert EOS not in ended.token_ids[:-1]
    on = engine.generate([[first]], sampling=to_length(40))[0]
    assert on.token_ids[: len(ended.token_ids)] == ended.token_ids
    assert len(on.token_ids) == 40
    assert ended.text == on.text[: len(ended.text)]


def test_generation_ends_where_the_context_is_full(engine: Engine) -> None:
    room, full = engine.generate([[3] * 150, [3] * engine.context_tokens], sampling=to_length(100))
    assert len(room.token_ids) == engine.context_tokens - 150 + 1
    assert len(full.token_ids) == 1
    assert (room.finish_reason, full.finish_reason) == ("length", "length")


def test_text_prompts_open_with_the_end_of_text(engine: Engine) -> None:
    text, tokens = engine.generate(
        ["hé", [EOS, *engine.tokenizer("hé", add_special_tokens=False)["input_ids"]]], sampling=to_length(8)
    )
    assert text.token_ids == tokens.token_ids
    assert text.prompt_tokens == 4


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([1] * 161, "161 tokens, this base's context holds 160"),
        ([257], "token ids from 0 to 256"),
        ([-1], "token ids from 0 to 256"),
        (["x"], "token ids from 0 to 256"),
    ],
)
def test_prompts_that_cannot_work_are_refused(engine: Engine, prompt: Any, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        engine.submit(prompt)
    assert engine.stats().requests_waiting == 0


def test_generate_wants_one_mix_and_one_sampling_for_each_prompt(engine: Engine) -> None:
    with pytest.raises(InvalidInputError, match="1 mixes for 2 prompts"):
        engine.generate([[1], [2]], mixes=[None])
    with pytest.raises(InvalidInputError, match="3 sampling for 2 prompts"):
        engine.generate([[1], [2]], sampling=[SamplingParams()] * 3)
    with pytest.raises(InvalidInputError, match="expected a list of prompts"):
        engine.generate("text")


def test_a_refused_prompt_leaves_nothing_behind(engine: Engine) -> None:
    with pytest.raises(InvalidInputError):
        engine.generate([[1], []], sampling=to_length(100))
    assert engine.generate([[1]], sampling=to_length(1))[0].finish_reason == "length"
    stats = engine.stats()
    assert (stats.requests_running, stats.requests_waiting) == (0, 0)


def test_bfloat16_follows_the_model_in_bfloat16(base_folder: Path, plain_model: Callable[[], Any]) -> None:
    engine = Engine.load(base_folder, max_sequences=4)
    prompt = PROMPTS[4]
    scores = engine.generate([prompt], sampling=SamplingParams(max_tokens=0, prompt_logprobs=True))[0].prompt_logprobs
    expected = logits_of(plain_model(), prompt).log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
    low = logits_of(plain_model().bfloat16(), prompt).float().log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
    error, low_error = (torch.tensor(scores) - expected).square().mean(), (low - expected).square().mean()
    assert error.sqrt() <= 1.5 * low_error.sqrt()


@pytest.mark.parametrize(
    "wrong", [{"dtype": "float16"}, {"dtype": torch.float64}, {"device": "abacus"}, {"max_sequences": 0}]
)
def test_load_refuses_settings_that_cannot_work(base_folder: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        Engine.load(base_folder, **wrong)


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no base at"):
        Engine.load(tmp_path)
