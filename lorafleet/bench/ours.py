"""Our engine as a row: loaded with what the row's requests use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorafleet.bench.cache import adapter_folder, base_folder
from lorafleet.bench.floor import adapter_bytes
from lorafleet.bench.jobs import Job
from lorafleet.bench.requests import ASKS, EIGHT, Ask, many_name, rank_of
from lorafleet.bench.timing import Runner
from lorafleet.bench.weights import make_adapter
from lorafleet.engine import Engine, Generation, SamplingParams, TokenMix

MANY, COLD = "many", "many_cold"


def our_runner(job: Job) -> Runner:
    """The engine for one of our rows. Of a cold row it knows no adapter before a request needs it."""
    asks = ASKS[job.name](job.load)
    engine = open_engine(job, dtype="bfloat16")
    cold = job.name == COLD
    folders = {name: adapter_folder(job.work, job.shape, name) for ask in asks for name in ask.uses} if cold else {}

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        return submit_all(engine, asks, prompts, new_tokens=new_tokens, folders=folders)

    def forget() -> None:
        for name in engine.adapters():
            engine.remove_adapter(name)
        for folder in folders.values():
            leave_page_cache(folder)

    return Runner(run, forget) if cold else Runner(run)


def open_engine(job: Job, *, dtype: str) -> Engine:
    """An engine with room for all requests at once, and the adapters that the row knows beforehand."""
    requests = job.load.requests
    # Objects stay in host memory: all of them have to fit, with what tiles take beside their rows.
    registered = adapter_bytes(job.shape, [rank_of(many_name(0))] * job.load.registered)
    engine = Engine.load(
        base_folder(job.work, job.shape),
        host_bytes=registered * 11 // 10 if job.name == MANY else None,
        device=job.device,
        dtype=dtype,
        max_sequences=requests,
        max_batch_tokens=max(requests, 1024),
    )
    used = {name for ask in ASKS[job.name](job.load) for name in ask.uses}
    if used.intersection(EIGHT):
        for name in EIGHT:
            engine.add_adapter(name, adapter_folder(job.work, job.shape, name))
    elif job.name == MANY:
        for number in range(job.load.registered):
            engine.add_adapter(many_name(number), make_adapter(job.shape, many_name(number)))
    elif job.name != COLD:
        for name in sorted(used):
            engine.add_adapter(name, make_adapter(job.shape, name))
    return engine


def submit_all(
    engine: Engine,
    asks: Sequence[Ask],
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    folders: dict[str, Path] | None = None,
) -> list[list[int]]:
    """Submit all requests, greedy and past any end of text; the new tokens of each.

    ``folders``: adapters that are loaded when the first request needs them.
    """
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    return [answer.token_ids for answer in ask_all(engine, asks, prompts, sampling=sampling, folders=folders)]


def ask_all(
    engine: Engine,
    asks: Sequence[Ask],
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingParams,
    folders: dict[str, Path] | None = None,
) -> list[Generation]:
    """Submit all requests at once and wait for them; ``folders`` as in :func:`submit_all`."""
    loaded = set(engine.adapters()) if folders else set()
    tickets = []
    for ask, prompt in zip(asks, prompts, strict=True):
        if folders:
            for name in ask.uses.keys() - loaded:
                engine.add_adapter(name, folders[name])
                loaded.add(name)
        mix = TokenMix(ask.routed, ask.top_k) if ask.routed else ask.weights
        tickets.append(engine.submit(prompt, mix=mix, sampling=sampling))
    return [ticket.result() for ticket in tickets]


def leave_page_cache(folder: Path) -> None:
    """Have a folder's files read from the disk the next time; does nothing where the system has no call for it."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # pages that are not written yet would stay
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
