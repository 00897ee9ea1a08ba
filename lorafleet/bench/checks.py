"""What has to be right before a row is timed, on a reduced shape, against transformers and peft.

In float32 every greedy token has to be the reference's. In bfloat16, which is what is timed, and where tokens may
differ by rounding, the log-probabilities of prompts and answers: their error against the float32 reference is at most
1.5 times that of the reference computed in bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.bench.cache import adapter_folder, base_folder
from lorafleet.bench.jobs import Job
from lorafleet.bench.ours import ask_all, open_engine, submit_all
from lorafleet.bench.peers.peft_batch import with_adapters
from lorafleet.bench.prompts import make_prompts
from lorafleet.bench.requests import ASKS, EIGHT, Ask
from lorafleet.bench.shapes import SHARED_INPUT
from lorafleet.bench.verdict import changed, first_mismatch
from lorafleet.engine import SamplingParams

Model: TypeAlias = Any
Reference: TypeAlias = Callable[[Ask, Tensor], Tensor]
"""A request and its tokens ``[1, n]`` → logits ``[n, V]`` of a model that computes what the request asks for."""


def plain_model(job: Job, dtype: torch.dtype) -> Model:
    from transformers import AutoModelForCausalLM

    folder = base_folder(job.work, job.shape)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(job.device).eval()


def base_reference(job: Job, dtype: torch.dtype = torch.float32) -> Reference:
    """transformers' own model."""
    model = plain_model(job, dtype)
    return lambda _ask, tokens: _logits(model, tokens)


def single_reference(job: Job, dtype: torch.dtype = torch.float32) -> Reference:
    """peft, with the adapter named for the batch."""
    model = with_adapters(plain_model(job, dtype), job)

    def logits(ask: Ask, tokens: Tensor) -> Tensor:
        (name,) = ask.weights
        return _logits(model, tokens, adapter_names=[name])

    return logits


def mixture_reference(job: Job, dtype: torch.dtype = torch.float32) -> Reference:
    """A copy of the base with ``W + Σ w_i s_i B_i A_i`` in every linear."""
    model = plain_model(job, dtype)

    def logits(ask: Ask, tokens: Tensor) -> Tensor:
        merged = copy.deepcopy(model)
        for name, weight in ask.weights.items():
            LoraAdapter.load(adapter_folder(job.work, job.shape, name)).merge_into(merged, weight)
        return _logits(merged, tokens)

    return logits


def routed_reference(job: Job, dtype: torch.dtype = torch.float32) -> Reference:
    """The base with the sum over a token's top adapters added to every linear.

    From the formula in :mod:`lorafleet.kernels.token_gates`, without the kernels.
    """
    model = plain_model(job, dtype)
    adapters = [LoraAdapter.load(adapter_folder(job.work, job.shape, name)) for name in EIGHT]
    top_k = ASKS["token_top2"](job.shape.load)[0].top_k
    for layer in range(job.shape.layers):
        for first, *others in SHARED_INPUT:
            paths = [f"model.layers.{layer}.{path}" for path in (first, *others)]
            gates = torch.stack([adapter.gates[paths[0]] for adapter in adapters]).to(job.device, dtype)
            for path in paths:
                pairs = [LoraPair(*(f.to(job.device, dtype) for f in adapter.modules[path])) for adapter in adapters]
                model.get_submodule(path).register_forward_hook(_add_routed(gates, pairs, top_k))
    return lambda _ask, tokens: _logits(model, tokens)


