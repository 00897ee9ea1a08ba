"""``lorafleet bench service``: what a real service keeps apart and what it holds, beside what is wanted of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from lorafleet.bench.machine import commit, cpu_device, versions
from lorafleet.bench.record import append, head, plain
from lorafleet.bench.service.figures import Verdict
from lorafleet.bench.service.isolation import IsolationSettings, bench_isolation
from lorafleet.bench.service.load import LoadSettings, bench_load
from lorafleet.bench.service.names import NameSettings, bench_names
from lorafleet.bench.service.routes import RouteSettings, bench_routes
from lorafleet.bench.service.timing import TimingSettings, bench_timing
from lorafleet.errors import UnknownNameError

SCENARIOS = ("isolation", "timing", "names", "load", "route")


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    scenarios: tuple[str, ...] = SCENARIOS
    threads: int = 2
    """Of the server."""
    registry: str | None = None
    """An empty database; None: a SQLite file for each scenario."""
    isolation: IsolationSettings = field(default_factory=IsolationSettings)
    timing: TimingSettings = field(default_factory=TimingSettings)
    names: NameSettings = field(default_factory=NameSettings)
    load: LoadSettings = field(default_factory=LoadSettings)
    route: RouteSettings = field(default_factory=RouteSettings)

    def __post_init__(self) -> None:
        for name in self.scenarios:
            if name not in SCENARIOS:
                raise UnknownNameError("scenario", name, SCENARIOS)


def command_line(settings: ServiceSettings) -> list[str]:
    """The command that does this again; a database's address is left out, as it may name a host and a user."""
    isolation, timing, names = settings.isolation, settings.timing, settings.names
    load, route = settings.load, settings.route
    named: dict[str, dict[str, object]] = {
        "isolation": {
            "requests": isolation.requests,
            "tenants": isolation.tenants,
            "changes": f"{isolation.changes_a_second:g}",
        },
        "timing": {"probes": timing.probes, "control-probes": timing.control_probes},
        "names": {"name-probes": names.probes, "control-probes": names.control_probes},
        "load": {
            "minutes": f"{load.minutes:g}",
            "capacity-seconds": f"{load.capacity_s:g}",
            "overload-seconds": f"{load.overload_s:g}",
        },
        "route": {
            "routers": ",".join(route.routers),
            "adapters": route.adapters,
            "route-seconds": f"{route.seconds:g}",
            "callers": route.callers,
        },
    }
    words = ["lorafleet", "bench", "service", "--scenario", ",".join(settings.scenarios)]
    words += ["--threads", str(settings.threads), "--seed", str(isolation.seed)]
    for name in settings.scenarios:
        for option, value in named[name].items():
            words += [f"--{option}", str(value)]
    return words


class ServiceBenchmark(NamedTuple):
    record: dict[str, Any]
    file: Path
    verdicts: list[Verdict]


def bench_service(
    settings: ServiceSettings,
    *,
    work: Path,
    out: Path,
    when: datetime,
    say: Callable[[str], None],
) -> ServiceBenchmark:
    """Run the scenarios one after another in ``work`` and append the record to ``out``.

    UnavailableError where a process does not start or fails.
    """
    out.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be made would cost a whole run
    results: dict[str, Any] = {}
    found: list[Verdict] = []
    for name in settings.scenarios:
        folder = work.resolve() / name
        folder.mkdir(parents=True)
        url = settings.registry or f"sqlite:///{folder / 'registry.db'}"

        def progress(step: str, name: str = name) -> None:
            say(f"{name}: {step}")

        if name == "isolation":
            made = bench_isolation(
                settings.isolation, work=folder, registry_url=url, threads=settings.threads, say=progress
            )
        elif name == "timing":
            made = bench_timing(settings.timing, work=folder, registry_url=url, threads=settings.threads, say=progress)
        elif name == "names":
            made = bench_names(settings.names, work=folder, registry_url=url, threads=settings.threads, say=progress)
        elif name == "load":
            made = bench_load(settings.load, work=folder, registry_url=url, threads=settings.threads, say=progress)
        else:
            made = bench_routes(settings.route, work=folder, registry_url=url, threads=settings.threads, say=progress)
        results[name], verdicts = made
        found += verdicts
    record = plain({
        **head(
            "service", when=when, command=command_line(settings), shape={"name": "service"},
            device=cpu_device(settings.threads), versions=versions(), commit=commit(),
        ),
        "registry": "sqlite" if settings.registry is None else settings.registry.partition(":")[0],
        "settings": {name: asdict(getattr(settings, name)) for name in settings.scenarios},
        "results": results,
        "verdicts": [verdict._asdict() for verdict in found],
    })  # fmt: skip
    return ServiceBenchmark(record, append(record, out), found)
