"""The gRPC server: RouterService, AdapterService, health and reflection behind one door."""

from __future__ import annotations

from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from lorafleet.errors import UnavailableError
from lorafleet.proto.registry.v1 import adapters_pb2, adapters_pb2_grpc
from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc
from lorafleet.router_service.adapters.service import AdapterService
from lorafleet.router_service.answering import Answering
from lorafleet.router_service.authentication import Authenticator
from lorafleet.router_service.event_loop import EventLoop
from lorafleet.router_service.grpc_door import MAX_RESPONSE_BYTES, Door
from lorafleet.router_service.grpc_health import Health
from lorafleet.router_service.service import RouterService
from lorafleet.router_service.tls import Tls
from lorafleet.router_service.trail import Begin, untraced
from lorafleet.router_service.waiting import Workers

SERVICE_NAME: Final[str] = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name
ADAPTER_SERVICE_NAME: Final[str] = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name
MAX_REQUEST_BYTES: Final = 2**20
"""Far more than a prompt that fits any context; gRPC counts it after decompression. Uploads come in smaller pieces."""
_SPARE_THREADS: Final = 8
_LOOKUPS: Final = 8
"""Threads that look keys up: a database that does not answer stops logins, not what runs."""
_MOST_WATCHES: Final = 64
"""Of health at the same time."""
_PER_CALL: Final = 4
"""Calls that may be there for each that is admitted: those that wait to be read or refused, and health."""
# What a connection without calls may cost.
_HANDSHAKE_MS: Final = 10_000
"""For TLS and HTTP/2 to be agreed on; gRPC's own limit is two minutes."""
_IDLE_MS: Final = 300_000
"""Then a connection without calls is closed; clients open another one by themselves, with their next call."""
_PING_MS, _PONG_MS = 60_000, 20_000
"""A peer that is silent for so long is asked, and given up where it does not answer: machines vanish without a word."""
_LAST_WORDS_S: Final = 0.5
"""For what is no drained call: a listing that is being answered, a health watch that has no end of its own."""


class GrpcServer:
    """An event loop on a thread of its own answers. Threads are for what waits: one for each call that is admitted, as
    all of them may wait for the registry or for a router's scores, a few more for listings, and one for each transfer
    of weights. Generations hold none while they run.
    """

    def __init__(
        self,
        answering: Answering,
        adapters: AdapterService,
        authenticator: Authenticator,
        *,
        max_calls: int,
        longest_call_s: float,
        begin: Begin = untraced,
    ) -> None:
        """``begin``: where traces of calls are kept."""
        self._health = Health()
        self._lookups = Workers(_LOOKUPS, "lorafleet-grpc-keys")
        self._workers = Workers(max_calls + _SPARE_THREADS + adapters.most_transfers, "lorafleet-grpc")
        self._door = Door(
            authenticator,
            lookups=self._lookups,
            workers=self._workers,
            longest_call_s=longest_call_s,
            max_calls=_PER_CALL * (max_calls + _SPARE_THREADS),
            max_health_calls=max_calls,
            max_watches=max(1, min(_MOST_WATCHES, max_calls // 2)),
            begin=begin,
        )
        router_pb2_grpc.add_RouterServiceServicer_to_server(RouterService(answering, self._workers), self._door)  # type: ignore[no-untyped-call]
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._door)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._door)
        names = (SERVICE_NAME, ADAPTER_SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(service_names=names), self._door)
        self._loop: EventLoop | None = None
        self._server: grpc.aio.Server | None = None
        self.set_serving(False)

    def bind(self, address: str, tls: Tls | None) -> int:
        """Takes a port and returns it; raises UnavailableError where it is taken. :meth:`stop` must follow."""
        assert self._loop is None, "bound once"
        self._loop = EventLoop("lorafleet-grpc-loop")
        try:
            return self._loop.run(self._bind(address, tls))
        except RuntimeError as error:
            raise UnavailableError(f"cannot listen on {address} ({error}); choose another port, or 0") from None

    def start(self) -> None:
        """Answers calls on the bound port."""
        assert self._loop is not None and self._server is not None, "bind() comes first"
        self._loop.run(self._server.start())

    def set_serving(self, serving: bool) -> None:
        """What health says: of the whole server, and of each service."""
        answer = health_pb2.HealthCheckResponse
        for service in ("", SERVICE_NAME, ADAPTER_SERVICE_NAME):
            self._health.set(service, answer.SERVING if serving else answer.NOT_SERVING)

    def stop(self) -> None:
        """Cuts off what still runs; the second time nothing happens.

        Waits for what has a thread: reads and writes of the database and the disk, of which none takes long, but for a
        FinishUpload that makes a version, which reads and writes all of its weights. The registry and the folder of
        uploads are closed next, under it otherwise. Whoever cannot wait kills the process, which such an upload
        survives: finished again, it is one version.
        """
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.run(self._end())
            loop.stop()
        self._workers.close()
        self._lookups.close()

    async def _end(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(_LAST_WORDS_S)

    async def _bind(self, address: str, tls: Tls | None) -> int:
        # On the loop: gRPC keeps the one that runs where a server is made.
        self._server = server = grpc.aio.server(
            options=[
                # Without it a second server could share the port, and take half of the calls.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
                ("grpc.max_connection_idle_ms", _IDLE_MS),
                ("grpc.keepalive_time_ms", _PING_MS),
                ("grpc.keepalive_timeout_ms", _PONG_MS),
            ],
            # Calls are bounded at the door. HTTP/2's own limit (grpc.max_concurrent_streams) is left alone: streams
            # beyond it are reset, and a burst of clients that share a connection sees UNAVAILABLE without a reason.
        )
        server.add_generic_rpc_handlers((self._door,))
        port: int = (
            server.add_insecure_port(address)
            if tls is None
            else server.add_secure_port(address, tls.grpc_credentials())
        )
        return port
