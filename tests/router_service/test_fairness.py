"""Tenants beside one that floods: who is let in, with what weight, and in what order they are served."""

from __future__ import annotations

import threading

import pytest

from lorafleet.engine import Engine
from lorafleet.errors import LorafleetError, OverloadedError
from lorafleet.registry import Registry
from lorafleet.router_service.admission import Admission
from lorafleet.router_service.weights import Weights
from tests.router_service.conftest import Connect, Fleet, Serve, run_in_thread


def entered(admission: Admission, tenant: str, weight: float = 1.0) -> int:
    """How many calls of a tenant are let in until one is not."""
    count = 0
    while True:
        try:
            admission.enter(tenant, weight)
        except OverloadedError:
            return count
        count += 1


def test_a_tenant_that_floods_leaves_a_quarter_of_the_places_to_others() -> None:
    admission = Admission(64)
    assert entered(admission, "flood") == 48
    assert entered(admission, "quiet") == 8
    assert entered(admission, "flood") == 0
    assert entered(admission, "third") == 6  # a third of the quarter, begun
    for _ in range(15):
        admission.leave("flood")
    assert entered(admission, "flood") == 1  # the others' calls count, too


def test_the_last_quarter_is_shared_by_weight() -> None:
    admission = Admission(64)
    assert entered(admission, "flood", 1.0) == 48
    assert entered(admission, "heavy", 3.0) == 12
    assert entered(admission, "other", 1.0) == 4
    with pytest.raises(OverloadedError, match="64 calls are running"):
        admission.enter("last")


def test_no_place_is_lost_or_given_twice() -> None:
    admission = Admission(64)
    for tenant in ("flood", "quiet"):
        for _ in range(entered(admission, tenant)):
            admission.leave(tenant)
    assert admission.wait_idle(timeout_s=0.0)
    assert entered(admission, "quiet") == 48


def test_weights_are_those_of_the_last_look(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights(fleet.registry)
    assert weights.of("acme") == 1.0
    fleet.registry.set_tenant_weight("acme", 3.0)
    assert weights.of("acme") == 1.0
    weights.renew()
    assert (weights.of("acme"), weights.of("rival"), weights.of("unknown")) == (3.0, 1.0, 1.0)

    def away(_registry: Registry) -> None:
        raise LorafleetError("the database is away")

    monkeypatch.setattr(Registry, "tenants", away)
    with pytest.raises(LorafleetError, match="away"):
        weights.renew()
    assert weights.of("acme") == 3.0


def test_a_changed_weight_reaches_a_running_service(
    fleet: Fleet, serve: Serve, connect: Connect, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, float]] = []
    submit = Engine.submit

    def noted(self: Engine, *arguments: object, **named: object) -> object:
        found.append((str(named["tenant"]), float(str(named["weight"]))))
        return submit(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "submit", noted)
    server = serve(poll_interval_s=0.01)
    client = connect(server)
    client.generate("314", max_tokens=1)
    fleet.registry.set_tenant_weight("acme", 2.5)
    while found[-1] != ("acme", 2.5):  # within the test's time limit
        client.generate("314", max_tokens=1)
    assert found[0] == ("acme", 1.0)


def test_a_quiet_tenant_is_answered_before_a_flood_that_came_first_and_never_refused(
    fleet: Fleet, serve: Serve, connect: Connect
) -> None:
    server = serve(max_calls=32)
    flood, quiet = connect(server), connect(server, tenant="rival")
    order: list[str] = []
    refused: list[LorafleetError] = []
    full = threading.Semaphore(0)

    def call() -> None:
        try:
            flood.generate("314", max_tokens=120, ignore_eos=True)
            order.append("flood")
        except LorafleetError as error:
            refused.append(error)
            full.release()

    threads = [run_in_thread(call) for _ in range(40)]
    for _ in range(40 - 24):  # it holds all that it can
        assert full.acquire(timeout=60.0)
    for _ in range(3):
        quiet.generate("27182", max_tokens=10, ignore_eos=True)
        order.append("quiet")
    for thread in threads:
        thread.join()
    assert order[:12].count("quiet") == 3
    assert order.count("flood") >= 24
    assert all(isinstance(error, OverloadedError) and "of your calls" in str(error) for error in refused)
