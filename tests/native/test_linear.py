"""The product with what stands around it, against the same in float64; nothing is read or written beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lorafleet.native.linear import INNER, MOST_MODULES, Linear, panels_of
from tests.native.marks import needs_tiles

pytestmark = needs_tiles

KIND = torch.bfloat16
TOKENS = (1, 15, 16, 17, 31, 32, 33, 64, 100, 300)
EPSILON = 1e-5
# bfloat16 keeps 8 bits: a result is at most this share of itself away from what was rounded.
ROUNDING = 2**-8
# Of the root of the sum of the squares of what is added up. Float32 sums of up to 2 048 products stay within 2^-18 of
# it; with a norm each normalised input is rounded to bfloat16 (2^-9.8 of itself on average), and the largest of 10^5
# such sums is 5 of those away.
SUMMING, SUMMING_NORMALISED = 2**-17, 2**-7


class Product(NamedTuple):
    """One group's weights and one batch; x, residual and y lie in buffers that are NaN around them, with rows of
    different lengths."""

    weight: Tensor
    bias: Tensor | None
    norm: tuple[Tensor, float] | None
    x: Tensor
    residual: Tensor | None
    d_outs: tuple[int, ...]
    gated: bool
    float_out: bool

    def kernel(self) -> Linear:
        return Linear(
            panels_of(self.weight, gated=self.gated),
            d_in=self.weight.shape[1],
            d_outs=self.d_outs,
            bias=self.bias,
            norm=self.norm,
            gated=self.gated,
            float_out=self.float_out,
        )

    def place(self, tokens: int) -> Tensor:
        columns = sum(self.d_outs) // 2 if self.gated else sum(self.d_outs)
        return guarded(tokens, columns, torch.float32 if self.float_out else KIND)

    def expected(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The result in float64, and how far from it the kernel's may be."""
        x = self.x[:tokens].double()
        summing = SUMMING
        if self.norm is not None:
            x = x * (x.square().mean(1, keepdim=True) + self.norm[1]).rsqrt() * self.norm[0].double()
            summing = SUMMING_NORMALISED
        weight = self.weight.double()
        y, size = x @ weight.T, (x.square() @ weight.T.square()).sqrt()
        if self.bias is not None:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        if self.residual is not None:
            residual = self.residual[:tokens].double()
            y, size = y + residual, size + residual.abs()
        error = summing * size
        if self.gated:
            (gate, up), (of_gate, of_up) = y.chunk(2, 1), error.chunk(2, 1)
            y = functional.silu(gate) * up
            # silu rises by 1.1 at most; exp is 3e-6 away
            error = 1.1 * of_gate * up.abs() + (functional.silu(gate).abs() + 1.1 * of_gate) * of_up + 1e-5 * y.abs()
        return y, error if self.float_out else error + ROUNDING * (y.abs() + error)


def guarded(rows: int, columns: int, dtype: torch.dtype = KIND) -> Tensor:
    """``[rows, columns]`` inside a buffer that is NaN around it; rows begin at odd addresses."""
    return torch.full((rows + 2, columns + 7), float("nan"), dtype=dtype)[1:-1, 3:-4]


def is_nan_around(inner: Tensor) -> bool:
    buffer = inner._base
    assert buffer is not None
    return int(buffer.isnan().sum()) == buffer.numel() - inner.numel()


def product_of(
    d_in: int,
    d_outs: tuple[int, ...],
    *,
    bias: bool = False,
    residual: bool = False,
    norm: bool = False,
    gated: bool = False,
    float_out: bool = False,
    tokens: int = max(TOKENS),
) -> Product:
    generator = torch.Generator().manual_seed(d_in + sum(d_outs))
    columns = sum(d_outs)

    def filled(rows: int, width: int, spare: int) -> Tensor:
        return guarded(rows, width + spare)[:, :width].copy_(torch.randn(rows, width, generator=generator))

    return Product(
        weight=(torch.randn(columns, d_in, generator=generator) / d_in**0.5).to(KIND),
        bias=torch.randn(columns, generator=generator) if bias else None,
        norm=((torch.rand(d_in, generator=generator) + 0.5).to(KIND), EPSILON) if norm else None,
        x=filled(tokens, d_in, 1),
        residual=filled(tokens, columns, 5) if residual else None,
        d_outs=d_outs,
        gated=gated,
        float_out=float_out,
    )


