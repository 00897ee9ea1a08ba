"""``lorafleet bench service``: what the service holds under load, and what it keeps apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafleet.cli.bench_options import say, words
from lorafleet.cli.output import JsonFlag, print_json, print_table
from lorafleet.stopping import interruptible


def service(
    scenario: Annotated[
        str, typer.Option(metavar="NAME,…", help="isolation, timing, names, load, route, one after another.")
    ] = "isolation,timing,names,load,route",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the server. (default: every core)")] = None,
    registry: Annotated[
        str | None,
        typer.Option(metavar="URL", help="An empty database, for one scenario. (default: a SQLite file for each)"),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="isolation: calls in all.")] = 12_000,
    tenants: Annotated[int, typer.Option(min=2, help="isolation: who call.")] = 50,
    changes: Annotated[float, typer.Option(min=0.1, help="isolation: of adapters, a second.")] = 8.0,
    probes: Annotated[int, typer.Option(min=2, help="timing: of another tenant's prompts.")] = 1000,
    name_probes: Annotated[
        int, typer.Option(min=2, help="names: that are not the caller's, of each kind, over each door.")
    ] = 1000,
    control_probes: Annotated[
        int, typer.Option(min=2, help="timing, names: of one's own, which have to be seen.")
    ] = 300,
    minutes: Annotated[float, typer.Option(min=0.05, help="load: at 80 % of the capacity.")] = 10.0,
    capacity_seconds: Annotated[float, typer.Option(min=1.0, help="load: in which it is measured.")] = 30.0,
    overload_seconds: Annotated[float, typer.Option(min=1.0, help="load: at twice the capacity.")] = 30.0,
    adapters: Annotated[int, typer.Option(min=1, help="route: of the one tenant.")] = 100,
    routers: Annotated[
        str, typer.Option(metavar="NAME,…", help="route: those that are measured.")
    ] = "cards,cards+likelihood,likelihood",
    route_seconds: Annotated[float, typer.Option(min=1.0, help="route: of each of a router's three phases.")] = 10.0,
    callers: Annotated[int, typer.Option(min=1, help="route: who wait for their answers.")] = 16,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 1,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep registries and logs here. (default: a temporary folder)")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the record is appended.")] = Path(
        "benchmarks/results"
    ),
    json: JsonFlag = False,
) -> None:
    """Put a real `lorafleet serve` of the tiny base under load, and hold what it does against what is wanted of it.

    isolation: every answer of many tenants, while adapters come and go, is that of an isolated run. timing: the time to
    a first token tells nothing of what others have asked. names: the time of a refusal tells nothing of what others
    have. load: no errors at 80 % of the capacity, an answer or a refusal at twice it. route: calls a second. The exit
    status is 1 where something was missed.
    """
    from contextlib import ExitStack
    from datetime import UTC, datetime
    from tempfile import TemporaryDirectory

    from lorafleet.bench.machine import cores
    from lorafleet.bench.service import run
    from lorafleet.bench.service.isolation import IsolationSettings
    from lorafleet.bench.service.load import LoadSettings
    from lorafleet.bench.service.names import NameSettings
    from lorafleet.bench.service.routes import RouteSettings
    from lorafleet.bench.service.timing import TimingSettings

    settings = run.ServiceSettings(
        scenarios=words(scenario),
        threads=threads or cores(),
        registry=registry,
        isolation=IsolationSettings(requests=requests, tenants=tenants, changes_a_second=changes, seed=seed),
        timing=TimingSettings(probes=probes, control_probes=control_probes, seed=seed),
        names=NameSettings(probes=name_probes, control_probes=control_probes, seed=seed),
        load=LoadSettings(minutes=minutes, capacity_s=capacity_seconds, overload_s=overload_seconds, seed=seed),
        route=RouteSettings(
            routers=words(routers), adapters=adapters, seconds=route_seconds, callers=callers, seed=seed
        ),
    )
    if registry is not None and len(settings.scenarios) != 1:
        raise typer.BadParameter(
            "--registry: found several scenarios, expected one; each begins with an empty database"
        )
    with interruptible(), ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(TemporaryDirectory(prefix="lorafleet-bench-")))
        elif work.exists() and any(work.iterdir()):
            raise typer.BadParameter(f"--work: {work} is not empty, expected a new folder")
        done = run.bench_service(settings, work=work, out=out, when=datetime.now(UTC), say=say)
    if json:
        print_json(done.record)
    else:
        print_table(
            ["scenario", "figure", "found", "wanted", ""],
            [(v.scenario, v.figure, f"{v.found:.4g}", v.wanted, "met" if v.met else "missed") for v in done.verdicts],
        )
        typer.echo(f"record: {done.file}")
    if not all(verdict.met for verdict in done.verdicts):
        raise typer.Exit(1)
