"""What happens to tenants' adapters while they are used: replaced under the same name, moved, taken out, put back,
deleted."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence

from lorafleet.adapters import LoraAdapter
from lorafleet.registry import Registry
from lorafleet.registry.records import CHAMPION

CANARY = "canary"


class Churn:
    """Changes one adapter after another, drawn by seed, through the registry alone.

    An adapter's first version stays usable, so that its name always means something. Others come, become what the name
    means, are taken out of use for good or for a while; what a name has meant comes back by rolling back. From time to
    time the weights of all that are out of use are deleted, but for those that a running service holds.
    """

    def __init__(
        self,
        registry: Registry,
        adapters: Sequence[tuple[str, str]],
        make: Callable[[], LoraAdapter],
        *,
        a_second: float,
        rng: random.Random,
        collect_every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``adapters``: tenant and name; ``make``: other weights at every call."""
        self._registry, self._adapters, self._make = registry, list(adapters), make
        self._every_s, self._rng, self._clock = 1.0 / a_second, rng, clock
        self._collect_every_s = collect_every_s
        self._next_at = self._collect_at = -1.0
        self.done: Counter[str] = Counter()
        """What was done how often."""
        self.deleted = 0
        """Versions whose weights are gone."""

    def turn(self) -> None:
        """Do what is due by now: one change at most, so that whoever calls is not held up."""
        now = self._clock()
        if self._next_at < 0:
            self._next_at, self._collect_at = now, now + self._collect_every_s
        if now >= self._collect_at:
            self._collect_at = now + self._collect_every_s
            self.deleted += len(self._registry.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0).purged)
        elif now >= self._next_at:
            self._next_at = max(self._next_at + self._every_s, now)
            tenant, name = self._rng.choice(self._adapters)
            self._change(tenant, name)

    def _change(self, tenant: str, name: str) -> None:
        registry, rng = self._registry, self._rng
        versions = registry.versions(tenant, name)
        pointed = registry.aliases(tenant, name)
        usable = [v for v in versions[1:] if v.state in ("staged", "evaluated")]
        idle = [v for v in usable if v.number not in pointed.values()]
        away = [v for v in versions[1:] if v.state in ("retired", "quarantined") and v.purged_at is None]
        kinds = ["replace", "replace"]
        kinds += ["canary"] * bool(usable) + ["roll back"] * (pointed.get(CHAMPION, 1) != 1)
        kinds += ["retire"] * bool(idle) + ["quarantine"] * bool(usable) + ["restore"] * bool(away)
        kind = rng.choice(kinds)
        if kind == "replace":
            version = registry.add_version(tenant, name, self._make())
            registry.set_alias(tenant, name, CHAMPION, version.number)
        elif kind == "canary":
            registry.set_alias(tenant, name, CANARY, rng.choice(usable).number)
        elif kind == "roll back":
            registry.rollback(tenant, name)
        elif kind == "retire":
            registry.retire(rng.choice(idle))
        elif kind == "quarantine":
            registry.quarantine(rng.choice(usable))
        else:
            registry.restore(rng.choice(away))
        self.done[kind] += 1
