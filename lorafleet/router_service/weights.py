"""Every tenant's weight, at hand for every request: read when the registry has changed, never in a request's path."""

from __future__ import annotations

from lorafleet.registry import Registry


class Weights:
    """Thread-safe: what is read takes the place of what was there at once."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._known: dict[str, float] = {}

    def renew(self) -> None:
        """Read them all again; raises what the registry raises, and keeps the old ones then."""
        self._known = {tenant.name: tenant.weight for tenant in self._registry.tenants()}

    def of(self, tenant: str) -> float:
        """A tenant's fair share relative to others; 1 for one that is newer than the last look."""
        return self._known.get(tenant, 1.0)
