"""What a caller is told of an error: ours keep their words, anything else is logged here and says nothing outside."""

from __future__ import annotations

import logging
import re
import uuid
from dataclasses import dataclass
from typing import Final

from lorafleet.errors import BackendError, LorafleetError, OverloadedError, QuotaExceededError, grpc_status

QUOTA_EXCEEDED: Final = "QUOTA_EXCEEDED"
"""The reason of a QuotaExceededError."""
FULL_S: Final = 1.0
"""After which a full server is tried again: it has room when one call ends."""
_LONGEST: Final = 1500
"""Bytes of a message, which may quote what was sent: in gRPC it travels in trailers, which peers bound to 8 KiB, in
plain with three characters for some bytes, and in the details once more with four for three."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """An error as both doors tell it."""

    status: str
    """The name of a gRPC status code."""
    reason: str
    """For machines, the error's class: NotFoundError → ``NOT_FOUND``."""
    message: str
    incident: str = ""
    """Where the log has the details; empty for our own errors."""
    retry_after_s: float | None = None


def failure(error: BaseException) -> Failure:
    broken = isinstance(error, BackendError)
    if broken or not isinstance(error, LorafleetError):
        incident = uuid.uuid4().hex
        _log.error("incident %s in a call", incident, exc_info=error)
        details = f"the server's log has the details under incident {incident}"
        if broken:
            message = f"a part that the server needs does not answer; call again later; {details}"
            return Failure("UNAVAILABLE", "UNAVAILABLE", message, incident)
        return Failure("INTERNAL", "INTERNAL", f"internal error; {details}", incident)
    reason = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).upper()
    retry_after_s = error.retry_after_s if isinstance(error, QuotaExceededError) else None
    if isinstance(error, OverloadedError):
        retry_after_s = FULL_S
    message = str(error).encode(errors="replace")[:_LONGEST].decode(errors="ignore")
    return Failure(grpc_status(error), reason, message, retry_after_s=retry_after_s)
