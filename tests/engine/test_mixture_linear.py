"""The linears that replace the base's: the same numbers, and each shared thing computed once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafleet.engine.mixture_linear import MixtureContext, MixtureLinear, wrap_linears
from lorafleet.kernels import Bank, PackedGroup, Plan, Run, mixture_path


class Block(nn.Module):
    """q, k, v over one input with biases in two of them, and a lone output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(10, 12)
        self.k_proj = nn.Linear(10, 6, bias=False)
        self.v_proj = nn.Linear(10, 6)
        self.dense = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return q, k, v, self.dense(k * v)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])


class Counting:
    """The dense path, with a count of calls."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()

    def __call__(self, y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
        self.calls[len(group.modules)] += 1
        mixture_path("dense")(y, x, group, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrapped_linears_compute_what_the_base_computed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stack = Stack().to(dtype)
    x = torch.randn(1, 7, 10, dtype=dtype)
    with torch.no_grad():
        expected = stack.layers[1](x)
        wrap_linears(stack, layers_path="layers", context=MixtureContext(mixture_path()))
        got = stack.layers[1](x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_siblings_share_one_shrink_and_lone_linears_have_their_own() -> None:
    torch.manual_seed(0)
    stack, counting = Stack(), Counting()
    context = MixtureContext(counting)
    specs = wrap_linears(stack, layers_path="layers", context=context)
    assert [[m.path.rpartition(".")[2] for m in spec.modules] for spec in specs[:2]] == [
        ["q_proj", "k_proj", "v_proj"],
        ["dense"],
    ]
    bank = Bank(specs)
    bank.add(
        "a", bank.pages({m.path: (torch.ones(2, s.d_in), torch.ones(m.d_out, 2)) for s in specs for m in s.modules})
    )
    packing = bank.pack(["a"])
    x = torch.randn(1, 5, 10)
    with torch.no_grad():
        bare = stack.layers[0](x)
        context.set(packing, Plan([Run((("a", 1.0),), 5)], packing.keys))
        mixed = stack.layers[0](x)
        assert counting.calls == {3: 1, 1: 1}
        for plain, with_adapter in zip(bare[:3], mixed[:3], strict=True):
            torch.testing.assert_close(with_adapter, plain + 2 * x.sum(-1, keepdim=True))
        context.set(None, None)
        for plain, again in zip(bare, stack.layers[0](x), strict=True):
            assert torch.equal(plain, again)


def test_a_new_input_is_never_taken_for_the_last_one() -> None:
    """Out of the usual order, interrupted, and with equal values in another tensor."""
    torch.manual_seed(0)
    stack = Stack()
    plain = {name: getattr(stack.layers[0], name) for name in ("q_proj", "k_proj", "v_proj")}
    wrap_linears(stack, layers_path="layers", context=MixtureContext(mixture_path()))
    x, other = torch.randn(2, 10), torch.randn(2, 10)
    with torch.no_grad():
        for name, value in [
            ("k_proj", x),
            ("q_proj", other),
            ("q_proj", x),
            ("v_proj", other),
            ("v_proj", x),
            ("q_proj", other),
        ]:
            torch.testing.assert_close(getattr(stack.layers[0], name)(value), plain[name](value))


def test_wrapped_linears_show_what_they_are() -> None:
    torch.manual_seed(0)
    stack = Stack()
    block: Any = stack.layers[0]
    bias = block.v_proj.bias.detach().clone()
    wrap_linears(stack, layers_path="layers", context=MixtureContext(mixture_path()))
    wrapped = block.v_proj
    assert isinstance(wrapped, MixtureLinear)
    assert (wrapped.weight.shape, wrapped.weight.dtype, wrapped.weight.device.type) == ((6, 10), torch.float32, "meta")
    assert wrapped.bias is not None
    assert torch.equal(wrapped.bias, bias)
    assert block.dense.bias is not None
    assert (wrapped.in_features, wrapped.out_features) == (10, 6)
