"""The rows of the table: our own and the peers', what each depends on, and which of them are run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lorafleet.errors import InvalidInputError, UnknownNameError


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    kind: Literal["ours", "peer"]
    check: str | None = None
    """the correctness check (of ``checks.CHECKS``) without which this row is not timed"""
    requests: int | None = None
    """in the place of as many as the shape's load has"""
    gpu: bool = False
    """whether it answers a question about GPUs: on a CPU it is run where it is asked for by name"""


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("generate", "peer"),
        Row("transformers_cb", "peer"),
        Row("peft", "peer"),
        Row("vllm", "peer"),
        Row("vllm_lora", "peer"),
        Row("base", "ours", "base"),
        Row("base_alone", "ours", "base", requests=1, gpu=True),
        Row("single", "ours", "single"),
        Row("mix2", "ours", "mix2"),
        Row("mix2_even8", "ours", "mix2", gpu=True),
        Row("mix2_even64", "ours", "mix2", gpu=True),
        Row("mix2_uneven64", "ours", "mix2", gpu=True),
        Row("token_top2", "ours", "token_top2"),
        Row("many", "ours", "single"),
        Row("many_cold", "ours", "single"),
    )
}
VLLM_ROWS = ("vllm", "vllm_lora")
WEIGHT_BOUND = ("base", "base_alone")
"""Rows whose decoding is compared, on a GPU, with the time that reading the weights once a step takes."""

COMPARED = {"base": ("generate", "transformers_cb", "vllm"), "single": ("peft", "vllm_lora")}
"""Our row → the peers that do the same."""
BEST_OF_PEERS = ("base",)
"""Rows that are compared with the fastest of their peers, and not with each of them."""


class Selection(NamedTuple):
    rows: tuple[Row, ...]
    """in the order of the table"""
    left_out: dict[str, str]
    """row → why it cannot run here"""


def select(wanted: Sequence[str] | None, *, vllm: bool, cuda: bool = False) -> Selection:
    """The rows that were asked for (None: all that belong to the device), without those that cannot run.

    ``vllm``: its Python is known. ``cuda``: the rows run on a GPU.

    Raises UnknownNameError for a name that is no row's, InvalidInputError where nothing is left.
    """
    for name in wanted if wanted is not None else ():
        if name not in ROWS:
            raise UnknownNameError("row", name, ROWS)
    chosen = [row for row in ROWS.values() if (cuda or not row.gpu if wanted is None else row.name in wanted)]
    left_out: dict[str, str] = {}
    for row in chosen:
        if row.name in VLLM_ROWS and not vllm:
            left_out[row.name] = "no vLLM: give the Python of its environment with --vllm-python"
    rows = tuple(row for row in chosen if row.name not in left_out)
    if not rows:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no row was named"
        raise InvalidInputError(f"found no row to run ({reasons}), expected at least one of: {', '.join(ROWS)}")
    return Selection(rows, left_out)