def compute(product: Product, kernel: Linear, tokens: int) -> Tensor:
    y = product.place(tokens)
    kernel.into(y, product.x[:tokens], None if product.residual is None else product.residual[:tokens], None)
    return y


# The last panel of 32 columns is whole, half full, or partly filled.
COLUMNS = {
    "one panel": (32,),
    "half a panel": (16,),
    "70 columns": (70,),
    "one column": (1,),
    "three modules": (48, 16, 80),
    "as many modules as there may be": (16,) * MOST_MODULES,
}
AROUND = {
    "alone": {},
    "bias": {"bias": True},
    "residual": {"residual": True},
    "norm": {"norm": True},
    "all": {"bias": True, "residual": True, "norm": True},
    "float32": {"bias": True, "norm": True, "float_out": True},
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("d_outs", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("d_in", [32, 96, 544, 768, 2048])  # 544: not a whole number of slices
def test_product_is_float64s_to_one_rounding_and_writes_nothing_beside_y(
    d_in: int, d_outs: tuple[int, ...], around: dict[str, bool]
) -> None:
    product = product_of(d_in, d_outs, **around)
    kernel = product.kernel()
    for tokens in TOKENS:
        y = compute(product, kernel, tokens)
        expected, error = product.expected(tokens)
        assert ((y.double() - expected).abs() <= error).all(), f"{tokens} tokens"
        assert is_nan_around(y), f"{tokens} tokens"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("d_in", "width"), [(32, 16), (96, 48), (544, 272), (768, 80), (2048, 32)])
def test_gated_product_is_silu_of_the_first_half_times_the_second(
    d_in: int, width: int, norm: bool, bias: bool
) -> None:
    product = product_of(d_in, (width, width), norm=norm, bias=bias, gated=True)
    kernel = product.kernel()
    for tokens in TOKENS:
        y = compute(product, kernel, tokens)
        expected, error = product.expected(tokens)
        assert ((y.double() - expected).abs() <= error).all(), f"{tokens} tokens"
        assert is_nan_around(y), f"{tokens} tokens"


@pytest.mark.parametrize("d_outs", [(48, 16, 80), (70,)])
def test_y_may_be_the_residual(d_outs: tuple[int, ...]) -> None:
    product = product_of(96, d_outs, residual=True, bias=True)
    assert product.residual is not None
    kernel = product.kernel()
    for tokens in TOKENS:
        beside = compute(product, kernel, tokens)
        y = guarded(tokens, sum(d_outs)).copy_(product.residual[:tokens])
        kernel.into(y, product.x[:tokens], y, None)
        assert torch.equal(y, beside)
        assert is_nan_around(y)


@pytest.mark.parametrize("float_out", [False, True])
@pytest.mark.parametrize("columns", [48, 1024, 2048])
def test_a_call_gives_a_new_tensor_of_the_result(columns: int, float_out: bool) -> None:
    product = product_of(64, (columns,), float_out=float_out, tokens=33)
    y = product.kernel()(product.x)
    assert y.dtype == (torch.float32 if float_out else KIND)
    assert y.shape == (33, columns)
    assert torch.equal(y, compute(product, product.kernel(), 33))


def test_no_tokens_give_no_rows() -> None:
    for around in AROUND.values():
        product = product_of(64, (48,), **around)
        assert product.kernel()(product.x[:0], None).shape == (0, 48)


def test_without_a_weight_the_residual_is_all() -> None:
    product = product_of(64, (48, 32), residual=True, tokens=40)
    alone = Linear(None, d_in=64, d_outs=product.d_outs)
    y = alone(product.x, product.residual)
    assert product.residual is not None
    assert torch.equal(y, product.residual)


# The first: threads take several panels at a time, and those of 300 tokens do not fit into the cache.
SHAPES = [(2048, (528, 496, 80)), (96, (48, 16, 80)), (544, (70,))]


@pytest.mark.parametrize("around", [AROUND["all"], AROUND["float32"]], ids=["all", "float32"])
@pytest.mark.parametrize(("d_in", "d_outs"), SHAPES)
def test_one_and_two_threads_give_the_same_bits(d_in: int, d_outs: tuple[int, ...], around: dict[str, bool]) -> None:
    product = product_of(d_in, d_outs, **around)
    for tokens in (1, 33, 300):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(compute(product, product.kernel(), tokens))
        assert torch.equal(*results), f"{tokens} tokens"


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize(("d_in", "d_outs"), SHAPES)
def test_a_token_alone_gets_the_same_bits_as_among_300(
    d_in: int, d_outs: tuple[int, ...], around: dict[str, bool]
) -> None:
    product = product_of(d_in, d_outs, **around)
    kernel = product.kernel()
    together = compute(product, kernel, 300)
    for token in (0, 15, 16, 31, 32, 150, 287, 299):
        own = slice(token, token + 1)
        residual = None if product.residual is None else product.residual[own]
        assert torch.equal(kernel(product.x[own], residual), together[own]), f"token {token}"


def test_calls_of_several_threads_do_not_meet() -> None:
    """The interpreter's lock is not held in a call, and each call has buffers that are kept."""
    products = [product_of(d_in, (48, 80), norm=True, tokens=65) for d_in in (96, 768)]
    expected = [product.kernel()(product.x) for product in products]
    right = [False, False]

    def work(index: int) -> None:
        torch.set_num_threads(2)
        kernel = products[index].kernel()
        right[index] = all(torch.equal(kernel(products[index].x), expected[index]) for _ in range(100))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True, True]


