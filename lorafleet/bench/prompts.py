"""The prompts of a run: random tokens, new ones for each phase, so that no engine's prefix cache can help."""

from __future__ import annotations

import random
from typing import NamedTuple

from lorafleet.bench.shapes import Shape

FIRST_PLAIN_TOKEN = 2
"""Below it are padding and the end of text."""


class Prompts(NamedTuple):
    """A list of token ids for each request, three times."""

    warm_up: list[list[int]]
    prefill: list[list[int]]
    whole: list[list[int]]


def make_prompts(shape: Shape, *, seed: int) -> Prompts:
    """Prompts of the shape's load; the same seed gives the same ones."""
    source = random.Random(seed)

    def draw() -> list[list[int]]:
        return [
            [source.randrange(FIRST_PLAIN_TOKEN, shape.vocabulary) for _ in range(shape.load.prompt_tokens)]
            for _ in range(shape.load.requests)
        ]

    return Prompts(draw(), draw(), draw())
