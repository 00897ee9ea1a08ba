"""A coordinator of scripted members that takes the lease: FOLDER. Its members answer once FOLDER/go is there.

Says on stdout that it works, and on stderr why it does not.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from lorafleet.coordinator.lease import FederationLease
from lorafleet.coordinator.rounds import run_federation
from lorafleet.coordinator.transport import Reply
from lorafleet.errors import UnavailableError
from tests.coordinator.killed_run import SETTINGS, members
from tests.coordinator.scripted import Timed, start


class Waiting(Timed):
    go: Path

    def receive(self, timeout_s: float) -> list[Reply]:
        if not self.go.exists():
            time.sleep(0.05)
            return []
        return super().receive(timeout_s)


def run(folder: Path) -> None:
    scripted = members()
    transport = Waiting(scripted.answers, scripted.speeds)
    transport.go = folder / "go"
    registry, federation, parts = start(folder, transport, SETTINGS)
    with registry, FederationLease(registry, federation) as lease:
        print("works", flush=True)
        parts = replace(parts, clock=transport.clock, check_lease=lease.check, token=lease.token, owner=lease.owner)
        run_federation(SETTINGS, federation, parts)


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]))
    except UnavailableError as error:
        sys.exit(f"error: {error}")
