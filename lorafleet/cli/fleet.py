"""``lorafleet demo``, ``aggregate``, ``client join`` and ``coordinator run``: training and combining adapters."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lorafleet.cli.output import JsonFlag, print_json
from lorafleet.stopping import interruptible

client = typer.Typer(help="What a data owner runs.", no_args_is_help=True)
coordinator = typer.Typer(help="What a federation's owner runs.", no_args_is_help=True)


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


@client.callback()
def _client() -> None:
    """Keeps `join` a subcommand: Typer folds a group of one command into that command."""


@coordinator.callback()
def _coordinator() -> None:
    """Keeps `run` a subcommand."""


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where report.json and report.html go.")] = Path("demo-out"),
    json: JsonFlag = False,
) -> None:
    """Run the whole loop on this machine: clients train, experts are combined, served and routed.

    Prints losses and targets, and shows its progress on a terminal. Exits with 1 where a target was missed.
    """
    from rich.console import Console

    from lorafleet.demo.report import as_json, print_tables
    from lorafleet.demo.run import run_demo

    # The demo shows its own progress; the arms that it trains beside would log every update.
    logging.getLogger("lorafleet").setLevel(logging.WARNING)
    report = run_demo(out)
    if json:
        print_json(as_json(report))
    else:
        # Wide enough for every row where there is no terminal whose width would count.
        print_tables(report, Console(width=None if sys.stdout.isatty() else 120))
        typer.echo(f"report: {out / 'report.html'}")
    if not all(target["met"] for target in report["targets"]):
        raise typer.Exit(1)


def aggregate(
    adapters: Annotated[
        list[str], typer.Argument(metavar="DIR[=WEIGHT]...", help="Adapters in PEFT format; all with a weight or none.")
    ],
    rule: Annotated[str, typer.Option(metavar="NAME", help="How they are combined: exact, fedit, …")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write, in PEFT format.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compress to this rank. (default: as the rule leaves it)")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Combine adapters of any ranks, offline. Weights are used as given; without any, each adapter counts equally."""
    import torch

    from lorafleet.adapters import LoraAdapter
    from lorafleet.coordinator.rules import get_rule

    combine = get_rule(rule)
    folders, weights = _weighted_folders(adapters)
    combined = combine([LoraAdapter.load(folder) for folder in folders], weights)
    errors: dict[str, float] = {}
    if rank is not None:
        combined, errors = combined.compressed(rank=rank)
    combined = combined.to(torch.float32)
    combined.save(out)
    error = max(errors.values(), default=0.0)
    if json:
        print_json(
            {
                "folder": str(out),
                "digest": combined.digest,
                "rule": rule,
                "rank": combined.rank,
                "parameters": combined.parameters,
                "modules": len(combined.modules),
                "weights": dict(zip(folders, weights, strict=True)),
                "largest_relative_error": error,
            }
        )
    else:
        typer.echo(f"{out}  {combined.digest}  rank {combined.rank}, largest relative error of a module {error:.2e}")


def _weighted_folders(arguments: list[str]) -> tuple[list[str], list[float]]:
    """A folder's own name may hold an equals sign: only a number after the last one is a weight."""
    folders: list[str] = []
    weights: list[float] = []
    for argument in arguments:
        folder, equals, weight = argument.rpartition("=")
        try:
            weights.append(float(weight))
        except ValueError:
            equals = ""
        folders.append(folder if equals else argument)
    if weights and len(weights) != len(folders):
        raise typer.BadParameter(
            f"found {len(weights)} weights for {len(folders)} adapters, expected one for each or none"
        )
    if len(set(folders)) != len(folders):
        raise typer.BadParameter("found a folder twice; name it once, with its weights added up")
    return folders, weights or [1.0 / len(folders)] * len(folders)


@client.command()
def join(
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="The federation's SuperLink (its Fleet API).")],
    data: Annotated[
        str, typer.Option(metavar="PATH|MODULE:NAME", help="A folder of texts, a .jsonl file, or a dataset in Python.")
    ],
    member: Annotated[str, typer.Option(metavar="KEY", help="The key that the federation knows you by.")],
    rank: Annotated[int, typer.Option(min=1, help="The rank that this machine affords.")] = 8,
    base: Annotated[str, typer.Option(metavar="PATH|tiny", help="Your copy of the federation's base.")] = "tiny",
    device: Annotated[str, typer.Option(metavar="cpu|cuda|cuda:N", help="Where to train.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="How the base's weights are held.")] = Dtype.bfloat16,
    insecure: Annotated[bool, typer.Option("--insecure", help="Connect without TLS.")] = False,
    root_certificates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The certificates that the SuperLink is checked against.")
    ] = None,
    private_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The key that this node is authenticated by.")
    ] = None,
) -> None:
    """Train for a federation on data that stays here, until SIGTERM or SIGINT."""
    from lorafleet.clients import join_federation

    join_federation(
        superlink,
        data=data,
        member=member,
        rank=rank,
        base=base,
        device=device,
        dtype=dtype.value,
        insecure=insecure,
        root_certificates=root_certificates,
        private_key=private_key,
    )


@coordinator.command()
def run(
    federation: Annotated[
        Path, typer.Argument(metavar="FEDERATION.toml", help="What is agreed: base, rule, limits, members.")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the rounds that are committed.")] = False,
) -> None:
    """Run a federation's rounds on a SuperLink that is already there."""
    from lorafleet.coordinator.launch import run as run_federation

    with interruptible():  # so that the run on the SuperLink is stopped, too, whatever else comes meanwhile
        run_federation(federation, resume)
