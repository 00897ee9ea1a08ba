"""Grouping of members by what they learn, on products that are never formed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.coordinator.clusters import SHARED, assign, partition, similarity

SHAPES = {"q": (24, 32), "down": (32, 80)}


def learned(direction: int, noise_seed: int, rank: int, noise: float = 0.3) -> LoraAdapter:
    """An update that points to ``direction`` up to noise; ranks are nested."""
    common, own = torch.Generator().manual_seed(direction), torch.Generator().manual_seed(100 + noise_seed)
    modules = {}
    for path, (d_out, d_in) in SHAPES.items():
        a = torch.randn(16, d_in, generator=common)[:rank]
        b = torch.randn(d_out, 16, generator=common)[:, :rank]
        modules[path] = LoraPair(a, b + noise * torch.randn(d_out, rank, generator=own))
    return LoraAdapter(modules)


def fleet(directions: dict[str, int]) -> dict[str, LoraAdapter]:
    ranks = (4, 8, 16, 12, 6)
    return {m: learned(d, i, ranks[i % len(ranks)]) for i, (m, d) in enumerate(sorted(directions.items()))}


def test_similarity_is_the_cosine_of_the_dense_updates() -> None:
    adapters = [learned(1, 0, 4), learned(1, 1, 8), learned(2, 2, 16)]
    flat = [torch.cat([a.delta(p).flatten() for p in sorted(SHAPES)]) for a in adapters]
    expected = [[float(torch.nn.functional.cosine_similarity(x, y, dim=0)) for y in flat] for x in flat]
    np.testing.assert_allclose(similarity(adapters), expected, atol=1e-5)


def test_a_vanishing_update_is_similar_to_nobody() -> None:
    zero = LoraAdapter(
        {p: LoraPair(torch.zeros(2, d_in), torch.zeros(d_out, 2)) for p, (d_out, d_in) in SHAPES.items()}
    )
    found = similarity([learned(1, 0, 4), zero])
    assert np.isfinite(found).all()
    assert found[0, 1] == 0.0


@pytest.mark.parametrize("kinds", [2, 3, 4])
def test_the_number_of_clusters_comes_from_the_data(kinds: int) -> None:
    directions = {f"m{i}": i % kinds for i in range(4 * kinds)}
    found = assign(fleet(directions), previous={}, min_size=2)
    assert len(set(found.values())) == kinds
    assert all((found[a] == found[b]) == (directions[a] == directions[b]) for a in found for b in found)


def test_updates_without_structure_make_one_cluster() -> None:
    generator = np.random.default_rng(0)
    noise = generator.uniform(0.0, 0.02, (6, 6))
    assert partition((noise + noise.T) / 2) == [0] * 6


def test_a_cluster_below_the_minimum_falls_to_the_shared_expert() -> None:
    found = assign(fleet({"a": 1, "b": 1, "c": 2, "d": 2, "lonely": 3}), previous={}, min_size=2)
    assert found["lonely"] == SHARED
    assert SHARED not in {found["a"], found["c"]}


def test_labels_follow_the_members_from_round_to_round() -> None:
    members = fleet({"a": 1, "b": 1, "c": 2, "d": 2})
    first = assign(members, previous={}, min_size=2)
    swapped = {m: {"expert-1": "expert-2", "expert-2": "expert-1"}[label] for m, label in first.items()}
    assert assign(members, previous=first, min_size=2) == first
    assert assign(members, previous=swapped, min_size=2) == swapped


def test_a_member_can_move_to_another_cluster() -> None:
    before = assign(fleet({"a": 1, "b": 1, "c": 2, "d": 2, "e": 1}), previous={}, min_size=2)
    after = assign(fleet({"a": 1, "b": 1, "c": 2, "d": 2, "e": 2}), previous=before, min_size=2)
    assert before["e"] == before["a"]
    assert after["e"] == after["c"] == before["c"]
    assert after["a"] == before["a"]


def test_a_new_cluster_opens_a_new_label() -> None:
    before = assign(fleet({"a": 1, "b": 1, "c": 2, "d": 2}), previous={}, min_size=2)
    after = assign(fleet({"a": 1, "b": 1, "c": 2, "d": 2, "e": 3, "f": 3}), previous=before, min_size=2)
    assert {m: after[m] for m in before} == before
    assert after["e"] == after["f"] == "expert-3"


def test_a_label_that_lost_its_members_is_not_given_to_others() -> None:
    found = assign(fleet({"a": 1, "b": 1, "c": 2, "d": 2}), previous={}, min_size=2, used={"expert-1", "shared"})
    assert set(found.values()) == {"expert-2", "expert-3"}


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_members_are_one_cluster(count: int) -> None:
    found = assign(fleet({f"m{i}": i for i in range(count)}), previous={}, min_size=2)
    assert set(found.values()) == ({SHARED} if count == 1 else {"expert-1"})
