"""Which adapter versions the engine holds, by digest: the live ones, and any other only while a call needs it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from lorafleet.adapters import LoraAdapter
from lorafleet.engine import Engine
from lorafleet.errors import BackendError, UnavailableError
from lorafleet.registry import Registry
from lorafleet.registry.records import Version
from lorafleet.router_service.holds import Holds

PAUSE_S: Final = 30.0
"""After a version could not be loaded: a store that is away is not waited for by every call, nor missed for good."""
_log = logging.getLogger(__name__)


class Residency:
    """Loads and unloads versions under their digests. Thread-safe; no lock is held while weights are read.

    The engine lets a request finish on the weights that it started with, so that a version need only be held until
    the request has been submitted.
    """

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        holds: Holds | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._registry, self._clock = engine, registry, clock
        self._holds = holds or Holds(registry)
        self._changed = threading.Condition()
        self._live: frozenset[str] = frozenset()
        self._loaded: set[str] = set()
        self._moving: set[str] = set()
        """Digests that a thread is loading or unloading right now."""
        self._held: Counter[str] = Counter()
        self._broken: dict[str, float] = {}
        """Digests that could not be loaded, and when they are tried again."""

    @contextmanager
    def hold(self, versions: Sequence[Version]) -> Iterator[None]:
        """The versions are in the engine inside the block; raises what loading one of them raises."""
        digests = self._take(versions)
        try:
            for version in versions:
                self._load(version)
            yield
        finally:
            self._let_go(digests)

    @contextmanager
    def hold_loadable(self, versions: Sequence[Version]) -> Iterator[list[Version]]:
        """Those of the versions that can be loaded, in the engine inside the block; the others are logged."""
        digests = self._take(versions)
        try:
            # Nothing leaves any more that is held: most calls find all of theirs there, at one look.
            all_there = self.has(digests)
            yield [version for version in versions if all_there or self._try_load(version)]
        finally:
            self._let_go(digests)

    def has(self, digests: Iterable[str]) -> bool:
        """Whether all of them are in the engine now; does not wait."""
        with self._changed:
            return all(digest in self._loaded and digest not in self._moving for digest in digests)

    def loadable(self, versions: Sequence[Version]) -> Sequence[Version]:
        """Those of the versions that did not fail just now; does not wait."""
        return [v for v in versions if not self._is_broken(v.digest)] if self._broken else versions

    def keep(self, live: Collection[Version]) -> None:
        """The engine holds exactly these from now on; one that cannot be loaded is logged and left out."""
        with self._changed:
            self._live = frozenset(version.digest for version in live)
            self._broken.clear()
            loaded = list(self._loaded)
        self._holds.take(self._live)
        for version in live:
            self._try_load(version)
        self._unload_unneeded(loaded)

    def renew_holds(self) -> None:
        """Tell the registry, now and then, what the engine has; to be called often."""
        self._holds.renew(self._needed)

    def release_holds(self) -> None:
        """Tell the registry that the engine has nothing any more."""
        self._holds.release()

    def _needed(self) -> set[str]:
        with self._changed:
            return self._loaded | self._moving | self._live

    def _take(self, versions: Sequence[Version]) -> list[str]:
        """Their digests, which are held until :meth:`_let_go`."""
        digests = [version.digest for version in versions]
        with self._changed:
            for digest in digests:
                self._held[digest] += 1
        return digests

    def _let_go(self, digests: Sequence[str]) -> None:
        with self._changed:
            for digest in digests:
                self._held[digest] -= 1
                if not self._held[digest]:
                    del self._held[digest]
        self._unload_unneeded(digests)

    def _try_load(self, version: Version) -> bool:
        """Whether the version is in the engine now; one that failed is tried again after ``PAUSE_S`` or at ``keep``."""
        if self._is_broken(version.digest):
            return False
        try:
            self._load(version)
        except Exception:
            _log.exception("%s cannot be loaded; the others are served", version.digest)
            self._broken[version.digest] = self._clock() + PAUSE_S
            return False
        return True

    def _is_broken(self, digest: str) -> bool:
        return self._clock() < self._broken.get(digest, -math.inf)

    def _load(self, version: Version) -> None:
        if not self._begin(version.digest, want_loaded=True):
            return
        loaded = False
        try:
            self._holds.take([version.digest])
            self._engine.add_adapter(version.digest, self._read(version))
            loaded = True
            # By digest: whom it belongs to is in the registry, not for whoever reads one tenant's lines.
            _log.info("loaded %s (rank %d)", version.digest, version.rank)
        finally:
            self._end(version.digest, loaded=loaded)

    def _read(self, version: Version) -> LoraAdapter:
        try:
            return self._registry.load(version)
        except UnavailableError as error:
            raise BackendError(f"the weights of {version.reference} cannot be read") from error

    def _unload_unneeded(self, digests: Sequence[str]) -> None:
        with self._changed:
            digests = [digest for digest in digests if digest in self._loaded and not self._is_needed(digest)]
        for digest in digests:
            if self._begin(digest, want_loaded=False):
                try:
                    self._engine.remove_adapter(digest)
                    _log.info("unloaded %s", digest)
                finally:
                    self._end(digest, loaded=False)

    def _begin(self, digest: str, *, want_loaded: bool) -> bool:
        """Claims a digest for a move, once nobody else moves it; False where there is nothing to do."""
        with self._changed:
            self._changed.wait_for(lambda: digest not in self._moving)
            if (digest in self._loaded) == want_loaded or (self._is_needed(digest) and not want_loaded):
                return False
            self._moving.add(digest)
            return True

    def _is_needed(self, digest: str) -> bool:
        return digest in self._live or self._held[digest] > 0

    def _end(self, digest: str, *, loaded: bool) -> None:
        with self._changed:
            self._moving.discard(digest)
            if loaded:
                self._broken.pop(digest, None)
            (self._loaded.add if loaded else self._loaded.discard)(digest)
            self._changed.notify_all()
