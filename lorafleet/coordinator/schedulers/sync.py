"""``sync``: everybody works, and the round closes when all have answered or its deadline has passed.

After Bonawitz et al. 2019 (arXiv 1902.01046, section 2): a goal count and a deadline decide whether a round commits or
is abandoned. A stalled member costs at most the deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["wait", "close", "abandon"]


@dataclass(frozen=True)
class Sync:
    """Explicit state is the caller's; this holds the two numbers that decide."""

    quorum: int
    """Accepted updates without which a round is abandoned."""
    deadline_s: float

    def select(self, members: Sequence[str], round_number: int) -> list[str]:
        """Who works in this round: all members that are here, in key order."""
        return sorted(members)

    def verdict(self, *, accepted: int, outstanding: int, elapsed_s: float) -> Verdict:
        """Whether a round goes on, commits, or is given up."""
        if outstanding and elapsed_s < self.deadline_s:
            return "wait"
        return "close" if accepted >= self.quorum else "abandon"
