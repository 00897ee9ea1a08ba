"""What every HTTP request passes before its endpoint: the caller's key, its scope, and its tenant's share of places."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lorafleet.registry.keys import require_scope
from lorafleet.registry.records import Key
from lorafleet.router_service.authentication import HEADER, Authenticator, bearer_token
from lorafleet.router_service.http.trails import trail_of
from lorafleet.router_service.shares import Shares
from lorafleet.router_service.waiting import Workers

OPEN: Final = frozenset({"/health"})
"""Says nothing about any tenant and is asked by machinery that has none. Any other path, known or not, needs a key."""
SCOPES: Final = {"/metrics": "metrics"}
_DEFAULT_SCOPE: Final = "infer"
_LOOKUPS: Final = 8
"""Threads that look keys up: a database that does not answer stops logins, not what runs."""
_KEY: Final = "lorafleet.key"
ADMIT: Final = "lorafleet.admit"
"""Where a scope has what the server wants called once the request's key is found good."""


def caller(request: Request) -> Key:
    """The key of a request that came through the door."""
    key = request.scope[_KEY]
    assert isinstance(key, Key)
    return key


def key_of(scope: Scope) -> Key | None:
    """The same before it is known whether the request came through."""
    key = scope.get(_KEY)
    assert key is None or isinstance(key, Key)
    return key


class Door:
    """Lets a request through with a key that has the scope of its path.

    ``most_calls`` may be there at a time, of which each tenant has a share (:class:`~..shares.Shares`): else one that
    sends headers and no bodies would have the server's connections, and everybody else a refusal.
    """

    def __init__(self, app: ASGIApp, authenticator: Authenticator, *, most_calls: int) -> None:
        self._app, self._authenticator = app, authenticator
        self._most, self._running, self._shares = most_calls, 0, Shares()
        self._lookups = Workers(_LOOKUPS, "lorafleet-keys")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # As the router reads it, to whose patterns a newline at the end is part of no path.
        path: str = scope["path"].removesuffix("\n")
        if path not in OPEN:
            trail = trail_of(scope)
            with trail.step("authenticate"):
                key = await self._key(bearer_token(Headers(scope=scope).getlist(HEADER)))
            trail.key_id = key.key_id
            require_scope(key, SCOPES.get(path, _DEFAULT_SCOPE))
            scope[_KEY] = key
            self._shares.take(key.tenant, free=self._most - self._running)
            self._running += 1
            try:
                if admit := scope.get(ADMIT):
                    admit()
                await self._app(scope, receive, send)
            finally:
                self._running -= 1
                self._shares.give_back(key.tenant)
        else:
            await self._app(scope, receive, send)

    def close(self) -> None:
        self._lookups.close()

    async def _key(self, token: str) -> Key:
        known = self._authenticator.known(token)
        return await self._lookups.run(self._authenticator.key, token) if known is None else known
