from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.errors import InvalidInputError
from lorafleet.router_service.routers import BASE, ROUTERS, Candidate, Pool
from lorafleet.router_service.routers.likelihood import TEMPERATURE, WINDOW, likelihood, posterior_weights

SQL, CPP = Candidate("sha256:a", "acme/sql:1"), Candidate("sha256:b", "acme/cpp:7")
PROMPT = [0, *range(10, 20)]


class Table:
    """Scores from a table of nats a token: digest → value; remembers the prompts it was asked about."""

    def __init__(self, per_token: Mapping[str, float]) -> None:
        self.per_token = per_token
        self.prompts: list[list[int]] = []

    def __call__(self, prompt: Sequence[int], mixes: Sequence[Mapping[str, float]]) -> list[list[float]]:
        self.prompts.append(list(prompt))
        assert all(set(mix.values()) <= {1.0} for mix in mixes)
        return [[self.per_token[next(iter(mix), BASE)]] * (len(prompt) - 1) for mix in mixes]


def test_the_adapter_that_explains_the_text_best_answers_alone_when_it_is_far_ahead() -> None:
    route = likelihood(PROMPT, [SQL, CPP], Table({BASE: -9.0, SQL.digest: -1.0, CPP.digest: -9.0}))
    assert route.mix == {SQL.digest: 1.0}
    assert route.scores[0].digest == SQL.digest
    assert route.scores[0].score == pytest.approx(-1.0)
    assert "acme/sql:1" in route.reason and "8.000 nats a token better than the base over 10 tokens" in route.reason


def test_two_close_adapters_share_the_route_and_the_base_gets_nothing() -> None:
    route = likelihood(PROMPT, [SQL, CPP], Table({BASE: -9.0, SQL.digest: -1.0, CPP.digest: -1.1}))
    ratio = math.exp(10 * 0.1 / TEMPERATURE)
    expected = round(64 * ratio / (1 + ratio)) / 64
    assert route.mix == {SQL.digest: expected, CPP.digest: 1.0 - expected}


def test_the_share_of_the_base_is_left_out_of_the_mix() -> None:
    route = likelihood(PROMPT, [SQL, CPP], Table({BASE: -1.0, SQL.digest: -1.0, CPP.digest: -9.0}))
    assert route.mix == {SQL.digest: 0.5}
    assert {scored.digest: scored.weight for scored in route.scores} == {BASE: 0.5, SQL.digest: 0.5, CPP.digest: 0.0}


def test_a_text_that_the_base_explains_best_runs_on_the_bare_base() -> None:
    route = likelihood(PROMPT, [SQL, CPP], Table({BASE: -1.0, SQL.digest: -9.0, CPP.digest: -9.0}))
    assert route.mix == {}
    assert "no adapter explains the text better than the base" in route.reason


def test_the_order_of_the_candidates_does_not_matter() -> None:
    table = Table({BASE: -1.0, SQL.digest: -1.0, CPP.digest: -1.0})
    assert likelihood(PROMPT, [SQL, CPP], table) == likelihood(PROMPT, [CPP, SQL], table)


def test_a_long_prompt_is_scored_on_its_opening_token_and_its_last_ones() -> None:
    table = Table({BASE: -1.0, SQL.digest: -1.0})
    prompt = list(range(1000))
    likelihood(prompt, [SQL], table)
    assert table.prompts == [[0, *prompt[-(WINDOW - 1) :]]]
    assert len(table.prompts[0]) == WINDOW


def test_without_candidates_the_base_answers_and_nothing_is_scored() -> None:
    table = Table({})
    route = likelihood(PROMPT, [], table)
    assert route.mix == {} and table.prompts == []
    assert [(scored.digest, scored.weight) for scored in route.scores] == [(BASE, 1.0)]


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no tokens"):
        likelihood([0], [SQL], Table({}))


def test_a_prompt_without_even_an_opening_token_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no tokens"):
        likelihood([], [SQL], Table({}))


def test_a_candidate_without_a_finite_likelihood_gets_nothing() -> None:
    probabilities, weights = posterior_weights([-5.0, math.nan, -math.inf, -5.0])
    assert probabilities == [0.5, 0.0, 0.0, 0.5]
    assert weights == [0.5, 0.0, 0.0, 0.5]


def test_when_nobody_has_a_finite_likelihood_the_text_cannot_be_routed() -> None:
    with pytest.raises(InvalidInputError, match="finite likelihood"):
        posterior_weights([-math.inf, math.nan])


def test_a_higher_temperature_brings_the_probabilities_together() -> None:
    cold, _ = posterior_weights([-10.0, -12.0], temperature=1.0)
    warm, _ = posterior_weights([-10.0, -12.0], temperature=4.0)
    assert cold[0] == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert warm[0] == pytest.approx(1 / (1 + math.exp(-0.5)))


@given(st.lists(st.floats(-2000.0, 0.0), min_size=1, max_size=40), st.integers(1, 6), st.floats(0.1, 50.0))
def test_weights_are_steps_that_sum_to_one_and_follow_the_likelihood(
    values: list[float], top_k: int, temperature: float
) -> None:
    probabilities, weights = posterior_weights(values, temperature=temperature, top_k=top_k)
    assert sum(weights) == 1.0
    assert all(weight >= 0 and (weight * 64).is_integer() for weight in weights)
    assert sum(weight > 0 for weight in weights) <= top_k
    assert math.fsum(probabilities) == pytest.approx(1.0)
    kept = math.fsum(sorted(probabilities, reverse=True)[:top_k])
    for value, probability, weight in zip(values, probabilities, weights, strict=True):
        if weight > 0:
            assert abs(weight - probability / kept) < 1 / 64
            assert sum(other > value for other in values) < top_k


def test_the_router_is_registered_under_its_name_and_says_that_it_runs_the_model() -> None:
    class Asked:
        text, tokens = "", PROMPT

    router = ROUTERS["likelihood"]
    table = Table({BASE: -9.0, SQL.digest: -1.0, CPP.digest: -9.0})
    assert router(Asked(), Pool.of([CPP, SQL]), table) == likelihood(PROMPT, [SQL, CPP], table)
    assert router.runs_model and not router.reads_cards
