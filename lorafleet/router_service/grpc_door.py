"""What every gRPC call passes before its handler: the caller's key, its scope, a deadline, and then its message."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final
from urllib.parse import unquote

import grpc

from lorafleet.errors import InvalidInputError, LorafleetError
from lorafleet.registry.keys import require_scope
from lorafleet.registry.records import Key
from lorafleet.router_service import grpc_trails, status
from lorafleet.router_service.authentication import HEADER, Authenticator, bearer_token
from lorafleet.router_service.grpc_blocking import Blocking
from lorafleet.router_service.origins import origin
from lorafleet.router_service.shares import Shares
from lorafleet.router_service.trail import Begin, Trail, untraced
from lorafleet.router_service.waiting import Workers

OPEN: Final = "grpc.health.v1.Health"
"""Health says nothing about any tenant and is asked by machinery that has none, by calls that may have no end."""
SCOPES: Final[Mapping[str, str | None]] = {
    "lorafleet.router.v1.RouterService": "infer",
    "lorafleet.registry.v1.AdapterService": "adapters:write",
    # Any key: what there is to call is no secret, but nobody's to look around in.
    "grpc.reflection.v1alpha.ServerReflection": None,
}
METHOD_SCOPES: Final[Mapping[str, str]] = {
    f"lorafleet.registry.v1.AdapterService/{name}": "adapters:read"
    for name in ("GetAdapter", "ListAdapters", "ListVersions", "GetVersion", "DownloadVersion")
}
"""Where a method needs another one than its service."""
_NEVER_S: Final = 1e8
"""gRPC gives a call without a deadline one in the far future."""

HEALTH_PER_ADDRESS: Final = 8
"""Checks, and watches, at the same time, so that nobody has all places."""
_MESSAGE_S: Final = 5.0
"""For a call's message to follow its headers: until then the call has a place among those that may be there."""
_NEXT_MESSAGE_S: Final = 30.0
"""For each message of a stream that runs on the event loop: it holds no thread, and a place all the same."""
MAX_RESPONSE_BYTES: Final = 16 * 2**20
"""Of one answer. The largest is a federation's version with all that it was made of, 73 bytes for each update that was
counted: 229,000 of them fit."""

# For gRPC every call brings a stream of messages. One that brings one message is read here: gRPC would read it before
# the handler runs, for whoever has no key, too.
_KINDS: Final = {False: grpc.stream_unary_rpc_method_handler, True: grpc.stream_stream_rpc_method_handler}
_Handle = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]
"""What gRPC calls: its answer is None where that is a stream, which it has written then."""
_Answer = Callable[[grpc.aio.ServicerContext, Key, Trail], Awaitable[Any]]
"""The same for a call of whoever has the key."""
_log = logging.getLogger(__name__)


class AnswerTooLargeError(LorafleetError):
    """An answer that cannot be sent, now or later."""


class CallerContext:
    """A call's context, with the key that it came with, and its trail."""

    __slots__ = ("_context", "key", "trail")

    def __init__(self, context: grpc.aio.ServicerContext, key: Key, trail: Trail) -> None:
        self._context, self.key, self.trail = context, key, trail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def scope_of(method: str) -> str | None:
    """What ``package.Service/Method`` needs; None: any key. A service that nobody entered here needs ``admin``."""
    return METHOD_SCOPES.get(method) or SCOPES.get(method.rpartition("/")[0], "admin")


def caller(context: CallerContext | Blocking) -> Key:
    """The key of a call that came through the door."""
    return context.key


def trail_of(context: CallerContext | Blocking) -> Trail:
    """The trail of a call that came through the door."""
    return context.trail


async def _unknown(context: grpc.aio.ServicerContext, _key: Key, _trail: Trail) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no such method here")


async def _message(context: grpc.aio.ServicerContext, read: Callable[[bytes], Any]) -> Any:
    """The one message of a call, which is cancelled where that does not come in time."""
    try:
        async with asyncio.timeout(_MESSAGE_S):
            found = await context.read()
    except TimeoutError:
        await context.abort(grpc.StatusCode.CANCELLED, f"the call's message did not come within {_MESSAGE_S:g} s")
    if found is grpc.aio.EOF:
        raise InvalidInputError("the call has no message, expected one")
    return _parsed(read, found)


