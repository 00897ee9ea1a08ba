"""From exceptions to gRPC statuses: ours keep their words, anything else is logged here and says nothing outside."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from lorafleet.errors import LorafleetError, grpc_status

DOMAIN: Final = "lorafleet"
_LONGEST: Final = 2000
"""Characters of a message: it travels in trailers, which peers bound to 8 KiB, and may quote what a caller sent."""
_log = logging.getLogger(__name__)


def to_status(error: BaseException) -> status_pb2.Status:
    """A status with a google.rpc.ErrorInfo whose reason is the error's class: NotFoundError → ``NOT_FOUND``."""
    if isinstance(error, LorafleetError):
        message = str(error)[:_LONGEST]
        reason = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).upper()
        metadata = {}
    else:
        incident = uuid.uuid4().hex
        _log.error("incident %s in a call", incident, exc_info=error)
        message = f"internal error; the server's log has the details under incident {incident}"
        reason, metadata = "INTERNAL", {"incident": incident}
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))
    return status_pb2.Status(code=code_pb2.Code.Value(grpc_status(error)), message=message, details=[detail])


def abort(context: grpc.ServicerContext, error: BaseException) -> NoReturn:
    """Ends the call with the error's status; raises, as ``context.abort`` does."""
    context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("abort_with_status returned")


@contextmanager
def translated(context: grpc.ServicerContext) -> Iterator[None]:
    """Any error inside ends the call with its status."""
    try:
        yield
    except Exception as error:
        abort(context, error)
