"""What a correctness check finds: a wrong token is injected, and has to be seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorafleet.bench import checks
from lorafleet.bench.checks import Reference, check, problem, rounding_problem
from lorafleet.bench.jobs import Job
from lorafleet.bench.requests import Ask
from lorafleet.bench.shapes import SHAPES, reduced
from lorafleet.bench.verdict import Mismatch, changed, first_mismatch
from lorafleet.bench.weights import prepare

LOGITS = torch.tensor([[0.0, 1.0, 0.5], [2.0, 0.0, 1.99995], [0.0, 0.0, 3.0]])


def test_the_references_own_choices_pass() -> None:
    assert first_mismatch(LOGITS, [1, 0, 2]) is None


def test_the_first_wrong_token_is_named() -> None:
    assert first_mismatch(LOGITS, [1, 0, 0]) == Mismatch(2, 0, 2, 3.0)


def test_a_token_within_a_near_tie_of_the_best_counts_as_the_best() -> None:
    assert first_mismatch(LOGITS, [1, 2, 2]) is None


def test_a_token_far_below_a_near_tie_is_wrong() -> None:
    assert first_mismatch(LOGITS, [1, 1, 2]) == Mismatch(1, 1, 0, 2.0)


def test_logits_that_are_no_numbers_are_wrong() -> None:
    assert first_mismatch(torch.full((1, 3), torch.nan), [0]) is not None


def test_choices_that_differ_are_counted() -> None:
    assert changed(LOGITS, LOGITS.flip(1)) == 2


def counting(_ask: Ask, tokens: Tensor) -> Tensor:
    """A model that always prefers the next number."""
    return torch.nn.functional.one_hot((tokens[0] + 1) % 10, 10).float()


def backwards(_ask: Ask, tokens: Tensor) -> Tensor:
    return torch.nn.functional.one_hot((tokens[0] - 1) % 10, 10).float()


ASK, PROMPT = Ask({"a0": 1.0}), [4, 2]


def test_right_tokens_are_no_problem() -> None:
    assert problem([[3, 4, 5]], [ASK], [PROMPT], reference=counting, bare=backwards, device="cpu") is None


def test_a_wrong_token_is_a_problem_that_says_what_was_expected() -> None:
    found = problem([[3, 4, 5], [3, 5, 6]], [ASK] * 2, [PROMPT] * 2, reference=counting, bare=None, device="cpu")
    assert found is not None and found.startswith("request 1, new token 1: found 5, expected 4")


def test_a_check_whose_adapters_change_nothing_is_a_problem() -> None:
    found = problem([[3, 4]], [ASK], [PROMPT], reference=counting, bare=counting, device="cpu")
    assert found is not None and "cannot see a wrong adapter" in found


def scored_by(model: Reference, *, shift: float = 0.0) -> list[tuple[list[int], list[float]]]:
    """What a request's tokens would be scored by a model, each log-probability off by ``shift``."""
    tokens = [4, 2, 3, 4]
    logprobs = model(ASK, torch.tensor([tokens[:-1]])).double().log_softmax(-1)
    return [(tokens, [float(row[token]) + shift for row, token in zip(logprobs, tokens[1:], strict=True)])]


def nearly_counting(ask: Ask, tokens: Tensor) -> Tensor:
    """Off by about a hundredth, as rounding is."""
    return counting(ask, tokens) * 1.01


def test_scores_as_near_as_rounding_are_no_problem() -> None:
    scored = scored_by(nearly_counting)
    assert rounding_problem(scored, [ASK], reference=counting, rounded=nearly_counting, device="cpu") is None


@pytest.mark.parametrize("shift", [0.1, -0.1, float("nan")])
def test_scores_further_off_than_rounding_are_a_problem(shift: float) -> None:
    scored = scored_by(counting, shift=shift)
    found = rounding_problem(scored, [ASK], reference=counting, rounded=nearly_counting, device="cpu")
    assert found is not None and "expected at most 1.5 times" in found


def test_scores_of_another_adapter_are_a_problem() -> None:
    scored = scored_by(backwards)
    assert rounding_problem(scored, [ASK], reference=counting, rounded=nearly_counting, device="cpu") is not None


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    prepare(folder, reduced(SHAPES["tiny"]))
    return folder


def check_job(work: Path, kind: str) -> Job:
    return Job(
        task="check", name=kind, shape=reduced(SHAPES["tiny"]), work=work, device="cpu", threads=1, seed=0
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["base", "single", "mix2", "token_top2"])
def test_the_engine_passes_against_transformers_peft_and_merged_weights(work: Path, kind: str) -> None:
    assert check(check_job(work, kind)) is None


@pytest.mark.parametrize(("kind", "instead"), [("single", "base"), ("mix2", "single"), ("token_top2", "mix2")])
def test_an_engine_that_computes_another_mixture_is_found(
    work: Path, kind: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = checks.submit_all

    def wrong(engine, _asks, prompts, *, new_tokens):  # type: ignore[no-untyped-def]
        asks = checks.ASKS[instead](reduced(SHAPES["tiny"]).load)
        return right(engine, asks, prompts, new_tokens=new_tokens)

    monkeypatch.setattr(checks, "submit_all", wrong)
    found = check(check_job(work, kind))
    assert found is not None and "expected" in found


def test_one_wrong_token_of_the_engine_is_found(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = checks.submit_all

    def wrong(*arguments, **keywords):  # type: ignore[no-untyped-def]
        tokens = right(*arguments, **keywords)
        tokens[5][-1] = (tokens[5][-1] + 1) % 300
        return tokens

    monkeypatch.setattr(checks, "submit_all", wrong)
    found = check(check_job(work, "base"))
    assert found is not None and found.startswith("request 5, new token 11:")
