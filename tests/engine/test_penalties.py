"""Penalties, biases and cuts: against transformers' logits processors and the formulas of OpenAI's API."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorafleet.engine import SamplingParams
from lorafleet.engine.penalties import TokenHistory, penalised, without
from lorafleet.engine.sampling import Choice, choose, start_history, weights_of

VOCABULARY = 500


def random_logits(seed: int, rows: int = 1, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def random_tokens(seed: int, count: int) -> list[int]:
    """With many repeats."""
    draw = random.Random(seed)
    return [min(draw.randrange(VOCABULARY), draw.randrange(VOCABULARY)) for _ in range(count)]


def history(params: SamplingParams, prompt: Sequence[int], generated: Sequence[int] = ()) -> TokenHistory | None:
    started = start_history(params, prompt)
    for token in generated:
        if started is not None:
            started.add(token)
    return started


def theirs(params: SamplingParams, prompt: Sequence[int], generated: Sequence[int], *, eos: int) -> LogitsProcessorList:
    """What transformers' ``generate`` does for the same settings, in its order."""
    processors: list[Any] = []
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias.items()}))
    if params.min_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, [eos]))
    if params.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return LogitsProcessorList(processors)


SETTINGS: list[dict[str, Any]] = [
    {"top_k": 7},
    {"top_k": 400},
    {"top_k": 10_000},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
    {"top_p": 0.9, "min_p": 0.1, "temperature": 2.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "temperature": 0.5},
    {"repetition_penalty": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.03, "temperature": 1.4},
    {"logit_bias": {3: 5.0, 4: -100.0, 499: 0.5}},
    {"repetition_penalty": 1.5, "logit_bias": {1: 4.0, 2: -3.5}, "top_p": 0.7},
    {"min_tokens": 60, "temperature": 0.3},
    {"repetition_penalty": 1.1, "min_tokens": 60, "logit_bias": {0: 100.0}, "top_k": 5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(settings: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0} | settings)
    eos = 0
    for seed in range(20):
        prompt, generated = random_tokens(seed, 30), random_tokens(seed + 100, 40)
        logits = random_logits(seed)
        scores = theirs(params, prompt, generated, eos=eos)(torch.tensor([prompt + generated]), logits.clone())

        counted = history(params, prompt, generated)
        ours = penalised(logits, [counted]) if counted else logits
        if params.min_tokens:
            ours = without(ours, [[eos]])
        weights = weights_of(ours, ours.max(dim=-1, keepdim=True).values, [params])
        assert torch.equal(weights > 0, scores > -math.inf)
        torch.testing.assert_close(weights / weights.sum(), scores.double().softmax(dim=-1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choosing_reads_the_token_off_that_distribution(temperature: float) -> None:
    params = SamplingParams(
        temperature=temperature, repetition_penalty=1.4, logit_bias={5: 2.0}, top_k=50, top_p=0.9, min_p=0.01
    )
    sampling = temperature > 0
    for seed in range(20):
        prompt, generated = random_tokens(seed, 30), random_tokens(seed + 100, 40)
        logits = random_logits(seed)
        token = choose(logits, [params], [random.Random(seed)], histories=[history(params, prompt, generated)]).tokens[
            0
        ]
        like = SamplingParams(temperature=1.0, repetition_penalty=1.4, logit_bias={5: 2.0}, top_k=50 if sampling else 1)
        scores = theirs(params if sampling else like, prompt, generated, eos=0)(
            torch.tensor([prompt + generated]), logits.clone()
        )
        running = scores[0].double().softmax(dim=-1).cumsum(dim=-1)
        at = random.Random(seed).random() if sampling else 0.5
        assert token == int((running <= at).sum())


@pytest.mark.parametrize(("presence", "frequency"), [(0.6, 0.0), (0.0, 0.4), (-1.0, 0.5), (2.0, -2.0)])
def test_presence_and_frequency_count_generated_tokens_alone(presence: float, frequency: float) -> None:
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    prompt, generated = random_tokens(1, 50), random_tokens(2, 80)
    logits = random_logits(3)
    counts = Counter(generated)
    assert max(counts.values()) > 1 and set(prompt) - set(generated)
    expected = logits.clone()
    for token, count in counts.items():
        expected[0, token] -= count * frequency + presence
    counted = history(params, prompt, generated)
    assert counted is not None
    torch.testing.assert_close(penalised(logits, [counted]), expected, rtol=1e-6, atol=1e-6)


def test_all_penalties_add_up_in_their_order() -> None:
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={1: 1.0, 5: -1.0}
    )
    counted = history(params, prompt=[0, 1], generated=[2, 2, 1, 3])
    assert counted is not None
    out = penalised(torch.tensor([[4.0, 4.0, -4.0, 0.0, 4.0, 4.0]]), [counted])
    assert out.tolist() == [[2.0, 2.0 - 0.75 + 1.0, -8.0 - 1.0, -0.75, 4.0, 3.0]]


def test_counting_a_token_at_a_time_is_counting_all_of_them_at_once() -> None:
    """What is kept from step to step, against a count from scratch in every step."""
    params = SamplingParams(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1, logit_bias={7: 1.5})
    prompt, generated = random_tokens(4, 20), random_tokens(5, 60)
    growing = history(params, prompt)
    assert growing is not None
    for step, token in enumerate(generated):
        logits = random_logits(step)
        seen, counts = {*prompt, *generated[:step]}, Counter(generated[:step])
        expected = logits.clone()
        for t in seen:
            expected[0, t] = logits[0, t] / 1.2 if logits[0, t] > 0 else logits[0, t] * 1.2
        for t, count in counts.items():
            expected[0, t] -= 0.3 + 0.1 * count
        expected[0, 7] += 1.5
        torch.testing.assert_close(penalised(logits, [growing]), expected, rtol=1e-6, atol=1e-6)
        growing.add(token)


def likeliest(choice: Choice, row: int) -> list[int]:
    return [token for token, _ in choice.top_logprobs[row]]


MIXED = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, frequency_penalty=1.0, top_p=0.9),
    SamplingParams(temperature=1.2, min_p=0.1, logit_bias={3: 10.0}),
    SamplingParams(min_tokens=90, stop_token_ids=(1, 2)),
    SamplingParams(presence_penalty=-1.5, logprobs=True, top_logprobs=3),
    SamplingParams(logprobs=True, top_logprobs=20),
    SamplingParams(temperature=1.0, top_k=20, repetition_penalty=0.8, min_tokens=100, logprobs=True),
]


