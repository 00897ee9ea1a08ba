"""Errors as OpenAI's clients expect them: a status that picks their exception, and an ``error`` object."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from lorafleet.errors import InvalidInputError
from lorafleet.router_service.failures import QUOTA_EXCEEDED, Failure, failure

# That of google.rpc.Code, so that both doors answer alike.
HTTP_STATUS: Final = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "DATA_LOSS": 500,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_CODES: Final = {"UNAUTHENTICATED": "invalid_api_key"}
_RETRY_AFTER_S: Final = 1.0
"""Where nobody knows better: a full server has room again when one call ends."""


class BadRequestError(InvalidInputError):
    """A field that cannot work as given; ``param`` is its name."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[BadRequestError], tuple[str, str | None]]:
        return type(self), (str(self), self.param)


def error_response(_request: Request, error: Exception) -> JSONResponse:
    """What an error inside the app is answered with, before any of a stream was sent."""
    if isinstance(error, HTTPException):  # no such path, or no such method
        message = f"{error.detail}; the paths are in the documentation of the API"
        body = {"message": message, "type": _type(error.status_code), "param": None, "code": None}
        return JSONResponse({"error": body}, error.status_code, dict(error.headers or {}))
    failed, body = described(error)
    status = HTTP_STATUS[failed.status]
    headers = {}
    if failed.reason == QUOTA_EXCEEDED and failed.retry_after_s is None:
        headers["x-should-retry"] = "false"  # as OpenAI's own servers tell their clients: no time helps
    elif status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers["retry-after"] = str(math.ceil(failed.retry_after_s or _RETRY_AFTER_S))
    if status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": body}, status, headers)


def described(error: BaseException) -> tuple[Failure, dict[str, Any]]:
    """What is told of an error, and its ``error`` object."""
    failed = failure(error)
    return failed, {
        "message": failed.message,
        "type": _type(HTTP_STATUS[failed.status]),
        "param": getattr(error, "param", None),
        "code": _CODES.get(failed.reason, failed.reason.lower()),
    }


def _type(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
