"""What is written down of a call while it runs: its line in the log, and its trace where traces are kept.

Both hold what finds a call again and where its time went. What a caller sent is in neither, but for a request id of a
few plain characters: no prompt, no key, and no name before it is known that the caller may use what it names.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, Final, Protocol

from lorafleet.engine import Ticket

REQUEST_ID: Final = "x-request-id"
"""A header of HTTP, and a key of gRPC's metadata."""
_SANE: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_calls: Final = logging.getLogger("lorafleet.calls")
_current: ContextVar[Trail | None] = ContextVar("lorafleet_trail", default=None)

Attributes = Mapping[str, str | int | float | tuple[str, ...]]


class Span(Protocol):
    """A call in a trace."""

    @property
    def trace_id(self) -> str:
        """32 hex digits; empty without a trace."""
        ...

    def step(self, name: str) -> AbstractContextManager[object]:
        """A part of the call, for as long as the block takes."""
        ...

    def interval(self, name: str, began: float, ended: float, attributes: Attributes) -> None:
        """A part that is over; times are those of ``time.monotonic``."""
        ...

    def end(self, attributes: Attributes, *, failed: bool) -> None: ...


Begin = Callable[[str, Mapping[str, str], Attributes], Span]
"""``(name, headers, attributes)``: headers in lower case, among which a caller's W3C trace context may be."""


_NO_STEP: Final = nullcontext()


class Untraced:
    """Where no traces are kept."""

    trace_id = ""

    def step(self, name: str) -> AbstractContextManager[object]:
        return _NO_STEP

    def interval(self, name: str, began: float, ended: float, attributes: Attributes) -> None:
        pass

    def end(self, attributes: Attributes, *, failed: bool) -> None:
        pass


def untraced(name: str, headers: Mapping[str, str], attributes: Attributes) -> Span:
    """``Begin`` for whoever keeps no traces."""
    return Untraced()


def sane_request_id(given: str) -> str:
    """The caller's own id where it is one, else a new one."""
    return given if _SANE.fullmatch(given) else secrets.token_hex(16)


class Trail:
    """One call, from the door to its end. Thread-safe: a gRPC call may end on another thread than its own."""

    def __init__(
        self,
        door: str = "",
        method: str = "",
        *,
        request_id: str = "",
        span: Span | None = None,
        level: int = logging.INFO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``method``: as the server names it, never as the caller wrote it. ``level``: of its line in the log."""
        self.door, self.method, self.request_id = door, method, request_id
        self.key_id = ""
        """Once the key is known to be one; it is public."""
        self.failure = ""
        """The reason of what went wrong after the status was sent."""
        self._span = Untraced() if span is None else span
        self._level, self._clock, self._began = level, clock, clock()
        self._attributes: dict[str, str | int | float | tuple[str, ...]] = {}
        self._tickets: list[tuple[Ticket, int]] = []
        self._lock = threading.Lock()
        self._ended = False

    @property
    def trace_id(self) -> str:
        return self._span.trace_id

    def step(self, name: str) -> AbstractContextManager[object]:
        """A part of the call for its trace."""
        return self._span.step(name)

    def note(self, name: str, value: str | int | float | tuple[str, ...]) -> None:
        """An attribute for its trace, by a name of OpenTelemetry's semantic conventions."""
        self._attributes[name] = value

    def follow(self, ticket: Ticket, *, prompt_tokens: int) -> None:
        """A generation that answers the call; ``prompt_tokens`` is 0 for a further one of a prompt that was counted."""
        with self._lock:
            self._tickets.append((ticket, prompt_tokens))

    def enter(self) -> None:
        """From here on, log records of this thread or task are this call's."""
        _current.set(self)

    def end(self, status: str, *, failed: bool, attributes: Attributes | None = None) -> None:
        """Writes its line and ends its trace; the second time nothing happens."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            # Not kept: a connection that waits for its next request still has the trail of the last one.
            tickets, self._tickets = self._tickets, []
        now = self._clock()
        prompt = sum(tokens for _, tokens in tickets)
        generated = sum(len(chunk.token_ids) for ticket, _ in tickets for chunk in ticket.chunks())
        if _calls.isEnabledFor(self._level):
            facts: dict[str, Any] = {
                "door": self.door,
                "method": self.method,
                "status": status,
                "duration_s": round(now - self._began, 6),
                "prompt_tokens": prompt,
                "generated_tokens": generated,
            }
            if self.failure:
                facts["failure"] = self.failure
            failure = f" {self.failure}" if self.failure else ""
            message = "%s %s%s in %.3f s, %d + %d tokens"
            values = (self.method, status, failure, now - self._began, prompt, generated)
            extra = {"trail": self, "facts": facts}
            # Not ``log``, which walks the stack for the line that called it: it is always this one.
            _calls.handle(_calls.makeRecord(_calls.name, self._level, __file__, 0, message, values, None, extra=extra))
        for number, (ticket, _) in enumerate(tickets):
            self._tell_times(ticket, number, now)
        usage = {"gen_ai.usage.input_tokens": prompt, "gen_ai.usage.output_tokens": generated} if tickets else {}
        reasons = {"error.type": self.failure or status} if failed or self.failure else {}
        known = {"lorafleet.key_id": self.key_id} if self.key_id else {}
        self._span.end(
            {**self._attributes, **usage, **reasons, **known, **(attributes or {})},
            failed=failed or bool(self.failure),
        )

    def _tell_times(self, ticket: Ticket, number: int, now: float) -> None:
        """Where the engine's time for one generation went; what is not over yet ends with the call."""
        times = ticket.times
        ended = now if times.ended is None else times.ended
        borders = [
            ("queue", times.submitted, times.started),
            ("prefill", times.started, times.first_token),
            ("decode", times.first_token, None),
        ]
        for name, began, until in borders:
            if began is not None:
                self._span.interval(name, began, ended if until is None else until, {"lorafleet.generation": number})


def current_trail() -> Trail | None:
    """That of the call which this thread or task works for, if any."""
    return _current.get()
