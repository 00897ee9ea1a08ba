"""What one tenant may still use of its quota here. Decisions only: no lock, no clock, no database.

An account holds blocks that were taken from the registry (:mod:`lorafleet.registry.quotas`). Requests draw on them, and
what they did not use comes back at their end. :meth:`Account.next` says what the registry should be asked now, and the
answer is handed to :meth:`Account.looked_up`, :meth:`took`, :meth:`refuse`, :meth:`settled` or :meth:`failed`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from lorafleet.errors import QuotaExceededError
from lorafleet.registry import quotas
from lorafleet.registry.records import Amount, Quota, Usage, UsageBlock

SETTLE_S: Final = 5.0
"""How long a block that nobody draws on is kept, and how often use without a block is put on record."""
REFUSED_S: Final = 1.0
"""For how long the registry's refusal is passed on before it is asked again: others may have given back."""
RETRY_S: Final = 1.0
FORGET_S: Final = 60.0
SHARE: Final = 8
"""A block is an eighth of the smallest limit: two transactions for 7.5 s of a tenant that uses its whole quota."""
MOST: Final = Amount(256, 65536)
"""Of one block: what a service that dies costs a tenant until its budget's period ends."""
NOTHING: Final = Amount(0, 0)


class Use(NamedTuple):
    """What goes on record."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    @property
    def amount(self) -> Amount:
        return Amount(self.requests, self.prompt_tokens + self.generated_tokens)

    def plus(self, other: Use) -> Use:
        return Use(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.generated_tokens + other.generated_tokens,
        )

    def minus(self, other: Use) -> Use:
        return Use(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))

    def part(self, most: Amount) -> Use:
        """As much of it as an amount has room for."""
        prompt = min(self.prompt_tokens, most.tokens)
        return Use(min(self.requests, most.requests), prompt, min(self.generated_tokens, most.tokens - prompt))


class RateLimit(NamedTuple):
    """A limit of the current minute."""

    limit: int
    remaining: int
    """Here and, as of the last look at the registry, in all services together."""
    reset_s: float
    """Until the next minute, which begins with the whole limit."""


class RateLimits(NamedTuple):
    requests: RateLimit | None
    tokens: RateLimit | None


@dataclass(eq=False)
class Held:
    """A block, and what was made of it."""

    block: UsageBlock
    left: Amount
    taken_at: float
    drawing: int = 0
    """Requests on their way that drew on it."""
    used: Use = field(default_factory=Use)


class Piece(NamedTuple):
    """What a request holds of a block."""

    held: Held
    amount: Amount


@dataclass(eq=False)
class Waiting:
    """A request that found too little; ``error`` is why it will get nothing."""

    need: Amount
    error: Exception | None = None


class LookUp(NamedTuple):
    """Ask for the quota."""

    change: int


class Take(NamedTuple):
    """Take a block; one of nothing holds what was used without any."""

    wanted: Amount
    least: Amount


class Settle(NamedTuple):
    """Settle a block, once."""

    held: Held


Action = LookUp | Take | Settle


class _Refusal(NamedTuple):
    least: Amount
    until: float
    error: QuotaExceededError
    again_at: float | None


class Account:
    """One tenant's. Whoever uses it from several threads holds a lock around every call."""

    def __init__(self, now: float) -> None:
        self.waiting: list[Waiting] = []
        self.closing = False
        """Nothing more is taken, and all is settled that can be."""
        self._quota: Quota | None = None
        self._size = NOTHING
        """Of a block, by the quota; 0 for what has no limit."""
        self._change, self._known_change = 1, 0
        self._blocks: list[Held] = []
        self._retired: list[Held] = []
        """Nobody draws on them any more; settled once those have ended that did."""
        self._unrecorded, self._recorded_at = Use(), now
        self._refusal: _Refusal | None = None
        self._retry_at = self._drawn_at = self._touched_at = now
        self._running = 0
        self._free, self._free_until = NOTHING, 0.0
        """What nobody had taken at the last look, and the end of that minute."""

    @property
    def known(self) -> bool:
        """Whether the quota is."""
        return self._quota is not None

    @property
    def clear(self) -> bool:
        """Whether all is on record, and nothing held."""
        return not (self._blocks or self._retired or any(self._unrecorded))

    def forgettable(self, now: float) -> bool:
        return self.clear and not self.waiting and self._running == 0 and now - self._touched_at > FORGET_S

    def touch(self, now: float) -> None:
        """Somebody has it in hands."""
        self._touched_at = now

    # Requests

    def enter(self, now: float) -> None:
        """Count a call that begins; the quota is known. QuotaExceededError where as many run as may."""
        assert self._quota is not None
        self._drawn_at = now
        most = self._quota.concurrent_requests
        if most is not None and self._running >= most:
            raise QuotaExceededError(
                f"concurrent_requests is {most}, and {self._running} run; try again when one has ended", 1.0
            )
        self._running += 1

    def leave(self) -> None:
        self._running -= 1

    def draw(self, need: Amount, now: float) -> tuple[Piece, ...] | None:
        """Hold what a request may use; None where the registry has to be asked first.

        QuotaExceededError where a limit has no room for it: now, or, with ``retry_after_s`` None, ever.
        """
        if self._quota is None:
            return None
        self._drawn_at = now
        need = self._limited(need)
        if need == NOTHING:
            return ()
        quotas.block(self._quota, {}, now, wanted=need, least=need)  # refuses what no window has room for
        self._expire(now)
        missing = self._missing(need)
        if missing != NOTHING:
            self._check_refusal(missing, now)
            return None
        pieces = []
        for held in self._blocks:
            taken = Amount(*map(min, held.left, need))
            if taken != NOTHING:
                held.left, need = _minus(held.left, taken), _minus(need, taken)
                held.drawing += 1
                pieces.append(Piece(held, taken))
        return tuple(pieces)

    def end(self, pieces: tuple[Piece, ...], used: Use) -> None:
        """A request has ended: what it did not use may be drawn again."""
        # Each block has on record what was drawn from it: the first one settled would else give back what was used.
        for held, amount in pieces:
            spent = used.part(amount)
            used = used.minus(spent)
            held.used = held.used.plus(spent)
            held.left = _plus(held.left, _minus(amount, spent.amount))
            held.drawing -= 1
        if pieces:
            pieces[0].held.used = pieces[0].held.used.plus(used)  # of what has no limit
        else:
            self._unrecorded = self._unrecorded.plus(used)

    def limits(self, now: float) -> RateLimits:
        """What headers say; both None before the quota is known."""
        quota, minute = self._quota or Quota(), quotas.window(quotas.MINUTE_S, now)
        here = _total(held.left for held in self._blocks if held.block.ends_at > now)

        def limit(most: int | None, free: int, left: int) -> RateLimit | None:
            if most is None:
                return None
            remaining = max(0, min(most, free + left)) if self._free_until == minute.ends_at else most
            return RateLimit(most, remaining, minute.ends_at - now)

        return RateLimits(
            limit(quota.requests_per_minute, self._free.requests, here.requests),
            limit(quota.tokens_per_minute, self._free.tokens, here.tokens),
        )

    # The registry

    def forget(self) -> None:
        """The quota may have changed; until it is known again, the old one counts."""
        self._change += 1

    def next(self, now: float) -> Action | None:
        """What to ask the registry now. Whoever gets it asks, and hands over the answer before asking for the next."""
        self._expire(now)
        may_retry = now >= self._retry_at
        if self._quota is None or (self._change != self._known_change and may_retry):
            return LookUp(self._change) if self.waiting or may_retry else None
        for waiting in self.waiting:
            missing = self._missing(self._limited(waiting.need))
            if missing != NOTHING and waiting.error is None and not self._is_refused(missing, now):
                more = Amount(*(m + s if m > 0 else 0 for m, s in zip(missing, self._size, strict=True)))
                return Take(more, missing)
        if not may_retry:
            return None
        return self._ahead(now) or self._settlement(now) or self._record(now)

    def looked_up(self, asked: LookUp, quota: Quota) -> None:
        self._known_change = asked.change
        if quota != self._quota:
            self._retire(self._blocks)  # they were measured by the old one
            self._quota, self._size, self._refusal = quota, _block_size(quota), None

    def took(self, asked: Take, block: UsageBlock, seen: Iterable[Usage], now: float) -> None:
        """``seen``: what all services had taken after that; empty where it could not be read."""
        held = Held(block, Amount(block.requests, block.tokens), now)
        if asked.wanted == NOTHING:
            held.used, self._unrecorded, self._recorded_at = self._unrecorded, Use(), now
            self._retired.append(held)
            return
        self._blocks.append(held)
        for usage in seen:
            if usage.window.period_s == quotas.MINUTE_S and usage.window.ends_at == block.ends_at:
                quota = self._quota or Quota()
                most = Amount(quota.requests_per_minute or 0, quota.tokens_per_minute or 0)
                self._free, self._free_until = _minus(most, usage.taken), block.ends_at

    def refuse(self, asked: Take, error: QuotaExceededError, now: float) -> None:
        """No limit had room for a block."""
        again_at = None if error.retry_after_s is None else now + error.retry_after_s
        self._refusal = _Refusal(asked.least, now + REFUSED_S, error, again_at)

    def settled(self, asked: Settle) -> None:
        block = asked.held.block
        if block.ends_at == self._free_until:
            unused = _minus(Amount(block.requests, block.tokens), asked.held.used.amount)
            self._free = _plus(self._free, unused)

    def failed(self, asked: Action, error: Exception, now: float) -> None:
        """The registry gave no answer: who waits for it gets the error; what is to be settled is kept."""
        self._retry_at = now + RETRY_S
        if isinstance(asked, Settle):
            self._retired.append(asked.held)
        elif isinstance(asked, Take) or self._quota is None:
            for waiting in self.waiting:
                waiting.error = error

    # What to do ahead of requests, and after them

    def _ahead(self, now: float) -> Take | None:
        """A block, where those that are there run low, or where the only ones are due to be settled."""
        if self._size == NOTHING or self.closing or not self._is_active(now):
            return None
        if self._refusal is not None and now < self._refusal.until:
            return None
        size, left = self._size, _total(held.left for held in self._blocks)
        due = any(held.drawing == 0 for held in self._blocks) and all(self._is_aged(held, now) for held in self._blocks)
        wanted = Amount(*(s if due or 2 * have < s else 0 for s, have in zip(size, left, strict=True)))
        return None if wanted == NOTHING else Take(wanted, Amount(*(min(1, w) for w in wanted)))

    def _settlement(self, now: float) -> Settle | None:
        if not self._blocks and not self._retired:
            return None
        fresh = any(not self._is_aged(held, now) for held in self._blocks)
        unneeded = [
            held
            for held in self._blocks
            if held.drawing == 0
            and (
                self.closing or held.left == NOTHING or not self._is_active(now) or (fresh and self._is_aged(held, now))
            )
        ]
        self._retire(unneeded)
        for held in self._retired:
            if held.drawing == 0:
                self._retired.remove(held)
                return Settle(held)
        return None

    def _record(self, now: float) -> Take | None:
        due = self.closing or now - self._recorded_at >= SETTLE_S
        return Take(NOTHING, NOTHING) if due and any(self._unrecorded) else None

    def _limited(self, need: Amount) -> Amount:
        """Without what has no limit."""
        quota = self._quota or Quota()
        requests = quota.requests_per_minute is not None
        tokens = quota.tokens_per_minute is not None or quota.budget_tokens is not None
        return Amount(need.requests if requests else 0, need.tokens if tokens else 0)

    def _missing(self, need: Amount) -> Amount:
        left = _total(held.left for held in self._blocks)
        return Amount(*(max(0, n - have) for n, have in zip(need, left, strict=True)))

    def _is_refused(self, missing: Amount, now: float) -> bool:
        refusal = self._refusal
        return (
            refusal is not None
            and now < refusal.until
            and all(m >= least for m, least in zip(missing, refusal.least, strict=True))
        )

    def _check_refusal(self, missing: Amount, now: float) -> None:
        if self._is_refused(missing, now):
            assert self._refusal is not None
            again_at = self._refusal.again_at
            raise QuotaExceededError(str(self._refusal.error), None if again_at is None else max(0.0, again_at - now))

    def _is_active(self, now: float) -> bool:
        return now - self._drawn_at < SETTLE_S

    def _is_aged(self, held: Held, now: float) -> bool:
        return now - held.taken_at >= SETTLE_S

    def _expire(self, now: float) -> None:
        if self._blocks:
            self._retire([held for held in self._blocks if held.block.ends_at <= now])

    def _retire(self, blocks: list[Held]) -> None:
        self._retired += blocks
        self._blocks = [held for held in self._blocks if held not in blocks]


def _block_size(quota: Quota) -> Amount:
    tokens = [most for most in (quota.tokens_per_minute, quota.budget_tokens) if most is not None]
    requests = [] if quota.requests_per_minute is None else [quota.requests_per_minute]
    return Amount(
        *(
            min(most, -(-min(limits) // SHARE)) if limits else 0
            for most, limits in zip(MOST, (requests, tokens), strict=True)
        )
    )


def _plus(first: Amount, second: Amount) -> Amount:
    return Amount(first.requests + second.requests, first.tokens + second.tokens)


def _minus(first: Amount, second: Amount) -> Amount:
    return Amount(first.requests - second.requests, first.tokens - second.tokens)


def _total(amounts: Iterable[Amount]) -> Amount:
    total = NOTHING
    for amount in amounts:
        total = _plus(total, amount)
    return total
