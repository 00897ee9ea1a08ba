"""One exception tree for the whole package, and its mapping to gRPC status codes.

::

    LorafleetError
    ├── InvalidInputError (ValueError)      a value that can never work as given
    │   ├── AdapterFormatError              an adapter's files are not what PEFT's format asks for
    │   └── UnknownNameError                a plug-in name that is not in its dict
    ├── NotFoundError (LookupError)         not there, or not yours: from outside the two look the same
    ├── AlreadyExistsError                  a name that is taken
    ├── BaseMismatchError                   an adapter and a base that do not belong together
    ├── DigestMismatchError                 bytes that arrived are not those that were announced
    ├── RejectedUpdateError                 a member's update that validation refuses
    ├── UnauthenticatedError                no or unknown tenant, or a key that opens nothing
    ├── PermissionDeniedError               a key that is known, without the scope that a call needs
    ├── QuotaExceededError                  a tenant has used what its quota allows for now
    ├── PromotionRefusedError               a candidate that is not measured to be better than what it would replace
    ├── BudgetSpentError                    a privacy budget that the next step would pass
    ├── OverloadedError                     a queue or a pool is full; try again later
    │   └── CallsFullError                  as many calls are here as may be at once
    ├── DeadlineExceededError               a call that took longer than it may
    └── UnavailableError                    a part that is needed does not run or is shutting down
        └── BackendError                    a database or a disk has failed; the message is for the log

Each message says what was found, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


class LorafleetError(Exception):
    """Base of all errors that lorafleet raises on purpose."""


class InvalidInputError(LorafleetError, ValueError):
    """A value that can never work as given."""


class AdapterFormatError(InvalidInputError):
    """An adapter's files are not what PEFT's format asks for, or hold what lorafleet refuses."""


class UnknownNameError(InvalidInputError):
    """A plug-in name that its dict does not hold."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}; known are: {', '.join(sorted(known)) or 'none'}")
        self.kind, self.name, self.known = kind, name, tuple(sorted(known))

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, tuple[str, ...]]]:
        return type(self), (self.kind, self.name, self.known)


class NotFoundError(LorafleetError, LookupError):
    """Not there, or not the caller's; the two are never told apart."""


class AlreadyExistsError(LorafleetError):
    """The name is taken."""


class BaseMismatchError(LorafleetError, ValueError):
    """An adapter and a base that do not belong together."""


class DigestMismatchError(LorafleetError, ValueError):
    """Bytes that arrived are not those that were announced; they were dropped, and can be sent again."""


class RejectedUpdateError(LorafleetError, ValueError):
    """A member's update that validation refuses; ``reason`` is a short stable code."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type[RejectedUpdateError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class UnauthenticatedError(LorafleetError):
    """No tenant, or one that is not known; no key, or one that opens nothing."""


class PermissionDeniedError(LorafleetError):
    """The caller is known, and its key has not the scope that the call needs; the message names it."""


class QuotaExceededError(LorafleetError):
    """A tenant has used what its quota allows.

    The same call may succeed ``retry_after_s`` seconds later; None where waiting alone does not help.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[QuotaExceededError], tuple[str, float | None]]:
        return type(self), (str(self), self.retry_after_s)


class PromotionRefusedError(LorafleetError):
    """A version is not known to be better than the one that an alias points at; the message has both losses."""


class BudgetSpentError(LorafleetError):
    """The next round would spend more privacy than was agreed; what is committed stays."""


class OverloadedError(LorafleetError):
    """A queue or a pool is full; the same call may succeed later."""


class CallsFullError(OverloadedError):
    """As many calls are here, or move weights, as may at once: unlike a full disk, over when one of them ends."""


class DeadlineExceededError(LorafleetError):
    """A call took longer than its caller, or the server, allows; what it had begun is cancelled."""


class UnavailableError(LorafleetError):
    """A part that is needed does not run, or is shutting down."""


class BackendError(UnavailableError):
    """A database, a disk or another part behind a service has failed.

    The message quotes it, and so may name machines and folders: it is for whoever runs the service, never for callers.
    """


# Looked up along the method resolution order, so that a subclass without an entry has its parent's code.
GRPC_STATUS: dict[type[Exception], str] = {
    InvalidInputError: "INVALID_ARGUMENT",
    NotFoundError: "NOT_FOUND",
    AlreadyExistsError: "ALREADY_EXISTS",
    BaseMismatchError: "FAILED_PRECONDITION",
    DigestMismatchError: "DATA_LOSS",
    RejectedUpdateError: "INVALID_ARGUMENT",
    UnauthenticatedError: "UNAUTHENTICATED",
    PermissionDeniedError: "PERMISSION_DENIED",
    PromotionRefusedError: "FAILED_PRECONDITION",
    BudgetSpentError: "FAILED_PRECONDITION",
    OverloadedError: "RESOURCE_EXHAUSTED",
    QuotaExceededError: "RESOURCE_EXHAUSTED",
    DeadlineExceededError: "DEADLINE_EXCEEDED",
    UnavailableError: "UNAVAILABLE",
}


def grpc_status(error: BaseException) -> str:
    """The name of the gRPC status code for an error; ``INTERNAL`` for anything that is not ours."""
    for cls in type(error).__mro__:
        if cls in GRPC_STATUS:
            return GRPC_STATUS[cls]
    return "INTERNAL"
