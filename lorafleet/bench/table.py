"""A record as lines of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("row", "tokens/s", "prefill s", "decode s", ": base", "floor : ours", ": peers")
ABSENT = "-"


def lines(record: Mapping[str, Any]) -> list[list[str]]:
    """One line for each row that was measured."""
    ratios: Sequence[Mapping[str, Any]] = record["ratios"]
    peers = {row["name"] for row in record["rows"] if row["kind"] == "peer"}
    to_base = {ratio["of"]: ratio["ratio"] for ratio in ratios if ratio["to"] == "base"}
    shown = []
    for row in record["rows"]:
        name, median = row["name"], row["median"]
        if median is None:
            continue
        floor = record["floors"].get(name)
        versus = [f"{r['ratio']:.2f} {r['to']}" for r in ratios if r["of"] == name and r["to"] in peers]
        shown.append(
            [
                name,
                f"{median['tokens_per_s']:.1f}",
                f"{median['prefill_s']:.3f}",
                f"{median['decode_s']:.3f}",
                f"{to_base[name]:.2f}" if name in to_base else ABSENT,
                f"{floor['share']:.2f}" if floor else ABSENT,
                ", ".join(versus) or ABSENT,
            ]
        )
    return shown


def notes(record: Mapping[str, Any]) -> list[str]:
    """What became of the rows that have no figures, and how close others come to reading the weights."""
    without = [f"{row['name']}: {row['status']}: {row['reason']}" for row in record["rows"] if row["median"] is None]
    return without + [
        f"{name}: decoding at {floor['share']:.2f} of the floor of reading the weights in every step"
        for name, floor in record["weight_floors"].items()
    ]
