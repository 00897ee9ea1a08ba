"""From errors to gRPC statuses with details for machines."""

from __future__ import annotations

from typing import Final, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from lorafleet.router_service.failures import QUOTA_EXCEEDED, failure

DOMAIN: Final = "lorafleet"


def to_status(error: BaseException) -> status_pb2.Status:
    """A status with a google.rpc.ErrorInfo, a RetryInfo where it is known when a retry makes sense, and a QuotaFailure
    where a quota is in the way.
    """
    failed = failure(error)
    metadata = {"incident": failed.incident} if failed.incident else {}
    details = [error_details_pb2.ErrorInfo(reason=failed.reason, domain=DOMAIN, metadata=metadata)]
    if failed.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(failed.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if failed.reason == QUOTA_EXCEEDED:
        violation = error_details_pb2.QuotaFailure.Violation(subject="tenant", description=failed.message)
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    packed = [any_pb2.Any() for _ in details]
    for container, detail in zip(packed, details, strict=True):
        container.Pack(detail)
    return status_pb2.Status(code=code_pb2.Code.Value(failed.status), message=failed.message, details=packed)


async def abort(context: grpc.aio.ServicerContext, error: BaseException) -> NoReturn:
    """Ends the call with the error's status, unless it has one, or nobody is there any more, which is what gRPC's
    InternalError says; raises, as ``context.abort`` does.
    """
    if context.code() is not None or isinstance(error, grpc.aio.InternalError):
        raise error
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("abort_with_status returned")
