"""One connection to the HTTP server, which is cut off where a request does not come or an answer is not taken.

Connections cost nothing to open, and the server takes only so many. So there are only so many of strangers, which is
everybody who has no request with a key that was found good: for one more, the one that has waited longest is closed, of
the address that has most of them. Whoever opens thousands closes their own, and nobody holds the places of callers.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

from lorafleet.router_service.http.door import ADMIT
from lorafleet.router_service.origins import origin

HEAD_S: Final = 10.0
"""For a request's line and headers. uvicorn waits for them without a limit; bodies and answers have others."""
UNREAD_S: Final = 60.0
"""For a caller to take what waits for it in the server's memory. uvicorn would wait for ever, also after the end."""


class Strangers:
    """The connections of a server whose callers are not known; used by its event loop only."""

    def __init__(self, most: int) -> None:
        self._most, self._number = most, 0
        self._waiting: dict[str, dict[Connection, None]] = {}
        """By address, in the order in which they came; those of an address, too."""

    def add(self, connection: Connection) -> None:
        """As the one that came last."""
        self.remove(connection)
        self._waiting.setdefault(connection.address, {})[connection] = None
        self._number += 1
        while self._number > self._most:
            most = max(self._waiting.values(), key=lambda own: len(own))
            longest = next(iter(most))
            self.remove(longest)
            longest.transport.abort()

    def remove(self, connection: Connection) -> None:
        own = self._waiting.get(connection.address, {})
        if connection in own:
            del own[connection]
            self._number -= 1
            if not own:
                del self._waiting[connection.address]


class Connection(H11Protocol):
    address = ""
    """Whom it is from."""
    _limit: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, strangers: Strangers, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._strangers, self._to = strangers, self.app
        self.app = self._answer
        self.access_log = False  # which would have whole paths, and whatever callers write there

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = origin(self.client[0]) if self.client else ""
        self._begin()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._limit is not None and self.cycle is not None and not self.cycle.response_complete:
            self._end()
            self._strangers.add(self)  # as the one that came last: its key is looked at now

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:  # no further request came with this one
            self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end()
        self._read()
        self._strangers.remove(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read()

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        scope[ADMIT] = self._admit
        await self._to(scope, receive, send)

    def _admit(self) -> None:
        """Its caller is known, until the next request."""
        self._strangers.remove(self)

    def _begin(self) -> None:
        self._end()
        self._limit = self.loop.call_later(HEAD_S, self.transport.abort)
        self._strangers.add(self)

    def _end(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
