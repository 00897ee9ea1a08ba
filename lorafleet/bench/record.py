"""The record of a run: one JSON document, kept in a file for the day, the shape and the device."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from lorafleet.bench.floor import Work, base_bytes
from lorafleet.bench.machine import Commit
from lorafleet.bench.results import RowResult, all_figures, decode_s, floors, ratios, weight_floors
from lorafleet.bench.shapes import Shape
from lorafleet.errors import InvalidInputError

FORMAT = 1


def head(
    benchmark: str,
    *,
    when: datetime,
    command: Sequence[str],
    shape: Mapping[str, Any],
    device: Mapping[str, Any],
    versions: Mapping[str, str],
    commit: Commit,
) -> dict[str, Any]:
    """What every record begins with; its file is named by the shape's ``name`` and the device's ``kind``."""
    return {
        "format": FORMAT,
        "benchmark": benchmark,
        "date": when.isoformat(timespec="seconds"),
        "command": " ".join(command),
        "commit": commit.id,
        "commit_modified": commit.modified,
        "device": dict(device),
        "versions": dict(versions),
        "shape": dict(shape),
    }


def make_record(
    *,
    when: datetime,
    command: Sequence[str],
    shape: Shape,
    device: Mapping[str, Any],
    versions: Mapping[str, str],
    commit: Commit,
    repeats: int,
    checks: Mapping[str, str | None],
    results: Sequence[RowResult],
    works: Mapping[str, Work],
) -> dict[str, Any]:
    """All that is known of a run; ``checks``: kind of request → what was wrong, None where nothing was."""
    found = all_figures(results)
    fields = asdict(shape)
    load = fields.pop("load")
    return {
        **head("engine", when=when, command=command, shape=fields, device=device, versions=versions, commit=commit),
        "load": load,
        "repeats": repeats,
        "checks": dict(checks),
        "rows": [
            {
                "name": result.row.name,
                "kind": result.row.kind,
                "status": result.status,
                "reason": result.reason,
                "repeats": [{**t._asdict(), "decode_s": decode_s(t)} for t in result.timings],
                "median": found[result.row.name]._asdict() if result.row.name in found else None,
            }
            for result in results
        ],
        "ratios": [ratio._asdict() for ratio in ratios(found)],
        "floors": {
            name: {**floor._asdict(), "work": floor.work._asdict()} for name, floor in floors(found, works).items()
        },
        "weight_floors": {
            name: floor._asdict()
            for name, floor in weight_floors(
                results, step_bytes=base_bytes(shape), new_tokens=shape.load.new_tokens
            ).items()
        },
    }


def file_name(record: Mapping[str, Any]) -> str:
    """DATE-SHAPE-DEVICE.json"""
    return f"{record['date'][:10]}-{record['shape']['name']}-{record['device']['kind']}.json"


def plain(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for: what was never answered took NaN or infinitely long."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def append(record: Mapping[str, Any], folder: Path) -> Path:
    """Add a record, as :func:`plain` has it, to the list in its file, which is made where it is new; that file.

    Raises InvalidInputError where the file holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / file_name(record)
    records: Any = []
    if file.exists():
        try:
            records = json.loads(file.read_text())
        except ValueError:
            records = None
        if not isinstance(records, list):
            raise InvalidInputError(f"{file} is no list of records, expected one to append to; move it away")
    part = file.with_suffix(".json.part")
    part.write_text(json.dumps([*records, plain(record)], indent=1, ensure_ascii=False) + "\n")
    part.replace(file)
    return file
