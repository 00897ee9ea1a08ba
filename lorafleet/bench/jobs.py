"""What one child process is asked to do, and how it is written for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from lorafleet.bench.shapes import Load, Shape

Device: TypeAlias = Literal["cpu", "cuda"]
Task: TypeAlias = Literal["prepare", "check", "time"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One child's work: make a shape's weights, check a kind of request, or time a row once."""

    task: Task
    name: str
    """of the shape, the check or the row"""
    shape: Shape
    work: Path
    device: Device
    threads: int
    seed: int
    """of the prompts"""
    requests: int | None = None
    """in the place of as many as the shape's load has; the weights are those of the shape all the same"""

    @property
    def load(self) -> Load:
        """What is submitted."""
        load = self.shape.load
        return load if self.requests is None else replace(load, requests=self.requests)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "work": str(self.work)})

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        shape = fields["shape"]
        shape["load"] = Load(**shape["load"])
        return cls(**{**fields, "shape": Shape(**shape), "work": Path(fields["work"])})


class Answer(NamedTuple):
    """What a child writes: the fields of its task, as JSON."""

    device: str
    """the device's own name"""
    timing: dict[str, Any] | None = None
    """a ``Timing``, of a row that was timed"""
    problem: str | None = None
    """what a check found; None where all is well"""
    versions: dict[str, str] | None = None
    """of libraries that only this child has"""
    memory_bytes_per_s: float | None = None
    """that the device reads and writes; of rows on a GPU that are compared with the reading of the weights"""


RunJob: TypeAlias = Callable[[Job], Answer]
"""Does a job elsewhere; UnavailableError where it failed: a first line without paths, then the end of its log."""
