"""From one round's updates to the next experts.

Every member k trained a residual R_k on top of the frozen expert E_{c(k)} that it was given. The model that it holds is
``W + E_{c(k)} + R_k``, and a group's next expert is the weighted mean of its members' models, in product space::

    E'_G = Σ_{k∈G} p_k (E_{c(k)} + R_k),   p_k = n_k / Σ_{j∈G} n_j

Where all members hold the same expert this is ``E + Σ p_k R_k``. The sum of experts is always exact; the federation's
rule decides how the residuals are summed. Then the expert is truncated optimally to its rank, and what that costs is
reported per module. No restart from zero: what a round learned stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorafleet.adapters import LoraAdapter, weighted_sum
from lorafleet.coordinator.clusters import SHARED
from lorafleet.coordinator.tree import Reducer, Weighted


@dataclass(frozen=True)
class MemberUpdate:
    """One accepted update, with what it was trained on top of."""

    residual: LoraAdapter
    num_examples: int
    held: str
    """Label of the expert that the member trained on; empty for the bare base."""


@dataclass(frozen=True)
class NextExpert:
    label: str
    weights: LoraAdapter
    """float32, truncated to the expert's rank"""
    parents: tuple[str, ...]
    """Digests of the experts it grew from, and of the updates."""
    members: int
    truncation_error: Mapping[str, float]
    """Relative Frobenius error per module that the truncation cost."""


def full_update(update: MemberUpdate, experts: Mapping[str, LoraAdapter]) -> LoraAdapter:
    """All that a member holds beyond the base, ``E_{c(k)} + R_k``, exactly; what clustering compares."""
    if not update.held:
        return update.residual
    return weighted_sum([experts[update.held], update.residual], [1.0, 1.0])


def next_experts(
    updates: Mapping[str, MemberUpdate],
    assignment: Mapping[str, str],
    experts: Mapping[str, LoraAdapter],
    *,
    rule: str,
    reducer: Reducer,
    rank: int,
) -> list[NextExpert]:
    """One expert per label of ``assignment`` and the shared expert over everybody, in label order."""
    groups: dict[str, list[str]] = {SHARED: sorted(updates)}
    for member in sorted(updates):
        if assignment[member] != SHARED:
            groups.setdefault(assignment[member], []).append(member)
    return [
        _next_expert(label, {m: updates[m] for m in groups[label]}, experts, rule=rule, reducer=reducer, rank=rank)
        for label in sorted(groups)
    ]


def _next_expert(
    label: str,
    updates: Mapping[str, MemberUpdate],
    experts: Mapping[str, LoraAdapter],
    *,
    rule: str,
    reducer: Reducer,
    rank: int,
) -> NextExpert:
    total = sum(update.num_examples for update in updates.values())
    shares = {member: update.num_examples / total for member, update in updates.items()}
    residual = reducer.reduce(rule, {m: Weighted(u.residual, shares[m]) for m, u in updates.items()})
    held: dict[str, float] = {}
    for member, update in updates.items():
        if update.held:
            held[update.held] = held.get(update.held, 0.0) + shares[member]
    grown = sorted(held)
    terms = [experts[name].to(torch.float64) for name in grown]
    untruncated = weighted_sum([*terms, residual], [*(held[name] for name in grown), 1.0])
    truncated, errors = untruncated.compressed(rank=rank)
    return NextExpert(
        label=label,
        weights=truncated.to(torch.float32),
        parents=(*(experts[name].digest for name in grown), *(updates[m].residual.digest for m in sorted(updates))),
        members=len(updates),
        truncation_error=errors,
    )
