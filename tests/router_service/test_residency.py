from __future__ import annotations

import logging
import threading

import pytest

from lorafleet.adapters import LoraAdapter
from lorafleet.engine import Engine
from lorafleet.errors import LorafleetError, UnavailableError
from lorafleet.registry import Version
from lorafleet.router_service.residency import PAUSE_S, Residency
from lorafleet.router_service.watcher import Watcher
from tests.router_service.conftest import Connect, Experts, Fleet, Serve

NEVER = 3600.0


@pytest.fixture
def residency(engine: Engine, fleet: Fleet) -> Residency:
    return Residency(engine, fleet.registry)


@pytest.fixture
def watcher(engine: Engine, fleet: Fleet, residency: Residency) -> Watcher:
    return Watcher(engine, fleet.registry, residency, interval_s=NEVER)


def damage(fleet: Fleet, version: Version) -> None:
    """Cut the weights of a version short."""
    path = fleet.registry.path(version) / "adapter_model.safetensors"
    content = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(content[: len(content) // 2])


def test_the_engine_holds_what_is_live_and_nothing_else(
    engine: Engine, fleet: Fleet, experts: Experts, watcher: Watcher
) -> None:
    assert watcher.poll() and engine.adapters() == {}
    first = fleet.add("acme/digits", experts.digits)
    fleet.add("rival/letters", experts.letters)
    assert watcher.poll()
    assert set(engine.adapters()) == {experts.digits.digest, experts.letters.digest}
    second = fleet.add("acme/digits", experts.other)
    assert watcher.poll()
    assert set(engine.adapters()) == {second.digest, experts.letters.digest}
    fleet.registry.set_alias("acme", "digits", "champion", 1)
    assert watcher.poll()
    assert set(engine.adapters()) == {first.digest, experts.letters.digest}
    fleet.registry.set_state(first, "quarantined")
    fleet.registry.set_state(second, "quarantined")
    assert watcher.poll()
    assert set(engine.adapters()) == {experts.letters.digest}


def test_nothing_happens_while_the_revision_stays(fleet: Fleet, experts: Experts, watcher: Watcher) -> None:
    fleet.add("acme/digits", experts.digits)
    assert watcher.poll()
    assert not watcher.poll()


def test_versions_of_another_base_are_passed_over(
    engine: Engine, fleet: Fleet, experts: Experts, watcher: Watcher
) -> None:
    fleet.registry.register_base("other", "sha256:" + "0" * 64, architecture="LlamaForCausalLM", parameters=1)
    fleet.add("acme/elsewhere", experts.digits, base="other")
    fleet.add("acme/letters", experts.letters)
    assert watcher.poll()
    assert set(engine.adapters()) == {experts.letters.digest}


def test_a_version_that_cannot_be_loaded_is_logged_and_the_others_are_served(
    engine: Engine, fleet: Fleet, experts: Experts, watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    damage(fleet, fleet.add("acme/digits", experts.digits))
    fleet.add("acme/letters", experts.letters)
    with caplog.at_level(logging.ERROR):
        assert watcher.poll()
    assert set(engine.adapters()) == {experts.letters.digest}
    assert f"{experts.digits.digest} cannot be loaded" in caplog.text


def test_a_version_that_could_not_be_read_once_is_tried_again_after_a_pause(
    engine: Engine, fleet: Fleet, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, tries = [0.0], list[str]()
    residency = Residency(engine, fleet.registry, clock=lambda: now[0])
    version = fleet.add("acme/digits", experts.digits)

    def away(version: Version) -> LoraAdapter:
        tries.append(version.digest)
        raise UnavailableError("the store is away")

    def routed() -> list[Version]:
        with residency.hold_loadable([version]) as there:
            return there

    with monkeypatch.context() as patched:
        patched.setattr(fleet.registry, "load", away)
        residency.keep([version])
        assert routed() == [] == residency.loadable([version])
        now[0] = PAUSE_S - 1
        assert routed() == [] and len(tries) == 1
        now[0] = PAUSE_S
        assert routed() == [] and len(tries) == 2
    assert residency.loadable([version]) == []
    with residency.hold([version]):  # asked for by its name: that it can be read again is known from then on
        assert residency.loadable([version]) == [version] == routed()
    residency.keep([])


def test_the_watcher_loads_new_versions_by_itself(
    engine: Engine, fleet: Fleet, experts: Experts, residency: Residency
) -> None:
    watcher = Watcher(engine, fleet.registry, residency, interval_s=0.01)
    watcher.start()
    try:
        version = fleet.add("acme/digits", experts.digits)
        assert watcher.wait_seen(fleet.registry.revision(), timeout_s=30.0)
        assert set(engine.adapters()) == {version.digest}
    finally:
        watcher.stop()


def test_a_version_held_by_a_call_outlives_its_life(
    engine: Engine, fleet: Fleet, experts: Experts, residency: Residency
) -> None:
    version = fleet.add("acme/digits", experts.digits)
    residency.keep([version])
    with residency.hold([version]):
        residency.keep([])
        assert version.digest in engine.adapters()
    assert engine.adapters() == {}


def test_holding_a_version_that_cannot_be_loaded_raises_and_leaves_nothing(
    engine: Engine, fleet: Fleet, experts: Experts, residency: Residency
) -> None:
    good, bad = fleet.add("acme/letters", experts.letters), fleet.add("acme/digits", experts.digits)
    damage(fleet, bad)
    with pytest.raises(LorafleetError), residency.hold([good, bad]):
        pytest.fail("the block must not run")
    assert engine.adapters() == {}
    with residency.hold_loadable([good, bad]) as held:
        assert held == [good]


def test_many_threads_find_a_version_loaded_inside_their_blocks(
    engine: Engine, fleet: Fleet, experts: Experts, residency: Residency
) -> None:
    versions = [fleet.add("acme/digits", experts.digits), fleet.add("acme/letters", experts.letters)]
    start = threading.Barrier(8)
    missing: list[str] = []

    def work(number: int) -> None:
        start.wait()
        for turn in range(10):
            version = versions[(number + turn) % 2]
            with residency.hold([version]):
                if version.digest not in engine.adapters():
                    missing.append(version.reference)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert missing == []
    assert engine.adapters() == {}


def test_a_live_version_that_is_not_loaded_yet_is_loaded_by_the_call(
    engine: Engine, fleet: Fleet, experts: Experts, serve: Serve, connect: Connect
) -> None:
    client = connect(serve(poll_interval_s=NEVER))
    fleet.add("acme/digits", experts.digits)
    assert engine.adapters() == {}
    assert client.generate("314", model="acme/digits", max_tokens=2).mix[0].digest == experts.digits.digest
    assert client.route("314").candidates[0].reference == "acme/digits:1"


def test_an_old_version_is_in_the_engine_only_while_a_call_needs_it(
    engine: Engine, fleet: Fleet, experts: Experts, serve: Serve, connect: Connect
) -> None:
    fleet.add("acme/digits", experts.digits)
    fleet.add("acme/digits", experts.other)
    server = serve(poll_interval_s=NEVER)
    result = connect(server).generate("314", model="acme/digits:1", max_tokens=2)
    assert result.mix[0].digest == experts.digits.digest
    assert server.wait_idle(timeout_s=30.0)
    assert set(engine.adapters()) == {experts.other.digest}


def test_a_damaged_adapter_costs_the_router_one_candidate(
    fleet: Fleet, experts: Experts, serve: Serve, connect: Connect
) -> None:
    damage(fleet, fleet.add("acme/digits", experts.digits))
    fleet.add("acme/letters", experts.letters)
    candidates = connect(serve()).route("abc").candidates
    assert {candidate.reference for candidate in candidates} == {"acme/letters:1", "base"}