def test_norm_of_zeros_is_zero() -> None:
    product = product_of(96, (48,), norm=True, bias=True)
    y = product.kernel()(torch.zeros(17, 96, dtype=KIND))
    assert product.bias is not None
    assert torch.equal(y, product.bias.to(KIND).expand(17, -1))


def test_norm_is_right_for_inputs_of_any_size() -> None:
    """Squares of 1e15 and of 1e-15 are within float32, which goes from 1e-38 to 1e38."""
    product = product_of(96, (48,), norm=True, tokens=40)
    for size in (1e15, 1e-3, 1e-15):
        scaled = product._replace(x=(product.x.float() * size).to(KIND))
        expected, error = scaled.expected(40)
        assert ((scaled.kernel()(scaled.x).double() - expected).abs() <= error).all(), size


def test_silu_of_any_number_is_torchs() -> None:
    gates = [0.0, -0.0, 1.0, -1.0, 20.0, -20.0, 79.0, -79.0, 81.0, -81.0, -1e4, 1e20, 3e38, -3e38]
    gates += [float("inf"), float("nan")]
    width = 16
    bias = torch.ones(2 * width)
    bias[: len(gates)] = torch.tensor(gates)
    kernel = Linear(
        panels_of(torch.zeros(2 * width, INNER, dtype=KIND), gated=True),
        d_in=INNER,
        d_outs=[width, width],
        bias=bias,
        gated=True,
    )
    y = kernel(torch.zeros(1, INNER, dtype=KIND))[0]
    # Far below, silu is -0.0 in float32 and 1e-31 here.
    torch.testing.assert_close(
        y.float(), functional.silu(bias[:width]).to(KIND).float(), rtol=ROUNDING, atol=1e-30, equal_nan=True
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_token(value: float) -> None:
    product = product_of(96, (48, 80), norm=True, residual=True, tokens=40)
    kernel = product.kernel()
    expected = compute(product, kernel, 40)
    product.x[20, 50] = value
    y = compute(product, kernel, 40)
    assert y[20].isnan().all()
    others = [token for token in range(40) if token != 20]
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 96),
        torch.zeros(3, 96, dtype=torch.float16),
        torch.zeros(96, 3, dtype=KIND).T,
        torch.zeros(3, 192, dtype=KIND)[:, ::2],
    ],
    ids=["float32", "float16", "columns apart", "every other column"],
)
def test_an_input_that_would_be_misread_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="columns side by side"):
        product_of(96, (48,)).kernel()(x)


