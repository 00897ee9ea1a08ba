"""Who calls: the API key in a call's ``authorization``, checked against the registry before any handler runs."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from lorafleet.errors import UnauthenticatedError, UnavailableError
from lorafleet.registry import Registry
from lorafleet.registry.records import Key

HEADER: Final = "authorization"
CACHED_S: Final = 0.5
_CACHED_KEYS: Final = 4096
_LONGEST: Final = 1000
"""Characters of a header's value: far more than a key has, and little to hash."""


def bearer_token(values: Sequence[str | bytes]) -> str:
    """The key in the values of ``authorization``; raises UnauthenticatedError unless it is one ``Bearer KEY``."""
    scheme, _, token = values[0].partition(" ") if len(values) == 1 and isinstance(values[0], str) else ("", "", "")
    if scheme.lower() != "bearer" or not token or len(token) > _LONGEST:
        raise UnauthenticatedError(
            f"found {len(values)} values of {HEADER!r} that may be a key, expected one, 'Bearer KEY'; `lorafleet key "
            "create` makes keys, and a server with a registry of its own says one when it starts"
        )
    return token


@dataclass(eq=False)
class _Known:
    """A key that was right when it was looked up."""

    key: Key
    looked_at: float
    """From before the look: what is revoked while it is read is not kept for longer than that."""
    renewing: bool = False
    looking: threading.Lock = field(default_factory=threading.Lock)
    """Held by whoever looks it up again, while others wait for what is found."""


class Authenticator:
    """From a token to its key. Thread-safe.

    A key that was right counts for ``cached_s`` seconds, or until the registry has changed (:meth:`forget`): a revoked
    key stops working within that time. After half of it one caller looks it up again, and the others go on with what is
    known, so that a busy tenant's calls do not all wait at once. Tokens are kept as digests. What was wrong is looked
    up every time, so that nobody fills the memory with guesses.
    """

    def __init__(
        self, registry: Registry, *, cached_s: float = CACHED_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry, self._cached_s, self._clock = registry, cached_s, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    def key(self, token: str) -> Key:
        """Raises UnauthenticatedError for a token that opens nothing, UnavailableError without the database."""
        digest = _digest(token)
        with self._lock:
            held = self._known.get(digest)
        if held is None:
            return self._look(token, digest)
        if self._age(held) < 0.5:
            return held.key
        with held.looking:
            with self._lock:
                held = self._known.get(digest)
            if held is not None and self._age(held) < 0.5:
                return held.key
            try:
                return self._look(token, digest)
            except UnavailableError:
                if held is not None and self._age(held) < 1.0:
                    return held.key
                raise

    def known(self, token: str) -> Key | None:
        """The key where no look at the database is needed; does not wait."""
        with self._lock:
            held = self._known.get(_digest(token))
            if held is None or (age := self._age(held)) >= 1.0:
                return None
            if age >= 0.5 and not held.renewing:
                held.renewing = True  # by this caller, who comes to :meth:`key` now
                return None
            return held.key

    def forget(self) -> None:
        """Look every key up again: the registry has changed."""
        with self._lock:
            for held in self._known.values():
                held.looked_at = -math.inf

    def _age(self, held: _Known) -> float:
        """1 once it does not count any more."""
        return (self._clock() - held.looked_at) / self._cached_s

    def _look(self, token: str, digest: bytes) -> Key:
        began = self._clock()
        try:
            key = self._registry.authenticate(token)
        except UnauthenticatedError:
            with self._lock:
                self._known.pop(digest, None)
            raise
        with self._lock:
            self._known[digest] = _Known(key, began)
            self._known.move_to_end(digest)
            while len(self._known) > _CACHED_KEYS:
                self._known.popitem(last=False)
        return key


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
