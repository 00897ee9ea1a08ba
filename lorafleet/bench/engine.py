"""``lorafleet bench engine``: one run, from its settings to its record."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from lorafleet.bench.children import Children
from lorafleet.bench.machine import commit, cores, this_cpu, versions
from lorafleet.bench.record import append, make_record
from lorafleet.bench.run import Settings, run_rows, works


class Benchmark(NamedTuple):
    record: dict[str, Any]
    file: Path
    """that the record was appended to"""
    complete: bool
    """False where a row was refused or failed"""


def bench_engine(
    settings: Settings,
    *,
    asked: list[str] | None,
    vllm_python: Path | None,
    out: Path,
    when: datetime,
    say: Callable[[str], None],
) -> Benchmark:
    """Run the rows and append the record to ``out``. ``asked``: the rows as they were named, None for all."""
    out.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be made would cost a whole run
    with TemporaryDirectory(prefix="lorafleet-bench-") as folder:
        run_job = Children(Path(folder), vllm_python=vllm_python)
        outcome = run_rows(settings, run_job=run_job, say=say)
    record = make_record(
        when=when,
        command=command_line(settings, asked=asked, vllm=vllm_python is not None),
        shape=settings.shape,
        device={
            "kind": settings.device,
            "name": outcome.device or this_cpu(),
            "cores": cores(),
            "threads": settings.threads,
        },
        versions=versions() | outcome.versions,
        commit=commit(),
        repeats=settings.repeats,
        checks=outcome.checks,
        results=outcome.results,
        works=works(settings),
    )
    return Benchmark(record, append(record, out), outcome.complete)


def command_line(settings: Settings, *, asked: list[str] | None, vllm: bool) -> list[str]:
    """The command that does this again, without the paths of this machine."""
    words = ["lorafleet", "bench", "engine", "--shape", settings.shape.name]
    if asked is not None:
        words += ["--rows", ",".join(asked)]
    words += ["--repeats", str(settings.repeats), "--device", settings.device, "--threads", str(settings.threads)]
    return [*words, "--vllm-python", "PYTHON"] if vllm else words
