"""peft: the eight adapters in one static batch, chosen for each row by ``adapter_names``."""

from __future__ import annotations

from typing import Any

from lorafleet.bench.cache import adapter_folder
from lorafleet.bench.jobs import Job
from lorafleet.bench.peers.generate import load_model, static_batch
from lorafleet.bench.requests import EIGHT
from lorafleet.bench.timing import Runner


def with_adapters(model: Any, job: Job) -> Any:
    """The model with all eight, in its own dtype: peft's default would compute them in float32, which is slower."""
    from peft import PeftModel

    first, *others = EIGHT
    kept = {"is_trainable": False, "autocast_adapter_dtype": False}
    adapted = PeftModel.from_pretrained(model, adapter_folder(job.work, job.shape, first), adapter_name=first, **kept)
    for name in others:
        adapted.load_adapter(adapter_folder(job.work, job.shape, name), adapter_name=name, **kept)
    return adapted.eval()


def peft_runner(job: Job) -> Runner:
    names = [EIGHT[number % len(EIGHT)] for number in range(job.shape.load.requests)]
    return static_batch(with_adapters(load_model(job), job), device=job.device, adapter_names=names)
