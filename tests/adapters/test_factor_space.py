"""Products in factor space against dense float64 algebra, on matrices that are not square."""

from __future__ import annotations

import pytest
import torch

from lorafleet.adapters import LoraPair
from lorafleet.adapters.factor_space import compress, inner, norm, stack, svd

SHAPES = [(40, 24), (24, 40), (17, 17), (5, 33)]


def random_pair(d_out: int, d_in: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    return LoraPair(
        torch.randn(rank, d_in, generator=generator, dtype=dtype),
        torch.randn(d_out, rank, generator=generator, dtype=dtype),
    )


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_stacking_is_the_weighted_sum_of_products(d_out: int, d_in: int) -> None:
    pairs = [random_pair(d_out, d_in, rank, seed) for seed, rank in enumerate((1, 4, 9))]
    weights = [0.5, -1.25, 3.0]
    expected = sum((w * p.delta for p, w in zip(pairs, weights, strict=True)), torch.zeros(d_out, d_in).double())
    torch.testing.assert_close(stack(pairs, weights).delta, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_inner_product_and_norm_equal_the_dense_ones(d_out: int, d_in: int) -> None:
    p, q = random_pair(d_out, d_in, 3, 0), random_pair(d_out, d_in, 7, 1)
    torch.testing.assert_close(inner(p, q), (p.delta * q.delta).sum())
    torch.testing.assert_close(norm(p), torch.linalg.matrix_norm(p.delta))


@pytest.mark.parametrize("seed", range(20))
def test_norm_of_float32_factors_is_right_where_columns_nearly_cancel(seed: int) -> None:
    first, change = random_pair(24, 40, 1, seed, torch.float32), random_pair(24, 40, 1, seed + 100, torch.float32)
    pair = LoraPair(torch.cat([first.a, first.a + 1e-4 * change.a]), torch.cat([first.b, -first.b], dim=1))
    expected = torch.linalg.matrix_norm(pair.b.double() @ pair.a.double())
    torch.testing.assert_close(norm(pair), expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("rank", [1, 8, 60])
def test_svd_of_factors_has_the_spectrum_of_the_product(d_out: int, d_in: int, rank: int) -> None:
    pair = random_pair(d_out, d_in, rank, 2)
    found, expected = svd(pair), torch.linalg.svdvals(pair.delta)
    kept = len(found.s)
    assert kept == min(rank, d_out, d_in)
    torch.testing.assert_close(found.s, expected[:kept], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((found.u * found.s) @ found.vt, pair.delta, rtol=1e-10, atol=1e-10)


def test_svd_of_equal_products_has_equal_signs_whatever_the_factors() -> None:
    pair = random_pair(30, 20, 4, 3)
    mix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(9)).double())[0]
    other = LoraPair(mix.T @ pair.a, pair.b @ mix)
    torch.testing.assert_close(svd(pair).u, svd(other).u, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_compression_is_the_best_approximation_of_its_rank(d_out: int, d_in: int) -> None:
    pair = random_pair(d_out, d_in, 12, 4)
    values = torch.linalg.svdvals(pair.delta)
    for rank in (1, 3, 5):
        done = compress(pair, rank=rank)
        assert done.pair.rank == rank
        error = torch.linalg.matrix_norm(pair.delta - done.pair.delta)
        torch.testing.assert_close(error, values[rank:].square().sum().sqrt())
        assert done.error == pytest.approx(float(error / torch.linalg.matrix_norm(pair.delta)), rel=1e-9)


def test_compression_without_a_target_finds_the_true_rank_and_loses_nothing() -> None:
    pair = random_pair(40, 24, 3, 5)
    redundant = stack([pair, pair, pair], [0.2, 0.3, 0.5])
    done = compress(redundant)
    assert done.pair.rank == 3
    torch.testing.assert_close(done.pair.delta, pair.delta, rtol=1e-11, atol=1e-11)
    assert done.error < 1e-12


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_threshold_keeps_the_fewest_components_that_reach_it(energy: float) -> None:
    pair = random_pair(40, 24, 16, 6)
    power = torch.linalg.svdvals(pair.delta).square()
    kept = compress(pair, energy=energy).pair.rank
    share = power.cumsum(0) / power.sum()
    assert share[kept - 1] >= energy
    assert kept == 1 or share[kept - 2] < energy


def test_a_zero_product_compresses_to_a_zero_pair_of_rank_one() -> None:
    done = compress(LoraPair(torch.ones(4, 6), torch.zeros(5, 4)))
    assert done.pair.rank == 1
    assert done.error == 0.0
    assert not done.pair.delta.any()


@pytest.mark.parametrize("arguments", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_impossible_targets_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        compress(random_pair(6, 6, 2, 7), **arguments)  # type: ignore[arg-type]
