"""The order of things: weights, checks, then all rows in turn, as often as asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lorafleet.bench.floor import Work, work
from lorafleet.bench.jobs import Answer, Device, Job, RunJob, Task
from lorafleet.bench.requests import ASKS, rank_of
from lorafleet.bench.results import RowResult
from lorafleet.bench.rows import ROWS, Row, Selection
from lorafleet.bench.shapes import Shape, reduced
from lorafleet.bench.timing import Timing
from lorafleet.errors import UnavailableError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run, and on what."""

    shape: Shape
    selection: Selection
    repeats: int
    device: Device
    threads: int
    work: Path
    """where the weights are"""


class Outcome(NamedTuple):
    results: list[RowResult]
    """in the order of the table"""
    checks: dict[str, str | None]
    """kind of request → what was wrong; None where nothing was"""
    device: str
    """a GPU's name; empty for a CPU"""
    versions: dict[str, str]
    """of libraries that only children have"""

    @property
    def complete(self) -> bool:
        """Every row that could run has its figures."""
        return all(result.status in ("measured", "left out") for result in self.results)


def run_rows(settings: Settings, *, run_job: RunJob, say: Callable[[str], None]) -> Outcome:
    """Check, then time. A row is timed only if its check found nothing; one that fails is not tried again.

    ``say`` is told what is done next. Raises UnavailableError where the weights cannot be made.
    """
    device, versions = "", dict[str, str]()

    def ask(task: Task, name: str, shape: Shape, seed: int, requests: int | None = None) -> Answer:
        nonlocal device
        answer = run_job(
            Job(
                task=task, name=name, shape=shape, work=settings.work, device=settings.device,
                threads=settings.threads, seed=seed, requests=requests,
            )
        )  # fmt: skip
        device = device or answer.device
        versions.update(answer.versions or {})
        return answer

    rows, small = settings.selection.rows, reduced(settings.shape)
    kinds = list(dict.fromkeys(row.check for row in rows if row.check is not None))
    for shape in (settings.shape, small) if kinds else (settings.shape,):
        say(f"weights of {shape.name}")
        ask("prepare", shape.name, shape, 0)

    checks: dict[str, str | None] = {}
    for kind in kinds:
        say(f"check {kind}")
        try:
            checks[kind] = ask("check", kind, small, 0).problem
        except UnavailableError as error:
            checks[kind] = _first_line(error)
            logger.warning("%s", error)

    results = {row.name: _start(row, checks) for row in rows}
    for repeat in range(settings.repeats):
        for result in results.values():
            if result.status != "measured":
                continue
            say(f"repeat {repeat + 1} of {settings.repeats}: {result.row.name}")
            try:
                answer = ask("time", result.row.name, settings.shape, repeat, result.row.requests)
                assert answer.timing is not None
                result.timings.append(Timing(**answer.timing))
                result.memory_bytes_per_s = answer.memory_bytes_per_s
            except UnavailableError as error:
                result.status, result.reason = "failed", _first_line(error)
                logger.warning("%s", error)
    for name, why in settings.selection.left_out.items():
        results[name] = RowResult(ROWS[name], "left out", why)
    return Outcome([results[name] for name in ROWS if name in results], checks, device, versions)


def works(settings: Settings) -> dict[str, Work]:
    """The work of the adapters of each of our rows that has any."""
    found = {}
    for row in settings.selection.rows:
        asks = ASKS[row.name](settings.shape.load) if row.kind == "ours" else []
        used = {name for ask in asks for name in ask.uses}
        if used:
            found[row.name] = work(settings.shape, asks, {name: rank_of(name) for name in used})
    return found


def _start(row: Row, checks: dict[str, str | None]) -> RowResult:
    problem = checks.get(row.check) if row.check is not None else None
    if problem is None:
        return RowResult(row, "measured")
    return RowResult(row, "refused", f"the check of {row.check} is red: {problem}")


def _first_line(error: UnavailableError) -> str:
    return str(error).splitlines()[0]
