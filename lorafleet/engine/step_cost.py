"""How long a step takes, learned from those before: ``base + sequences · a + tokens · b`` seconds, none below zero.

Least squares over the last steps, each counting less than the one after it. What is small is the error's share of what
was expected: real steps cost less for each further sequence, and it is the small ones that are asked about. On two
cores, steps of 1 to 64 sequences, a fit of plain errors took the base for 34 % more than it was, and let a step be made
longer by as much. Steps that are all alike do not say how much of their time is the base: a small penalty on it takes
them for proportional then. So the time of a smaller step is underestimated at first, rather than overestimated, and a
caller that makes steps smaller learns what they really take.
"""

from __future__ import annotations

from typing import Final

DECAY: Final = 0.995
"""Of a step's weight with each further one: some 200 steps count."""
PENALTY: Final = 0.5
"""On the base, in steps of the usual weight."""
OUTLIER: Final = 3.0
"""A step counts at most as so many times what was expected, or its part: a pause of the machine is no cost."""
TRUSTED: Final = 20
"""Steps before anything is an outlier."""
_SWEEPS: Final = 6


class StepCost:
    """Not thread-safe: the engine holds its lock around every call."""

    def __init__(self) -> None:
        self._products = [[0.0] * 3 for _ in range(3)]
        """sums of feature · feature; features are 1, sequences, tokens, each over the seconds that were expected"""
        self._targets = [0.0] * 3
        """sums of feature · seconds over those that were expected"""
        self._factors = [0.0] * 3
        self._steps = 0

    def observe(self, *, sequences: int, tokens: int, seconds: float) -> None:
        """A step computed ``tokens`` tokens in all, of ``sequences`` sequences."""
        expected = seconds
        if self._steps >= TRUSTED:
            expected = self.seconds(sequences=sequences, tokens=tokens)
            seconds = min(max(seconds, expected / OUTLIER), OUTLIER * expected)
        self._steps += 1
        features = (1.0 / expected, sequences / expected, tokens / expected)
        for i, feature in enumerate(features):
            self._targets[i] = DECAY * self._targets[i] + feature * seconds / expected
            for j, other in enumerate(features):
                self._products[i][j] = DECAY * self._products[i][j] + feature * other
        self._fit()

    def seconds(self, *, sequences: int, tokens: int) -> float:
        """Expected of such a step; 0 before the first one."""
        base, each, token = self._factors
        return base + each * sequences + token * tokens

    def tokens_within(self, seconds: float, *, sequences: int) -> int | None:
        """How many tokens of so many sequences a step of at most so many ``seconds`` may have; None: any number."""
        base, each, token = self._factors
        left = seconds - base - each * sequences
        if left < 0:
            return 0
        return None if token == 0 else int(left / token)

    def _fit(self) -> None:
        """Coordinate descent from the last factors, which exact solutions stay near to."""
        penalty = PENALTY * (1.0 - DECAY) / (1.0 - DECAY**self._steps) * self._products[0][0]
        for _ in range(_SWEEPS):
            for i in range(3):
                row = self._products[i]
                rest = self._targets[i] - sum(row[j] * self._factors[j] for j in range(3) if j != i)
                self._factors[i] = max(0.0, rest / (row[i] + (penalty if i == 0 else 0.0)))