def _add_routed(gates: Tensor, pairs: Sequence[LoraPair], top_k: int) -> Callable[[Any, tuple[Tensor], Tensor], Tensor]:
    """A hook that adds ``Σ_k g_k B_k A_k x`` to a linear's output; ``gates [K, d_in]``, K pairs."""

    def hook(_module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = inputs
        best = (x @ gates.T).topk(top_k, dim=-1)
        weights = torch.zeros(*x.shape[:-1], len(pairs), device=x.device, dtype=x.dtype)
        weights.scatter_(-1, best.indices, best.values.softmax(dim=-1))
        return output + sum(weights[..., k : k + 1] * (x @ a.T @ b.T) for k, (a, b) in enumerate(pairs))

    return hook


MOST_ROUNDING = 1.5
"""Our error in bfloat16 for that of a plain model."""

CHECKS: dict[str, Callable[[Job, torch.dtype], Reference]] = {
    "base": base_reference,
    "single": single_reference,
    "mix2": mixture_reference,
    "token_top2": routed_reference,
}


def check(job: Job) -> str | None:
    """What is wrong with what our engine answers to the requests of a kind; None where nothing is."""
    asks, prompts = ASKS[job.name](job.shape.load), make_prompts(job.shape, seed=job.seed).whole
    engine = open_engine(job, dtype="float32")
    found = submit_all(engine, asks, prompts, new_tokens=job.shape.load.new_tokens)
    bare = base_reference(job) if any(ask.uses for ask in asks) else None
    reference = CHECKS[job.name](job, torch.float32)
    wrong = problem(found, asks, prompts, reference=reference, bare=bare, device=job.device)
    if wrong is not None:
        return wrong
    sampling = SamplingParams(
        max_tokens=job.shape.load.new_tokens, ignore_eos=True, logprobs=True, prompt_logprobs=True
    )
    answers = ask_all(open_engine(job, dtype="bfloat16"), asks, prompts, sampling=sampling)
    scored = [
        (prompt + a.token_ids, [*(a.prompt_logprobs or ()), *a.logprobs])
        for prompt, a in zip(prompts, answers, strict=True)
    ]
    rounded = CHECKS[job.name](job, torch.bfloat16)
    return rounding_problem(scored, asks, reference=reference, rounded=rounded, device=job.device)


@torch.no_grad()
def rounding_problem(
    scored: Sequence[tuple[list[int], list[float]]],
    asks: Sequence[Ask],
    *,
    reference: Reference,
    rounded: Reference,
    device: str,
) -> str | None:
    """Whether our log-probabilities are further from the reference's than rounding explains; None where they are not.

    ``scored``: for each request its tokens, and the log-probability of each of them but the first. ``rounded``: the
    reference computed in the dtype of ours.
    """
    ours, theirs = [], []
    for (tokens, logprobs), ask in zip(scored, asks, strict=True):
        row = torch.tensor([tokens[:-1]], device=device)
        after = torch.tensor(tokens[1:], device=device)[:, None]
        exact, other = (
            model(ask, row).double().log_softmax(-1).gather(1, after)[:, 0].cpu() for model in (reference, rounded)
        )
        ours.append(torch.tensor(logprobs, dtype=torch.float64) - exact)
        theirs.append(other - exact)
    error, allowed = (float(torch.cat(each).square().mean().sqrt()) for each in (ours, theirs))
    if error <= MOST_ROUNDING * allowed:
        return None
    return (
        f"in bfloat16 log-probabilities are off by {error:.2g} nats (root mean square), and by {allowed:.2g} where the "
        f"reference is computed in bfloat16; expected at most {MOST_ROUNDING} times that"
    )


@torch.no_grad()
def problem(
    found: Sequence[list[int]],
    asks: Sequence[Ask],
    prompts: Sequence[list[int]],
    *,
    reference: Reference,
    bare: Reference | None,
    device: str,
) -> str | None:
    """The first wrong token among those that were ``found`` for the requests, in words; None where all are right.

    ``bare``: the base, where the requests use adapters. A check whose adapters change no token sees nothing, and is
    a problem as well.
    """
    differing = 0
    for number, (tokens, ask, prompt) in enumerate(zip(found, asks, prompts, strict=True)):
        row = torch.tensor([prompt + tokens[:-1]], device=device)
        logits = reference(ask, row)[len(prompt) - 1 :]
        wrong = first_mismatch(logits, tokens)
        if wrong is not None:
            return (
                f"request {number}, new token {wrong.position}: found {wrong.found}, expected {wrong.expected}, which "
                f"the reference prefers by {wrong.gap:.2g}"
            )
        if bare is not None:
            differing += changed(logits, bare(ask, row)[len(prompt) - 1 :])
    if bare is not None and differing == 0:
        return "found no token that the adapters change, expected some: this check cannot see a wrong adapter"
    return None


def _logits(model: Model, tokens: Tensor, **arguments: Any) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False, **arguments).logits[0]
    return logits.float()
