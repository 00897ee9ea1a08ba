from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorafleet.errors import UnauthenticatedError, UnavailableError
from lorafleet.registry import Registry
from lorafleet.registry.records import Key
from lorafleet.router_service.authentication import Authenticator, bearer_token


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    opened = Registry.open(f"sqlite:///{tmp_path / 'registry.db'}", tmp_path / "blobs")
    opened.create_tenant("acme")
    return opened


def test_a_key_that_was_right_counts_for_half_a_second_at_most(registry: Registry) -> None:
    clock = Clock()
    authenticator = Authenticator(registry, clock=clock)
    issued = registry.create_key("acme")
    assert authenticator.known(issued.token) is None
    assert authenticator.key(issued.token) == issued.key
    registry.revoke_key("acme", issued.key.key_id)
    clock.now += 0.24
    assert authenticator.known(issued.token) == issued.key == authenticator.key(issued.token)
    clock.now += 0.25
    authenticator.known(issued.token)  # whoever is to look it up again, and does not
    assert authenticator.known(issued.token) == issued.key
    clock.now += 0.02
    assert authenticator.known(issued.token) is None
    with pytest.raises(UnauthenticatedError):
        authenticator.key(issued.token)
    assert authenticator.known(issued.token) is None


def test_one_caller_looks_a_known_key_up_again_and_the_others_go_on(registry: Registry) -> None:
    clock = Clock()
    authenticator = Authenticator(registry, clock=clock)
    issued = registry.create_key("acme")
    authenticator.key(issued.token)
    clock.now += 0.3
    assert [authenticator.known(issued.token) for _ in range(3)] == [None, issued.key, issued.key]
    assert authenticator.key(issued.token) == issued.key
    clock.now += 0.3
    assert [authenticator.known(issued.token) for _ in range(2)] == [None, issued.key]
    clock.now += 0.3
    assert authenticator.known(issued.token) is None, "nobody looked"


def test_many_who_come_with_a_key_that_is_due_look_once(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    authenticator = Authenticator(registry, clock=clock)
    issued = registry.create_key("acme")
    authenticator.key(issued.token)
    clock.now += 0.6
    looked, go, began = [], threading.Event(), threading.Event()
    look = registry.authenticate

    def slow(token: str) -> Key:
        looked.append(token)
        began.set()
        assert go.wait(30)
        return look(token)

    monkeypatch.setattr(registry, "authenticate", slow)
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(authenticator.key, issued.token) for _ in range(8)]
        assert began.wait(30)
        go.set()
        assert [each.result(30) for each in found] == [issued.key] * 8
    assert len(looked) == 1


def test_a_database_that_is_away_while_a_key_still_counts_refuses_nobody(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    authenticator = Authenticator(registry, clock=clock)
    issued = registry.create_key("acme")
    authenticator.key(issued.token)

    def away(_token: str) -> Key:
        raise UnavailableError("the database is away")

    monkeypatch.setattr(registry, "authenticate", away)
    clock.now += 0.4
    assert authenticator.key(issued.token) == issued.key
    clock.now += 0.2
    with pytest.raises(UnavailableError):
        authenticator.key(issued.token)


def test_a_change_of_the_registry_ends_what_was_known(registry: Registry) -> None:
    authenticator = Authenticator(registry, clock=Clock())
    issued = registry.create_key("acme")
    authenticator.key(issued.token)
    registry.revoke_key("acme", issued.key.key_id)
    authenticator.forget()
    with pytest.raises(UnauthenticatedError):
        authenticator.key(issued.token)


def test_guesses_are_not_kept(registry: Registry) -> None:
    authenticator = Authenticator(registry)
    for number in range(20):
        with pytest.raises(UnauthenticatedError):
            authenticator.key(f"lf_{number:012d}_{'x' * 43}")
    assert len(authenticator._known) == 0


@pytest.mark.parametrize("value", ["Bearer k", "bearer k", "BEARER k"])
def test_a_bearer_token_is_read_whatever_the_case_of_its_scheme(value: str) -> None:
    assert bearer_token([value]) == "k"


@pytest.mark.parametrize(
    "values",
    [[], [""], ["k"], ["Bearer"], ["Bearer "], ["Basic k"], ["Bearer k"] * 2, [b"Bearer k"], ["Bearer " + "k" * 9999]],
)
def test_anything_but_one_bearer_token_is_refused_without_naming_it(values: list[str | bytes]) -> None:
    with pytest.raises(UnauthenticatedError, match="Bearer KEY") as caught:
        bearer_token(values)
    assert "kkk" not in str(caught.value)
