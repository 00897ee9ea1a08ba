"""A few hundred of the cases of :mod:`tests.fuzz.doors`, and that what it looks for would be seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from lorafleet.router_service.answering import Answering
from tests.fuzz import doors, grpc_cases, http_cases
from tests.fuzz.service import Service, running


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as service:
        yield service


def test_neither_door_fails_whatever_it_is_asked(service: Service) -> None:
    counted = doors.main(service, 300, seed=7)
    assert all(found.total() >= 150 for found in counted.values())
    answered = [name for found in counted.values() for name in found if name.endswith((" 200", " OK"))]
    assert {"POST /v1/completions 200", "POST /v1/chat/completions 200", "Generate OK", "Route OK"} <= set(answered)
    assert "ListAdapters OK" in answered


def broken(*_: Any, **__: Any) -> NoReturn:
    raise KeyError("a fault")


def test_a_fault_behind_either_door_is_seen(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answering, "answer", broken)
    with pytest.raises(BaseException, match="Server error") as over_http:  # a group of schemathesis' own
        http_cases.run(service, 100, seed_number=1, progress=lambda _number: None, shrink=False)
    assert "completions" in str(over_http.value.exceptions[0].operation)  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="INTERNAL"):
        grpc_cases.run(service, 100, seed_number=1, progress=lambda _number: None, shrink=False)
