"""``lorafleet bench fairness``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafleet.cli.bench_options import say
from lorafleet.cli.output import JsonFlag, print_json, print_table
from lorafleet.stopping import interruptible


def fairness(
    seconds: Annotated[float, typer.Option(min=1, help="Of each arm, in each turn.")] = 20.0,
    turns: Annotated[int, typer.Option(min=1, help="How often each arm is run; figures are over all of them.")] = 3,
    part: Annotated[float, typer.Option(help="Of its share of the capacity that the quiet tenant offers.")] = 0.5,
    flood: Annotated[float, typer.Option(help="What the other tenant offers, times the capacity.")] = 2.0,
    compare: Annotated[bool, typer.Option(help="Also flood under the quiet tenant's own key.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the engine; callers need the others.")] = 1,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and prompts.")] = 1,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep logs and registry here. (default: a temporary folder)")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the record is appended.")] = Path(
        "benchmarks/results"
    ),
    json: JsonFlag = False,
) -> None:
    """Flood a service as one tenant, and time another that uses half of its share, beside what it has alone.

    The service is a real process on this machine, as are the callers. The exit status is 1 where something was missed.
    """
    from contextlib import ExitStack
    from datetime import UTC, datetime
    from tempfile import TemporaryDirectory

    from lorafleet.bench import fairness as benchmark

    settings = benchmark.FairnessSettings(
        seconds=seconds, turns=turns, part=part, flood=flood, compare=compare, threads=threads, seed=seed
    )
    with interruptible(), ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(TemporaryDirectory(prefix="lorafleet-bench-")))
        elif work.exists() and any(work.iterdir()):
            raise typer.BadParameter(f"--work: {work} is not empty, expected a new folder")
        done = benchmark.bench_fairness(settings, work=work.absolute(), out=out, when=datetime.now(UTC), say=say)
    if json:
        print_json(done.record)
    else:
        print_table(
            ["turn", "arm", "answered", "p50 s", "p95 s", "first token p95 s", "flood answers/s", "flood refused"],
            [
                (
                    r.turn + 1,
                    r.arm,
                    f"{len(r.latencies_s)} of {r.offered}",
                    benchmark.percentile(r.latencies_s, 50),
                    benchmark.percentile(r.latencies_s, 95),
                    benchmark.percentile(r.first_tokens_s, 95),
                    f"{r.flood_rate:.1f}",
                    r.flood_refused,
                )
                for r in done.results
            ],
        )
        typer.echo(f"capacity: {done.capacity:.1f} answers/s")
        for ratio in done.ratios:
            said = "for comparison" if ratio.arm == "one tenant" else "met" if ratio.met else "missed"
            typer.echo(
                f"{ratio.arm} : alone: {ratio.throughput:.3f} of the answers (wanted at least "
                f"{benchmark.WANTED_THROUGHPUT:g}), p95 {ratio.latency:.2f} times the latency and "
                f"{ratio.first_token:.2f} times the time to a first token (wanted at most {benchmark.WANTED_RATIO:g}): "
                f"{said}"
            )
        typer.echo(f"record: {done.file}")
    if not benchmark.wanted(done.ratios):
        raise typer.Exit(1)
