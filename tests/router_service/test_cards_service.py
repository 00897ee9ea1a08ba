"""Routes by model cards through the service: what they cost, what is held for them, and what a damaged adapter does."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from lorafleet.engine import Engine
from lorafleet.registry import Registry, Version
from tests.router_service.conftest import Connect, Experts, Fleet, Serve


def add(fleet: Fleet, experts: Experts) -> tuple[Version, Version]:
    made = []
    for name, weights, card in (
        ("digits", experts.digits, "Continues decimal digits of pi."),
        ("letters", experts.letters, "Recites the alphabet, letter by letter."),
    ):
        fleet.registry.create_adapter("acme", name, base=fleet.base_digest)
        made.append(fleet.registry.add_version("acme", name, weights, card=card))
    return made[0], made[1]


def test_a_route_and_an_answer_by_cards_agree_and_no_text_is_scored(
    engine: Engine, fleet: Fleet, experts: Experts, serve: Serve, connect: Connect
) -> None:
    digits, _ = add(fleet, experts)
    client = connect(serve(router="cards"))
    before = engine.stats().prompt_tokens_total
    decision = client.route("What are the digits of pi?")
    assert engine.stats().prompt_tokens_total == before
    assert decision.router == "cards" and decision.candidates[0].reference == "acme/digits:1"
    assert "'digits'" in decision.reason and "'pi'" in decision.reason
    result = client.generate("What are the digits of pi?", model="auto", max_tokens=2)
    assert result.route == decision and [part.digest for part in result.mix] == [digits.digest]
    assert client.generate("???", model="auto", max_tokens=2).mix == ()


def test_another_tenants_card_is_never_read(fleet: Fleet, experts: Experts, serve: Serve, connect: Connect) -> None:
    add(fleet, experts)
    assert connect(serve(router="cards"), tenant="rival").route("digits of pi").mix == ()


def test_a_damaged_adapter_is_not_chosen_a_second_time(
    fleet: Fleet, experts: Experts, serve: Serve, connect: Connect
) -> None:
    digits, _ = add(fleet, experts)
    shutil.rmtree(fleet.registry.path(digits))
    client = connect(serve(router="cards"))
    assert [part.reference for part in client.generate("digits or letter", model="auto", max_tokens=2).mix] == [
        "acme/letters:1"
    ]
    assert client.route("digits of pi").mix == ()


def test_the_model_decides_among_those_whose_cards_are_near(
    fleet: Fleet, experts: Experts, serve: Serve, connect: Connect
) -> None:
    add(fleet, experts)
    decision = connect(serve(router="cards+likelihood")).route("3141592653589793")
    assert decision.router == "cards+likelihood" and decision.candidates[0].reference == "acme/digits:1"


def test_a_promotion_reaches_a_running_service_within_five_seconds(
    fleet: Fleet, experts: Experts, serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    """By another process's hand, which the service is not told of; where it chooses as where it is asked by name."""
    first, _ = add(fleet, experts)
    fleet.registry.promote(first)
    second = fleet.registry.add_version("acme", "digits", experts.letters, card=fleet.registry.card(first))
    client = connect(serve(router="cards"))
    assert client.route("digits of pi").candidates[0].reference == first.reference
    with Registry.open(f"sqlite:///{tmp_path / 'registry.db'}", tmp_path / "blobs") as elsewhere:
        elsewhere.promote(second, force=True)
    began = time.monotonic()
    while client.route("digits of pi").candidates[0].reference != second.reference:
        assert time.monotonic() - began < 5.0
    for model in ("acme/digits", "auto"):
        answered = client.generate("digits of pi", model=model, max_tokens=2)
        assert [part.digest for part in answered.mix] == [second.digest]
    assert time.monotonic() - began < 5.0
