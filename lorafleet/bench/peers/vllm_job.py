"""What vLLM's process is told: paths and prompts, since it knows nothing of lorafleet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lorafleet.bench import timing
from lorafleet.bench.cache import adapter_folder, base_folder
from lorafleet.bench.jobs import Job
from lorafleet.bench.prompts import make_prompts
from lorafleet.bench.requests import EIGHT, RANKS

PROGRAM = Path(__file__).with_name("vllm_process.py")
CACHE_GIB = 4
"""Room for keys and values on a CPU: 64 requests of 192 tokens of the largest shape need 1.5."""


def vllm_job(job: Job) -> dict[str, Any]:
    """The content of its job file."""
    load = job.shape.load
    adapters = [
        {"name": name, "folder": str(adapter_folder(job.work, job.shape, name))}
        for name in (EIGHT if job.name == "vllm_lora" else ())
    ]
    return {
        "timing": timing.__file__,
        "base": str(base_folder(job.work, job.shape)),
        "adapters": adapters,
        "max_rank": max(RANKS),
        "prompts": make_prompts(job.shape, seed=job.seed),
        "requests": load.requests,
        "new_tokens": load.new_tokens,
        "max_tokens": load.prompt_tokens + load.new_tokens,
        "device": job.device,
    }


def vllm_environment(job: Job) -> dict[str, str]:
    """Its settings: as many threads as everybody else, no network, no usage statistics."""
    cores = sorted(os.sched_getaffinity(0))[: job.threads]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
