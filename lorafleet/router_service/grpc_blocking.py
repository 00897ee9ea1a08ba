"""Methods that wait for disks and databases, on threads, for calls that live on an event loop.

A method gets an ordinary iterator of requests, or returns one of answers. Each step of them waits for the event loop:
no more is read from a caller than the method takes, and no more is made than the caller reads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import closing, suppress
from typing import Any, Final

import grpc

from lorafleet.errors import UnavailableError
from lorafleet.registry.records import Key
from lorafleet.router_service.trail import Trail
from lorafleet.router_service.waiting import Workers

_LAST_WORDS_S: Final = 0.5
"""For the status of a call that is ended here. It goes out after what was written before, which a caller that reads
nothing leaves where it is until the call's deadline."""


class Blocking:
    """What a method that runs on a thread knows of its call, and what it can do with it."""

    def __init__(self, context: grpc.aio.ServicerContext, key: Key, trail: Trail) -> None:
        self.key, self.trail = key, trail
        self._context, self._loop = context, asyncio.get_running_loop()
        self._given_up: asyncio.Future[None] = self._loop.create_future()
        self._ended = threading.Event()
        self._step: Future[Any] | None = None
        """What the thread waits for."""

    def cancel(self) -> None:
        """Ends the call, from any thread; its caller sees CANCELLED."""
        self._loop.call_soon_threadsafe(self._give_up)

    def requests(self, read: Callable[[bytes], Any]) -> Iterator[Any]:
        """The call's messages; UnavailableError where it ends before its end, which is nobody's fault here."""
        while (found := self._wait(self._context.read())) is not grpc.aio.EOF:
            yield read(found)

    def write(self, method: Callable[[], Generator[Any]]) -> None:
        """Its answers one after another, each when there is room for it."""
        with closing(method()) as answers:
            for answer in answers:
                self._wait(self._context.write(answer))

    async def run(self, workers: Workers, method: Callable[[], Any]) -> Any:
        """What the method returns or raises. Where the call ends before it, what it waits for of the call fails."""
        working = asyncio.ensure_future(workers.run(method))
        try:
            await asyncio.wait((working, self._given_up), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            self._end()  # first: the thread, and whatever the method holds, are free whether or not the caller listens
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._context.abort(grpc.StatusCode.CANCELLED, "nothing has moved for too long")
            raise asyncio.CancelledError
        finally:
            self._end()
            working.cancel()  # where it waits for a thread

    def _end(self) -> None:
        """Lets the thread go on: what it waits for is cancelled, and it takes no further step."""
        self._ended.set()
        if self._step is not None:
            self._step.cancel()

    def _give_up(self) -> None:
        if not self._given_up.done():
            self._given_up.set_result(None)

    def _wait(self, step: Coroutine[Any, Any, Any]) -> Any:
        """Its result, from the event loop."""
        try:
            if self._ended.is_set():
                step.close()
            else:
                self._step = asyncio.run_coroutine_threadsafe(step, self._loop)
                if self._ended.is_set():  # between the two lines: `_end` did not see this step
                    self._step.cancel()
                found = self._step.result()
                if not self._ended.is_set():
                    return found
        except (grpc.aio.BaseError, CancelledError):
            pass
        raise UnavailableError("the call ended before all of it had come; go on from what is durable")
