"""What the typed clients share: a connection to one server, with its key, deadlines, the caller's trace, and errors.

Needs grpcio with grpcio-status.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from lorafleet.errors import (
    GRPC_STATUS,
    AdapterFormatError,
    CallsFullError,
    DeadlineExceededError,
    InvalidInputError,
    LorafleetError,
    PromotionRefusedError,
    QuotaExceededError,
    UnavailableError,
)

_MAX_ANSWER_BYTES: Final = 16 * 2**20
"""Of one message, as servers send at most; gRPC's own limit is 4 MiB."""


@dataclass(frozen=True)
class ClientTls:
    """How the connection is encrypted. Files in PEM format."""

    authority: Path | None = None
    """Of the authority that the server's certificate is checked against; None: those that gRPC brings."""
    certificate: Path | None = None
    """One's own, for servers that ask for one (mTLS); with its private key."""
    private_key: Path | None = None

    def credentials(self) -> Any:
        """Raises InvalidInputError where a file cannot be read, or a certificate has no key."""
        if (self.certificate is None) != (self.private_key is None):
            raise InvalidInputError("found a certificate or a private key alone, expected both or neither")
        try:
            contents = [
                None if path is None else path.read_bytes()
                for path in (self.authority, self.private_key, self.certificate)
            ]
        except OSError as error:
            raise InvalidInputError(f"a file of TLS cannot be read: {error}") from None
        return grpc.ssl_channel_credentials(*contents)


class Connection:
    """To one server, with one API key; it is made when it is first used. Thread-safe.

    Raises InvalidInputError for what cannot be a key, and as :meth:`ClientTls.credentials` does.
    """

    def __init__(self, address: str, *, key: str, timeout_s: float, tls: ClientTls | None) -> None:
        """``timeout_s`` bounds each call as a whole. Without ``tls`` the key travels in the clear."""
        self.address, self._timeout_s = address, timeout_s
        self._metadata = _authorization(key)
        options = [("grpc.max_receive_message_length", _MAX_ANSWER_BYTES)]
        self.channel = (
            grpc.insecure_channel(address, options)
            if tls is None
            else grpc.secure_channel(address, tls.credentials(), options)
        )

    def call(self, method: Any, request: Any) -> Any:
        """What a stub's method that answers with one message answers."""
        with self.translated():
            return self.begin(method, request)

    def begin(self, method: Any, request: Any) -> Any:
        """A call whose answer is a stream; read it within :meth:`translated`."""
        return method(request, metadata=(*self._metadata, *_trace_context()), timeout=self._timeout_s)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Errors of calls inside are those of :mod:`lorafleet.errors`, in the server's words."""
        try:
            yield
        except grpc.RpcError as error:
            raise _error_of(error, self.address) from None

    def close(self) -> None:
        """Calls that run are cancelled."""
        self.channel.close()


def _authorization(key: str) -> tuple[tuple[str, str]]:
    """A call's metadata with an API key; InvalidInputError for what cannot be one."""
    if not (key.isascii() and key.isprintable()):
        raise InvalidInputError(f"found an API key of {len(key)} characters, expected visible ASCII characters only")
    return (("authorization", f"Bearer {key}"),)


def _trace_context() -> tuple[tuple[str, str], ...]:
    """W3C's, of the span that the caller is in, so that the call is a part of its trace; none without OpenTelemetry."""
    if "opentelemetry.trace" not in sys.modules:  # whoever is in a span has imported it
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers)
    return tuple(headers.items())


# A status that several classes share comes back as the first of them, which is the most general one; but for those that
# callers tell apart, by the reason in the status' details.
_BY_REASON: Mapping[str, type[LorafleetError]] = {
    "ADAPTER_FORMAT": AdapterFormatError,
    "PROMOTION_REFUSED": PromotionRefusedError,
    "QUOTA_EXCEEDED": QuotaExceededError,
    "CALLS_FULL": CallsFullError,
}
_ERRORS = {status: error for error, status in reversed(GRPC_STATUS.items())}


def _error_of(error: grpc.RpcError, address: str) -> Exception:
    """The exception behind a failed call."""
    status, words = error.code().name, error.details() or "no details"
    if status == "DEADLINE_EXCEEDED":
        return DeadlineExceededError(f"{address} did not answer in time; allow more time, or ask for fewer tokens")
    if status == "CANCELLED":
        return UnavailableError(f"the call to {address} was cancelled before its end")
    if status == "UNAVAILABLE" and words.startswith("failed to connect"):
        return UnavailableError(f"no server answers at {address}; start one with `lorafleet serve` or name another one")
    reason, retry_after_s = _details(error)
    kind = _BY_REASON.get(reason, _ERRORS.get(status, LorafleetError))
    return QuotaExceededError(words, retry_after_s) if kind is QuotaExceededError else kind(words)


def _details(error: grpc.RpcError) -> tuple[str, float | None]:
    """The reason of its google.rpc.ErrorInfo, and the seconds of its RetryInfo; empty and None where there is none."""
    try:
        found = rpc_status.from_call(error)
    except ValueError:  # details of another status than the call's
        return "", None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    reason, retry_after_s = "", None
    for detail in found.details if found is not None else ():
        if detail.Unpack(info):
            reason = str(info.reason)
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return reason, retry_after_s
