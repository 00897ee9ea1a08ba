"""A real ``lorafleet serve`` and real callers, each in a process of its own, for benchmarks of the service.

::

    with Service.of(work, registry=url, blobs=folder, arguments=["--threads", "1"]) as service:
        asks = [Ask(key=key, prompt="SELECT ", model="acme/sql", at_s=at) for at in poisson(20.0, 30.0, rng)]
        outcomes = service.ask(asks)                       # open loop: every ask at its time
        outcomes = service.ask(asks, callers=16)           # closed loop: 16 callers that wait for their answers
        outcomes, memory = service.ask_sampled(asks)       # with the server's memory, every second

- :class:`Service` starts ``lorafleet serve --base tiny`` on free ports of loopback, both doors, waits until it listens,
  and ends it, with all that it started, when the block is left. ``start`` begins a run of callers without waiting for
  it, so that several kinds of callers, or other work, go on at the same time.
- :class:`lorafleet.bench.service.asks.Ask` is one call, ``Outcome`` what became of it; ``poisson`` gives times of
  arrival.
- :class:`Tenants` puts tenants with keys and adapters into a registry; :func:`random_adapter` makes adapters of the
  tiny base that change what it says.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.adapters.base_shapes import ModuleShapes, base_shapes
from lorafleet.assets import base_path, describe_base
from lorafleet.bench.neighbours import Neighbours
from lorafleet.bench.service.asks import Ask, Outcome, Run, read_outcomes
from lorafleet.demo.processes import Processes, wait_for_line
from lorafleet.errors import UnavailableError
from lorafleet.flower_commands import script
from lorafleet.registry import Registry
from lorafleet.registry.records import Version

BASE = "tiny"
SLACK_S = 30.0
"""Beyond their last deadline, for callers to start, to end and to write down what they got."""
_POLL_S = 0.02


class MemorySample(NamedTuple):
    at_s: float
    """since the callers were started"""
    bytes: int
    """resident, of the server and all below it; shared pages count once for each process"""
    taken_by_others: float | None = None
    """share of the processors since the sample before (:mod:`lorafleet.bench.neighbours`)"""


class Service:
    """A server in a process of its own; entering the block starts it, leaving it ends it."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        """``folder`` is for logs and what callers are told; ``command`` begins a server that says where it listens, as
        :meth:`of` and :mod:`.bare` do."""
        self._folder, self._command = folder, list(command)
        self._processes = Processes(folder / "logs")
        self._runs = 0
        self.grpc = self.http = ""
        """``HOST:PORT`` of each door, once it is started."""
        self.pid = 0

    @classmethod
    def of(cls, folder: Path, *, registry: str, blobs: Path, arguments: Sequence[str] = ()) -> Self:
        """``lorafleet serve``, with further arguments."""
        command = [
            script("lorafleet"), "serve", "--base", BASE, "--registry", registry, "--blobs", str(blobs),
            "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", *arguments,
        ]  # fmt: skip
        return cls(folder, command)

    def __enter__(self) -> Self:
        try:
            process = self._processes.start("service", self._command, environment=_environment())
            pattern = r"listening grpc=(\S+:\d+) http=(\S+:\d+)"
            found = wait_for_line(self._processes.log("service"), pattern, process, "service")
        except BaseException:
            self._processes.stop()
            raise
        self.grpc, self.http, self.pid = found[1], found[2], process.pid
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._processes.stop()

    @property
    def log(self) -> Path:
        """What the server wrote."""
        return self._processes.log("service")

    def ask(
        self,
        asks: Sequence[Ask],
        *,
        callers: int | None = None,
        seconds: float | None = None,
        timeout_s: float = 60.0,
        keep_answers: bool = False,
    ) -> list[Outcome]:
        """What became of the asks that were sent, in their order (:class:`lorafleet.bench.service.asks.Run`)."""
        started = self.start(asks, callers=callers, seconds=seconds, timeout_s=timeout_s, keep_answers=keep_answers)
        return [outcome for outcome in started.outcomes() if outcome is not None]

    def ask_sampled(
        self, asks: Sequence[Ask], *, every_s: float = 1.0, timeout_s: float = 60.0
    ) -> tuple[list[Outcome], list[MemorySample]]:
        """In open loop, with the server's memory as it goes."""
        samples: list[MemorySample] = []
        neighbours = Neighbours()
        began = time.monotonic()

        def sample() -> None:
            if time.monotonic() - began >= len(samples) * every_s:
                samples.append(MemorySample(time.monotonic() - began, self.memory_bytes(), neighbours.share()))

        outcomes = self.start(asks, timeout_s=timeout_s).outcomes(meanwhile=sample)
        return [outcome for outcome in outcomes if outcome is not None], samples

    def start(
        self,
        asks: Sequence[Ask],
        *,
        callers: int | None = None,
        seconds: float | None = None,
        timeout_s: float = 60.0,
        keep_answers: bool = False,
    ) -> Started:
        """Callers on their way, in a process of their own."""
        self._runs += 1
        name = f"callers-{self._runs}"
        job, answer = (self._folder / f"{name}.{kind}.json" for kind in ("run", "outcomes"))
        Run(
            grpc=self.grpc, http=self.http, asks=asks, callers=callers, seconds=seconds, timeout_s=timeout_s,
            keep_answers=keep_answers,
        ).write(job)  # fmt: skip
        command = [sys.executable, "-m", "lorafleet.bench.service.callers", str(job), str(answer)]
        process = self._processes.start(name, command, environment=_environment(), may_end=True)
        last_s = seconds if seconds is not None else max((ask.at_s for ask in asks), default=0.0)
        # Callers that wait without a bound on the time take as long as the service does: each ask its deadline at most.
        turns = math.ceil(len(asks) / callers) if callers is not None and seconds is None else 1
        limit_s = last_s + turns * timeout_s + SLACK_S
        return Started(self, name, answer, has_ended=lambda: process.poll() is not None, limit_s=limit_s)

    def memory_bytes(self) -> int:
        """Resident now, of the server and all below it."""
        head = psutil.Process(self.pid)
        return sum(process.memory_info().rss for process in [head, *head.children(recursive=True)])

    def cpu_s(self) -> float:
        """Processor seconds of the server so far, without those of what it started."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def check(self) -> None:
        """UnavailableError, with the end of its log, where the server or a process of callers has failed."""
        self._processes.check()

    def forget(self, name: str) -> None:
        """End a process of callers; one that has ended already, too."""
        self._processes.stop(name)


class Started:
    """Callers on their way."""

    def __init__(
        self, service: Service, name: str, answer: Path, *, has_ended: Callable[[], bool], limit_s: float
    ) -> None:
        self._service, self._name, self._answer = service, name, answer
        self._has_ended, self._limit_s = has_ended, limit_s

    def outcomes(self, *, meanwhile: Callable[[], None] = lambda: None) -> list[Outcome | None]:
        """Waits for the callers; in the order of the asks, None for one that was not sent in time.

        ``meanwhile`` is called fifty times a second. UnavailableError where the server or the callers failed.
        """
        deadline = time.monotonic() + self._limit_s
        while not self._has_ended():
            self._service.check()
            if time.monotonic() > deadline:
                raise UnavailableError(f"the callers did not end within {self._limit_s:.0f} s, and have deadlines")
            meanwhile()
            time.sleep(_POLL_S)
        self._service.check()
        self._service.forget(self._name)
        return read_outcomes(self._answer)


class Tenants:
    """Puts tenants with keys and adapters of the tiny base into a registry that is empty, or has other tenants."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        found = describe_base(BASE)
        registry.register_base(found.name, found.digest, architecture=found.architecture, parameters=found.parameters)
        self.base = found.digest
        self.keys: dict[str, str] = {}
        """Tenant → a key of it that may infer."""

    def add(self, tenant: str, *, weight: float = 1.0) -> str:
        """A new tenant; returns its key."""
        self.registry.create_tenant(tenant, weight=weight)
        self.keys[tenant] = self.registry.create_key(tenant).token
        return self.keys[tenant]

    def add_adapter(self, tenant: str, name: str, weights: LoraAdapter, *, card: str = "") -> Version:
        """A new adapter with its first version."""
        self.registry.create_adapter(tenant, name, base=self.base)
        return self.registry.add_version(tenant, name, weights, card=card)


TARGETS = ("q_proj", "v_proj", "down_proj")


def random_adapter(seed: int, *, rank: int = 4, size: float = 0.1, targets: Sequence[str] = TARGETS) -> LoraAdapter:
    """Changes the named projections of every layer of the tiny base: A is normal over the square root of its inputs, B
    normal with ``size``, which at 0.1 changes most of the base's greedy tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LoraPair(
            torch.randn(rank, d_in, generator=generator) / math.sqrt(d_in),
            torch.randn(d_out, rank, generator=generator) * size,
        )
        for path, (d_out, d_in) in sorted(_shapes().items())
        if path.endswith(tuple(targets))
    }
    return LoraAdapter(modules)


@cache
def _shapes() -> ModuleShapes:
    return base_shapes(base_path(BASE))


def _environment() -> Mapping[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet}
