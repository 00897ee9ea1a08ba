"""One call's hold on the engine: whatever it submitted is cancelled when the call ends, however it ends."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import grpc

from lorafleet.engine import Engine, SamplingParams, Ticket
from lorafleet.errors import UnavailableError
from lorafleet.router_service.admission import Admission
from lorafleet.router_service.tenancy import named_tenant


class Call:
    """Counts as running from its creation until gRPC reports the end of the call: normal, cancelled, or out of time."""

    def __init__(self, engine: Engine, admission: Admission, context: grpc.ServicerContext) -> None:
        self._engine, self._admission = engine, admission
        # Tenants share no cached prefix: the time of a first token would tell what others have asked.
        self._salt = named_tenant(context.invocation_metadata())
        self._lock = threading.Lock()
        self._tickets: list[Ticket] = []
        self._ended = False
        admission.enter()
        if not context.add_callback(self._end):
            self._end()
            raise UnavailableError("the call ended before it was served")

    def submit(self, prompt: str | Sequence[int], *, mix: Mapping[str, float], sampling: SamplingParams) -> Ticket:
        ticket = self._engine.submit(prompt, mix=mix, sampling=sampling, salt=self._salt)
        with self._lock:
            self._tickets.append(ticket)
            ended = self._ended
        if ended:
            ticket.cancel()
        return ticket

    def score(self, prompt: Sequence[int], mixes: Sequence[Mapping[str, float]]) -> list[list[float]]:
        """For each mix the log-likelihood in nats of the prompt's tokens from the second on; one batch for all."""
        sampling = SamplingParams(max_tokens=0, prompt_logprobs=True)
        tickets = [self.submit(prompt, mix=mix, sampling=sampling) for mix in mixes]
        scores: list[list[float]] = []
        for ticket in tickets:
            scored = ticket.result()
            if scored.finish_reason == "cancelled" or scored.prompt_logprobs is None:
                raise UnavailableError("the call ended before its text was scored")
            scores.append(scored.prompt_logprobs)
        return scores

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            tickets = list(self._tickets)
        for ticket in tickets:
            ticket.cancel()
        self._admission.leave()
