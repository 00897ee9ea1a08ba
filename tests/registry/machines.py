"""How a registry and a model of plain dicts are held against one another, call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from lorafleet.errors import LorafleetError


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the kind of the error that it raises."""
    try:
        return call()
    except LorafleetError as error:
        return type(error)


def run(machine: Callable[[], RuleBasedStateMachine], *, examples: int, steps: int = 40, drawn: bool = False) -> None:
    """The same runs every time; ``drawn``: others at every call, of which one that fails can be given again by what
    Hypothesis prints."""
    run_state_machine_as_test(
        machine,  # type: ignore[arg-type]
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=not drawn,
            print_blob=True,
            database=None,
            phases=[Phase.generate],  # shrinking would take minutes; the steps are printed
            suppress_health_check=list(HealthCheck),
        ),
    )
