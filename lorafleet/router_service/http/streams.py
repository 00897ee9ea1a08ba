"""What tickets bring, as HTTP's answers: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lorafleet.engine import Generation, Ticket, TokenChunk
from lorafleet.errors import UnavailableError
from lorafleet.router_service.call import Call
from lorafleet.router_service.http.errors import described
from lorafleet.router_service.http.replies import Reply
from lorafleet.router_service.tickets import parts
from lorafleet.router_service.trail import Trail

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_LAST_WORDS_S = 5.0
"""After the deadline, for the event that says so."""
_log = logging.getLogger(__name__)


async def _parts(tickets: Sequence[Ticket], *, deadline: float) -> AsyncIterator[tuple[int, TokenChunk | Generation]]:
    """:func:`parts`; UnavailableError for a ticket that was cut off."""
    async for number, part in parts(tickets, deadline=deadline):
        if isinstance(part, Generation) and part.finish_reason == "cancelled":
            raise UnavailableError("the generation was cut off; the server is shutting down, ask another one")
        yield number, part


async def results(tickets: Sequence[Ticket], *, deadline: float) -> list[Generation]:
    """All generations in the order of their tickets; raises what :func:`_parts` raises."""
    found: dict[int, Generation] = {}
    async for number, part in _parts(tickets, deadline=deadline):
        if isinstance(part, Generation):
            found[number] = part
    return [found[number] for number in range(len(tickets))]


async def events(
    reply: Reply, tickets: Sequence[Ticket], *, usage: bool, deadline: float, trail: Trail
) -> AsyncIterator[bytes]:
    """A stream's server-sent events; an error is the last one, as the status has been sent by then, and is noted."""
    found: dict[int, Generation] = {}
    try:
        for opening in reply.openings():
            yield _event(opening)
        async for number, part in _parts(tickets, deadline=deadline):
            if isinstance(part, TokenChunk):
                if (piece := reply.piece(number, part)) is not None:
                    yield _event(piece)
                continue
            found[number] = part
            last = reply.closing(number, part)
            if len(found) == len(tickets):
                break
            yield _event(last)
        generations = [found[number] for number in range(len(tickets))]
        if usage:
            yield _event(last)
            last = reply.usage(generations)
        yield _event(reply.with_mix(last, generations))
        yield DONE
    except Exception as error:
        failed, body = described(error)
        trail.failure = failed.reason
        yield _event({"error": body})


class CallStream(StreamingResponse):
    """A stream that holds its call: the call ends with it, however it ends, even before its first event."""

    def __init__(self, content: AsyncIterator[bytes], call: Call, *, deadline: float) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._call, self._deadline = call, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # A reader that has stopped reading holds the stream no longer than a call may take.
            async with asyncio.timeout_at(self._deadline + _LAST_WORDS_S):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            _log.warning("a caller did not read its stream to the end in time; its connection is closed")
        finally:
            self._call.end()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The work's result; raises ClientDisconnect, and gives the work up, when the caller has gone."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(content: Any) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
