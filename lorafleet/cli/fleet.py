"""``lorafleet demo``, ``aggregate`` and ``coordinator run``: training and combining adapters."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafleet.cli import stores
from lorafleet.cli.output import JsonFlag, print_json
from lorafleet.stopping import interruptible

if TYPE_CHECKING:
    from lorafleet.adapters import LoraAdapter

coordinator = typer.Typer(help="What a federation's owner runs.", no_args_is_help=True)


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
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="The folder to write, in PEFT format; by fedsa, one below it for each member."
        ),
    ],
    rule: Annotated[
        str, typer.Option(metavar="NAME", help="How they are combined; docs/rules.md lists the rules.")
    ] = "exact",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Truncate to this rank. (default: as the rule leaves it)")
    ] = None,
    energy: Annotated[
        float, typer.Option(metavar="SHARE", help="Truncate to the rank that keeps this share of the squared norm.")
    ] = 1.0,
    residual: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what --out then lacks of the whole aggregate here.")
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option(metavar="NORM", help="Scale updates down whose product's norm is larger.")
    ] = None,
    robust: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Bound bad members: cosine, krum, multi_krum, trimmed_mean or median."),
    ] = None,
    byzantine: Annotated[
        int | None, typer.Option(min=0, help="How many may be bad. (default: f as large as 2 f + 3 members allow)")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Combine adapters of any ranks, offline. Weights are used as given; without any, each adapter counts equally."""
    from lorafleet.adapters import LoraAdapter
    from lorafleet.coordinator.robust import Robustness, robust_aggregate
    from lorafleet.coordinator.rules import get_rule
    from lorafleet.coordinator.rules.aggregate import Targets, check_targets

    chosen = get_rule(rule)
    targets = Targets(rank=rank, energy=energy, residual=residual is not None)
    robustness = Robustness(clip=clip_norm, wrapper=robust, byzantine=byzantine)
    check_targets(chosen, targets)
    folders, weights = _weighted_folders(adapters)
    own = _member_folders(folders, out) if chosen.personal else {}
    _refuse_overwriting(folders, [*(own.values() if own else [out]), *([residual] if residual else [])])
    with _progress() as watch:
        members = [LoraAdapter.load(folder) for folder in watch(folders)]
        result = robust_aggregate(chosen, members, weights, robustness, targets, watch=watch)
    written = [
        _write(adapter, folder)
        for adapter, folder in zip(result.personal or (result.adapter,), own.values() if own else (out,), strict=True)
    ]
    rest = None if result.residual is None or residual is None else _write(result.residual, residual)
    error = max(result.errors.values())
    if json:
        print_json(
            {
                **({"folder": str(out), "digest": None} if own else written[0]),
                "rule": rule,
                "rank": max(item["rank"] for item in written),
                "parameters": sum(item["parameters"] for item in written),
                "modules": len(result.errors),
                "weights": dict(zip(folders, weights, strict=True)),
                "shares": dict(zip(folders, result.weights, strict=True)),
                "largest_relative_error": error,
                "errors": result.errors,
                "ranks": {path: ranks._asdict() for path, ranks in result.ranks.items()},
                "residual": rest,
                "personal": dict(zip(own, written, strict=True)) if own else None,
            }
        )
        return
    for item in written:
        typer.echo(
            f"{item['folder']}  {item['digest']}  rank {item['rank']}, largest relative error of a module {error:.2e}"
        )
    if rest is not None:
        typer.echo(f"{rest['folder']}  {rest['digest']}  rank {rest['rank']}, the residual")


def _write(adapter: LoraAdapter | None, folder: Path) -> dict[str, Any]:
    """Save in float32, and say what was saved."""
    import torch

    assert adapter is not None
    saved = adapter.to(torch.float32)
    saved.save(folder)
    return {"folder": str(folder), "digest": saved.digest, "rank": saved.rank, "parameters": saved.parameters}


def _member_folders(folders: Sequence[str], out: Path) -> dict[str, Path]:
    """Member's folder → the one to write: of its name, with its number where others have the same."""
    names = [Path(folder).resolve().name for folder in folders]
    return {
        folder: out / (name if names.count(name) == 1 else f"{name}-{number}")
        for number, (folder, name) in enumerate(zip(folders, names, strict=True), 1)
    }


def _refuse_overwriting(read: Sequence[str], written: Sequence[Path]) -> None:
    taken = [Path(folder).resolve() for folder in read]
    for folder in written:
        if folder.resolve() in taken:
            raise typer.BadParameter(f"found {folder} to write to, which is used already; name another folder")
        taken.append(folder.resolve())


@contextmanager
def _progress() -> Iterator[Callable[[Sequence[str]], Iterable[str]]]:
    """Hands names through, with a bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        yield lambda names: bar.track(names, description="aggregating")


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
        run_federation(federation, resume, by=stores.operator(None))
