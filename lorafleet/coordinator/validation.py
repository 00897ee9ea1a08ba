"""What an update must be before it counts. One bad member costs at most its own update.

Checked in this order, each with a stable reason code that the registry keeps: ``header`` (schema, types), ``order``
(another federation, round, attempt, member, base or expert than was ordered), ``factors`` (keys, shapes, dtype, NaN),
``modules`` (not the base's), ``rank``, ``digest``, ``count`` (number of examples), ``norm``, ``frozen`` (a factor that
was to stay is another); ``metrics`` (no finite number, or none wanted) comes after ``order``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from lorafleet.adapters import LoraAdapter
from lorafleet.adapters.base_shapes import ModuleShapes, check_fits
from lorafleet.adapters.factor_space import norm
from lorafleet.adapters.frozen import frozen_factor
from lorafleet.adapters.streaming import Shape, check_size
from lorafleet.adapters.wire import TrainOrder, UpdateHeader, from_arrays
from lorafleet.coordinator.transport import one_line
from lorafleet.errors import BaseMismatchError, InvalidInputError, RejectedUpdateError

# Factors whose product is small because they cancel are how a large update hides from whoever computes in float32: of
# a trained update ``‖A‖ ‖B‖`` is a small multiple of ``‖B A‖``, at most the root of the rank where no direction counts.
MAX_CANCELLATION = 100.0


@dataclass(frozen=True)
class UpdatePolicy:
    """Limits that a federation sets on its members' updates."""

    max_rank: int = 256
    max_examples: int = 100_000
    max_norm: float = 1e4
    """Largest Frobenius norm of the whole update's product; a module's ``‖A‖ ‖B‖`` may be 100 times as large."""

    def __post_init__(self) -> None:
        for name in ("max_rank", "max_examples"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"policy.{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.max_norm < math.inf:
            raise InvalidInputError(f"policy.max_norm is {self.max_norm}, expected a finite number above 0")


@dataclass(frozen=True)
class CheckedUpdate:
    header: UpdateHeader
    residual: LoraAdapter | None
    """None for an evaluation alone."""
    metrics: dict[str, float]
    size_bytes: int


def check_update(
    order: TrainOrder,
    header: Mapping[str, Any],
    arrays: Mapping[str, npt.NDArray[Any]],
    metrics: Mapping[str, Any],
    *,
    expert: LoraAdapter | None = None,
    shapes: ModuleShapes,
    policy: UpdatePolicy,
) -> CheckedUpdate:
    """Verify one reply against the order that asked for it, and the ``expert`` that was sent with the order.

    Raises RejectedUpdateError with a reason code.
    """
    try:
        head = UpdateHeader.from_config(header)
    except InvalidInputError as error:
        raise RejectedUpdateError("header", str(error)) from None
    for name in ("federation", "round", "attempt", "member", "base_digest", "expert_digest"):
        found, expected = getattr(head, name), getattr(order, name)
        if found != expected:
            raise RejectedUpdateError("order", f"{name} is {found!r}, the order said {expected!r}")
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if name != one_line(name):
            raise RejectedUpdateError("metrics", f"found the name {name!r}, expected a short printable one")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RejectedUpdateError("metrics", f"{name} is {value!r}, expected a finite number")
        numbers[name] = float(value)
    if order.reports == "nothing" and numbers:
        raise RejectedUpdateError("metrics", f"found {', '.join(sorted(numbers))}, the order wanted no reports")
    if order.steps == 0:
        return CheckedUpdate(head, None, numbers, 0)
    try:
        residual = from_arrays(arrays, base=order.base_digest)
    except InvalidInputError as error:
        raise RejectedUpdateError("factors", str(error)) from None
    check_factors(residual, order, head, shapes, policy)
    check_frozen(residual, order, expert)
    size_bytes = sum(array.nbytes for array in arrays.values())
    return CheckedUpdate(head, residual, numbers, size_bytes)


def check_factors(
    residual: LoraAdapter, order: TrainOrder, head: UpdateHeader, shapes: ModuleShapes, policy: UpdatePolicy
) -> None:
    try:
        check_fits(residual, shapes)
    except BaseMismatchError as error:
        raise RejectedUpdateError("modules", str(error)) from None
    limit = order.rank or policy.max_rank
    if residual.rank > limit or head.rank > limit:
        raise RejectedUpdateError("rank", f"found rank {max(residual.rank, head.rank)}, at most {limit} was agreed")
    try:
        for path, (a, b) in residual.modules.items():
            check_size(path, Shape(rank=a.shape[0], d_in=a.shape[1], d_out=b.shape[0]))
    except InvalidInputError as error:  # no store takes it
        raise RejectedUpdateError("rank", str(error)) from None
    if residual.digest != head.digest:
        raise RejectedUpdateError(
            "digest", f"the factors have digest {residual.digest[:19]}, the header says {head.digest[:19]}"
        )
    if not 1 <= head.num_examples <= policy.max_examples:
        raise RejectedUpdateError("count", f"num_examples is {head.num_examples}, expected 1 to {policy.max_examples}")
    if head.num_examples > (most := order.steps * order.batch_size):
        raise RejectedUpdateError(
            "count",
            f"num_examples is {head.num_examples}, {order.steps} steps of {order.batch_size} see {most} at most",
        )
    if order.reports == "nothing" and head.num_examples != 1:
        raise RejectedUpdateError("count", f"num_examples is {head.num_examples}, expected 1: all weigh the same")
    size = math.hypot(*(float(norm(pair)) for pair in residual.modules.values()))
    if not size <= policy.max_norm:
        raise RejectedUpdateError("norm", f"the update's norm is {size:.3g}, at most {policy.max_norm:.3g} is allowed")
    factors = max(float(a.double().norm() * b.double().norm()) for a, b in residual.modules.values())
    if not factors <= MAX_CANCELLATION * policy.max_norm:
        raise RejectedUpdateError(
            "norm", f"a module's ‖A‖ ‖B‖ is {factors:.3g}, at most {MAX_CANCELLATION * policy.max_norm:.3g} is allowed"
        )


def check_frozen(residual: LoraAdapter, order: TrainOrder, expert: LoraAdapter | None) -> None:
    """The factor that the order held still is in the update as it was, bit by bit."""
    for path, (a, b) in residual.modules.items():
        try:
            expected = frozen_factor(order, expert, path, width=a.shape[1])
        except InvalidInputError as error:
            raise RejectedUpdateError("frozen", str(error)) from None
        found = a if order.trains == "b" else b
        if expected is not None and not torch.equal(found, expected):
            raise RejectedUpdateError(
                "frozen", f"{path}: found another {'A' if order.trains == 'b' else 'B'} than the order held still"
            )
