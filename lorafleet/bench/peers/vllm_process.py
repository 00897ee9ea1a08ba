"""vLLM, with and without LoRA: a process in vLLM's own environment, which has no lorafleet.

Started by its path, isolated (``python -I vllm_process.py JOB ANSWER``), so that this folder is not searched for
modules; ``timing.py`` is loaded from the path that the job names. JOB and ANSWER are JSON files, as
``vllm_job.py`` writes and reads them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any


def load_timing(path: str) -> Any:
    """lorafleet's way of timing, without lorafleet."""
    spec = importlib.util.spec_from_file_location("timing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_runner(job: dict[str, Any], timing: Any) -> Any:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found, unused-ignore]

    lora: dict[str, Any] = {}
    requests: Any = None
    if job["adapters"]:
        lora = {"enable_lora": True, "max_loras": len(job["adapters"]), "max_lora_rank": job["max_rank"]}
        adapters = [LoRARequest(each["name"], i, each["folder"]) for i, each in enumerate(job["adapters"], start=1)]
        requests = [adapters[i % len(adapters)] for i in range(job["requests"])]
    model = LLM(
        model=job["base"],
        dtype="bfloat16",
        max_model_len=job["max_tokens"],
        max_num_seqs=job["requests"],
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **lora,
    )

    def run(prompts: Any, new_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, min_tokens=0, ignore_eos=True, detokenize=False
        )
        texts = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = model.generate(texts, sampling, lora_request=requests, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return timing.Runner(run)


def main(job_file: str, answer_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    timing = load_timing(job["timing"])
    import torch
    import vllm  # type: ignore[import-not-found, unused-ignore]

    cuda = job["device"] == "cuda"
    found = timing.measure(
        make_runner(job, timing),
        job["prompts"],
        new_tokens=job["new_tokens"],
        clock=time.perf_counter,
        synchronise=torch.cuda.synchronize if cuda else timing.nothing,
    )
    answer = {
        "timing": found._asdict(),
        "device": torch.cuda.get_device_name() if cuda else "",
        "versions": {"vllm": vllm.__version__},
    }
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":  # vLLM's own processes import this file again
    main(*sys.argv[1:])
