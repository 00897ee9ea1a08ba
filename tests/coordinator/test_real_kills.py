"""SIGKILL of real processes in the middle of rounds: they are started again, and nothing is lost or counts twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorafleet.clients.state import read_state
from tests.coordinator.real_fleet import Shape, digests, kill, real_fleet, undisturbed

pytestmark = [pytest.mark.process, pytest.mark.long]
# A coordinator holds its lease, and has read the journal, within this from its start; where more processes work than
# there are cores, each takes so much longer.
RECOVERY_S = 10.0


@pytest.mark.timeout(600)  # 75 s of one core; 137 s on two that were shared by seven processes
def test_superlink_and_member_that_are_killed_in_a_round_leave_no_trace_in_the_experts(tmp_path: Path) -> None:
    shape = Shape(members=3)
    expected = undisturbed(tmp_path / "undisturbed", shape)
    with real_fleet(tmp_path / "real", shape) as fleet:
        fleet.start()
        fleet.wait_for(lambda: "round 1 of fleet: 300 steps" in fleet.log("alder"), timeout_s=240)
        assert kill(fleet.head("superlink"))
        fleet.wait_for(lambda: "round 2 of fleet: 300 steps" in fleet.log("birch"), timeout_s=240)
        assert kill(fleet.head("birch"))
        fleet.wait_for(lambda: fleet.done, timeout_s=240)
        fleet.check_journal()
        assert digests(fleet.registry) == expected
        crowded = max(1.0, max(os.getloadavg()) / (os.cpu_count() or 1))
        assert len(fleet.leases_s()) == 2 and max(fleet.leases_s()) < RECOVERY_S * crowded
        said = fleet.log("alder")
        assert "round 1 of fleet: answered from the state" in said or said.count("round 1 of fleet: 300 steps") == 2
    for member in shape.accepted:
        state = read_state(tmp_path / "real" / "states" / member)
        assert state.history[-1].verdict == "accepted"
    # The one whose updates break the agreement knows why.
    state = read_state(tmp_path / "real" / "states" / "cedar")
    assert state.history[-1].verdict == "rejected: rank: found rank 6, at most 4 was agreed"
    log = (state.folder / "client.log").read_text()
    for number in (1, 2):
        assert f"WARNING round {number} of fleet: your update" in log
    assert "was rejected, and counts for nothing: rank: found rank 6" in log
