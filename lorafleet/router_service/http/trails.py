"""Every HTTP request's trail: its id, its line in the log, its place in a trace."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafleet.router_service.trail import REQUEST_ID, Begin, Trail, sane_request_id, untraced

_TRAIL: Final = "lorafleet.trail"
_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
OTHER: Final = "_OTHER"
"""For a method or path that is none of ours: callers may write anything there."""
_ABORTED: Final = HTTPStatus.INTERNAL_SERVER_ERROR


def trail_of(scope: Scope) -> Trail:
    """That of a request which came through :class:`Trails`."""
    trail = scope[_TRAIL]
    assert isinstance(trail, Trail)
    return trail


def route_name(routes: Sequence[Route], scope: Scope) -> str:
    """The pattern that a path fits, such as ``/v1/models/{model:path}``: a path may hold a name."""
    return next((route.path for route in routes if route.matches(scope)[0] != Match.NONE), OTHER)


class Trails:
    """Begins and ends trails; answers with the caller's ``x-request-id`` where it is sane, else with a new one."""

    def __init__(
        self, app: ASGIApp, routes: Sequence[Route], *, quiet: Callable[[str], bool], begin: Begin = untraced
    ) -> None:
        """``quiet``: paths that machines ask for all the time; they have no trace, and a line for debugging only."""
        self._app, self._routes, self._quiet, self._begin = app, routes, quiet, begin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        verb = scope["method"] if scope["method"] in _METHODS else OTHER
        route = route_name(self._routes, scope)
        method, quiet = f"{verb} {route}", self._quiet(route)
        request_id = sane_request_id(headers.get(REQUEST_ID, ""))
        attributes = {"http.request.method": verb, "http.route": route, "lorafleet.request_id": request_id}
        trail = Trail(
            "http",
            method,
            request_id=request_id,
            span=None if quiet else self._begin(method, headers, attributes),
            level=logging.DEBUG if quiet else logging.INFO,
        )
        scope[_TRAIL] = trail
        trail.enter()
        status = int(_ABORTED)  # where nothing was answered the server says this

        async def identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, identified)
        finally:
            trail.end(str(status), failed=status >= 500, attributes={"http.response.status_code": status})
