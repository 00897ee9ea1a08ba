"""Routers: from a prompt and the adapters that the caller may use to a mix."""

from __future__ import annotations

from lorafleet.router_service.routers.cards import Cards
from lorafleet.router_service.routers.likelihood import Likelihood
from lorafleet.router_service.routers.shortlist import Shortlist
from lorafleet.router_service.routers.types import BASE, Candidate, Pool, Prompt, Route, Router, Score, Scored

ROUTERS: dict[str, Router] = {"likelihood": Likelihood(), "cards": Cards(), "cards+likelihood": Shortlist()}

__all__ = ["BASE", "ROUTERS", "Candidate", "Pool", "Prompt", "Route", "Router", "Score", "Scored"]
