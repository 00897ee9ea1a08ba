"""Two coordinators of one federation: the second waits for a lease that nobody renews, and gives way to one alive."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from lorafleet.coordinator import lease as lease_module
from lorafleet.coordinator.lease import LEASE_S, POLL_S, RENEW_S, FederationLease
from lorafleet.coordinator.settings import FederationSettings
from lorafleet.errors import UnavailableError
from lorafleet.registry import Federation, Registry
from tests.coordinator.killed_run import SETTINGS as KILLED
from tests.coordinator.killed_run import members
from tests.coordinator.scripted import BASE, start

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = FederationSettings(tenant="operator", name="fleet")


class World:
    """One clock for the registry and the waiting; what happens while somebody waits is ``meanwhile``."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meanwhile: Callable[[], object] = lambda: None

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def registry(tmp_path: Path, world: World) -> Iterator[Registry]:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    with Registry.open(url, tmp_path / "blobs", clock=world.clock) as opened:
        yield opened


@pytest.fixture
def federation(registry: Registry) -> Federation:
    registry.create_tenant("operator")
    registry.register_base("base", BASE, architecture="LlamaForCausalLM", parameters=1)
    return registry.create_federation("operator", "fleet", base=BASE, settings=SETTINGS.to_dict())


def held(registry: Registry, federation: Federation, world: World) -> FederationLease:
    return FederationLease(registry, federation, clock=world.clock, sleep=world.sleep)


def test_a_lease_is_free_again_when_its_coordinator_has_ended(
    registry: Registry, federation: Federation, world: World
) -> None:
    for _ in range(2):
        with held(registry, federation, world) as lease:
            lease.check()
            found = registry.lease(federation)
            assert found is not None and (found.owner, found.token) == (lease.owner, lease.token)
    assert world.now == 0.0


def test_a_second_coordinator_is_refused_while_the_first_is_alive(
    registry: Registry, federation: Federation, world: World
) -> None:
    with held(registry, federation, world) as first:

        def renew() -> None:
            if world.now % RENEW_S == 0:
                first.check()

        world.meanwhile = renew
        with (
            pytest.raises(UnavailableError, match=r"operator/fleet since 1970-01-01 00:00:00.* and is alive"),
            held(registry, federation, world),
        ):
            pass
        assert world.now <= RENEW_S
        first.check()


def test_the_lease_of_a_coordinator_that_crashed_is_taken_over_when_it_expires(
    registry: Registry, federation: Federation, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    registry.take_lease(federation, "crashed", for_s=LEASE_S)
    with caplog.at_level("INFO"), held(registry, federation, world) as lease:
        assert LEASE_S <= world.now <= LEASE_S + POLL_S
        lease.check()
    assert [r.getMessage() for r in caplog.records] == [
        "another coordinator has run operator/fleet since 1970-01-01 00:00:00+00:00; waiting at most 8 s, in case "
        "that it is gone"
    ]


def test_a_coordinator_that_was_not_heard_of_ends_when_another_has_taken_over(
    registry: Registry, federation: Federation, world: World
) -> None:
    with held(registry, federation, world) as lease:
        world.now += LEASE_S
        registry.take_lease(federation, "another", for_s=LEASE_S)
        with pytest.raises(UnavailableError, match="another coordinator runs operator/fleet since 1970-01-01 00:00:08"):
            lease.check()
    assert registry.take_lease(federation, "mine", for_s=LEASE_S).owner == "another"


def test_the_lease_is_renewed_while_its_coordinator_is_busy(
    registry: Registry, federation: Federation, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.01)
    with held(registry, federation, world):
        world.now = LEASE_S - 1.0
        # Nobody asks: the thread does. An owner that asks gets the lease only once it has expired.
        for _ in range(1000):
            found = registry.take_lease(federation, "another", for_s=LEASE_S)
            if found.expires_at > LEASE_S:
                break
            lease_module.time.sleep(0.01)
        assert found.expires_at == 2 * LEASE_S - 1.0


@pytest.mark.process
def test_of_two_coordinators_started_at_once_one_works_and_the_other_says_why_it_does_not(tmp_path: Path) -> None:
    made, federation, _ = start(tmp_path, members(), KILLED)
    command = [sys.executable, "-m", "tests.coordinator.second_coordinator", str(tmp_path)]

    def coordinate() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(coordinate), pool.submit(coordinate)]
        first, _ = wait(both, return_when=FIRST_COMPLETED)
        (tmp_path / "go").touch()  # only now does a round of the other one come to its end
        (refused,) = [done.result() for done in first]
        (worked,) = [done.result() for done in both if done not in first]
    assert refused.returncode == 1 and refused.stdout == ""
    assert "error: another coordinator runs operator/fleet since" in refused.stderr and "is alive" in refused.stderr
    assert (worked.returncode, worked.stdout) == (0, "works\n"), worked.stderr
    assert [r.state for r in made.rounds(federation)] == ["committed"] * 4
    commits = [entry for entry in made.audit("operator") if entry.action == "round.commit"]
    assert [entry.subject for entry in commits] == [f"operator/fleet round {number}" for number in range(1, 5)]
    assert len({entry.by for entry in commits}) == 1 and len(commits[0].by) == 32  # the lease's owner
    made.close()
