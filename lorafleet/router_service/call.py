"""One call's hold on the engine: whatever it submitted is cancelled when the call ends, however it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from lorafleet.engine import Engine, SamplingParams, Ticket
from lorafleet.errors import UnavailableError
from lorafleet.registry.records import Key
from lorafleet.router_service.admission import Admission
from lorafleet.router_service.metering import Metering, Reservation
from lorafleet.router_service.trail import Trail


class Call:
    """Counts as running from its creation until :meth:`end`, which is the door's to call: gRPC's or HTTP's."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        metering: Metering,
        key: Key,
        trail: Trail | None = None,
        *,
        weight: float = 1.0,
    ) -> None:
        """``weight``: the tenant's. Raises what ``Admission.enter`` raises; :meth:`end` must follow otherwise."""
        self._engine, self._admission, self._metering = engine, admission, metering
        self.key, self._weight = key, weight
        self.trail = Trail() if trail is None else trail
        self.began = time.monotonic()
        self._lock = threading.Lock()
        self._tickets: list[Ticket] = []
        self._ended = self._metered = False
        admission.enter(key.tenant, weight)

    def reserve(self, *, requests: int, tokens: int, wait: bool = True) -> Reservation:
        """Hold what the tenant's quota has to have room for; raises what ``Metering.enter`` and ``reserve`` raise.

        From the first time on the call counts among the tenant's concurrent ones. May wait for the database; not to
        ``wait``: WouldWait instead.
        """
        with self.trail.step("quota"):
            if not self._metered:
                self._metering.enter(self.key.tenant, wait=wait)
                with self._lock:
                    self._metered, ended = not self._ended, self._ended
                if ended:
                    self._metering.leave(self.key.tenant)
                    raise UnavailableError("the call ended before it was served")
            return self._metering.reserve(self.key.tenant, requests=requests, tokens=tokens, wait=wait)

    def submit(self, prompt: str | Sequence[int], *, mix: Mapping[str, float], sampling: SamplingParams) -> Ticket:
        # Tenants share no cached prefix: the time of a first token would tell what others have asked.
        tenant = self.key.tenant
        ticket = self._engine.submit(
            prompt, mix=mix, sampling=sampling, salt=tenant, tenant=tenant, weight=self._weight
        )
        with self._lock:
            self._tickets.append(ticket)
            ended = self._ended
        if ended:
            ticket.cancel()
        return ticket

    def score(self, prompt: Sequence[int], mixes: Sequence[Mapping[str, float]]) -> list[list[float]]:
        """For each mix the log-likelihood in nats of the prompt's tokens from the second on; one batch for all."""
        sampling = SamplingParams(max_tokens=0, prompt_logprobs=True)
        tickets: list[Ticket] = []
        with self.reserve(requests=0, tokens=len(prompt) * len(mixes)) as reservation:
            for mix in mixes:
                tickets.append(self.submit(prompt, mix=mix, sampling=sampling))
                reservation.follow(tickets[-1], prompt_tokens=len(prompt))
        scores: list[list[float]] = []
        for ticket in tickets:
            scored = ticket.result()
            if scored.finish_reason == "cancelled" or scored.prompt_logprobs is None:
                raise UnavailableError("the call ended before its text was scored")
            scores.append(scored.prompt_logprobs)
        return scores

    def end(self) -> None:
        """Cancels what still runs; from now on the call does not count. The second time nothing happens."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            tickets, metered = list(self._tickets), self._metered
        for ticket in tickets:
            ticket.cancel()
        if metered:
            self._metering.leave(self.key.tenant)
        self._admission.leave(self.key.tenant)
