"""A gRPC server that does nothing: ``python -m lorafleet.bench.service.bare``.

The same library, event loop and protocol as the service, and to every ``Route`` the same answer, of a usual size. What
it answers a second is what is left where a route costs nothing: a bound on the service's own figure on that machine.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc
from uvicorn.loops.auto import auto_loop_factory

from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc

CANDIDATES: Final = 9
"""As many as the cards router tells."""


class Bare(router_pb2_grpc.RouterServiceServicer):
    def __init__(self) -> None:
        names = [f"library/a-name-of-some-length:{number}" for number in range(CANDIDATES)]
        candidates = [
            router_pb2.Candidate(
                reference=name, digest=f"sha256:{number:064x}", score=0.5, probability=0.25, weight=0.0
            )
            for number, name in enumerate(names)
        ]
        mix = [router_pb2.MixComponent(reference=names[0], digest=f"sha256:{0:064x}", weight=1.0)]
        reason = f"the name and card of {names[0]} have 50% of what the text says ('some', 'of', 'it')"
        decision = router_pb2.RouteDecision(router="cards", mix=mix, candidates=candidates, reason=reason)
        self._answer = router_pb2.RouteResponse(decision=decision)

    async def Route(self, request: router_pb2.RouteRequest, context: Any) -> router_pb2.RouteResponse:
        return self._answer


async def serve() -> None:
    """Until the process is ended; says where it listens as the service does."""
    server = grpc.aio.server()
    router_pb2_grpc.add_RouterServiceServicer_to_server(Bare(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening grpc=127.0.0.1:{port} http=127.0.0.1:0", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        runner.run(serve())
