"""How exact the aggregation is: the tree's untruncated sum of the last round's updates, against dense float64."""

from __future__ import annotations

import random

import torch

from lorafleet.adapters import LoraAdapter
from lorafleet.coordinator.tree import Reducer, Weighted
from lorafleet.registry import Federation, Registry

# The largest uneven weight over the smallest, as between a member with a hundred times another's samples.
UNEVEN_RATIO = 100.0
UNEVEN_SEED = 0


def journalled_updates(registry: Registry, federation: Federation) -> dict[str, Weighted]:
    """The accepted updates of the last committed round, weighted by their sample counts."""
    last = max((r for r in registry.rounds(federation) if r.state == "committed"), key=lambda r: r.number)
    records = registry.updates(last)
    total = sum(record.num_examples for record in records)
    return {r.member: Weighted(registry.update_factors(r), r.num_examples / total) for r in records}


def relative_error(updates: dict[str, Weighted], reducer: Reducer) -> float:
    """``‖tree − dense‖_F / ‖dense‖_F`` of the worst module, under the updates' own weights and under uneven ones.

    The tree's sum is rounded to float32, as it is shipped. Own weights alone would show little: members who do the
    same number of steps weigh the same.
    """
    return max(sum_error(chosen, reducer) for chosen in (updates, unevenly_weighted(updates)))


def unevenly_weighted(updates: dict[str, Weighted]) -> dict[str, Weighted]:
    """The same updates under weights that sum to 1, evenly spaced in logarithm over 1:100, dealt by a fixed seed."""
    steps = max(1, len(updates) - 1)
    sizes = [UNEVEN_RATIO ** (k / steps) for k in range(len(updates))]
    random.Random(UNEVEN_SEED).shuffle(sizes)
    dealt = zip(sorted(updates), sizes, strict=True)
    return {member: updates[member]._replace(weight=size / sum(sizes)) for member, size in dealt}


def sum_error(updates: dict[str, Weighted], reducer: Reducer) -> float:
    """The worst module's relative error under the weights as given."""
    summed = reducer.reduce("exact", updates).to(torch.float32)
    paths = set(summed.modules).union(*(adapter.modules for adapter, _ in updates.values()))
    return max(module_error(summed, updates, path) for path in sorted(paths))


def module_error(summed: LoraAdapter, updates: dict[str, Weighted], path: str) -> float:
    """One module's relative error; a module that the sum lacks counts as zeros there, one that no update has as ∞."""
    terms = [
        weight * (adapter.modules[path].b.double() @ adapter.modules[path].a.double())
        for adapter, weight in updates.values()
        if path in adapter.modules
    ]
    if not terms:
        return float("inf")
    dense = torch.stack(terms).sum(dim=0)
    pair = summed.modules.get(path)
    found = torch.zeros_like(dense) if pair is None else pair.b.double() @ pair.a.double()
    difference = torch.linalg.matrix_norm(found - dense)
    return 0.0 if difference == 0 else float(difference / torch.linalg.matrix_norm(dense))
