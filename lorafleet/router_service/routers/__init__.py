"""Routers: from a prompt and the adapters that the caller may use to a mix."""

from __future__ import annotations

from lorafleet.router_service.routers.likelihood import likelihood
from lorafleet.router_service.routers.types import BASE, Candidate, Route, Router, Scored

ROUTERS: dict[str, Router] = {"likelihood": likelihood}

__all__ = ["BASE", "ROUTERS", "Candidate", "Route", "Router", "Scored"]
