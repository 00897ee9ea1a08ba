"""What is measured: the shapes of the random bases, and the load that each of them is given."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from lorafleet.errors import UnknownNameError

BYTES_PER_WEIGHT = 2
"""Every row runs in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that are submitted together, each with random tokens in and as many tokens out as it may, greedily."""

    requests: int
    prompt_tokens: int = 128
    new_tokens: int = 64
    registered: int = 1000
    """adapters that the rows of many adapters know"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with random weights; the output layer has weights of its own."""

    name: str
    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    load: Load

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def key(self) -> str:
        """Names a cache of this shape's weights: another shape of the same name has another one."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


SHARED_INPUT = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The projections of a decoder layer by the input that they read; tokens are routed for each of these."""


class Projection(NamedTuple):
    """One linear layer of a decoder layer."""

    path: str
    """below the decoder layer"""
    d_out: int
    d_in: int


def projections(shape: Shape) -> tuple[Projection, ...]:
    """The seven linear layers of one decoder layer; adapters change all of them."""
    hidden, kv = shape.hidden, shape.kv_heads * shape.head_dim
    return (
        Projection("self_attn.q_proj", hidden, hidden),
        Projection("self_attn.k_proj", kv, hidden),
        Projection("self_attn.v_proj", kv, hidden),
        Projection("self_attn.o_proj", hidden, hidden),
        Projection("mlp.gate_proj", shape.mlp, hidden),
        Projection("mlp.up_proj", shape.mlp, hidden),
        Projection("mlp.down_proj", hidden, shape.mlp),
    )


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            name="S", hidden=768, layers=12, mlp=2048, heads=12, kv_heads=4, vocabulary=8192, load=Load(requests=32)
        ),
        Shape(
            name="M", hidden=2048, layers=16, mlp=5632, heads=32, kv_heads=8, vocabulary=8192, load=Load(requests=16)
        ),
        Shape(
            name="8B", hidden=4096, layers=32, mlp=14336, heads=32, kv_heads=8, vocabulary=128256,
            load=Load(requests=64),
        ),
        # For the tests of the harness; its figures mean nothing. vLLM's CPU attention has no heads below 32.
        Shape(
            name="tiny", hidden=64, layers=2, mlp=128, heads=2, kv_heads=1, vocabulary=320,
            load=Load(requests=8, prompt_tokens=16, new_tokens=8, registered=40),
        ),
    )
}  # fmt: skip


def get_shape(name: str) -> Shape:
    """The shape of that name; raises UnknownNameError, which lists the known ones."""
    if name not in SHAPES:
        raise UnknownNameError("shape", name, SHAPES)
    return SHAPES[name]


def reduced(shape: Shape) -> Shape:
    """The same architecture and widths with two layers and few tokens: what correctness is checked on.

    Eight requests, so that each of the eight adapters answers one.
    """
    return replace(
        shape,
        name=f"{shape.name}-reduced",
        layers=2,
        vocabulary=min(shape.vocabulary, 8192),
        load=Load(requests=8, prompt_tokens=24, new_tokens=12, registered=shape.load.registered),
    )
