"""Which adapters are loaded, under which names, and for how long their weights must stay.

A name points at a digest; requests hold digests. So a name can be moved to a new version, or removed, while requests
finish on the version that they started with. Weights leave when no name and no request needs them; where they are
until then is for :mod:`lorafleet.engine.tiers` to say.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from lorafleet.adapters import LoraAdapter
from lorafleet.engine.model import LoadedBase
from lorafleet.engine.request import Request, ResolvedMix, TokenMix
from lorafleet.engine.tiers import Claim, Tiers, TierStats
from lorafleet.errors import BaseMismatchError, InvalidInputError, LorafleetError, NotFoundError
from lorafleet.kernels import Packing, TokenRoute

MAX_WEIGHT = 8.0
# A temperature that float32 takes for zero would make 0 / 0 of the largest logit; nobody routes anywhere near it.
MIN_TEMPERATURE = 1e-4


class _Named(NamedTuple):
    """What a name means, and how it came."""

    digest: str
    source: Path | None
    """the folder that it came from; None for an object"""
    pinned: bool


class Residency:
    """Thread-safe. Its lock guards the names; order: the engine's lock, this one, that of the tiers."""

    def __init__(self, base: LoadedBase, tiers: Tiers) -> None:
        self._base, self._tiers = base, tiers
        self._adapted = {module.path for group in base.groups for module in group.modules}
        self._names: dict[str, _Named] = {}
        self._lock = threading.Lock()

    def add(self, name: str, adapter: str | Path | LoraAdapter, *, pinned: bool = False) -> str:
        """Load an adapter, or one from a folder, under a name, in place of what the name meant; returns its digest.

        Raises what reading the folder raises; BaseMismatchError where adapter and base do not belong together,
        InvalidInputError for an empty name, an adapted module that the engine does not serve or factors that the base's
        dtype does not hold, OverloadedError where there is no room for one that has to stay. Nothing changes then.
        """
        if not isinstance(name, str) or not name:
            raise InvalidInputError(f"found {name!r} as an adapter's name, expected a text that is not empty")
        source = None
        if not isinstance(adapter, LoraAdapter):
            if not isinstance(adapter, str | Path):
                raise InvalidInputError(f"found {adapter!r} as an adapter, expected a LoraAdapter or its folder")
            source = Path(adapter).absolute()
            adapter = self._tiers.read(source)
        self._check(adapter)
        digest = adapter.digest
        # The slow part, without the lock: steps go on meanwhile.
        try:
            pages = self._tiers.stage(adapter)
        except ValueError as error:
            raise InvalidInputError(f"the adapter does not fit this base: {error}") from None
        with self._lock:
            self._tiers.put(digest, pages, source=source, gated=bool(adapter.gates), pinned=pinned)
            replaced = self._names.get(name)
            self._names[name] = _Named(digest, source, pinned)
            if replaced is not None:
                self._forget(replaced)
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
        # An infinity among an adapter's rows would reach every token of a batch: a closed gate's zero times it is NaN.
        largest = torch.finfo(self._base.dtype).max
        for path, factors in [*adapter.modules.items(), *((path, (gate,)) for path, gate in adapter.gates.items())]:
            if any(torch.linalg.vector_norm(tensor, math.inf) > largest for tensor in factors):
                raise InvalidInputError(
                    f"{path}: found numbers beyond {largest:.3g}, the largest of {self._base.dtype}, in which this "
                    "engine computes: the adapter is damaged"
                )

    def remove(self, name: str) -> None:
        """Forget a name; raises NotFoundError where there is none."""
        with self._lock:
            if name not in self._names:
                raise self._unknown(name)
            self._forget(self._names.pop(name))

    def adapters(self) -> dict[str, str]:
        """Name → digest."""
        with self._lock:
            return {name: named.digest for name, named in self._names.items()}

    def acquire(self, mix: Mapping[str, float] | TokenMix | None) -> ResolvedMix:
        """Check a mix and hold the versions that its names mean now, until ``release`` of the result.

        Raises NotFoundError for an unknown name; InvalidInputError for what is no mix, for a weight that is no finite
        number of size at most 8, for a route that cannot be, or whose adapters have no gates, and where the adapters
        can never be on the device together.
        """
        if isinstance(mix, TokenMix):
            return self._acquire_route(mix)
        if not isinstance(mix, Mapping | None):
            raise InvalidInputError(f"found {mix!r} as a mix, expected adapters' names and their weights")
        return self._acquire_weights(mix or {})

    def _acquire_route(self, mix: TokenMix) -> ResolvedMix:
        if not isinstance(mix.adapters, tuple) or not all(isinstance(name, str) for name in mix.adapters):
            raise InvalidInputError(f"the route is among {mix.adapters!r}, expected a tuple of adapters' names")
        if isinstance(mix.temperature, bool) or not isinstance(mix.temperature, int | float):
            raise InvalidInputError(f"the route's temperature is {mix.temperature!r}, expected a number")
        if not MIN_TEMPERATURE <= mix.temperature <= 1 / MIN_TEMPERATURE:
            raise InvalidInputError(
                f"the route's temperature is {mix.temperature}, expected a number from {MIN_TEMPERATURE:g} to "
                f"{1 / MIN_TEMPERATURE:g}"
            )
        with self._lock:
            for name in mix.adapters:
                if name not in self._names:
                    raise self._unknown(name)
            digests = {name: self._names[name].digest for name in mix.adapters}
            try:
                route = TokenRoute(tuple(digests.values()), mix.top_k, float(mix.temperature))
            except ValueError as error:
                raise InvalidInputError(f"the route cannot be: {error}") from None
            route = replace(route, top_k=min(route.top_k, len(route.keys)))  # more would be the same, under another key
            names = {digest: name for name, digest in digests.items()}
            if without := sorted(names[digest] for digest in route.keys if not self._tiers.has_gates(digest)):
                raise InvalidInputError(
                    f"{', '.join(without)}: found no gates, which tokens are routed by; leave them out, or give weights"
                )
            return self._hold(ResolvedMix({}, digests, route))

    def _acquire_weights(self, mix: Mapping[str, float]) -> ResolvedMix:
        weights: dict[str, float] = {}
        for name, weight in mix.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise InvalidInputError(f"the weight of {name!r} is {weight!r}, expected a number")
            if not abs(weight) <= MAX_WEIGHT:  # NaN is not, either
                raise InvalidInputError(
                    f"the weight of {name!r} is {weight}, expected a finite number of size at most {MAX_WEIGHT:g}"
                )
            weights[name] = float(weight)
        with self._lock:
            for name in weights:
                if name not in self._names:
                    raise self._unknown(name)
            weights = {name: weight for name, weight in weights.items() if weight != 0.0}
            digests = {name: self._names[name].digest for name in weights}
            gates: dict[str, float] = {}
            for name, weight in weights.items():  # two names may mean the same weights
                gates[digests[name]] = gates.get(digests[name], 0.0) + weight
            open_gates = tuple(sorted((digest, weight) for digest, weight in gates.items() if weight != 0.0))
            return self._hold(ResolvedMix(weights, digests, open_gates))

    def release(self, mix: ResolvedMix) -> None:
        """Let go of what :meth:`acquire` held; once for each."""
        self._tiers.release(mix.held)

    def expect(self, waiting: Iterable[Request]) -> None:
        """Bring what the waiting requests need, in their order, to the device as far as there is room."""
        self._tiers.expect([request.mix.held for request in waiting])

    def claim(self, request: Request) -> Claim:
        """Keep a request's adapters on the device while it runs, until :meth:`unclaim`; or why that cannot be yet."""
        return self._tiers.claim(request.mix.held)

    def unclaim(self, request: Request) -> None:
        self._tiers.unclaim(request.mix.held)

    def take_failed(self) -> dict[str, LorafleetError]:
        """Digest → why it could not be loaded, since the last call."""
        return self._tiers.take_failed()

    @property
    def loading(self) -> bool:
        """Whether an adapter is on its way."""
        return self._tiers.loading

    def stop(self) -> None:
        """End the loading threads; what is needed later starts new ones."""
        self._tiers.stop()

    def pack(self, digests: Iterable[str]) -> Packing:
        """The rows of at least these adapters; each must be claimed."""
        return self._tiers.pack(digests)

    @property
    def packings_total(self) -> int:
        return self._tiers.packings_total

    def stats(self) -> TierStats:
        return self._tiers.stats()

    def _hold(self, mix: ResolvedMix) -> ResolvedMix:
        self._tiers.require_fit(mix.held)
        self._tiers.hold(mix.held)
        return mix

    def _forget(self, named: _Named) -> None:
        self._tiers.forget(named.digest, source=named.source, pinned=named.pinned)

    def _unknown(self, name: str) -> NotFoundError:
        return NotFoundError(f"no adapter {name!r} is loaded; add it first")
