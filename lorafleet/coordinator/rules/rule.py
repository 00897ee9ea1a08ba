"""What a rule is: a sum that can be taken in any grouping.

A rule lifts each update to a partial result and merges partial results, module by module. Merging a merge gives the
same aggregate up to float64 rounding, so that a tree of workers can take the sum; with a fixed tree, the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.errors import BaseMismatchError, InvalidInputError

Modules = dict[str, LoraPair]
"""Partial results of one shard of modules, in float64."""


@dataclass(frozen=True)
class Rule:
    """An aggregation rule as two pure functions on one module's factors."""

    name: str
    formula: str
    exact: bool
    """Whether the aggregate is Σ p_k B_k A_k, whatever the ranks."""
    mixed_ranks: bool
    lift: Callable[[LoraPair, float], LoraPair]
    """(one member's pair in float64, its weight p_k) → its partial result"""
    merge: Callable[[Sequence[LoraPair]], LoraPair]
    """partial results → their joint partial result; the last one is the aggregate"""

    def __call__(self, adapters: Sequence[LoraAdapter], weights: Sequence[float]) -> LoraAdapter:
        """The untruncated aggregate of ``adapters`` with ``weights`` as given (not normalised), in float64."""
        if len(adapters) != len(weights) or not adapters:
            raise InvalidInputError(
                f"found {len(adapters)} adapters and {len(weights)} weights, expected as many of each, at least one"
            )
        lifted = [lift_all(self, dict(a.modules), w) for a, w in zip(adapters, weights, strict=True)]
        return LoraAdapter(merge_all(self, lifted), common_base(adapters))


def common_base(adapters: Sequence[LoraAdapter]) -> str:
    bases = sorted({adapter.base for adapter in adapters if adapter.base})
    if len(bases) > 1:
        raise BaseMismatchError(
            f"the adapters belong to different bases: {', '.join(bases)}; aggregate one base at a time"
        )
    return bases[0] if bases else ""


def lift_all(rule: Rule, modules: Modules, weight: float) -> Modules:
    return {
        path: rule.lift(LoraPair(a.to(torch.float64), b.to(torch.float64)), weight) for path, (a, b) in modules.items()
    }


def merge_all(rule: Rule, parts: Sequence[Modules]) -> Modules:
    """Merge module by module, in the order given; a member that does not adapt a module adds nothing there."""
    merged: Modules = {}
    for path in sorted({path for part in parts for path in part}):
        pairs = [part[path] for part in parts if path in part]
        shapes = {(pair.b.shape[0], pair.a.shape[1]) for pair in pairs}
        if len(shapes) > 1:
            raise BaseMismatchError(
                f"{path}: found updates of shapes {sorted(shapes)}, expected one: these are not of one base"
            )
        merged[path] = rule.merge(pairs)
    return merged