@pytest.mark.parametrize("gated", [False, True])
def test_panels_hold_the_weight_once_and_zeros_behind_it(gated: bool) -> None:
    """By the definition of their order: which element of the weight stands where."""
    columns, d_in = (96, 64) if gated else (70, 64)
    weight = torch.randn(columns, d_in, generator=torch.Generator().manual_seed(0)).to(KIND)
    panels = panels_of(weight, gated=gated)
    assert panels.shape == (3, 2, 2, 16, 16, 2)
    assert panels.is_contiguous()
    for panel in range(3):
        for unit in range(2):
            for column in range(16):
                row = unit * columns // 2 + panel * 16 + column if gated else panel * 32 + unit * 16 + column
                found = panels[panel, :, unit, :, column].reshape(-1)
                assert torch.equal(found, weight[row] if row < columns else torch.zeros(d_in, dtype=KIND))


@pytest.mark.parametrize(
    "refused",
    [
        lambda kernel: kernel(torch.zeros(3, 16, dtype=KIND)),
        lambda kernel: kernel(torch.zeros(3, 64, dtype=KIND)),
        lambda kernel: kernel(torch.zeros(3, 32, dtype=KIND), torch.zeros(3, 16, dtype=KIND)),
        lambda kernel: kernel(torch.zeros(3, 32, dtype=KIND), torch.zeros(2, 32, dtype=KIND)),
        lambda kernel: kernel(torch.zeros(3, 32, dtype=KIND), torch.zeros(3, 32)),
        lambda kernel: kernel(torch.zeros(3, 32, dtype=KIND), torch.zeros(32, 3, dtype=KIND).T),
        lambda kernel: kernel.into(torch.zeros(3, 32), torch.zeros(3, 32, dtype=KIND), None, None),
        lambda kernel: kernel.into(torch.zeros(32, 3, dtype=KIND).T, torch.zeros(3, 32, dtype=KIND), None, None),
        lambda kernel: kernel.into(torch.zeros(2, 32, dtype=KIND), torch.zeros(3, 32, dtype=KIND), None, None),
    ],
    ids=[
        "x too narrow", "x too wide", "residual too narrow", "residual too short", "residual float32",
        "residual transposed", "y float32", "y transposed", "y too short",
    ],
)  # fmt: skip
def test_what_the_kernel_cannot_read_is_refused(refused: Callable[[Linear], Any]) -> None:
    kernel = Linear(panels_of(torch.zeros(32, INNER, dtype=KIND)), d_in=INNER, d_outs=[32])
    with pytest.raises(ValueError, match="expected"):
        refused(kernel)


def test_what_does_not_fit_together_is_refused_when_it_is_made() -> None:
    panels = panels_of(torch.zeros(32, INNER, dtype=KIND))
    for wrong in (
        {"gated": True, "float_out": True},
        {"bias": torch.zeros(32, dtype=KIND)},
        {"bias": torch.zeros(16)},
        {"norm": (torch.ones(INNER), 1e-5)},
    ):
        with pytest.raises(ValueError, match="expected"):
            Linear(panels, d_in=INNER, d_outs=[32], **wrong)
    with pytest.raises(ValueError, match="none for what is gated"):
        gated = Linear(panels, d_in=INNER, d_outs=[16, 16], gated=True)
        gated(torch.zeros(3, INNER, dtype=KIND), torch.zeros(3, 16, dtype=KIND))
