"""Quotas in the path of requests: what a call may use is held before it runs, and put on record after it.

The registry is asked by threads of its own, one question at a time for each tenant and no lock held meanwhile. A
request waits only where its tenant's blocks are empty, or its quota not known yet, and never longer than ``WAIT_S``;
what is decided is in :mod:`lorafleet.router_service.accounts`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from lorafleet.engine import Ticket
from lorafleet.errors import LorafleetError, QuotaExceededError, UnavailableError
from lorafleet.registry import Registry
from lorafleet.registry.quotas import MINUTE_S
from lorafleet.registry.records import Amount, Usage
from lorafleet.router_service.accounts import Account, Action, LookUp, Piece, RateLimits, Take, Use, Waiting
from lorafleet.router_service.waiting import WouldWait

WAIT_S: Final = 3.0
"""How long a request waits for the registry; then it is UNAVAILABLE."""
LAST_RECORDS_S: Final = 6.0
"""For what is to go on record when the service stops: longer than SQLite waits for its turn."""
_THREADS: Final = 4
_TICK_S: Final = 0.5
_log = logging.getLogger(__name__)


class _Tenant:
    """An account with its lock; ``asking`` while a thread asks the registry for it."""

    def __init__(self, name: str, now: float) -> None:
        self.name, self.account = name, Account(now)
        self.changed = threading.Condition()
        self.asking = False

    @property
    def is_clear(self) -> bool:
        """Whether nothing of it is left to be put on record."""
        return self.account.clear and not self.asking


class Reservation:
    """What a request may use. Ends by itself when it is left and all tickets that it follows are done.

    Prompt tokens count from the submission on, generated ones as they came, also of a request that was cancelled or
    failed. One that was left with an error before it had a ticket used nothing.
    """

    def __init__(self, requests: int, end: Callable[[Use], None]) -> None:
        self._used, self._end = Use(requests=requests), end
        self._lock = threading.Lock()
        self._followed = self._ended = 0
        self._left = False

    def follow(self, ticket: Ticket, *, prompt_tokens: int) -> None:
        """Count a ticket; ``prompt_tokens`` is 0 for a further answer to a prompt that was counted."""
        with self._lock:
            self._used = self._used.plus(Use(prompt_tokens=prompt_tokens))
            self._followed += 1
        counted = False

        def listen() -> None:
            nonlocal counted
            if ticket.done and not counted:
                counted = True
                self._finish(generated=sum(len(chunk.token_ids) for chunk in ticket.chunks()))

        ticket.subscribe(listen)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if kind is not None and self._followed == 0:
                self._used = Use()
            self._left = True
            over = self._ended == self._followed
        if over:
            self._end(self._used)

    def _finish(self, *, generated: int) -> None:
        with self._lock:
            self._used = self._used.plus(Use(generated_tokens=generated))
            self._ended += 1
            over = self._left and self._ended == self._followed
        if over:
            self._end(self._used)


class Metering:
    """Every tenant's account, and the threads that ask the registry for them. Thread-safe."""

    def __init__(self, registry: Registry, *, clock: Callable[[], float] = time.time, wait_s: float = WAIT_S) -> None:
        """``clock``: that of the registry, whose windows count."""
        self._registry, self._clock, self._wait_s = registry, clock, wait_s
        self._lock = threading.Lock()
        self._tenants: dict[str, _Tenant] = {}
        self._questions: queue.SimpleQueue[tuple[_Tenant, Action] | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        # Daemons: a database that never answers does not keep the process.
        self._threads = [
            threading.Thread(target=self._ask_all, name=f"lorafleet-usage-{number}", daemon=True)
            for number in range(_THREADS)
        ]
        self._threads.append(threading.Thread(target=self._tick_all, name="lorafleet-usage", daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, *, timeout_s: float = LAST_RECORDS_S) -> None:
        """Put on record what is not yet, and end the threads; what takes longer than ``timeout_s`` is left."""
        if self._stopped.is_set() or not self._threads[0].is_alive():
            return
        deadline = time.monotonic() + timeout_s
        tenants = self._all()
        for tenant in tenants:
            with tenant.changed:
                tenant.account.closing = True
                self._ask(tenant)
        left = 0
        for tenant in tenants:
            with tenant.changed:
                while not (clear := tenant.is_clear) and (seconds := deadline - time.monotonic()) > 0:
                    tenant.changed.wait(seconds)
                left += not clear
        if left:
            _log.warning("the last use of %d tenants is not on record: the registry's database did not answer", left)
        self._stopped.set()
        for _ in range(_THREADS):
            self._questions.put(None)
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))

    def forget(self) -> None:
        """Look every quota up again, in the background: the registry has changed."""
        for tenant in self._all():
            with tenant.changed:
                tenant.account.forget()
                self._ask(tenant)

    def enter(self, name: str, *, wait: bool = True) -> None:
        """Count a call of a tenant, until ``leave``. QuotaExceededError where as many run here as may.

        Not to ``wait``: WouldWait where the quota is not known.
        """
        tenant = self._tenant(name)
        with tenant.changed:
            self._wait(tenant, Waiting(Amount(0, 0)), lambda: tenant.account.known, wait=wait)
            tenant.account.enter(self._clock())

    def leave(self, name: str) -> None:
        tenant = self._tenants[name]  # not forgotten while a call of it runs
        with tenant.changed:
            tenant.account.leave()

    def reserve(self, name: str, *, requests: int, tokens: int, wait: bool = True) -> Reservation:
        """Hold what a request may use at most; whoever gets it uses it as a context manager.

        QuotaExceededError, with the seconds until it may be tried again, where a limit has no room; UnavailableError
        where the registry has to be asked and does not answer. Not to ``wait``: WouldWait where it has to be asked.
        """
        tenant, need = self._tenant(name), Amount(requests, tokens)
        pieces: tuple[Piece, ...] | None = None

        def drawn() -> bool:
            nonlocal pieces
            pieces = tenant.account.draw(need, self._clock())
            return pieces is not None

        with tenant.changed:
            self._wait(tenant, Waiting(need), drawn, wait=wait)
            self._ask(tenant)
        held = pieces or ()

        def end(used: Use) -> None:
            with tenant.changed:
                tenant.account.touch(self._clock())
                tenant.account.end(held, used)
                self._ask(tenant)
                if tenant.account.waiting:
                    tenant.changed.notify_all()  # what came back may be enough for who waits

        return Reservation(requests, end)

    def limits(self, name: str) -> RateLimits:
        """What is left of a tenant's minute; does not wait."""
        with self._lock:
            tenant = self._tenants.get(name)
        if tenant is None:
            return RateLimits(None, None)
        with tenant.changed:
            return tenant.account.limits(self._clock())

    def _wait(self, tenant: _Tenant, waiting: Waiting, ready: Callable[[], bool], *, wait: bool) -> None:
        """Until ready, under the tenant's lock, with the registry asked for what is missing."""
        if ready():
            return
        if not wait:
            raise WouldWait
        deadline = time.monotonic() + self._wait_s
        tenant.account.waiting.append(waiting)
        try:
            while waiting.error is None:
                self._ask(tenant)
                if not tenant.changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise UnavailableError(
                        f"the registry's database did not answer within {self._wait_s:g} s; call again later"
                    )
                if ready():
                    return
            raise waiting.error
        finally:
            tenant.account.waiting.remove(waiting)

    def _tenant(self, name: str) -> _Tenant:
        with self._lock:
            if name not in self._tenants:
                self._tenants[name] = _Tenant(name, self._clock())
            tenant = self._tenants[name]
            with tenant.changed:
                tenant.account.touch(self._clock())  # so that it is not forgotten before it is used
            return tenant

    def _all(self) -> list[_Tenant]:
        with self._lock:
            return list(self._tenants.values())

    def _ask(self, tenant: _Tenant) -> None:
        """Have the registry asked what is to be asked now, unless a thread does already; under the tenant's lock."""
        if not tenant.asking and (action := tenant.account.next(self._clock())) is not None:
            tenant.asking = True
            self._questions.put((tenant, action))

    # Threads

    def _tick_all(self) -> None:
        """What is due by the clock: blocks of a new minute, and what goes on record."""
        while True:
            to_border = MINUTE_S - self._clock() % MINUTE_S
            if self._stopped.wait(min(_TICK_S, to_border)):
                return
            for tenant in self._all():
                with tenant.changed:
                    self._ask(tenant)
            self._forget_idle()

    def _forget_idle(self) -> None:
        now = self._clock()
        with self._lock:
            for name, tenant in list(self._tenants.items()):
                with tenant.changed:
                    if not tenant.asking and tenant.account.forgettable(now):
                        del self._tenants[name]

    def _ask_all(self) -> None:
        while (question := self._questions.get()) is not None:
            tenant: _Tenant = question[0]
            action: Action | None = question[1]
            while action is not None:
                answer = self._answer(tenant.name, action)
                with tenant.changed:
                    answer(tenant.account, self._clock())
                    tenant.changed.notify_all()
                    action = tenant.account.next(self._clock())
                    tenant.asking = action is not None

    def _answer(self, name: str, action: Action) -> Callable[[Account, float], None]:
        """Ask the registry; what its answer does to the account."""
        try:
            if isinstance(action, LookUp):
                quota = self._registry.quota(name)
                return lambda account, _now: account.looked_up(action, quota)
            if isinstance(action, Take):
                (requests, tokens), least = action
                block = self._registry.lease_usage(
                    name,
                    requests=requests,
                    tokens=tokens,
                    least_requests=least.requests,
                    least_tokens=least.tokens,
                )
                seen = self._seen(name) if action.wanted != (0, 0) else []
                return lambda account, now: account.took(action, block, seen, now)
            used = action.held.used
            self._registry.settle_usage(action.held.block, **used._asdict())
            return lambda account, _now: account.settled(action)
        except QuotaExceededError as error:
            if isinstance(action, Take):
                refusal = error
                return lambda account, now: account.refuse(action, refusal, now)
            failure: Exception = error
        except LorafleetError as error:
            _log.warning("the registry did not answer %s: %s", type(action).__name__, error)
            failure = error
        except Exception as error:
            _log.exception("the registry did not answer %s", type(action).__name__)
            failure = error
        return lambda account, now: account.failed(action, failure, now)

    def _seen(self, name: str) -> list[Usage]:
        """What is taken by now; for headers only, so that the block that was taken is not lost with it."""
        try:
            return self._registry.usage(name, since=self._clock())
        except Exception as error:
            _log.warning("what is left of a quota cannot be read: %s", error)
            return []
