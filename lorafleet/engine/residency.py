"""Which adapters are loaded, under which names, and for how long their weights must stay.

A name points at a digest; requests hold digests. So a name can be moved to a new version, or removed, while requests
finish on the version that they started with. Weights leave when no name and no request needs them.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping

from lorafleet.adapters import LoraAdapter
from lorafleet.engine.model import LoadedBase
from lorafleet.engine.request import ResolvedMix, TokenMix
from lorafleet.errors import BaseMismatchError, InvalidInputError, NotFoundError
from lorafleet.kernels import Bank, Packing, TokenRoute

MAX_WEIGHT = 8.0


class Residency:
    """Thread-safe."""

    def __init__(self, base: LoadedBase, bank: Bank) -> None:
        self._base, self._bank = base, bank
        self._adapted = {module.path for group in bank.groups for module in group.modules}
        self._digests: dict[str, str] = {}
        self._holders: Counter[str] = Counter()  # digest → names and requests that need it
        self._lock = threading.Lock()

    def add(self, name: str, adapter: LoraAdapter) -> str:
        """Load an adapter under a name, in place of what the name meant; returns its digest.

        Raises BaseMismatchError where adapter and base do not belong together, InvalidInputError for an empty name
        or an adapted module that the engine does not serve. Nothing changes then.
        """
        if not isinstance(name, str) or not name:
            raise InvalidInputError(f"found {name!r} as an adapter's name, expected a text that is not empty")
        self._check(adapter)
        digest = adapter.digest
        # The slow part, without the lock: steps go on meanwhile.
        factors = {path: (pair.a, pair.b) for path, pair in adapter.modules.items()}
        try:
            pages = self._bank.pages(factors, adapter.gates)
        except ValueError as error:
            raise InvalidInputError(f"the adapter does not fit this base: {error}") from None
        with self._lock:
            self._bank.add(digest, pages)
            self._holders[digest] += 1
            replaced = self._digests.get(name)
            self._digests[name] = digest
            if replaced is not None:
                self._release((replaced,))
        return digest

    def _check(self, adapter: LoraAdapter) -> None:
        if adapter.base.startswith("sha256:") and adapter.base != self._base.digest:
            raise BaseMismatchError(
                f"the adapter was made for base {adapter.base}, this engine serves {self._base.digest}"
            )
        list(adapter.targets(self._base.model))
        if other := sorted(set(adapter.modules) - self._adapted):
            raise InvalidInputError(
                f"the adapter changes {', '.join(other)}; only linear layers of the decoder's layers can be mixed: "
                "train it without the others"
            )

    def remove(self, name: str) -> None:
        """Forget a name; raises NotFoundError where there is none."""
        with self._lock:
            if name not in self._digests:
                raise self._unknown(name)
            self._release((self._digests.pop(name),))

    def adapters(self) -> dict[str, str]:
        """Name → digest."""
        with self._lock:
            return dict(self._digests)

    def acquire(self, mix: Mapping[str, float] | TokenMix | None) -> ResolvedMix:
        """Check a mix and hold the versions that its names mean now, until ``release`` of the result.

        Raises NotFoundError for an unknown name; InvalidInputError for a weight that is no finite number of size at
        most 8, and for a route that cannot be, or whose adapters have no gates.
        """
        return self._acquire_route(mix) if isinstance(mix, TokenMix) else self._acquire_weights(mix or {})

    def _acquire_route(self, mix: TokenMix) -> ResolvedMix:
        with self._lock:
            for name in mix.adapters:
                if name not in self._digests:
                    raise self._unknown(name)
            digests = {name: self._digests[name] for name in mix.adapters}
            try:
                route = TokenRoute(tuple(digests.values()), mix.top_k, mix.temperature)
            except ValueError as error:
                raise InvalidInputError(f"the route cannot be: {error}") from None
            names = {digest: name for name, digest in digests.items()}
            if without := sorted(names[digest] for digest in route.keys if not self._bank.has_gates(digest)):
                raise InvalidInputError(
                    f"{', '.join(without)}: found no gates, which tokens are routed by; leave them out, or give weights"
                )
            self._holders.update(route.keys)
        return ResolvedMix({}, digests, route)

    def _acquire_weights(self, mix: Mapping[str, float]) -> ResolvedMix:
        weights: dict[str, float] = {}
        for name, weight in mix.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise InvalidInputError(f"the weight of {name!r} is {weight!r}, expected a number")
            if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
                raise InvalidInputError(
                    f"the weight of {name!r} is {weight}, expected a finite number of size at most {MAX_WEIGHT:g}"
                )
            weights[name] = float(weight)
        with self._lock:
            for name in weights:
                if name not in self._digests:
                    raise self._unknown(name)
            weights = {name: weight for name, weight in weights.items() if weight != 0.0}
            digests = {name: self._digests[name] for name in weights}
            gates: dict[str, float] = {}
            for name, weight in weights.items():  # two names may mean the same weights
                gates[digests[name]] = gates.get(digests[name], 0.0) + weight
            open_gates = tuple(sorted((digest, weight) for digest, weight in gates.items() if weight != 0.0))
            self._holders.update(digest for digest, _ in open_gates)
        return ResolvedMix(weights, digests, open_gates)

    def release(self, mix: ResolvedMix) -> None:
        """Let go of what :meth:`acquire` held; once for each."""
        with self._lock:
            self._release(mix.held)

    def pack(self, digests: Iterable[str]) -> Packing:
        """The rows of at least these adapters, contiguous; each must be held."""
        with self._lock:
            return self._bank.pack(digests)

    @property
    def packings_total(self) -> int:
        return self._bank.packings_total

    def _release(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._holders[digest] -= 1
            if self._holders[digest] == 0:
                del self._holders[digest]
                self._bank.remove(digest)

    def _unknown(self, name: str) -> NotFoundError:
        return NotFoundError(f"no adapter {name!r} is loaded; add it first")
