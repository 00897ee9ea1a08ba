"""The RPCs of lorafleet.router.v1.RouterService: a shell around ``answering``."""

from __future__ import annotations

from functools import partial

import grpc

from lorafleet.engine import Generation
from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc
from lorafleet.router_service import messages
from lorafleet.router_service.answering import Answering
from lorafleet.router_service.call import Call
from lorafleet.router_service.grpc_door import caller, trail_of
from lorafleet.router_service.tickets import parts
from lorafleet.router_service.waiting import Workers, WouldWait


class RouterService(router_pb2_grpc.RouterServiceServicer):
    """Reads requests and writes what the engine generates; callers were checked before (:mod:`.grpc_door`)."""

    def __init__(self, answering: Answering, workers: Workers) -> None:
        """``workers``: for what waits for the registry, for an adapter or for the model."""
        self._answering, self._workers = answering, workers

    async def Route(
        self, request: router_pb2.RouteRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.RouteResponse:
        call = self._call(context)
        try:
            # Most calls find all that they need at hand; a thread costs more than their work.
            decision = self._answering.route(call, request.text, wait=False)
        except WouldWait:
            decision = await self._workers.run(self._answering.route, call, request.text)
        return router_pb2.RouteResponse(decision=messages.decision(decision))

    async def Generate(self, request: router_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        sampling = messages.sampling_params(request)
        call = self._call(context)
        call.trail.note("gen_ai.operation.name", "text_completion")
        submit = partial(
            self._answering.answer,
            call,
            [request.prompt],
            model=request.model,
            mix=request.mix,
            sampling=[sampling],
        )
        answer = await self._workers.run(submit)
        async for _, part in parts(answer.tickets):
            if isinstance(part, Generation):
                await context.write(router_pb2.GenerateResponse(summary=messages.summary(part, answer)))
            else:
                await context.write(messages.chunk(part))

    async def ListAdapters(
        self, request: router_pb2.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ListAdaptersResponse:
        usable = await self._workers.run(self._answering.usable, caller(context))
        return router_pb2.ListAdaptersResponse(adapters=[messages.adapter(version) for version in usable])

    def _call(self, context: grpc.aio.ServicerContext) -> Call:
        """Ends when gRPC has ended the call: answered to the last byte, cancelled, or beyond its deadline."""
        call = self._answering.call(caller(context), trail_of(context))
        context.add_done_callback(lambda _context: call.end())
        return call
