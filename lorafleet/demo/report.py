"""What the demo found: targets checked, ``report.json``, a table for the terminal, and a self-contained page."""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorafleet.demo import plots

ARMS = tuple(plots.ARMS)


@dataclass(frozen=True)
class Target:
    """One promise of the demo, and whether this run kept it."""

    name: str
    found: float
    expected: str
    met: bool


def gap_closed(start: float, reached: float, end: float) -> float:
    """Share of the way from ``start`` to ``end`` that ``reached`` covers; NaN where there is no way to go."""
    return (start - reached) / (start - end) if start != end else float("nan")


def check_targets(report: Mapping[str, Any]) -> list[Target]:
    """The targets of a full run, from the figures of ``report.json`` alone."""
    domains: Mapping[str, Mapping[str, float]] = report["domains"]
    mean = {arm: statistics.fmean(losses[arm] for losses in domains.values()) for arm in ARMS}
    worst = max(losses["federated"] - losses["base"] for losses in domains.values())
    gap = mean["base"] - mean["centralised"]
    closed = gap_closed(mean["base"], mean["federated"], mean["centralised"])
    routed = gap_closed(mean["base"], mean["routed"], mean["oracle"])
    error = report["aggregation"]["relative_error"]
    serving = report["serving"]
    memory, seconds = report["peak_memory_bytes"], report["seconds"]
    return [
        Target("aggregation: relative error of the untruncated sum", error, "≤ 1e-5", error <= 1e-5),
        Target("federated − base, worst domain (nats)", worst, "< 0", worst < 0),
        Target(
            "federated − fedit, mean (nats)",
            mean["federated"] - mean["fedit"],
            "≤ 0",
            mean["federated"] <= mean["fedit"],
        ),
        Target("base − centralised, mean (nats)", gap, "≥ 0.1", gap >= 0.1),
        Target("gap base → centralised that federated closes", closed, "≥ 0.80", closed >= 0.8),
        Target("gap base → oracle that routed closes", routed, "≥ 0.90", routed >= 0.9),
        Target("requests that failed", serving["errors"], "0", serving["errors"] == 0),
        Target(
            "experts that answered in their last version while serving",
            serving["experts_in_last_version"],
            f"{serving['experts']}",
            serving["experts_in_last_version"] == serving["experts"],
        ),
        Target("seconds in all", seconds, "≤ 360", seconds <= 360),
        Target("peak memory (GB)", memory / 1e9, "≤ 8", memory <= 8e9),
    ]


def write(report: Mapping[str, Any], out: Path) -> None:
    """``report.json`` and ``report.html`` into ``out``."""
    document = json.dumps(as_json(report), indent=1, allow_nan=False)
    (out / "report.json").write_text(document + "\n", encoding="utf-8")
    (out / "report.html").write_text(page(report), encoding="utf-8")


def as_json(value: Any) -> Any:
    """The same figures as JSON can hold them: null for what is no finite number."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_targets(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with its targets, each with what was found and whether it was met."""
    return {**report, "targets": [asdict(target) for target in check_targets(report)]}


def print_tables(report: Mapping[str, Any], console: Console) -> None:
    """Losses by domain and arm, what was served, then the targets of a report that has them."""
    losses = Table(title="held-out loss, nats per token", title_justify="left")
    losses.add_column("domain")
    for arm in ARMS:
        losses.add_column(arm, justify="right")
    for domain, row in report["domains"].items():
        losses.add_row(domain, *(f"{row[arm]:.3f}" for arm in ARMS))
    mean = [statistics.fmean(row[arm] for row in report["domains"].values()) for arm in ARMS]
    losses.add_section()
    losses.add_row("mean", *(f"{value:.3f}" for value in mean))
    console.print(losses)
    serving = report["serving"]
    console.print(
        f"served {serving['requests']} requests of {serving['tenants']} tenants with "
        f"{serving['distinct_mixes']} distinct mixes; "
        f"{serving['tokens_per_second']:.0f} tokens per second in the measured burst; "
        f"{serving['swaps_while_serving']} adapters changed version under traffic, without a restart"
    )
    table = Table(title="targets", title_justify="left")
    for column in ("", "figure", "found", "expected"):
        table.add_column(column, justify="right" if column == "found" else "left")
    for target in report["targets"]:
        verdict = "[green]✓ met[/]" if target["met"] else "[red]✗ missed[/]"
        table.add_row(verdict, target["name"], f"{target['found']:.3g}", target["expected"])
    console.print(table)


