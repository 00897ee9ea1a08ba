"""The load: prompts, and which request uses which adapter."""

from __future__ import annotations

from collections import Counter

import pytest

from lorafleet.bench.prompts import FIRST_PLAIN_TOKEN, make_prompts
from lorafleet.bench.requests import ASKS, EIGHT, Ask, adapter_ranks, rank_of, zipf
from lorafleet.bench.shapes import SHAPES, get_shape, reduced
from lorafleet.errors import UnknownNameError

S = SHAPES["S"]


def test_the_eight_adapters_have_each_rank_twice() -> None:
    assert Counter(adapter_ranks().values()) == {8: 2, 16: 2, 32: 2, 64: 2}


def test_a_request_of_single_uses_its_number_modulo_eight() -> None:
    asks = ASKS["single"](S.load)
    assert [ask.weights for ask in asks[:9]] == [{f"a{i % 8}": 1.0} for i in range(9)]
    assert len(asks) == 32


def test_a_request_of_mix2_uses_two_adapters() -> None:
    asks = ASKS["mix2"](S.load)
    assert asks[7].weights == {"a7": 0.7, "a0": 0.3}
    assert asks[7].uses == {"a7": 1.0, "a0": 1.0}


def test_a_request_of_base_asks_for_nothing() -> None:
    assert all(ask == Ask() and ask.uses == {} for row in ("base", "base_alone") for ask in ASKS[row](S.load))


@pytest.mark.parametrize(
    ("row", "distinct", "ranks"),
    [("mix2_even8", 8, {16}), ("mix2_even64", 64, {16}), ("mix2_uneven64", 64, {8, 16, 32, 64})],
)
def test_64_requests_mix_two_of_the_adapters_of_the_target(row: str, distinct: int, ranks: set[int]) -> None:
    asks = ASKS[row](SHAPES["8B"].load)
    used = {name for ask in asks for name in ask.uses}
    assert len(asks) == 64 and all(len(ask.uses) == 2 for ask in asks)
    assert len(used) == distinct and {rank_of(name) for name in used} == ranks
    assert used.isdisjoint(EIGHT)


def test_a_token_of_token_top2_uses_two_of_eight() -> None:
    ask, *_ = ASKS["token_top2"](S.load)
    assert ask.routed == EIGHT and ask.uses == dict.fromkeys(EIGHT, 0.25)


def test_many_draws_the_same_adapters_warm_and_cold() -> None:
    assert ASKS["many"](S.load) == ASKS["many_cold"](S.load)
    names = {name for ask in ASKS["many"](S.load) for name in ask.uses}
    assert names.isdisjoint(EIGHT) and {rank_of(name) for name in names} == {8}


def test_zipf_draws_in_proportion_to_one_over_the_place() -> None:
    drawn = Counter(zipf(60_000, names=3, exponent=1.0, seed=0))
    assert [drawn[i] / 60_000 for i in range(3)] == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.01)
    assert zipf(5, names=1000, exponent=1.0, seed=1) == zipf(5, names=1000, exponent=1.0, seed=1)


def test_prompts_are_seeded_and_no_phase_repeats_a_prompt() -> None:
    prompts = make_prompts(S, seed=3)
    assert prompts == make_prompts(S, seed=3) != make_prompts(S, seed=4)
    together = [tuple(prompt) for phase in prompts for prompt in phase]
    assert len(together) == len(set(together)) == 3 * 32
    assert {len(prompt) for prompt in together} == {128}
    assert all(FIRST_PLAIN_TOKEN <= token < S.vocabulary for prompt in together for token in prompt)


def test_a_reduced_shape_keeps_the_widths_and_uses_every_adapter() -> None:
    small = reduced(SHAPES["8B"])
    assert (small.layers, small.hidden, small.mlp, small.heads) == (2, 4096, 14336, 32)
    assert {name for ask in ASKS["single"](small.load) for name in ask.uses} == set(EIGHT)


def test_another_shape_of_the_same_name_has_another_cache() -> None:
    assert len({shape.key for shape in SHAPES.values()} | {reduced(S).key}) == len(SHAPES) + 1


def test_an_unknown_shape_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="8B, M, S, tiny"):
        get_shape("XL")
