"""From tickets, which the engine's thread fills, to what an event loop can wait for; no thread a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from typing import TypeVar

from lorafleet.engine import Generation, Ticket, TokenChunk
from lorafleet.errors import DeadlineExceededError

T = TypeVar("T")


async def parts(
    tickets: Sequence[Ticket], *, deadline: float | None = None
) -> AsyncIterator[tuple[int, TokenChunk | Generation]]:
    """``(number of the ticket, chunk)`` as they come, and for each ticket its generation at its end.

    Raises the error of a ticket that failed, and DeadlineExceededError at the event loop's time ``deadline`` (None:
    whoever waits is cancelled in time).
    """
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(changed.set)

    for ticket in tickets:
        ticket.subscribe(wake)
    seen = dict.fromkeys(range(len(tickets)), 0)
    while seen:
        await before(deadline, changed.wait())
        changed.clear()
        for number in list(seen):
            ticket = tickets[number]
            done = ticket.done  # before the chunks: none comes after the end
            for chunk in ticket.chunks(seen[number]):
                seen[number] += 1
                yield number, chunk
            if done:
                del seen[number]
                yield number, ticket.result()


async def before(deadline: float | None, work: Awaitable[T]) -> T:
    """The work's result; raises DeadlineExceededError where it takes until the event loop's time ``deadline``."""
    try:
        async with asyncio.timeout_at(deadline) as limit:
            return await work
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceededError("the call took longer than a call may; ask for fewer tokens") from None
