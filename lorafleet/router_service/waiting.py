"""What must not wait on an event loop, and the threads that wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TypeVar

T = TypeVar("T")


class WouldWait(Exception):
    """Work that was not to wait would have to: it has left nothing behind, and is to be done again on a thread."""


class Workers:
    """Threads for what waits: for the database, for a disk, for the model."""

    def __init__(self, threads: int, name: str) -> None:
        """``threads`` at most; they are started as they are needed."""
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """What the function returns or raises; not called where whoever waits is cancelled before a thread is free."""
        # With the context of the call, by which what is logged there is known to be its.
        work = partial(copy_context().run, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Waits for what runs; nothing may begin any more."""
        self._pool.shutdown(wait=True)
