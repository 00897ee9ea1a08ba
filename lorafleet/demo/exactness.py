"""How exact the aggregation is: the tree's untruncated sum of the last round's updates, against dense float64."""

from __future__ import annotations

import torch

from lorafleet.adapters import LoraAdapter
from lorafleet.coordinator.tree import Reducer, Weighted
from lorafleet.registry import Federation, Registry


def journalled_updates(registry: Registry, federation: Federation) -> dict[str, Weighted]:
    """The accepted updates of the last committed round, weighted by their sample counts."""
    last = max((r for r in registry.rounds(federation) if r.state == "committed"), key=lambda r: r.number)
    records = registry.updates(last)
    total = sum(record.num_examples for record in records)
    return {r.member: Weighted(registry.update_factors(r), r.num_examples / total) for r in records}


def relative_error(updates: dict[str, Weighted], reducer: Reducer) -> float:
    """``‖tree − dense‖_F / ‖dense‖_F``, the worst module; the tree's sum is rounded to float32, as it is shipped."""
    summed = reducer.reduce("exact", updates).to(torch.float32)
    return max(module_error(summed, updates, path) for path in summed.modules)


def module_error(summed: LoraAdapter, updates: dict[str, Weighted], path: str) -> float:
    terms = [
        weight * (adapter.modules[path].b.double() @ adapter.modules[path].a.double())
        for adapter, weight in updates.values()
        if path in adapter.modules
    ]
    dense = torch.stack(terms).sum(dim=0)
    return float(
        torch.linalg.matrix_norm(summed.to(torch.float64).delta(path) - dense) / torch.linalg.matrix_norm(dense)
    )
