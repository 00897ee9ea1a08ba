"""Bad adapters, mixes, prompts and parameters while others are served: a typed error for whoever sent them, alone."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.engine import Engine, SamplingParams
from lorafleet.engine.request import TokenMix
from lorafleet.errors import (
    AdapterFormatError,
    BaseMismatchError,
    InvalidInputError,
    LorafleetError,
    NotFoundError,
)
from tests.engine.bases import PROMPTS, SMALL, save_base, to_length

NAN, INFINITY = float("nan"), float("inf")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
GOOD: list[tuple[list[int], dict[str, float], SamplingParams]] = [
    (PROMPTS[0], {"a": 1.0}, to_length(60)),
    (PROMPTS[1], {"a": 0.7, "b": -0.3}, to_length(60, temperature=0.8, seed=3)),
    (PROMPTS[4], {}, to_length(60, logprobs=True, top_logprobs=3, prompt_logprobs=True)),
]


class Service:
    """An engine whose thread runs, and three requests that nobody else may disturb."""

    def __init__(self, base_folder: Path, adapters: dict[str, Path]) -> None:
        self.engine = Engine.load(base_folder, dtype="float32", max_sequences=8, max_batch_tokens=32)
        for name in "ab":
            self.engine.add_adapter(name, adapters[name])
        self.engine.start()
        self.alone = [
            self.engine.submit(prompt, mix=mix, sampling=sampling).result(timeout_s=60)
            for prompt, mix, sampling in GOOD
        ]
        self.known = self.engine.adapters()

    def while_serving(self, bad: Callable[[], Any]) -> Any:
        """What ``bad`` gives, called once the good ones have begun; they end as they do alone."""
        before = self.engine.stats()
        tickets = [self.engine.submit(prompt, mix=mix, sampling=sampling) for prompt, mix, sampling in GOOD]
        for ticket in tickets:
            next(ticket.stream())
        try:
            return bad()
        finally:
            for ticket, alone in zip(tickets, self.alone, strict=True):
                found = ticket.result(timeout_s=60)
                assert found.token_ids == alone.token_ids
                assert found.finish_reason == "length"
            after = self.engine.stats()
            assert after.requests_finished_total == before.requests_finished_total + len(GOOD)
            self.assert_nothing_is_left()

    def assert_nothing_is_left(self) -> None:
        """No pages, no holds, no claims, and no adapter beside the good ones."""
        stats = self.engine.stats()
        assert (stats.requests_running, stats.requests_waiting, stats.kv_pages_in_use) == (0, 0, 0)
        assert not self.engine._tickets and not self.engine._cancelled
        assert self.engine.adapters() == self.known
        entries = self.engine._residency._tiers._entries
        assert set(entries) == set(self.known.values())
        assert [(entry.holds, entry.claims, entry.pins) for entry in entries.values()] == [(0, 0, 0)] * len(entries)
        assert stats.adapters_on_device + stats.adapters_on_host + stats.adapters_on_disk == len(entries)


@pytest.fixture(scope="module")
def service(base_folder: Path, adapters: dict[str, Path]) -> Iterator[Service]:
    service = Service(base_folder, adapters)
    yield service
    service.engine.stop()


def with_config(**changes: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return damage


def with_tensors(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        save_file({name: change(name, t) for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)

    return damage


def renamed(old: str, new: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        save_file({name.replace(old, new): t for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)

    return damage


def poisoned(value: float) -> Callable[[Path], object]:
    def poison(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor.flatten()[-1] = value
        return tensor

    return with_tensors(poison)


def longer_inputs(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor], dim=1) if "lora_A" in name else tensor


# What is done to a good adapter's folder, before it is added; tests/adapters/test_format.py has more.
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], type[LorafleetError], str]] = {
    "for a base of other shapes": (with_tensors(longer_inputs), BaseMismatchError, "the adapter is for 160 → 48"),
    "for a base of more layers": (renamed("layers.2", "layers.7"), BaseMismatchError, "which this base does not have"),
    "for a base of other names": (renamed("q_proj", "query"), BaseMismatchError, "which this base does not have"),
    "for another base by digest": (
        with_config(base_model_name_or_path="sha256:other"), BaseMismatchError, "made for base sha256:other"),
    "for the output layer": (
        lambda folder: LoraAdapter({"lm_head": LoraPair(torch.ones(1, 48), torch.ones(257, 1))}).save(folder),
        InvalidInputError, "only linear layers of the decoder's layers"),
    "NaN": (poisoned(NAN), AdapterFormatError, "found NaN or infinity"),
    "infinity": (poisoned(INFINITY), AdapterFormatError, "found NaN or infinity"),
    "truncated": (lambda folder: os.truncate(folder / WEIGHTS, 3000), AdapterFormatError, "damaged or truncated"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), NotFoundError, "adapter_config.json is missing"),
    "gone": (shutil.rmtree, NotFoundError, "is missing"),
    "rank 0": (with_config(r=0), AdapterFormatError, "rank_pattern says 0"),
    "alpha NaN": (with_config(lora_alpha=NAN), AdapterFormatError, "expected a number"),
    "DoRA": (with_config(use_dora=True), AdapterFormatError, "use_dora is set"),
}  # fmt: skip


@pytest.fixture
def copy_of_a(adapters: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapters["a"], tmp_path / "copy"))


@pytest.mark.parametrize("bad", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_adapter_is_refused_at_load_and_its_name_keeps_its_meaning(
    service: Service, copy_of_a: Path, bad: tuple[Callable[[Path], object], type[LorafleetError], str]
) -> None:
    damage, error, words = bad
    damage(copy_of_a)

    def add() -> None:
        for name in ("new", "a"):
            with pytest.raises(error, match=words):
                service.engine.add_adapter(name, copy_of_a)
        with pytest.raises(error, match=words):
            service.engine.add_adapter("pinned", copy_of_a, pinned=True)

    service.while_serving(add)


@pytest.mark.parametrize("named", ["../../../etc/passwd", "https://example.com/base", "someone/another-base"])
def test_the_base_that_an_adapter_names_is_not_followed(service: Service, copy_of_a: Path, named: str) -> None:
    with_config(base_model_name_or_path=named, revision="main")(copy_of_a)
    digest = service.engine.add_adapter("copy", copy_of_a)
    ticket = service.engine.submit(GOOD[0][0], mix={"copy": 1.0}, sampling=GOOD[0][2])
    service.engine.remove_adapter("copy")
    assert digest == service.known["a"]
    assert ticket.result(timeout_s=60).token_ids == service.alone[0].token_ids
    service.assert_nothing_is_left()


@pytest.mark.parametrize("adapter", [None, 5, b"folder", ["a"], "/no/such/folder", "a\0b", ""], ids=repr)
def test_what_is_no_adapter_is_refused(service: Service, adapter: Any) -> None:
    def add() -> None:
        with pytest.raises((InvalidInputError, NotFoundError)):
            service.engine.add_adapter("new", adapter)

    service.while_serving(add)


@pytest.mark.parametrize("name", ["", None, 5, ("a",)], ids=repr)
def test_what_is_no_name_is_refused(service: Service, name: Any, adapters: dict[str, Path]) -> None:
    def add() -> None:
        with pytest.raises(InvalidInputError, match="as an adapter's name"):
            service.engine.add_adapter(name, adapters["c"])

    service.while_serving(add)


BAD_REQUESTS: dict[str, tuple[dict[str, Any], type[LorafleetError], str]] = {
    "unknown name": ({"mix": {"a": 0.5, "ghost": 0.5}}, NotFoundError, "no adapter 'ghost'"),
    "unknown name without weight": ({"mix": {"ghost": 0.0}}, NotFoundError, "no adapter 'ghost'"),
    "name that is no text": ({"mix": {5: 1.0}}, NotFoundError, "no adapter 5"),
    "weight NaN": ({"mix": {"a": NAN}}, InvalidInputError, "the weight of 'a' is nan"),
    "weight infinite": ({"mix": {"a": 1.0, "b": INFINITY}}, InvalidInputError, "the weight of 'b' is inf"),
    "weight minus infinite": ({"mix": {"a": -INFINITY}}, InvalidInputError, "the weight of 'a' is -inf"),
    "weight 1e9": ({"mix": {"a": 1e9}}, InvalidInputError, "of size at most 8"),
    "weight -1e9": ({"mix": {"a": -(10**9)}}, InvalidInputError, "of size at most 8"),
    "weight beyond any float": ({"mix": {"a": 10**400}}, InvalidInputError, "of size at most 8"),
    "weight true": ({"mix": {"a": True}}, InvalidInputError, "expected a number"),
    "weight a text": ({"mix": {"a": "1"}}, InvalidInputError, "expected a number"),
    "weight null": ({"mix": {"a": None}}, InvalidInputError, "expected a number"),
    "mix a list": ({"mix": ["a"]}, InvalidInputError, "as a mix, expected"),
    "mix a text": ({"mix": "a"}, InvalidInputError, "as a mix, expected"),
    "route to nobody": ({"mix": TokenMix(())}, InvalidInputError, "without adapters"),
    "route to a text": ({"mix": TokenMix("ab")}, InvalidInputError, "expected a tuple"),  # type: ignore[arg-type]
    "route to unknown": ({"mix": TokenMix(("a", "ghost"))}, NotFoundError, "no adapter 'ghost'"),
    "route without gates": ({"mix": TokenMix(("a", "b"))}, InvalidInputError, "found no gates"),
    "route at 0": ({"mix": TokenMix(("a",), 1, 0.0)}, InvalidInputError, "temperature"),
    "route at NaN": ({"mix": TokenMix(("a",), 1, NAN)}, InvalidInputError, "temperature"),
    "route at next to 0": ({"mix": TokenMix(("a",), 1, 1e-300)}, InvalidInputError, "temperature"),
    "route at a text": ({"mix": TokenMix(("a",), 1, "1")}, InvalidInputError, "temperature"),  # type: ignore[arg-type]
    "prompt longer than the context": ({"prompt": [1] * 161}, InvalidInputError, "the prompt has 161 tokens"),
    "text longer than the context": ({"prompt": "x" * 5000}, InvalidInputError, "the prompt has 5001 tokens"),
    "empty prompt": ({"prompt": []}, InvalidInputError, "the prompt is empty"),
    "empty text": ({"prompt": ""}, InvalidInputError, "the prompt is empty"),
    "token beyond the vocabulary": ({"prompt": [1, 257]}, InvalidInputError, "the prompt holds 257"),
    "token below 0": ({"prompt": [1, -1]}, InvalidInputError, "the prompt holds -1"),
    "token beyond any integer": ({"prompt": [10**30]}, InvalidInputError, "the prompt holds 1000"),
    "token a number": ({"prompt": [1.0]}, InvalidInputError, "the prompt holds 1.0"),
    "token true": ({"prompt": [True]}, InvalidInputError, "the prompt holds True"),
    "prompt null": ({"prompt": None}, InvalidInputError, "as a prompt, expected"),
    "prompt a number": ({"prompt": 7}, InvalidInputError, "as a prompt, expected"),
    "prompt bytes": ({"prompt": b"abc"}, InvalidInputError, "as a prompt, expected"),
    "half a character": ({"prompt": "a\ud800"}, InvalidInputError, "half a character"),
    "salt a number": ({"salt": 5}, InvalidInputError, "as salt, expected a text"),
    "salt half a character": ({"salt": "\ud800"}, InvalidInputError, "as salt, expected a text"),
    "sampling a dict": ({"sampling": {"max_tokens": 3}}, InvalidInputError, "expected SamplingParams"),
    "bias beyond the vocabulary": (
        {"sampling": SamplingParams(logit_bias={257: 1.0})}, InvalidInputError, "logit_bias for token 257"),
    "stop beyond the vocabulary": (
        {"sampling": SamplingParams(stop_token_ids=[10**30])}, InvalidInputError, "stop_token_ids for token 1000"),
}  # fmt: skip


def submitted(service: Service, request: dict[str, Any]) -> Any:
    settings = {"prompt": [1, 2, 3], "mix": {"a": 1.0}, "sampling": to_length(4)} | request
    return service.engine.submit(settings.pop("prompt"), **settings)


@pytest.mark.parametrize("bad", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_request_is_refused_when_it_is_submitted(
    service: Service, bad: tuple[dict[str, Any], type[LorafleetError], str]
) -> None:
    request, error, words = bad

    def submit() -> None:
        with pytest.raises(error, match=words):
            submitted(service, request)

    service.while_serving(submit)


@pytest.mark.parametrize("settings", [
    {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": None}, {"temperature": -0.1},
    {"temperature": NAN}, {"temperature": INFINITY}, {"temperature": 10**400}, {"temperature": "1"}, {"top_p": 0},
    {"top_p": 1.01}, {"top_p": NAN}, {"top_k": -1}, {"top_k": 1.5}, {"top_k": True}, {"seed": 1.5}, {"seed": "x"},
    {"stop": [""]}, {"stop": [5]}, {"stop": 5}, {"min_p": 1.5}, {"min_p": NAN}, {"repetition_penalty": 0.0},
    {"repetition_penalty": NAN}, {"presence_penalty": 3}, {"frequency_penalty": -INFINITY}, {"logit_bias": {-1: 1}},
    {"logit_bias": {1: NAN}}, {"logit_bias": [1]}, {"min_tokens": 200}, {"stop_token_ids": [-1]}, {"top_logprobs": 1},
    {"top_logprobs": 21, "logprobs": True}, {"ignore_eos": "no"}, {"logprobs": 1}, {"prompt_logprobs": None},
], ids=str)  # fmt: skip
def test_parameters_out_of_range_are_refused_when_they_are_made(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="sampling: found"):
        SamplingParams(**settings)


@pytest.mark.parametrize("settings", [
    {"temperature": 5e-324}, {"temperature": 1.7e308}, {"temperature": 1.0, "top_k": 10**30},
    {"temperature": 1.0, "top_p": 5e-324}, {"temperature": 1.0, "seed": -(10**40)}, {"repetition_penalty": 100},
    {"logit_bias": dict.fromkeys(range(257), -100)}, {"temperature": 1.0, "min_p": 1.0},
], ids=lambda settings: ",".join(settings))  # fmt: skip
def test_parameters_at_the_end_of_their_range_are_served(service: Service, settings: dict[str, Any]) -> None:
    ticket = submitted(service, {"sampling": to_length(4, **settings)})
    assert len(ticket.result(timeout_s=60).token_ids) == 4
    service.assert_nothing_is_left()


def overflowing(a: float, b: float) -> LoraAdapter:
    """Finite itself; what it computes is not."""
    return LoraAdapter({
        f"model.layers.{layer}.{name}": LoraPair(torch.full((2, d_in), a), torch.full((d_out, 2), b))
        for layer in range(3)
        for name, d_in, d_out in (("self_attn.q_proj", 48, 48), ("mlp.gate_proj", 48, 80), ("mlp.down_proj", 80, 48))
    })  # fmt: skip


@pytest.mark.parametrize("sizes", [(3e38, 0.1), (0.1, 3e38), (1e30, 1e30)], ids=str)
@pytest.mark.parametrize(
    "sampling",
    [
        to_length(8),
        to_length(8, temperature=1.0, seed=1, top_p=0.9, repetition_penalty=1.2),
        to_length(8, logprobs=True, top_logprobs=5, prompt_logprobs=True),
    ],
    ids=["greedy", "sampled", "scored"],
)
def test_adapter_that_overflows_fails_its_own_requests(
    service: Service, sizes: tuple[float, float], sampling: SamplingParams
) -> None:
    engine = service.engine
    failed = engine.stats().requests_failed_total

    def use() -> None:
        engine.add_adapter("hot", overflowing(*sizes))
        mixes: list[dict[str, float]] = [{"hot": 1.0}, {"hot": -8.0, "a": 1.0}, {"a": 0.5, "b": 0.5, "hot": 1.0}]
        prompts = [[5, 6, 7], [9] * 70, list(range(90, 100))]  # one of them in chunks
        tickets = [
            engine.submit(prompt, mix=mix, sampling=sampling) for prompt, mix in zip(prompts, mixes, strict=True)
        ]
        engine.remove_adapter("hot")
        for ticket in tickets:
            with pytest.raises(InvalidInputError, match="the mix gives logits that are not finite"):
                ticket.result(timeout_s=60)

    service.while_serving(use)
    assert engine.stats().requests_failed_total == failed + 3


@pytest.mark.parametrize(
    ("hidden", "wide"), [(128, 192), (48, 80)], ids=["widths that tiles divide", "widths that they do not"]
)
def test_adapter_that_overflows_fails_alone_in_bfloat16_too(tmp_path: Path, hidden: int, wide: int) -> None:
    sizes = {"hidden_size": hidden, "intermediate_size": wide}
    torch.manual_seed(0)
    save_base(LlamaForCausalLM(LlamaConfig(**SMALL | sizes)), tmp_path)
    engine = Engine.load(tmp_path, dtype="bfloat16", max_sequences=8, max_batch_tokens=64)
    path = "model.layers.0.mlp.gate_proj"
    for name, size in (("hot", 2e38), ("good", 0.1)):
        engine.add_adapter(
            name, LoraAdapter({path: LoraPair(torch.full((3, hidden), size), torch.full((wide, 3), size))})
        )
    mixes: list[dict[str, float]] = [{"good": 1.0}, {"hot": 1.0}, {}, {"hot": -0.3, "good": 0.3}, {"good": -0.5}]
    tickets = [
        engine.submit(prompt, mix=mix, sampling=to_length(20)) for prompt, mix in zip(PROMPTS, mixes, strict=True)
    ]
    for mix, ticket in zip(mixes, tickets, strict=True):
        if "hot" in mix:
            with pytest.raises(InvalidInputError, match="the mix gives logits that are not finite"):
                ticket.result()
        else:
            assert len(ticket.result().token_ids) == 20


def test_adapter_beyond_the_bases_dtype_is_refused(base_folder: Path) -> None:
    engine = Engine.load(base_folder, dtype="bfloat16", max_sequences=4)
    most = torch.finfo(torch.bfloat16).max
    for a, b in ((0.1, 3.4e38), (3.4e38, 0.1), (0.1, -3.4e38)):
        with pytest.raises(InvalidInputError, match=r"found numbers beyond 3.39e\+38, the largest of torch.bfloat16"):
            engine.add_adapter("hot", overflowing(a, b))
    assert engine.add_adapter("hot", overflowing(0.1, most))
    gate = LoraAdapter({Q: LoraPair(torch.ones(1, 48), torch.ones(48, 1))}, gates={Q: torch.full((48,), 3.4e38)})
    with pytest.raises(InvalidInputError, match="found numbers beyond"):
        engine.add_adapter("gate", gate)


def test_all_of_it_at_once_from_many_threads(service: Service, adapters: dict[str, Path], tmp_path: Path) -> None:
    engine = service.engine
    wrong: list[str] = []

    def expect(name: str, error: type[LorafleetError], call: Callable[[], Any]) -> None:
        try:
            call()
        except error:
            return
        except BaseException as found:
            wrong.append(f"{name}: {found!r}")
        else:
            wrong.append(f"{name}: accepted")

    def add_all() -> None:
        for name, (damage, error, _) in BAD_FOLDERS.items():
            folder = Path(shutil.copytree(adapters["b"], tmp_path / name.replace(" ", "-")))
            damage(folder)
            expect(name, error, lambda folder=folder: engine.add_adapter("a", folder))  # type: ignore[misc]

    def submit_all() -> None:
        for name, (request, error, _) in BAD_REQUESTS.items():
            expect(name, error, lambda request=request: submitted(service, request))  # type: ignore[misc]

    def overflow() -> None:
        for size in (1e30, 2e38):
            engine.add_adapter(f"hot {size}", overflowing(size, size))
            tickets = [engine.submit([5], mix={f"hot {size}": 1.0}, sampling=to_length(4)) for _ in range(3)]
            engine.remove_adapter(f"hot {size}")
            for ticket in tickets:
                expect("overflow", InvalidInputError, lambda ticket=ticket: ticket.result(60))  # type: ignore[misc]

    def all_at_once() -> None:
        threads = [threading.Thread(target=target) for target in (add_all, submit_all, overflow, submit_all)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    service.while_serving(all_at_once)
    assert not wrong
