"""What answers a prompt, free of any transport: from a caller's key, a model or a mix, and a prompt to tickets.

The gRPC servicer and the HTTP app are shells around it: they read a request, and write what the tickets bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from lorafleet.engine import Engine, Generation, SamplingParams, Ticket
from lorafleet.errors import InvalidInputError, UnknownNameError
from lorafleet.registry import Registry
from lorafleet.registry.records import Key, Version
from lorafleet.router_service import access, routers
from lorafleet.router_service.accounts import RateLimits
from lorafleet.router_service.admission import Admission
from lorafleet.router_service.call import Call
from lorafleet.router_service.candidates import Candidates
from lorafleet.router_service.metering import Metering, Reservation
from lorafleet.router_service.residency import Residency
from lorafleet.router_service.trail import Trail
from lorafleet.router_service.waiting import WouldWait

BASE_MODEL: Final = "base"
AUTO_MODEL: Final = "auto"

Prompt = str | Sequence[int]
"""A text, or token ids, which are taken as they are."""
Follow = Callable[[Ticket, Call], None]
"""Is shown every ticket that answers a caller."""


@dataclass(frozen=True)
class Decision:
    """A router's answer, with what it chose among."""

    router: str
    route: routers.Route
    versions: tuple[Version, ...]
    references: Mapping[str, str]
    """Digest → reference, of them."""


@dataclass(frozen=True)
class Answer:
    """Generations on their way."""

    prompts: int
    """How many."""
    tickets: tuple[Ticket, ...]
    """Prompt by prompt, for each as many as there are sampling parameters."""
    versions: tuple[Version, ...]
    """Those that the mix could be made of, by which its digests get their references."""
    decision: Decision | None
    """Where the router decided."""


