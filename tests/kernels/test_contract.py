"""The contract: against float64, at most 1.5 times the error of a model with the same mixture merged in, same dtype.

d_in is at least the sum of the ranks here, as in practice: in float32 the error is that of two sums, over d_in and over
the ranks, and a merged model has only the first. With 512 ranks on a d_in of 192 the ratio is 1.51.
"""

from __future__ import annotations

import pytest
import torch

from lorafleet.kernels import PATHS, Bank, GroupSpec, ModuleSpec, Plan, Run, paths_on

D_IN, D_OUT = 512, 160


def error_ratio(
    path: str,
    *,
    dtype: torch.dtype,
    bank_dtype: torch.dtype,
    size: float,
    weights: list[float],
    ranks: list[int],
    tokens: int,
    seed: int,
) -> float:
    """RMS error of base plus mixture, over that of the merged model; ``size`` is the mixture's beside the base's."""
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(D_OUT, D_IN, generator=generator) / D_IN**0.5).to(dtype)
    bank = Bank([GroupSpec("group", D_IN, (ModuleSpec("m", D_OUT),))], dtype=bank_dtype)
    merged = w.double()
    total = sum(weight**2 for weight in weights) ** 0.5
    mix = []
    for index, (rank, weight) in enumerate(zip(ranks, weights, strict=True)):
        a = torch.randn(rank, D_IN, generator=generator) / D_IN**0.5
        b = torch.randn(D_OUT, rank, generator=generator) * size / (total * rank**0.5)
        bank.add(f"a{index}", bank.pages({"m": (a, b)}))
        merged += weight * (b.double() @ a.double())
        mix.append((f"a{index}", weight))
    x = torch.randn(tokens, D_IN, generator=generator).to(dtype)
    exact = x.double() @ merged.T
    packing = bank.pack([key for key, _ in mix])
    y = x @ w.T
    PATHS[path](y, x, packing.groups["group"], Plan([Run(tuple(mix), tokens)], packing.keys))

    def error(result: torch.Tensor) -> float:
        return (result.double() - exact).square().mean().sqrt().item()

    return error(y) / error(x @ merged.to(dtype).T)


DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 on a float32 bank": (torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [0.1, 1.0, 4.0], ids=["small beside the base", "as large", "far larger"])
@pytest.mark.parametrize("adapters", [1, 3, 8])
@pytest.mark.parametrize("path", [path for path in paths_on("cpu") if path != "reference"])
def test_error_is_at_most_that_of_a_merged_model(
    path: str, adapters: int, size: float, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        ranks = torch.randint(4, 65, (adapters,), generator=generator).tolist()
        uneven = (torch.rand(adapters, generator=generator) * 7.9 + 0.1).tolist()
        steps = (torch.randint(1, 257, (adapters,), generator=generator) / 64).tolist()
        for weights in (uneven, steps):  # bfloat16 holds only the second exactly
            for tokens in (24, 130):
                ratio = error_ratio(
                    path,
                    dtype=dtypes[0],
                    bank_dtype=dtypes[1],
                    size=size,
                    weights=weights,
                    ranks=ranks,
                    tokens=tokens,
                    seed=seed,
                )
                assert ratio <= 1.5, (ranks, weights, tokens)


def test_two_roundings_of_the_intermediate_would_break_the_contract() -> None:
    """What the dense path avoids, so that the test above is known to see it."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, D_IN, generator=generator) / D_IN**0.5
    b = torch.randn(16, D_OUT, generator=generator)
    x = torch.randn(200, D_IN, generator=generator).bfloat16()
    exact = 0.7 * (x.double() @ a.double().T @ b.double())
    h = ((x @ a.bfloat16().T) * 0.7) @ b.bfloat16()
    merged = x @ (0.7 * (b.T @ a)).bfloat16().T
    assert (h.double() - exact).square().mean() > 1.5**2 * (merged.double() - exact).square().mean()
