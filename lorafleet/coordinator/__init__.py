"""Federations: rounds, rules, schedulers. The plug-in dicts are public; importing them loads neither flwr nor ray."""

from lorafleet.coordinator.rules import RULES
from lorafleet.coordinator.schedulers import SCHEDULERS

__all__ = ["RULES", "SCHEDULERS"]
