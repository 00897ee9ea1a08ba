"""Rules: how accepted updates become one adapter. ``RULES`` maps a name to its implementation.

Importing this loads neither flwr nor ray: rules run offline and inside the workers of a reduction tree alike.
"""

from lorafleet.coordinator.rules.exact import EXACT
from lorafleet.coordinator.rules.fedit import FEDIT
from lorafleet.coordinator.rules.rule import Rule
from lorafleet.errors import UnknownNameError

RULES: dict[str, Rule] = {rule.name: rule for rule in (EXACT, FEDIT)}


def get_rule(name: str) -> Rule:
    """The rule of that name; an unknown one raises with the names that are known."""
    if name not in RULES:
        raise UnknownNameError("rule", name, RULES)
    return RULES[name]


__all__ = ["RULES", "Rule", "get_rule"]