def page(report: Mapping[str, Any]) -> str:
    """The whole report as one HTML page without scripts or outside references."""
    domains = report["domains"]
    curves = {name: {"federated": c["federated"], "fedit": c["fedit"]} for name, c in report["curves"].items()}
    flat = {name: {arm: row[arm] for arm in ("centralised", "local")} for name, row in domains.items()}
    traffic = report["traffic"]
    sections = [
        ("Targets", targets_table(report), "Every promise of the demo, checked on this run."),
        ("Loss by domain", losses_table(domains) + plots.loss_by_arm(domains), ARMS_EXPLAINED),
        (
            "Loss over rounds",
            plots.loss_over_rounds(curves, flat),
            "Round 0 is the base. Each point is that domain's expert as committed, answering through the service.",
        ),
        (
            "What the router chose",
            plots.router_heat_map(report["router"]),
            "Mean weight by domain of the prompt. The router saw about 100 tokens and was told nothing else.",
        ),
        (
            "New versions under traffic",
            plots.versions_over_time([tuple(dot) for dot in traffic["versions"]]),
            "Requests that were answered while the last round ran: the version moves on, the service does not stop.",
        ),
        (
            "Tokens per second",
            plots.tokens_per_second(
                [tuple(p) for p in traffic["tokens"]], measured=report["serving"]["tokens_per_second"]
            ),
            "While the last round ran, training and serving share this machine; the burst had it to itself.",
        ),
        ("Owners", owners_table(report["owners"]), "Private data, made from text found on this machine."),
        ("Rounds", rounds_table(report["rounds"]), "Over real Flower SuperNodes; reduced by Ray."),
    ]
    body = "\n".join(
        f"<section><h2>{html.escape(title)}</h2><p>{html.escape(note)}</p><div class=wide>{content}</div></section>"
        for title, content, note in sections
    )
    met = sum(target["met"] for target in report["targets"])
    summary = (
        f"{len(report['owners'])} data owners, {len(report['rounds'])} rounds, {len(domains)} domains; "
        f"{met} of {len(report['targets'])} targets met; {report['seconds']:.0f} seconds."
    )
    return PAGE.format(
        summary=html.escape(summary), body=body, environment=html.escape(json.dumps(report["environment"]))
    )


ARMS_EXPLAINED = (
    "base: no adapter. local: the main owner alone, same steps. fedit: the domain's expert when factors are averaged. "
    "federated: the domain's expert when products are summed exactly. centralised: one adapter trained on everybody's "
    "data with everybody's steps. routed: what the router chose for each prompt. "
    "oracle: the best single expert in hindsight."
)


def table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def losses_table(domains: Mapping[str, Mapping[str, float]]) -> str:
    rows = [[html.escape(name), *(f"{row[arm]:.3f}" for arm in ARMS)] for name, row in domains.items()]
    mean = [f"<b>{statistics.fmean(row[arm] for row in domains.values()):.3f}</b>" for arm in ARMS]
    return table(["domain", *ARMS], [*rows, ["<b>mean</b>", *mean]])


def targets_table(report: Mapping[str, Any]) -> str:
    verdict = {True: "<span class=yes>met</span>", False: "<span class=no>missed</span>"}
    rows = [
        [verdict[t["met"]], html.escape(t["name"]), f"{t['found']:.3g}", html.escape(t["expected"])]
        for t in report["targets"]
    ]
    return table(["", "figure", "found", "expected"], rows)


def owners_table(owners: list[Mapping[str, Any]]) -> str:
    def shares(owner: Mapping[str, Any]) -> str:
        return ", ".join(
            f"{html.escape(name)} {share:.0%}" for name, share in owner["shares"].items() if share >= 0.005
        )

    rows = [
        [html.escape(o["name"]), html.escape(o["domain"]), str(o["rank"]), kilobytes(o["train_bytes"]),
         html.escape(o["expert"]), shares(o)]
        for o in owners
    ]  # fmt: skip
    return table(["owner", "main domain", "rank", "training text", "expert", "shares of the domains"], rows)


def rounds_table(rounds: list[Mapping[str, Any]]) -> str:
    rows = [
        [
            str(r["round"]),
            f"{r['seconds']:.1f} s",
            f"{r['reduce_s']:.2f} s",
            kilobytes(r["bytes_up"]),
            kilobytes(r["bytes_down"]),
            f"{r['truncation_error']['mean']:.2e}",
            ", ".join(f"{html.escape(label)}: {count}" for label, count in r["members"].items()),
        ]
        for r in rounds
    ]
    return table(
        ["round", "time", "reduction", "up", "down", "truncation error (mean)", "members of each expert"], rows
    )


def kilobytes(size: int) -> str:
    return f"{size / 1e3:,.0f} kB"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lorafleet: the loop on this machine</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #202428; background: #fff;
  max-width: 1080px; margin: 2.5rem auto; padding: 0 1.25rem; }}
h1 {{ font-size: 1.7rem; margin-bottom: .2rem; }}
h2 {{ font-size: 1.15rem; margin: 2.4rem 0 .2rem; }}
p {{ margin: .2rem 0 .8rem; color: #555d66; max-width: 46rem; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin-bottom: 1rem; }}
th, td {{ text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e3e6ea; }}
th {{ color: #555d66; font-weight: 600; }}
.wide {{ overflow-x: auto; }}
.wide svg {{ max-width: 100%; height: auto; }}
.yes {{ color: #00795c; font-weight: 600; }}
.no {{ color: #b3261e; font-weight: 600; }}
footer {{ margin-top: 3rem; font-size: .8rem; color: #7a828a; }}
</style>
</head>
<body>
<h1>The loop on this machine</h1>
<p>{summary}</p>
{body}
<footer>{environment}</footer>
</body>
</html>
"""
