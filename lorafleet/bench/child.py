"""A child of the benchmark: ``python -m lorafleet.bench.child JOB ANSWER`` does one job and ends."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from lorafleet.bench.bandwidth import memory_bytes_per_s
from lorafleet.bench.jobs import Answer, Job
from lorafleet.bench.kernels import device_clock
from lorafleet.bench.prompts import make_prompts
from lorafleet.bench.rows import WEIGHT_BOUND
from lorafleet.bench.timing import Runner, measure, nothing

# A peer's process never loads our engine.
PEERS = {
    "generate": "lorafleet.bench.peers.generate:generate_runner",
    "transformers_cb": "lorafleet.bench.peers.continuous:continuous_runner",
    "peft": "lorafleet.bench.peers.peft_batch:peft_runner",
}
OURS = "lorafleet.bench.ours:our_runner"


def load_runner(job: Job) -> Runner:
    """The row's runner, from the one module that it needs."""
    module, _, function = PEERS.get(job.name, OURS).partition(":")
    make: Callable[[Job], Runner] = getattr(import_module(module), function)
    return make(job)


def answer(job: Job) -> Answer:
    """Do a job in this process."""
    device = torch.cuda.get_device_name() if job.device == "cuda" else ""
    if job.task == "prepare":
        from lorafleet.bench.weights import prepare

        prepare(job.work, job.shape, device=job.device)
        return Answer(device)
    if job.task == "check":
        from lorafleet.bench.checks import check

        return Answer(device, problem=check(job))
    timing = measure(
        load_runner(job),
        make_prompts(replace(job.shape, load=job.load), seed=job.seed),
        new_tokens=job.load.new_tokens,
        clock=time.perf_counter,
        synchronise=torch.cuda.synchronize if job.device == "cuda" else nothing,
    )
    per_s = None
    if job.device == "cuda" and job.name in WEIGHT_BOUND:
        per_s = memory_bytes_per_s("cuda", clock=device_clock("cuda"))
    return Answer(device, timing=timing._asdict(), memory_bytes_per_s=per_s)


def main(job_file: str, answer_file: str) -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    job = Job.from_json(Path(job_file).read_text())
    torch.set_num_threads(job.threads)
    Path(answer_file).write_text(json.dumps(answer(job)._asdict()))


if __name__ == "__main__":
    main(*sys.argv[1:])
