"""What callers ask of the service, when, and what became of it: written for the process that asks, and read back."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

Door: TypeAlias = Literal["generate", "route", "completion"]
"""``Generate`` or ``Route`` over gRPC, or ``/v1/completions`` over HTTP, as a stream."""

LOST = "LOST"
"""The status of an ask that had no answer when all were to be over."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One call. ``key`` is its tenant's API key."""

    key: str
    prompt: str
    door: Door = "generate"
    at_s: float = 0.0
    """When it is sent, from the beginning of the run; of no account where callers wait for their answers."""
    model: str = ""
    """A reference, "auto", or "" for the bare base."""
    mix: Mapping[str, float] = field(default_factory=dict)
    max_tokens: int = 16


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an ask; times are seconds from the beginning of the run."""

    status: str
    """OK, the name of a gRPC status code (over HTTP the one that the error's code stands for), or ``LOST``."""
    at_s: float
    """When it should have been sent: where callers wait, when it was."""
    sent_s: float
    first_s: float | None = None
    """When its first token came."""
    ended_s: float = 0.0
    tokens: int = 0
    """That were generated."""
    answer: tuple[int | str, ...] = ()
    """The tokens: ids over gRPC, texts over HTTP. Empty unless they are kept."""
    digests: Mapping[str, float] = field(default_factory=dict)
    """What answered, digest → weight."""
    retry_after_s: float | None = None
    """What a refusal said."""
    message: str = ""
    """An error's, without an answer's text."""

    @property
    def latency_s(self) -> float:
        """From when it should have been sent: waiting in a caller that is late counts."""
        return self.ended_s - self.at_s

    @property
    def first_token_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.at_s


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one process of callers does.

    ``callers`` None: open loop, every ask is sent at its time, whatever became of those before. A number: so many
    callers each send their next ask when they have the answer to the last one, for ``seconds`` at most.
    """

    grpc: str
    http: str
    asks: Sequence[Ask]
    callers: int | None = None
    seconds: float | None = None
    """After which no further ask is sent."""
    timeout_s: float = 60.0
    """Every call's deadline. What has no status 5 s after it is lost."""
    channels: int = 4
    """gRPC connections; callers take turns."""
    keep_answers: bool = False

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> Run:
        fields = json.loads(file.read_text())
        return cls(**{**fields, "asks": [Ask(**ask) for ask in fields["asks"]]})


def write_outcomes(outcomes: Sequence[Outcome | None], file: Path) -> None:
    """In the order of the asks; None for one that was not sent."""
    file.write_text(json.dumps([None if outcome is None else asdict(outcome) for outcome in outcomes]))


def read_outcomes(file: Path) -> list[Outcome | None]:
    return [None if fields is None else _outcome(fields) for fields in json.loads(file.read_text())]


def _outcome(fields: dict[str, Any]) -> Outcome:
    return Outcome(**{**fields, "answer": tuple(fields["answer"])})


def poisson(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Times of arrival in ``[0, seconds)``: independent of one another, ``rate`` a second on average."""
    times: list[float] = []
    now = rng.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += rng.expovariate(rate)
    return times
