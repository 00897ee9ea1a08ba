"""``logprobs.cpp`` against float64."""

from __future__ import annotations

import math

import pytest
import torch

from lorafleet.native.logprobs import logprobs_of
from tests.native.marks import needs_tiles

pytestmark = needs_tiles


def expected(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 1023, 1024, 1025, 4096, 50_257, 152_064])
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_it_is_the_logarithm_of_softmax(columns: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(columns)
    logits = torch.randn(23, columns, generator=generator) * scale
    tokens = torch.randint(columns, (23,), generator=generator)
    wanted = expected(logits, tokens)
    assert (logprobs_of(logits, tokens) - wanted).abs().max() <= 4e-6 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("rest", [-0.35, -3.0])
def test_a_hundred_thousand_logits_that_are_alike_add_up(rest: float) -> None:
    logits = torch.full((1, 152_064), rest)
    logits[0, 7] = 0.0
    tokens = torch.tensor([7])
    assert abs(float(logprobs_of(logits, tokens)[0]) - float(expected(logits, tokens)[0])) <= 4e-6


def test_rows_of_a_wider_tensor_are_read_and_nothing_beside_them() -> None:
    wide = torch.full((9, 40), math.nan)
    wide[:, :33] = torch.randn(9, 33, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(9)
    assert torch.allclose(logprobs_of(wide[:, :33], tokens).double(), expected(wide[:, :33], tokens), atol=4e-6)


@pytest.mark.parametrize("at", [0, 1500, 2047])
def test_the_highest_logit_may_come_anywhere(at: int) -> None:
    logits = torch.full((1, 2048), -30.0)
    logits[0, at] = 60.0
    found = [float(logprobs_of(logits, torch.tensor([token]))[0]) for token in (at, (at + 1) % 2048)]
    assert found == pytest.approx([0.0, -90.0], abs=4e-6)


def test_what_is_masked_out_has_no_part() -> None:
    logits = torch.tensor([[-math.inf] * 1030 + [1.0, 1.0]])
    assert logprobs_of(logits, torch.tensor([1030])).item() == pytest.approx(-math.log(2), abs=4e-6)
    assert logprobs_of(logits, torch.tensor([3])).item() == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1024, 1029])
def test_a_row_that_is_not_finite_is_nan_and_the_next_one_right(bad: float, at: int) -> None:
    logits = torch.zeros(2, 1030)
    logits[0, at] = bad
    found = logprobs_of(logits, torch.tensor([1, 1])).tolist()
    assert math.isnan(found[0]) and found[1] == pytest.approx(-math.log(1030), abs=4e-6)
    assert math.isnan(logprobs_of(torch.full((1, 20), -math.inf), torch.tensor([0])).item())


def test_threads_give_the_same_bits() -> None:
    logits = torch.randn(300, 4096, generator=torch.Generator().manual_seed(2))
    tokens = torch.arange(300)
    alone = logprobs_of(logits, tokens)
    torch.set_num_threads(2)
    assert torch.equal(logprobs_of(logits, tokens), alone)
    assert torch.equal(logprobs_of(logits[7:8], tokens[7:8]), alone[7:8])


def test_what_cannot_be_read_is_refused() -> None:
    logits, tokens = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)
    assert logprobs_of(logits[:0], tokens[:0]).shape == (0,)
    for wrong in (logits.double(), logits[0], torch.zeros(8, 3).t(), logits[:, :0]):
        with pytest.raises(ValueError, match="side by side"):
            logprobs_of(wrong, tokens)
    with pytest.raises(ValueError, match=r"tokens \[2\]"):
        logprobs_of(logits, tokens[:2])
    for token in (-1, 8):
        with pytest.raises(IndexError, match="8 logits"):
            logprobs_of(logits, tokens + token)
