"""On every architecture: greedy tokens of one adapter are those of peft's generate, of a mixture a merged model's.

Their log-probabilities are compared, too: some random models repeat the last token, whatever the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from lorafleet.engine import Engine, Generation
from lorafleet.engine.model import CHECKED_ARCHITECTURES
from tests.engine.bases import logits_of, to_length
from tests.engine.test_architectures import small_model

TOKENS = 8
# Of equal length, so that peft generates for both at once.
PROMPTS = [[9, 8, 7, 6, 5] * 4, list(range(40, 60))]
# Where the two most likely tokens are closer than this, rounding may decide.
TIE = 1e-4

KINDS = ["patterns", "rank-stabilised", "one module", "some layers", "regular expression", "exclusion"]
MIXES: list[dict[str, float]] = [
    {"patterns": 0.7, "some layers": 0.3},
    {"rank-stabilised": -0.5, "one module": 1.25},
    {"patterns": 1.0, "regular expression": 1.0},
    {"some layers": -1.0, "rank-stabilised": 0.4, "exclusion": 0.9},
    {"one module": 8.0, "some layers": -0.015625, "exclusion": -0.3},
]


def configs(leaves: Sequence[str], *, conv1d: bool) -> dict[str, LoraConfig]:
    """One for each of ``KINDS``; ``leaves`` are the last parts of the linear layers' paths."""
    first, second, *_, last = leaves
    settings: dict[str, dict[str, Any]] = {
        "patterns": {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": "all-linear",
            "rank_pattern": {first: 6, rf".*\.1\..*{last}": 1},
            "alpha_pattern": {last: 12, rf".*\.2\..*{second}": 2},
        },
        "rank-stabilised": {
            "r": 5,
            "lora_alpha": 4,
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {second: 2},
        },
        "one module": {"r": 4, "target_modules": [last]},
        "some layers": {"r": 2, "lora_alpha": 6, "target_modules": list(leaves), "layers_to_transform": [1]},
        "regular expression": {"r": 4, "target_modules": rf".*\.(0|2)\.(.*\.)?({second}|{last})"},
        "exclusion": {"r": 7, "target_modules": "all-linear", "exclude_modules": [first]},
    }
    assert list(settings) == KINDS
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "bias": "none", "fan_in_fan_out": conv1d}
    return {kind: LoraConfig(**common, **each) for kind, each in settings.items()}


def randomise(model: PeftModel) -> None:
    """Both factors of every adapter, so that each of them changes the tokens."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)


@torch.no_grad()
def generated(model: Any) -> list[list[int]]:
    prompts = torch.tensor(PROMPTS)
    out = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    tokens: list[list[int]] = out[:, prompts.shape[1] :].tolist()
    return tokens


def logprobs(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """``[TOKENS]`` nats, of ``tokens`` after the prompt."""
    after = logits_of(model, prompt + tokens)[len(prompt) - 1 : -1].log_softmax(-1)
    return after.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)


def assert_same(found: Generation, expected: list[int], prompt: list[int], model: Any) -> None:
    """Tokens up to a place where ``model``, which gave the expected ones, is undecided; log-probabilities of all."""
    torch.testing.assert_close(
        torch.tensor(found.logprobs), logprobs(model, prompt, found.token_ids), atol=1e-3, rtol=1e-4
    )
    for place, (one, other) in enumerate(zip(found.token_ids, expected, strict=True)):
        if one != other:
            first, second = logits_of(model, prompt + expected[:place])[-1].topk(2).values.tolist()
            assert first - second < TIE, f"token {place}: found {found.token_ids}, expected {expected}"
            return


@contextmanager
def merged(model: PeftModel, mix: dict[str, float]) -> Iterator[PeftModel]:
    """The base with ``W + Σ w_i ΔW_i``, where ΔW is peft's own."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer.get_base_layer().weight.clone() for layer in layers]
    with torch.no_grad(), model.disable_adapter():
        for layer in layers:
            for name, weight in mix.items():
                if name in layer.lora_A:
                    layer.get_base_layer().weight += weight * layer.get_delta_weight(name)
        yield model
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.copy_(weight)


@dataclass(frozen=True)
class Served:
    """A base with one adapter of each kind, in peft and in the engine."""

    tuned: PeftModel
    engine: Engine

    def generate(self, prompts: list[list[int]], mixes: list[dict[str, float]]) -> list[Generation]:
        return self.engine.generate(prompts, mixes=mixes, sampling=to_length(TOKENS, logprobs=True))

    def assert_changed(self, found: Generation, prompt: list[int]) -> None:
        """Else nothing was compared."""
        with self.tuned.disable_adapter():
            bare = logprobs(self.tuned, prompt, found.token_ids)
        assert (torch.tensor(found.logprobs) - bare).abs().max() > 0.01


@pytest.fixture(scope="module", params=CHECKED_ARCHITECTURES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp(request.param)
    model = small_model(request.param, folder / "base")
    model.generation_config.eos_token_id = None
    linears = {
        name.rpartition(".")[2]: type(module).__name__
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not model.get_output_embeddings()
    }
    each = configs(list(linears), conv1d="Conv1D" in linears.values())
    tuned: Any = get_peft_model(model, each[KINDS[0]], adapter_name=KINDS[0])
    for kind in KINDS[1:]:
        tuned.add_adapter(kind, each[kind])
    randomise(tuned)
    tuned.save_pretrained(folder / "adapters")
    engine = Engine.load(folder / "base", dtype="float32", max_sequences=8, max_batch_tokens=48)
    for kind in KINDS:
        engine.add_adapter(kind, folder / "adapters" / kind)
    return Served(tuned.eval(), engine)


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_at_weight_one_gives_the_tokens_of_pefts_generate(served: Served, kind: str) -> None:
    found = served.generate(PROMPTS, [{kind: 1.0}] * len(PROMPTS))
    served.tuned.set_adapter(kind)
    for prompt, ours, theirs in zip(PROMPTS, found, generated(served.tuned), strict=True):
        assert_same(ours, theirs, prompt, served.tuned)
        served.assert_changed(ours, prompt)


def test_mixtures_in_one_batch_give_the_tokens_of_merged_models(served: Served) -> None:
    found = served.generate(PROMPTS * len(MIXES), [mix for mix in MIXES for _ in PROMPTS])
    for mix in MIXES:
        mine, found = found[: len(PROMPTS)], found[len(PROMPTS) :]
        with merged(served.tuned, mix) as model:
            for prompt, ours, theirs in zip(PROMPTS, mine, generated(model), strict=True):
                assert_same(ours, theirs, prompt, model)
        for prompt, ours in zip(PROMPTS, mine, strict=True):
            served.assert_changed(ours, prompt)
