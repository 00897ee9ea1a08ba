"""Follows the registry: what goes live there is in the engine a moment later, outside the path of any request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lorafleet.engine import Engine
from lorafleet.registry import Registry
from lorafleet.router_service.residency import Residency

_log = logging.getLogger(__name__)


class Watcher:
    """A thread that compares the registry's revision and hands the live versions to the residency."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        residency: Residency,
        *,
        changed: Callable[[], None] = lambda: None,
        interval_s: float = 0.5,
    ) -> None:
        """``changed`` is called when the registry's revision has moved, before anything is loaded."""
        self._engine, self._registry, self._residency, self._changed = engine, registry, residency, changed
        self._interval_s = interval_s
        self._seen = -1
        self._moved = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lorafleet-watcher", daemon=True)

    def start(self) -> None:
        """Loads what is live now, then follows in the background."""
        self.poll()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what is loaded stays loaded, and may be deleted in the registry from now on."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._residency.release_holds()

    def poll(self) -> bool:
        """One look at the registry; True where its revision had changed. Versions of other bases are passed over."""
        # Read before the versions: a change in between is then seen again at the next look, never lost.
        revision = self._registry.revision()
        if revision == self._seen:
            return False
        self._changed()
        live = [version for version in self._registry.all_live() if version.base_digest == self._engine.base_digest]
        self._residency.keep(live)
        with self._moved:
            self._seen = revision
            self._moved.notify_all()
        return True

    def wait_seen(self, revision: int, *, timeout_s: float) -> bool:
        """Waits until the engine holds what was live at a revision of the registry; False when that takes longer."""
        with self._moved:
            return self._moved.wait_for(lambda: self._seen >= revision, timeout_s)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self.poll()
                self._residency.renew_holds()
            except Exception:
                _log.exception("the registry cannot be read; serving goes on with what is loaded")
