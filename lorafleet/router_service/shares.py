"""How a door's places are shared among tenants, whatever their calls do there."""

from __future__ import annotations

from lorafleet.errors import CallsFullError


class Shares:
    """For calls of tenants: each may have as many as are left for others.

    One alone has half of all places, two that come together a third each; one after the other each takes half of what
    is left, so that it takes ten tenants to fill a thousand.
    """

    def __init__(self) -> None:
        self._running: dict[str, int] = {}
        """Of tenants that have any."""

    def take(self, tenant: str, *, free: int) -> None:
        """Raises CallsFullError for who has as many calls as are ``free``; else :meth:`give_back` must follow."""
        mine = self._running.get(tenant, 0)
        if mine >= free:
            raise CallsFullError("too many of your calls are here at once; try again when one has ended")
        self._running[tenant] = mine + 1

    def give_back(self, tenant: str) -> None:
        left = self._running[tenant] - 1
        if left:
            self._running[tenant] = left
        else:
            del self._running[tenant]