@pytest.mark.parametrize("seed", range(8))
def test_a_rows_choice_depends_on_that_row_alone_in_any_batch_and_order(seed: int) -> None:
    rows = len(MIXED)
    logits = random_logits(seed, rows).bfloat16().float()  # with many ties
    histories = [history(p, random_tokens(row, 20), random_tokens(row + 50, 30)) for row, p in enumerate(MIXED)]

    def chosen(order: Sequence[int]) -> Choice:
        return choose(
            logits[list(order)],
            [MIXED[row] for row in order],
            [random.Random(1000 * seed + row) for row in order],
            histories=[histories[row] for row in order],
            eos=(0,),
        )

    alone = [chosen([row]) for row in range(rows)]
    order = random.Random(seed).sample(range(rows), rows)
    for batch in (range(rows), order, order[: rows // 2], [6, 6, 2, 7]):
        together = chosen(batch)
        for place, row in enumerate(batch):
            assert together.tokens[place] == alone[row].tokens[0]
            assert together.logprobs[place] == pytest.approx(alone[row].logprobs[0], abs=1e-6)
            assert likeliest(together, place) == likeliest(alone[row], 0)


def test_what_is_given_does_not_change() -> None:
    logits = random_logits(0, len(MIXED))
    histories = [history(p, [1, 2, 3], [4, 4]) for p in MIXED]
    before = [None if h is None else (list(h.tokens), list(h.factors), list(h.addends), h.generated) for h in histories]
    given = logits.clone()
    choose(logits, MIXED, [random.Random(0) for _ in MIXED], histories=histories, eos=(0,))
    assert torch.equal(logits, given)
    assert before == [
        None if h is None else (list(h.tokens), list(h.factors), list(h.addends), h.generated) for h in histories
    ]


def test_a_request_without_such_settings_has_nothing_to_count() -> None:
    plain = SamplingParams(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1, seed=1, stop=["x"], stop_token_ids=[3])
    assert start_history(plain, [1, 2, 3]) is None


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_ends_are_not_chosen_before_min_tokens(ignore_eos: bool) -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=[4], ignore_eos=ignore_eos)
    counted = history(params, [1])
    assert counted is not None
    logits = torch.tensor([[9.0, 1.0, 2.0, 3.0, 8.0]])  # end of text, then the stop token, are the likeliest

    def token() -> int:
        return choose(logits, [params], [random.Random(0)], histories=[counted], eos=(0,)).tokens[0]

    for _ in range(2):
        assert token() == (0 if ignore_eos else 3)
        counted.add(3)
    assert token() == 0


def test_a_bias_of_100_decides_and_of_minus_100_bans() -> None:
    logits = random_logits(0)
    best = int(logits.argmax())
    for temperature in (0.0, 1.0):
        only = SamplingParams(temperature=temperature, logit_bias={11: 100.0})
        never = SamplingParams(temperature=temperature, logit_bias={best: -100.0})
        for seed in range(20):
            assert choose(logits, [only], [random.Random(seed)], histories=[history(only, [])]).tokens == [11]
            assert choose(logits, [never], [random.Random(seed)], histories=[history(never, [])]).tokens != [best]


def test_tokens_beyond_the_vocabulary_are_passed_over() -> None:
    """They are refused where a request comes in; if one gets through it must not become an index."""
    params = SamplingParams(
        repetition_penalty=2.0, logit_bias={9: 1.0, 1: 1.0}, min_tokens=5, stop_token_ids=[2, 2**62]
    )
    counted = history(params, [0, 7, 2**40])
    logits = torch.tensor([[4.0, 1.0, 5.0], [1.0, 2.0, 3.0]])
    other = history(SamplingParams(logit_bias={2: -5.0}), [])
    choice = choose(logits, [params, SamplingParams()], [random.Random(0)] * 2, histories=[counted, other])
    assert choice.tokens == [0, 1]
    assert counted is not None
    assert penalised(logits[:1], [counted]).tolist() == [[2.0, 2.0, 5.0]]


def test_extreme_settings_leave_a_token_to_choose() -> None:
    """−∞ in the logits, the largest penalties, and a vocabulary whose every token is an end."""
    logits = torch.tensor([[-math.inf, 1e30, -1e30, 0.0]])
    for penalty in (0.01, 100.0):
        for temperature in (0.0, 1.0):
            params = SamplingParams(
                temperature=temperature, repetition_penalty=penalty, frequency_penalty=2.0, logit_bias={0: 100.0}
            )
            choice = choose(logits, [params], [random.Random(0)], histories=[history(params, range(4), range(4))])
            assert choice.tokens == [1] and choice.finite == [True]
    none_left = SamplingParams(temperature=1.0, min_tokens=1, stop_token_ids=range(4))
    choice = choose(logits, [none_left], [random.Random(0)], histories=[history(none_left, [])])
    assert 0 <= choice.tokens[0] < 4


def test_logprobs_are_those_of_the_model_whatever_is_done_to_its_logits() -> None:
    logits = random_logits(0, 3)
    params = [
        SamplingParams(logprobs=True, top_logprobs=20),
        SamplingParams(
            temperature=0.5, top_k=3, repetition_penalty=3.0, logit_bias={7: 9.0}, logprobs=True, top_logprobs=4
        ),
        SamplingParams(temperature=1.0),
    ]
    choice = choose(
        logits, params, [random.Random(row) for row in range(3)], histories=[history(p, range(50)) for p in params]
    )
    expected = logits.log_softmax(dim=-1)
    for row, count in ((0, 20), (1, 4)):
        assert choice.logprobs[row] == pytest.approx(float(expected[row, choice.tokens[row]]), abs=1e-5)
        values, ids = expected[row].topk(count)
        assert likeliest(choice, row) == ids.tolist()
        assert [value for _, value in choice.top_logprobs[row]] == pytest.approx(values.tolist(), abs=1e-5)
    assert choice.tokens[0] == choice.top_logprobs[0][0].token
    assert choice.logprobs[2] is None and choice.top_logprobs[2] == []


def test_equally_likely_tokens_come_in_the_order_of_their_ids() -> None:
    params = SamplingParams(logprobs=True, top_logprobs=5)
    logits = torch.tensor([[-2.0, -1.0, 0.0, -0.0, -1.0, 0.0, 1.0, -1.0], [-3.0, *[-math.inf] * 7]])
    choice = choose(logits, [params, params], [random.Random(0)] * 2)
    assert [likeliest(choice, row) for row in (0, 1)] == [[6, 2, 3, 5, 1], [0, 1, 2, 3, 4]]


def test_more_top_logprobs_than_tokens_are_all_tokens() -> None:
    params = SamplingParams(logprobs=True, top_logprobs=20)
    (top,) = choose(torch.tensor([[0.0, 2.0, 1.0, 0.0]]), [params], [random.Random(0)]).top_logprobs
    assert [token for token, _ in top] == [1, 2, 0, 3]
    assert math.fsum(math.exp(value) for _, value in top) == pytest.approx(1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_chooses_like_the_cpu() -> None:
    logits = random_logits(0, len(MIXED))
    histories = [history(p, random_tokens(row, 20), random_tokens(row + 50, 30)) for row, p in enumerate(MIXED)]
    chosen = [
        choose(
            logits.to(device), MIXED, [random.Random(row) for row in range(len(MIXED))], histories=histories, eos=(0,)
        )
        for device in ("cpu", "cuda")
    ]
    assert chosen[0].tokens == chosen[1].tokens
    assert likeliest(chosen[0], 7) == likeliest(chosen[1], 7)
