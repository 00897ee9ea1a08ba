"""grpc.health.v1 for whoever asks, which is anybody. Each watch is a task, which holds nobody up but itself."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Answer = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc ships no types
    """What is served, by the name of a service; "" is the whole server."""

    def __init__(self) -> None:
        self._status: dict[str, int] = {}
        self._watches: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    def set(self, service: str, status: int) -> None:
        """Whoever watches the service is told; from any thread."""
        self._status[service] = status
        for changed, loop in list(self._watches.items()):
            with suppress(RuntimeError):  # the loop has ended, and the watch with it
                loop.call_soon_threadsafe(changed.set)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> Any:
        status = self._status.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service here")
        return _Answer(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        """Now, and after each change, until the caller hangs up. A service that is not there may come."""
        changed, told = asyncio.Event(), None
        self._watches[changed] = asyncio.get_running_loop()
        try:
            while True:
                changed.clear()  # before the look: a change after it is seen in the next turn
                now = self._status.get(request.service, _Answer.SERVICE_UNKNOWN)
                if now != told:
                    await context.write(_Answer(status=now))
                    told = now
                else:
                    await changed.wait()
        finally:
            del self._watches[changed]
