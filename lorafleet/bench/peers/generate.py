"""transformers' ``generate``: one static batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lorafleet.bench.cache import base_folder
from lorafleet.bench.jobs import Job
from lorafleet.bench.timing import Runner


def load_model(job: Job) -> Any:
    """The base in bfloat16 with torch's own attention."""
    from transformers import AutoModelForCausalLM

    folder = base_folder(job.work, job.shape)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.to(job.device).eval()


def generate_runner(job: Job) -> Runner:
    return static_batch(load_model(job), device=job.device)


def static_batch(model: Any, *, device: str, **arguments: Any) -> Runner:
    """All prompts, of one length, in one call of ``generate`` with these further arguments."""

    @torch.inference_mode()
    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        tokens = torch.tensor([list(prompt) for prompt in prompts], device=device)
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            **arguments,
        )
        new: list[list[int]] = out[:, tokens.shape[1] :].tolist()
        return new

    return Runner(run)
