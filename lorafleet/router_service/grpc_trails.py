"""Every gRPC call's trail, to its end: answered, refused, or left by its caller."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import grpc

from lorafleet.router_service.trail import REQUEST_ID, Begin, Trail, sane_request_id

OTHER: Final = "_OTHER"
"""For a method that is none of ours: callers may write anything there."""
# What of a status is the server's fault, as OpenTelemetry's conventions have it.
_FAILED: Final = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
_NUMBERS: Final = {code.name: code.value[0] for code in grpc.StatusCode}


def begun(method: str, metadata: Iterable[tuple[str, str | bytes]], begin: Begin) -> Trail:
    """That of a call of ``package.Service/Method``, in whose task this is; :func:`end` must follow."""
    headers = {name: value for name, value in metadata if isinstance(value, str)}
    request_id = sane_request_id(headers.get(REQUEST_ID, ""))
    service, _, name = method.rpartition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name, "lorafleet.request_id": request_id}
    trail = Trail("grpc", method, request_id=request_id, span=begin(method, headers, attributes))
    trail.enter()
    return trail


def end(trail: Trail, context: grpc.aio.ServicerContext, *, answered: bool) -> None:
    """``answered``: whether all went well; else the call was refused, or its task was cancelled."""
    if answered:
        status = "OK"
    elif (code := context.code()) is not None:
        status = code.name
    else:
        status = "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
    trail.end(status, failed=status in _FAILED, attributes={"rpc.grpc.status_code": _NUMBERS[status]})
