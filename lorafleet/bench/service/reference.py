"""What a prompt and a mix give in an engine of their own: alone, in float32, with nothing cached."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from lorafleet.adapters import LoraAdapter
from lorafleet.bench.verdict import NEAR_TIE
from lorafleet.engine import Engine, SamplingParams

Likely: TypeAlias = Sequence[tuple[int, float]]
"""A place's likeliest tokens with their log-probabilities in nats, the likeliest first."""
Go: TypeAlias = Callable[[Sequence[int], int], Sequence[Likely]]
"""``go(tokens, n)``: the n places behind the tokens, each after the likeliest token of those before it."""

TOP = 20
"""As many as an engine tells; a near tie of more tokens than that is no near tie."""


class Wrong(NamedTuple):
    """A token that the reference would not have chosen."""

    position: int
    found: int | str
    expected: int
    gap: float
    """nats by which the reference prefers what was expected; infinite beyond its ``TOP``"""


def first_wrong(
    go: Go, prompt: Sequence[int], found: Sequence[int | str], *, text: Callable[[int], str] = str
) -> Wrong | None:
    """The first token that greedy decoding would not have chosen, given those before it; None where all are right.

    ``found``: token ids, or texts of tokens, as some doors tell them; ``text`` is that of an id. A token within
    ``NEAR_TIE`` of the best counts as the best, and those behind it are held against what follows from it.
    """
    taken: list[int] = []
    while len(taken) < len(found):
        begun = len(taken)
        for likely in go([*prompt, *taken], len(found) - begun):
            wanted = found[len(taken)]
            same = [token for token, _ in likely if wanted == (token if isinstance(wanted, int) else text(token))]
            value = dict(likely).get(same[0], -math.inf) if same else -math.inf
            best, top = likely[0]
            if not top - value < NEAR_TIE:
                return Wrong(len(taken), wanted, best, top - value)
            taken.append(same[0])
            if same[0] != best:
                break  # the places behind this one follow from another token
    return None


class Isolated:
    """Runs one request at a time, with its own adapters only, and nothing that was computed for another."""

    def __init__(self, engine: Engine, weights: Callable[[str], LoraAdapter]) -> None:
        """``weights``: of a digest. ``engine`` computes in float32."""
        self._engine, self._weights = engine, weights
        self._salts = itertools.count()
        self._known: dict[tuple[tuple[int, ...], tuple[tuple[str, float], ...], int], list[Likely]] = {}

    def text(self, token: int) -> str:
        decoded: str = self._engine.tokenizer.decode([token])
        return decoded

    def encode(self, prompt: str) -> list[int]:
        return self._engine.encode(prompt)

    def go(self, mix: Mapping[str, float]) -> Go:
        """Greedy decoding under a mix, digest → weight; what was computed once is remembered."""
        return lambda tokens, places: self._places(tuple(tokens), mix, places)

    def tokens(self, prompt: Sequence[int], mix: Mapping[str, float], places: int) -> list[int]:
        """What greedy decoding gives."""
        return [likely[0][0] for likely in self._places(tuple(prompt), mix, places)]

    def _places(self, tokens: tuple[int, ...], mix: Mapping[str, float], places: int) -> list[Likely]:
        key = (tokens, tuple(sorted(mix.items())), places)
        if key not in self._known:
            for digest in mix:
                self._engine.add_adapter(digest, self._weights(digest))
            sampling = SamplingParams(max_tokens=places, ignore_eos=True, logprobs=True, top_logprobs=TOP)
            ticket = self._engine.submit(list(tokens), mix=mix, sampling=sampling, salt=f"alone-{next(self._salts)}")
            self._known[key] = [list(likely) for likely in ticket.result().top_logprobs]
            for digest in mix:
                self._engine.remove_adapter(digest)
        return self._known[key]
