"""Where the harness keeps the random weights that it made."""

from __future__ import annotations

from pathlib import Path

from lorafleet.bench.shapes import Shape

VERSION = 1
"""To be raised where ``weights.py`` makes other weights for the same shape, so that older ones are not taken."""


def folder_of(work: Path, shape: Shape) -> Path:
    """All that belongs to one shape."""
    return work / f"{shape.key}-v{VERSION}"


def base_folder(work: Path, shape: Shape) -> Path:
    """The base, in HF format."""
    return folder_of(work, shape) / "base"


def adapter_folder(work: Path, shape: Shape, name: str) -> Path:
    """An adapter, in PEFT format."""
    return folder_of(work, shape) / "adapters" / name