async def _messages(context: grpc.aio.ServicerContext, read: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    """A stream's messages; the call is cancelled where the next one does not come in time."""
    while True:
        try:
            async with asyncio.timeout(_NEXT_MESSAGE_S):
                found = await context.read()
        except TimeoutError:
            words = f"the stream's next message did not come within {_NEXT_MESSAGE_S:g} s; end it, and begin another"
            await context.abort(grpc.StatusCode.CANCELLED, words)
        if found is grpc.aio.EOF:
            return
        yield _parsed(read, found)


def _parsed(read: Callable[[bytes], Any], found: bytes) -> Any:
    try:
        return read(found)
    except Exception:
        raise InvalidInputError("the call's message cannot be read, expected the one of its method") from None


def _sized(method: str, write: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Answers as bytes, of which gRPC would send none that is too large: it says RESOURCE_EXHAUSTED, as if it helped to
    call again, and ends the call as it does one whose caller has gone."""

    def sized(answer: Any) -> bytes:
        found = write(answer)
        if len(found) > MAX_RESPONSE_BYTES:
            words = f"the answer has {len(found)} bytes, expected at most {MAX_RESPONSE_BYTES}"
            _log.error("%s: %s", method, words)
            raise AnswerTooLargeError(f"{words}; ask for less of it")
        return found

    return sized


def _answerer(handler: Any, write: Callable[[Any], bytes], workers: Workers) -> _Answer:
    """A method of whatever kind, as a coroutine that reads its request, and gives its one answer as bytes, or writes
    its answers."""
    behavior, read = _behavior(handler), handler.request_deserializer
    if inspect.iscoroutinefunction(behavior) or inspect.isasyncgenfunction(behavior):

        async def on_the_loop(context: grpc.aio.ServicerContext, key: Key, trail: Trail) -> Any:
            request = _messages(context, read) if handler.request_streaming else await _message(context, read)
            answer = behavior(request, CallerContext(context, key, trail))
            if inspect.isasyncgen(answer):
                async for part in answer:
                    await context.write(part)
                return None
            found = await answer
            return None if handler.response_streaming else write(found)

        return on_the_loop

    async def on_a_thread(context: grpc.aio.ServicerContext, key: Key, trail: Trail) -> Any:
        call = Blocking(context, key, trail)
        parsed = partial(_parsed, read)
        request = call.requests(parsed) if handler.request_streaming else await _message(context, read)
        method = partial(behavior, request, call)
        if handler.response_streaming:
            return await call.run(workers, partial(call.write, method))
        return write(await call.run(workers, method))

    return on_a_thread


def _behavior(handler: Any) -> Any:
    kind = {False: "unary", True: "stream"}
    return getattr(handler, f"{kind[handler.request_streaming]}_{kind[handler.response_streaming]}")


def _for_all(places: Places, handler: Any) -> _Handle:
    behavior, read = _behavior(handler), handler.request_deserializer

    async def open_to_all(_requests: object, context: grpc.aio.ServicerContext) -> Any:
        address = origin(_host(context.peer()))
        if not places.take(address):
            words = "too many ask for the server's health at the same time"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, words)
        try:
            return await behavior(await _message(context, read), context)
        except Exception as error:
            await status.abort(context, error)
        finally:
            places.give_back(address)

    return open_to_all


class Places:
    """For calls of whoever has no key: so many in all, and so many for each address."""

    def __init__(self, most: int, *, most_each: int) -> None:
        self._most, self._most_each = most, most_each
        self._taken: Counter[str] = Counter()

    def take(self, address: str) -> bool:
        """Whether there was one; :meth:`give_back` must follow then."""
        if self._taken.total() >= self._most or self._taken[address] >= self._most_each:
            return False
        self._taken[address] += 1
        return True

    def give_back(self, address: str) -> None:
        self._taken[address] -= 1
        if not self._taken[address]:
            del self._taken[address]


def _host(peer: str) -> str:
    """The address in gRPC's name of a peer."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


class Door(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc ships no types
    """Lets a call through with a key that has the scope of its service, and with a deadline.

    Services are added to the door, as they would be to a server, and the door to the server: an interceptor does the
    same, and costs every call another coroutine.

    All of it runs on the event loop, and what may wait on threads: keys that are not known are looked up on
    ``lookups``, methods that are no coroutines run on ``workers``. A service without an entry in ``SCOPES`` is closed
    to all but the scope ``admin``. Any error of a method ends its call with the error's status.

    Health needs no key, and may never end. So it has ``max_health_calls`` places, those that watch it have
    ``max_watches`` others, and each address has a few of them: what one stranger asks takes little away from others.
    ``max_calls`` of all kinds may be there at a time; one more is refused before anything of it is looked at. Of what
    they leave each tenant has a share (:class:`Shares`): else one that begins many calls and goes on with none of them
    would keep everybody out.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        *,
        lookups: Workers,
        workers: Workers,
        longest_call_s: float,
        max_calls: int,
        max_health_calls: int,
        max_watches: int,
        begin: Begin = untraced,
    ) -> None:
        """``begin``: where traces of calls are kept."""
        self._authenticator, self._longest_call_s, self._begin = authenticator, longest_call_s, begin
        self._lookups, self._workers = lookups, workers
        self._checks = Places(max_health_calls, most_each=HEALTH_PER_ADDRESS)
        self._watches = Places(max_watches, most_each=HEALTH_PER_ADDRESS)
        self._most, self._running = max_calls, 0
        self._shares = Shares()
        self._services: list[grpc.GenericRpcHandler] = []
        self._opened: dict[str, Any] = {}
        """Handlers of methods that there are: made once, asked for by every call."""

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """How generated code adds a service."""
        self._services += handlers

    def add_registered_method_handlers(self, _service: str, _handlers: Mapping[str, Any]) -> None:
        """What generated code tells a server, too, that looks methods up by itself."""

    def service(self, handler_call_details: Any) -> Any:
        path: str = handler_call_details.method
        opened = self._opened.get(path)
        if opened is None:
            found = (service.service(handler_call_details) for service in self._services)
            handler = next((handler for handler in found if handler is not None), None)
            opened = self._open(path.removeprefix("/"), handler)
            if handler is not None:  # of others there are as many as callers can think of
                self._opened[path] = opened
        return opened

    def _open(self, method: str, handler: Any) -> Any:
        if handler is None:  # which a caller without a key does not learn either
            handle = self._for_callers(grpc_trails.OTHER, None, _unknown)
            return grpc.stream_stream_rpc_method_handler(self._bounded(handle))
        serialize = handler.response_serializer
        if method.rpartition("/")[0] == OPEN:
            handle = _for_all(self._watches if handler.response_streaming else self._checks, handler)
        else:
            serialize = _sized(method, serialize)
            handle = self._for_callers(method, scope_of(method), _answerer(handler, serialize, self._workers))
            if not handler.response_streaming:
                serialize = None  # done before the end of its call, so that an error of it is one of the method
        return _KINDS[handler.response_streaming](self._bounded(handle), None, serialize)

    def _bounded(self, handle: _Handle) -> _Handle:
        # gRPC has a bound, too (maximum_concurrent_rpcs). It decides before it waits for a call: the first one that
        # came after a crowd had gone was refused.
        async def bounded(requests: object, context: grpc.aio.ServicerContext) -> Any:
            is_full = self._running >= self._most
            self._running += 1
            try:
                if is_full:
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded")
                return await handle(requests, context)
            except grpc.aio.InternalError:
                # What was written to a caller that has just gone: what is too large was refused before. Nobody is there
                # to be told, and gRPC would log it.
                raise asyncio.CancelledError from None
            finally:
                self._running -= 1

        return bounded

    def _for_callers(self, method: str, needed: str | None, answer: _Answer) -> _Handle:
        async def checked(_requests: object, context: grpc.aio.ServicerContext) -> Any:
            metadata, answered = context.invocation_metadata(), False
            trail = grpc_trails.begun(method, metadata, self._begin)
            try:
                with trail.step("authenticate"):
                    key = await self._key(metadata)
                trail.key_id = key.key_id
                if needed is not None:
                    require_scope(key, needed)
                self._check_deadline(context.time_remaining())
                tenant = key.tenant
                self._shares.take(tenant, free=self._most - self._running + 1)  # this one is among those that run
                try:
                    found = await answer(context, key, trail)
                finally:
                    self._shares.give_back(tenant)
                answered = True
                return found
            except Exception as error:
                await status.abort(context, error)
            finally:
                grpc_trails.end(trail, context, answered=answered)

        return checked

    async def _key(self, metadata: Iterable[tuple[str, str | bytes]]) -> Key:
        token = bearer_token([value for name, value in metadata if name == HEADER])
        known = self._authenticator.known(token)
        return await self._lookups.run(self._authenticator.key, token) if known is None else known

    def _check_deadline(self, remaining_s: float | None) -> None:
        """A caller that has gone would hold memory for as long as it asked for; a deadline bounds that."""
        if remaining_s is None or remaining_s > _NEVER_S:
            found = "no deadline"
        elif remaining_s > self._longest_call_s:
            found = f"a deadline {remaining_s:.0f} s away"
        else:
            return
        raise InvalidInputError(
            f"the call has {found}, expected one of at most {self._longest_call_s:g} s; set a timeout in your client"
        )
