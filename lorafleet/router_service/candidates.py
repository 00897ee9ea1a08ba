"""What routers choose among, tenant by tenant: kept until the registry changes, so that a route asks no database."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from lorafleet.errors import UnavailableError
from lorafleet.registry import Registry
from lorafleet.registry.records import Version
from lorafleet.router_service import access
from lorafleet.router_service.routers import Candidate, Pool
from lorafleet.router_service.routers.lexical import LONGEST
from lorafleet.router_service.waiting import WouldWait

CACHED_S: Final = 0.5
_TENANTS: Final = 4096
_POOLS: Final = 1024
_POSTINGS: Final = 10**6
"""In the indexes of all pools together: about 100 MB."""
_LONGEST: Final = 500_000
"""Characters of all cards of a pool: two seconds of the interpreter, and half of ``_POSTINGS``. Of many, each is read
the less far."""
_STRIPES: Final = 64

_Ids = tuple[tuple[int, str], ...]
"""A version's number in the registry and its digest, for each."""


class _Usable(NamedTuple):
    """A tenant's at a revision of the registry."""

    versions: tuple[Version, ...]
    revision: int
    looked_at: float


class _Asked(NamedTuple):
    """What a tenant's last pool was asked for with, and that pool's key."""

    versions: Sequence[Version]
    """Most calls bring the very same ones, which need no comparison."""
    ids: _Ids
    key: bytes


class Candidates:
    """Thread-safe.

    A look at the registry counts for ``cached_s`` seconds, or until :meth:`forget`: a revoked grant stops working
    within that time. After half of it one caller looks again, while the others go on with what is known. The revision
    is compared then, and all is read again only where that has moved. Pools are kept by
    what is in them: digests, references and cards; a name that comes to mean another version is another pool's.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        base_digest: str,
        reads_cards: bool,
        cached_s: float = CACHED_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._base_digest, self._reads_cards = registry, base_digest, reads_cards
        self._cached_s, self._clock = cached_s, clock
        self._lock = threading.Lock()
        # One look for all who wait for the same tenant's; a few tenants share a lock.
        self._looking = [threading.Lock() for _ in range(_STRIPES)]
        self._making = [threading.Lock() for _ in range(_STRIPES)]
        self._usable: OrderedDict[str, _Usable] = OrderedDict()
        self._renewing: set[str] = set()
        """Tenants that one caller looks at again."""
        self._forgotten_at = -math.inf
        self._keys: OrderedDict[str, _Asked] = OrderedDict()
        self._pools: OrderedDict[bytes, Pool] = OrderedDict()
        self._postings = 0

    def usable(self, tenant: str, *, wait: bool = True) -> tuple[Version, ...]:
        """The live version of each adapter that a tenant may use. Not to ``wait``: WouldWait where it is not known."""
        with self._lock:
            held = self._usable.get(tenant)
            age = self._age(held)
            if held is not None and age < 1.0:
                if age < 0.5 or (not wait and tenant in self._renewing):
                    return held.versions
                self._renewing.add(tenant)  # by this caller, who comes again and waits
        if not wait:
            raise WouldWait
        with self._looking[hash(tenant) % _STRIPES]:
            with self._lock:
                held = self._usable.get(tenant)
            if held is not None and self._age(held) < 0.5:
                return held.versions
            try:
                return self._look(tenant).versions
            except UnavailableError:
                if held is not None and self._age(held) < 1.0:
                    return held.versions
                raise

    def pool(self, tenant: str, versions: Sequence[Version], *, wait: bool = True) -> Pool:
        """What a router chooses among; of versions with the same weights the first one stands for all.

        Not to ``wait``: WouldWait where it has to be made.
        """
        ids: _Ids | None = None
        with self._lock:
            asked = self._keys.get(tenant)
            if asked is not None and asked.versions is not versions:
                ids = _ids(versions)
            if asked is not None and (ids is None or asked.ids == ids) and (pool := self._pools.get(asked.key)):
                self._pools.move_to_end(asked.key)
                return pool
        if not wait:
            raise WouldWait
        with self._making[hash(tenant) % _STRIPES]:  # nobody waits for another tenant's large one
            candidates = self._candidates(versions)
            key = _key(candidates)
            with self._lock:
                pool = self._pools.get(key)
            if pool is None:
                pool = Pool.of(candidates)
                # An index is made when it is first asked for anything: here, not on somebody's event loop.
                pool = self._keep(key, pool, pool.index.postings if self._reads_cards else 0)
            with self._lock:
                self._keys[tenant] = _Asked(versions, _ids(versions) if ids is None else ids, key)
                self._keys.move_to_end(tenant)
                while len(self._keys) > _TENANTS:
                    self._keys.popitem(last=False)
        return pool

    def forget(self) -> None:
        """Look at the registry again: it has changed."""
        self._forgotten_at = self._clock()

    def _age(self, held: _Usable | None) -> float:
        """1 once a look does not count any more."""
        if held is None or held.looked_at <= self._forgotten_at:
            return 1.0
        return (self._clock() - held.looked_at) / self._cached_s

    def _look(self, tenant: str) -> _Usable:
        # From before the look: what is revoked while it is read is not kept for longer than that.
        began = self._clock()
        with self._lock:
            held = self._usable.get(tenant)
        try:
            revision = self._registry.revision()
            if held is None or held.revision != revision:
                versions = tuple(access.usable(self._registry, tenant, base_digest=self._base_digest))
                held = _Usable(versions, revision, began)
        finally:
            with self._lock:
                self._renewing.discard(tenant)
        held = held._replace(looked_at=began)
        with self._lock:
            self._usable[tenant] = held
            self._usable.move_to_end(tenant)
            while len(self._usable) > _TENANTS:
                self._usable.popitem(last=False)
        return held

    def _candidates(self, versions: Sequence[Version]) -> list[Candidate]:
        distinct: dict[str, Version] = {}
        for version in versions:
            distinct.setdefault(version.digest, version)
        kept = list(distinct.values())
        cards = self._registry.cards(kept) if self._reads_cards else [""] * len(kept)
        longest = min(LONGEST, _LONGEST // max(1, len(kept)))
        return [Candidate(v.digest, v.reference, card[:longest]) for v, card in zip(kept, cards, strict=True)]

    def _keep(self, key: bytes, pool: Pool, size: int) -> Pool:
        """The pool that is kept: another thread may have been faster with the same one."""
        with self._lock:
            if (kept := self._pools.get(key)) is not None:
                return kept
            self._pools[key] = pool
            self._postings += size
            while len(self._pools) > 1 and (len(self._pools) > _POOLS or self._postings > _POSTINGS):
                _, left = self._pools.popitem(last=False)
                self._postings -= left.index.postings if self._reads_cards else 0
            return pool


def _key(candidates: Sequence[Candidate]) -> bytes:
    digest = hashlib.sha256()
    for candidate in sorted(candidates, key=lambda candidate: candidate.digest):
        for part in (candidate.digest, candidate.reference, candidate.card):
            digest.update(hashlib.sha256(part.encode()).digest())
    return digest.digest()


def _ids(versions: Sequence[Version]) -> _Ids:
    return tuple((version.id, version.digest) for version in versions)
