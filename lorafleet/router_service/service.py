"""The RPCs of lorafleet.router.v1.RouterService."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import grpc

from lorafleet.engine import Engine, Generation
from lorafleet.errors import InvalidInputError, UnknownNameError
from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc
from lorafleet.registry import Registry
from lorafleet.registry.records import Version
from lorafleet.router_service import access, messages, routers, status
from lorafleet.router_service.admission import Admission
from lorafleet.router_service.call import Call
from lorafleet.router_service.residency import Residency
from lorafleet.router_service.tenancy import named_tenant

BASE_MODELS: Final = ("", "base")
AUTO_MODEL: Final = "auto"


class RouterService(router_pb2_grpc.RouterServiceServicer):
    """Resolves references, asks the router where the caller wants that, and streams what the engine generates."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        residency: Residency,
        admission: Admission,
        *,
        router: str = "likelihood",
    ) -> None:
        if router not in routers.ROUTERS:
            raise UnknownNameError("router", router, routers.ROUTERS)
        self._engine, self._registry, self._residency, self._admission = engine, registry, residency, admission
        self._router = router

    def Route(self, request: router_pb2.RouteRequest, context: grpc.ServicerContext) -> router_pb2.RouteResponse:
        with status.translated(context):
            call = Call(self._engine, self._admission, context)
            with self._residency.hold_loadable(self._usable(context)) as versions:
                route = self._decide(call, request.text, versions)
            return router_pb2.RouteResponse(decision=messages.decision(self._router, route, versions))

    def Generate(
        self, request: router_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[router_pb2.GenerateResponse]:
        with status.translated(context):
            if request.model and request.mix:
                raise InvalidInputError(f"found a model ({request.model!r}) and a mix, expected at most one of the two")
            sampling = messages.sampling_params(request)
            call = Call(self._engine, self._admission, context)
            route: routers.Route | None = None
            if request.model == AUTO_MODEL:
                with self._residency.hold_loadable(self._usable(context)) as versions:
                    route = self._decide(call, request.prompt, versions)
                    ticket = call.submit(request.prompt, mix=route.mix, sampling=sampling)
            else:
                weights = dict(request.mix) if request.model in BASE_MODELS else {request.model: 1.0}
                versions, mix = self._resolve(context, weights)
                with self._residency.hold(versions):
                    ticket = call.submit(request.prompt, mix=mix, sampling=sampling)
            for chunk in ticket.stream():
                yield messages.chunk(chunk)
            yield self._last(ticket.result(), route, versions)

    def ListAdapters(
        self, request: router_pb2.ListAdaptersRequest, context: grpc.ServicerContext
    ) -> router_pb2.ListAdaptersResponse:
        with status.translated(context):
            return router_pb2.ListAdaptersResponse(adapters=[messages.adapter(v) for v in self._usable(context)])

    def _usable(self, context: grpc.ServicerContext) -> list[Version]:
        tenant = named_tenant(context.invocation_metadata())
        return access.usable(self._registry, tenant, base_digest=self._engine.base_digest)

    def _resolve(
        self, context: grpc.ServicerContext, weights: dict[str, float]
    ) -> tuple[list[Version], dict[str, float]]:
        """References → versions and a mix by digest; two references to the same weights add up."""
        tenant = named_tenant(context.invocation_metadata())
        versions: list[Version] = []
        mix: dict[str, float] = {}
        for reference, weight in sorted(weights.items()):
            version = access.resolve(self._registry, tenant, reference, base_digest=self._engine.base_digest)
            versions.append(version)
            mix[version.digest] = mix.get(version.digest, 0.0) + weight
        return versions, mix

    def _decide(self, call: Call, text: str, versions: Sequence[Version]) -> routers.Route:
        tokenizer = self._engine.tokenizer
        prompt = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        candidates = [routers.Candidate(*named) for named in messages.references(versions).items()]
        return routers.ROUTERS[self._router](prompt, candidates, call.score)

    def _last(
        self, generation: Generation, route: routers.Route | None, versions: Sequence[Version]
    ) -> router_pb2.GenerateResponse:
        summary = messages.summary(generation, versions)
        if route is not None:
            summary.route.CopyFrom(messages.decision(self._router, route, versions))
        return router_pb2.GenerateResponse(summary=summary)
