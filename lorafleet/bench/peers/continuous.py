"""transformers' continuous batching."""

from __future__ import annotations

from collections.abc import Sequence

from lorafleet.bench.jobs import Job
from lorafleet.bench.peers.generate import load_model
from lorafleet.bench.timing import Runner

POLL_S = 1.0
CPU_BATCH_TOKENS = 512
"""Its attention on a CPU is one dense mask over a whole step, so that small steps are faster: the prefill of shape S
took 3.9 s at the library's 8192 tokens, 2.0 at 1024, 1.5 at 512 (one core with AMX, 2026-11-22)."""


def continuous_runner(job: Job) -> Runner:
    """One manager for all parts of the measurement. On a GPU its sizes are the library's own."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    load = job.shape.load
    config = ContinuousBatchingConfig(allow_block_sharing=False)
    if job.device == "cpu":
        config.max_batch_tokens = max(CPU_BATCH_TOKENS, load.requests)
        # By default the cache takes 60% of the machine's memory.
        pages = -(-(load.prompt_tokens + load.new_tokens) // config.page_size)
        config.num_blocks = load.requests * pages
    model = load_model(job)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(
            max_new_tokens=load.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=config,
    )
    if job.device == "cuda":
        manager.warmup()
    manager.start()

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        names = manager.add_requests([list(prompt) for prompt in prompts], max_new_tokens=new_tokens)
        done: dict[str, list[int]] = {}
        while len(done) < len(names):
            result = manager.get_result(timeout=POLL_S)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended before all requests were done")
            elif result.error is not None:
                raise RuntimeError(f"transformers' continuous batching failed a request: {result.error}")
            elif result.is_finished():
                done[result.request_id] = list(result.generated_tokens)
        return [done[name] for name in names]

    # Its thread is no daemon: without an end the process would wait for it.
    return Runner(run, close=lambda: manager.stop(block=True))
