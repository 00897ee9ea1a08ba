"""What a step takes, learned from those before."""

from __future__ import annotations

import random

import pytest

from lorafleet.engine.step_cost import StepCost


def learned(steps: list[tuple[int, int]], *, seconds: tuple[float, float, float], noise: float = 0.0) -> StepCost:
    rng, cost = random.Random(1), StepCost()
    base, each, token = seconds
    for sequences, tokens in steps:
        took = base + each * sequences + token * tokens
        cost.observe(sequences=sequences, tokens=tokens, seconds=took * (1 + noise * rng.uniform(-1, 1)))
    return cost


def mixed(count: int) -> list[tuple[int, int]]:
    rng = random.Random(2)
    return [(n, n + rng.choice([0, 0, 100, 300])) for n in (rng.randint(1, 64) for _ in range(count))]


def test_a_mixed_load_shows_what_the_base_a_sequence_and_a_token_take() -> None:
    cost = learned(mixed(400), seconds=(2e-3, 1e-4, 2e-5), noise=0.2)
    for sequences, tokens in ((1, 1), (8, 8), (64, 64), (4, 400)):
        expected = 2e-3 + 1e-4 * sequences + 2e-5 * tokens
        assert cost.seconds(sequences=sequences, tokens=tokens) == pytest.approx(expected, rel=0.15)


def test_small_steps_are_known_where_each_further_sequence_costs_less() -> None:
    """Most are small, and a few as large as they may be: those say little of what a small one takes."""
    cost, rng = StepCost(), random.Random(3)
    for _ in range(400):
        sequences = rng.randint(1, 8) if rng.random() < 0.75 else rng.randint(16, 64)
        cost.observe(sequences=sequences, tokens=sequences, seconds=5e-3 * sequences**0.5)
    for sequences in (2, 4, 8):
        expected = 5e-3 * sequences**0.5
        assert cost.seconds(sequences=sequences, tokens=sequences) == pytest.approx(expected, rel=0.2)


def test_steps_that_are_all_alike_are_taken_for_proportional() -> None:
    cost = learned([(64, 64)] * 400, seconds=(2e-3, 1e-4, 0.0))
    assert cost.seconds(sequences=64, tokens=64) == pytest.approx(8.4e-3, rel=0.05)
    assert cost.seconds(sequences=1, tokens=1) < 1e-3


def test_a_pause_of_the_machine_changes_little() -> None:
    cost = learned(mixed(400), seconds=(2e-3, 1e-4, 0.0))
    cost.observe(sequences=1, tokens=1, seconds=10.0)
    assert cost.seconds(sequences=1, tokens=1) < 3e-3


def test_tokens_within_a_time_take_that_time() -> None:
    cost = learned(mixed(400), seconds=(2e-3, 1e-4, 2e-5))
    tokens = cost.tokens_within(8e-3, sequences=4)
    assert tokens is not None
    assert cost.seconds(sequences=4, tokens=tokens) == pytest.approx(8e-3, rel=0.02)
    assert cost.tokens_within(1e-3, sequences=4) == 0
    assert StepCost().tokens_within(1e-3, sequences=4) is None
