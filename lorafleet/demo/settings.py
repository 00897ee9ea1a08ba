"""What one demo run is: sizes and seeds. The defaults are the full demo; tests run a smaller one."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorafleet.coordinator.settings import FederationSettings, Training

TENANT = "operator"
FEDERATION = "fleet"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    seed: int = 7
    base: str = "tiny"
    domains: tuple[str, ...] = ("cpp", "prose", "sql")
    """Whose owners take part: two owners have each domain as their main one, and some text of the others. A fourth
    domain, ``math``, is built too: its two owners would cost another 50 seconds on two cores."""
    ranks: tuple[int, ...] = (16, 8, 32, 32, 4, 16)
    """One SuperNode an owner, at the rank that its hardware affords."""
    rounds: int = 3
    expert_rank: int = 64
    """Twice the largest member's: at 32 the last round's truncation took a fifth of an expert's norm."""
    at_once: int = 2
    """Members that train at the same time, each with 0.1 GB more than at rest: as many as a small machine has cores."""
    training: Training = field(default_factory=lambda: Training(steps=20, batch_size=4))
    windows: int = 12
    """Held-out windows a domain."""
    burst_requests: int = 64

    def federation(self, rule: str = "exact") -> FederationSettings:
        """The agreement of all arms that differ in the rule only."""
        return FederationSettings(
            tenant=TENANT,
            name=FEDERATION,
            base=self.base,
            rounds=self.rounds,
            rule=rule,
            quorum=max(2, len(self.ranks) // 2),
            deadline_s=180.0,
            at_once=self.at_once,
            # The service is asked for every expert's loss anyway, and each task costs seconds of imports.
            evaluate_last=False,
            expert_rank=self.expert_rank,
            seed=self.seed,
            training=self.training,
        )