class Answering:
    """Resolves references, asks the router where the caller wants that, and submits to the engine. Thread-safe."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        residency: Residency,
        admission: Admission,
        metering: Metering,
        *,
        router: str = "likelihood",
        follow: Follow,
        weight_of: Callable[[str], float] = lambda tenant: 1.0,
    ) -> None:
        """``weight_of`` a tenant among others: asked in the path of every request."""
        if router not in routers.ROUTERS:
            raise UnknownNameError("router", router, routers.ROUTERS)
        self.engine = engine
        self._registry, self._residency = registry, residency
        self._admission, self._metering, self._weight_of = admission, metering, weight_of
        self._router_name, self._router, self._follow = router, routers.ROUTERS[router], follow
        self._candidates = Candidates(registry, base_digest=engine.base_digest, reads_cards=self._router.reads_cards)

    def usable(self, key: Key) -> list[Version]:
        """The live version of each adapter that the caller may use with this base."""
        return access.usable(self._registry, key.tenant, base_digest=self.engine.base_digest)

    def resolve(self, key: Key, reference: str) -> Version:
        """Raises what :func:`access.resolve` raises: NotFoundError for a missing and for another's adapter."""
        return access.resolve(self._registry, key.tenant, reference, base_digest=self.engine.base_digest)

    def forget(self) -> None:
        """Look up again what routers choose among: the registry has changed."""
        self._candidates.forget()

    def limits(self, key: Key) -> RateLimits:
        """What is left of the caller's minute; does not wait."""
        return self._metering.limits(key.tenant)

    def call(self, key: Key, trail: Trail | None = None) -> Call:
        """A call of this caller, which counts as running; whoever asks for it has to end it."""
        return Call(self.engine, self._admission, self._metering, key, trail, weight=self._weight_of(key.tenant))

    def route(self, call: Call, text: str, *, wait: bool = True) -> Decision:
        """Which adapters would answer a text; one request of the tenant's quota, and the tokens that are scored.

        Not to ``wait``, for who is on an event loop: WouldWait where the registry, an adapter or the model is needed.
        """
        if self._router.runs_model and not wait:
            raise WouldWait
        usable, asked = self._candidates.usable(call.key.tenant, wait=wait), _Asked(self.engine, text)
        with (
            call.reserve(requests=1, tokens=0, wait=wait),
            self._decided(call, asked, usable, wait=wait) as decision,
        ):
            return decision

    def answer(
        self,
        call: Call,
        prompts: Sequence[Prompt],
        *,
        model: str,
        mix: Mapping[str, float],
        sampling: Sequence[SamplingParams],
    ) -> Answer:
        """Submit the prompts, each once for each of ``sampling``.

        ``model``: "" or "base" for the bare base, "auto" for the router's choice, or a reference; ``mix``: reference →
        weight, instead of a model. It is one request of the tenant's quota, with the tokens of the prompts and of what
        is generated; may wait for the database, for a bounded time. Raises what :meth:`resolve`, ``Call.reserve`` and
        ``Engine.submit`` raise, and InvalidInputError for a model beside a mix.
        """
        if mix and model:
            raise InvalidInputError(f"found a model ({model!r}) and a mix, expected at most one of the two")
        if model == AUTO_MODEL and len(prompts) != 1:
            raise InvalidInputError(f"found {len(prompts)} prompts for the model {model!r}, expected one a call")
        if model == AUTO_MODEL:
            usable = self._candidates.usable(call.key.tenant)
            encoded = [self.engine.encode(prompt) for prompt in prompts]
            asked = _Asked(self.engine, prompts[0], encoded[0])
            with self._reserve(call, encoded, sampling) as held, self._decided(call, asked, usable) as decision:
                call.trail.note("gen_ai.request.model", model)
                tickets = self._submit(call, held, encoded, decision.route.mix, sampling)
            return Answer(len(prompts), tickets, decision.versions, decision)
        weights = dict(mix) if model in ("", BASE_MODEL) else {model: 1.0}
        named, by_digest = self._resolve(call.key, weights)
        # Only now: what is not the caller's to use may be anything, another's name or a prompt in the wrong field.
        call.trail.note("gen_ai.request.model", "mix" if mix else model or BASE_MODEL)
        encoded = [self.engine.encode(prompt) for prompt in prompts]
        with self._reserve(call, encoded, sampling) as held, self._residency.hold(named):
            tickets = self._submit(call, held, encoded, by_digest, sampling)
        return Answer(len(prompts), tickets, tuple(named), None)

    def _reserve(self, call: Call, encoded: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> Reservation:
        """A prompt's tokens once, whatever is generated for it, and as many tokens as may be generated."""
        room = self.engine.context_tokens + 1
        generated = sum(min(params.max_tokens, room - len(ids)) for ids in encoded for params in sampling)
        return call.reserve(requests=1, tokens=sum(map(len, encoded)) + generated)

    def _submit(
        self,
        call: Call,
        held: Reservation,
        encoded: Sequence[Sequence[int]],
        mix: Mapping[str, float],
        sampling: Sequence[SamplingParams],
    ) -> tuple[Ticket, ...]:
        tickets: list[Ticket] = []
        for ids in encoded:
            for number, params in enumerate(sampling):
                ticket = call.submit(ids, mix=mix, sampling=params)
                counted = 0 if number else len(ids)
                held.follow(ticket, prompt_tokens=counted)
                call.trail.follow(ticket, prompt_tokens=counted)
                self._follow(ticket, call)
                tickets.append(ticket)
        return tuple(tickets)

    def _resolve(self, key: Key, weights: Mapping[str, float]) -> tuple[list[Version], dict[str, float]]:
        """References → versions and a mix by digest; two references to the same weights add up."""
        versions: list[Version] = []
        mix: dict[str, float] = {}
        for reference, weight in sorted(weights.items()):
            version = self.resolve(key, reference)
            versions.append(version)
            mix[version.digest] = mix.get(version.digest, 0.0) + weight
        return versions, mix

    @contextmanager
    def _decided(
        self, call: Call, asked: _Asked, usable: Sequence[Version], *, wait: bool = True
    ) -> Iterator[Decision]:
        """What the router decides; inside the block what it chose is in the engine, and stays there where one waits."""
        if self._router.runs_model:
            with self._residency.hold_loadable(usable) as loaded:
                yield self._decide(call, asked, loaded, wait=wait)
            return
        left = self._residency.loadable(usable)
        while True:
            decision = self._decide(call, asked, left, wait=wait)
            if not wait:
                # Nothing is held: whoever does not wait submits nothing, and to let go may be to unload.
                if not self._residency.has(decision.route.mix):
                    raise WouldWait
                yield decision
                return
            chosen = [version for version in left if version.digest in decision.route.mix]
            with self._residency.hold_loadable(chosen) as loaded:
                if len(loaded) == len(chosen):
                    yield decision
                    return
            failed = {version.digest for version in chosen} - {version.digest for version in loaded}
            left = [version for version in left if version.digest not in failed]

    def _decide(self, call: Call, asked: _Asked, versions: Sequence[Version], *, wait: bool) -> Decision:
        with call.trail.step("route"):
            pool = self._candidates.pool(call.key.tenant, versions, wait=wait)
            route = self._router(asked, pool, call.score)
            return Decision(self._router_name, route, tuple(versions), pool.references)


class _Asked:
    """A prompt, as routers read it."""

    def __init__(self, engine: Engine, prompt: Prompt, encoded: Sequence[int] | None = None) -> None:
        """``encoded``: the prompt's token ids, where they are known already."""
        self._tokenizer, self._prompt, self._encoded = engine.tokenizer, prompt, encoded

    @cached_property
    def text(self) -> str:
        if isinstance(self._prompt, str):
            return self._prompt
        decoded: str = self._tokenizer.decode(self._prompt, skip_special_tokens=True)
        return decoded

    @cached_property
    def tokens(self) -> Sequence[int]:
        if self._encoded is not None:
            return self._encoded
        # Not the engine's own encoding: a text may be longer than any context, and a router reads its end.
        return [self._tokenizer.eos_token_id, *self._tokenizer(self._prompt, add_special_tokens=False)["input_ids"]]


def references(versions: Sequence[Version]) -> dict[str, str]:
    """Digest → reference; of versions with the same weights the first one's."""
    named: dict[str, str] = {}
    for version in versions:
        named.setdefault(version.digest, version.reference)
    return named


def mix_by_digest(generation: Generation) -> dict[str, float]:
    """What answered: digest → weight; empty for the bare base."""
    return {generation.digests[name]: weight for name, weight in generation.mix.items()}
