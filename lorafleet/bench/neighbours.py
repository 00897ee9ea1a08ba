"""How much of a virtual machine's processors others on the same host had, while something was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil

_WORKING = ("user", "nice", "system", "irq", "softirq")


class Neighbours:
    """Laps: each tells of the time since the one before."""

    def __init__(self, cpu_times: Callable[[], Any] = psutil.cpu_times) -> None:
        self._cpu_times = cpu_times
        self._before = cpu_times()

    def share(self) -> float | None:
        """Of the time for which something here would have run: that in which the host let others run instead.

        None where the system does not count it (only Linux does, as ``steal``), or where nothing ran.
        """
        before, now = self._before, self._cpu_times()
        self._before = now
        if not hasattr(now, "steal"):
            return None
        taken = now.steal - before.steal
        wanted = taken + sum(getattr(now, name) - getattr(before, name) for name in _WORKING)
        return taken / wanted if wanted > 0 else None
