"""Who calls: the tenant in a call's metadata, checked against the registry before any handler runs.

A tenant name is no secret, so that this tells callers apart without proving who they are; the server therefore listens
on loopback only (:mod:`lorafleet.router_service.server`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import grpc

from lorafleet.errors import NotFoundError, UnauthenticatedError
from lorafleet.registry import Registry
from lorafleet.router_service import status

METADATA_KEY: Final = "lorafleet-tenant"
_OPEN: Final = "/grpc.health.v1.Health/"
"""Health checks say nothing about any tenant and come from machinery that has none."""


def named_tenant(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The tenant that a call names; raises UnauthenticatedError unless it names exactly one."""
    found = [value for key, value in metadata if key == METADATA_KEY]
    if len(found) != 1 or not isinstance(found[0], str) or not found[0]:
        raise UnauthenticatedError(
            f"found {len(found)} values for the metadata key {METADATA_KEY!r}, expected one: the name of your tenant"
        )
    return found[0]


class TenantInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Lets a call through only when it names a tenant that the registry knows.

    The check runs on the call's own thread: gRPC asks interceptors on the one thread that takes in all calls, where a
    database that does not answer would stop every tenant.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN):
            return handler
        behavior = handler.unary_stream if handler.response_streaming else handler.unary_unary

        def checked(request: object, context: grpc.ServicerContext) -> Any:
            with status.translated(context):
                self._check(context.invocation_metadata())
            return behavior(request, context)

        kind = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return kind(checked, handler.request_deserializer, handler.response_serializer)

    def _check(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        name = named_tenant(metadata)
        try:
            self._registry.tenant(name)
        except NotFoundError:
            raise UnauthenticatedError(f"no tenant {name!r} here; create it with `lorafleet tenant create`") from None
