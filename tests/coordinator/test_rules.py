"""Every rule against its dense float64 formula, over unlike ranks and modules that are not square."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.coordinator.rules import RULES, get_rule
from lorafleet.coordinator.tree import LocalReducer, Weighted
from lorafleet.errors import BaseMismatchError, InvalidInputError, UnknownNameError

SHAPES = {"model.q": (32, 48), "model.k": (16, 48), "model.down": (48, 96)}
RANKS = (4, 8, 16, 32, 5)
WEIGHTS = (0.1, 0.3, 0.2, 0.15, 0.25)


def adapter(rank: int, seed: int, base: str = "b") -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    return LoraAdapter(
        {
            path: LoraPair(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))
            for path, (d_out, d_in) in SHAPES.items()
        },
        base,
    )


@pytest.fixture
def updates() -> list[LoraAdapter]:
    return [adapter(rank, seed) for seed, rank in enumerate(RANKS)]


def dense_exact(updates: list[LoraAdapter], path: str) -> torch.Tensor:
    pairs = [u.modules[path] for u in updates]
    return sum(
        (w * (p.b.double() @ p.a.double()) for p, w in zip(pairs, WEIGHTS, strict=True)), torch.zeros(()).double()
    )


def dense_fedit(updates: list[LoraAdapter], path: str) -> torch.Tensor:
    rank = max(RANKS)
    d_out, d_in = SHAPES[path]
    a, b = torch.zeros(rank, d_in).double(), torch.zeros(d_out, rank).double()
    for update, weight in zip(updates, WEIGHTS, strict=True):
        pair = update.modules[path]
        a += weight * torch.nn.functional.pad(pair.a.double(), (0, 0, 0, rank - pair.rank))
        b += weight * torch.nn.functional.pad(pair.b.double(), (0, rank - pair.rank))
    return b @ a


FORMULAS = {"exact": dense_exact, "fedit": dense_fedit}


@pytest.mark.parametrize("name", sorted(RULES))
def test_rule_equals_its_dense_formula(name: str, updates: list[LoraAdapter]) -> None:
    aggregate = RULES[name](updates, WEIGHTS)
    for path in SHAPES:
        expected = FORMULAS[name](updates, path)
        error = torch.linalg.matrix_norm(aggregate.delta(path) - expected) / torch.linalg.matrix_norm(expected)
        assert error < 1e-12, path


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_single_update_at_weight_one_comes_back_unchanged(name: str, updates: list[LoraAdapter]) -> None:
    aggregate = RULES[name](updates[:1], [1.0])
    for path in SHAPES:
        torch.testing.assert_close(aggregate.delta(path), updates[0].to(torch.float64).delta(path))


@pytest.mark.parametrize("name", sorted(RULES))
def test_any_grouping_gives_the_same_aggregate(name: str, updates: list[LoraAdapter]) -> None:
    rule = RULES[name]
    members = {f"m{i}": Weighted(u, w) for i, (u, w) in enumerate(zip(updates, WEIGHTS, strict=True))}
    tree = LocalReducer().reduce(name, members)
    for path in SHAPES:
        torch.testing.assert_close(tree.delta(path), rule(updates, WEIGHTS).delta(path), rtol=1e-11, atol=1e-11)


def test_reduction_has_the_same_bits_whatever_the_order_of_arrival(updates: list[LoraAdapter]) -> None:
    members = {f"m{i}": Weighted(u, w) for i, (u, w) in enumerate(zip(updates, WEIGHTS, strict=True))}
    digests = {
        LocalReducer().reduce("exact", dict(order)).compressed(rank=16)[0].digest
        for order in itertools.islice(itertools.permutations(members.items()), 0, 120, 17)
    }
    assert len(digests) == 1


def test_exact_aggregate_never_outgrows_the_matrix(updates: list[LoraAdapter]) -> None:
    many = RULES["exact"](updates * 4, [w / 4 for w in WEIGHTS] * 4)
    for path, (d_out, d_in) in SHAPES.items():
        assert many.modules[path].rank <= min(d_out, d_in)
        torch.testing.assert_close(many.delta(path), dense_exact(updates, path), rtol=1e-10, atol=1e-10)


def test_fedit_is_not_exact_on_these_updates(updates: list[LoraAdapter]) -> None:
    exact, fedit = dense_exact(updates, "model.q"), RULES["fedit"](updates, WEIGHTS).delta("model.q")
    assert torch.linalg.matrix_norm(fedit - exact) > 0.1 * torch.linalg.matrix_norm(exact)


def test_a_module_that_one_member_lacks_is_summed_over_the_others(updates: list[LoraAdapter]) -> None:
    partial = LoraAdapter({"model.q": updates[1].modules["model.q"]})
    aggregate = RULES["exact"]([updates[0], partial], [0.5, 0.5])
    torch.testing.assert_close(aggregate.delta("model.k"), 0.5 * updates[0].to(torch.float64).delta("model.k"))


def test_updates_of_unlike_bases_are_refused(updates: list[LoraAdapter]) -> None:
    with pytest.raises(BaseMismatchError, match="different bases"):
        RULES["exact"]([updates[0], adapter(4, 9, base="other")], [0.5, 0.5])
    wrong = LoraAdapter({"model.q": LoraPair(torch.ones(2, 49), torch.ones(32, 2))}, "b")
    with pytest.raises(BaseMismatchError, match="not of one base"):
        RULES["exact"]([updates[0], wrong], [0.5, 0.5])


def test_nothing_to_aggregate_is_refused() -> None:
    with pytest.raises(InvalidInputError):
        RULES["exact"]([], [])
    with pytest.raises(InvalidInputError):
        LocalReducer().reduce("exact", {})


def test_an_unknown_rule_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="exact, fedit"):
        get_rule("average")


def test_importing_rules_loads_neither_flwr_nor_ray() -> None:
    code = "import sys, lorafleet.coordinator.rules; sys.exit(bool({'flwr', 'ray', 'sqlalchemy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
