"""One coordinator at a time: the lease that it holds on its federation, renewed by a thread while it runs."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from lorafleet.errors import LorafleetError, UnavailableError
from lorafleet.registry import Federation, Lease, Registry

log = logging.getLogger(__name__)

# A coordinator that crashed is in the next one's way for so long; two renewals may fail before it is taken for dead.
# One that was only slow writes nothing any more: its fencing token is refused.
LEASE_S = 8.0
RENEW_S = 2.0
POLL_S = 0.5


class FederationLease:
    """Held inside the block; leaving it gives the lease back.

    Entering takes it, and waits at most ``LEASE_S`` for the lease of a coordinator that may be gone. Raises
    UnavailableError where that one turns out to be alive.
    """

    def __init__(
        self,
        registry: Registry,
        federation: Federation,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._registry, self._federation = registry, federation
        self._clock, self._sleep = clock, sleep
        self._owner = uuid.uuid4().hex
        self._token = 0
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Self:
        self._take()
        self._renewer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._renewer.join()
        try:
            self._registry.release_lease(self._federation, self._owner)
        except LorafleetError as failed:
            log.warning("the lease on %s stays until it expires: %s", self._federation.name, failed)

    def check(self) -> None:
        """Renew the lease; raises UnavailableError where another coordinator has it by now."""
        lease = self._ask()
        if lease.owner != self._owner:
            raise UnavailableError(
                f"another coordinator runs {self._name} since {_time(lease.taken_at)}: this one was not heard of for "
                f"{LEASE_S:.0f} s and ends here; what is committed stays"
            )

    def _take(self) -> None:
        first, began = self._ask(), self._clock()
        lease = first
        if lease.owner != self._owner:
            log.info(
                "another coordinator has run %s since %s; waiting at most %.0f s, in case that it is gone",
                self._name, _time(lease.taken_at), LEASE_S,
            )  # fmt: skip
        while lease.owner != self._owner:
            # A holder that is alive renews its lease while this waits.
            waited = self._clock() - began
            if (lease.owner, lease.expires_at) != (first.owner, first.expires_at) or waited > LEASE_S + RENEW_S:
                raise UnavailableError(
                    f"another coordinator runs {self._name} since {_time(lease.taken_at)}, and is alive: wait for its "
                    "end, or stop it"
                )
            self._sleep(POLL_S)
            lease = self._ask()
        self._token = lease.token

    @property
    def token(self) -> int:
        """What the registry knows this holder by; whoever takes the lease later has a higher one."""
        return self._token

    @property
    def owner(self) -> str:
        """The name that it is taken under, one for each run."""
        return self._owner

    def _ask(self) -> Lease:
        return self._registry.take_lease(self._federation, self._owner, for_s=LEASE_S)

    @property
    def _name(self) -> str:
        return f"{self._federation.tenant}/{self._federation.name}"

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                self.check()
            except LorafleetError as error:  # where it is lost, the round loop's own check ends the run
                log.warning("%s", error)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")
