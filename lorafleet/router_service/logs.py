"""The service's log, a line or a JSON object for each record, with the call that it belongs to.

What the package logs of a call names no prompt, no key and no tenant. An exception's own words are another matter: they
may quote what the call brought. In a call an unexpected one is written as its type and where it was raised, without its
words; those of the operating system, which knows no callers, are kept.
"""

from __future__ import annotations

import json
import logging
import math
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, Literal, TextIO

from lorafleet.router_service.trail import Trail, current_trail

Form = Literal["text", "json"]
_TELLING: Final = (OSError, MemoryError, ImportError)
"""What these say is of the machine."""
_HIDDEN: Final = "(its words are left out: they may quote the call)"


def set_up(stream: TextIO, *, form: Form, level: str | None) -> None:
    """Write records to ``stream`` in this form, instead of what wrote them to a stream until now.

    ``level`` is the package's own (None: as it is); that of other libraries stays. For the entry point of a process.
    """
    # A line tells none of these, and every record would look them up.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    handler = logging.StreamHandler(stream)
    handler.addFilter(belongs)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root.addHandler(handler)
    if level is not None:
        logging.getLogger("lorafleet").setLevel(level.upper())


def belongs(record: logging.LogRecord) -> bool:
    """Notes the call that a record belongs to; a filter, as it has to run on the thread that logs."""
    if not hasattr(record, "trail"):
        record.trail = current_trail()
    return True


class TextLines(logging.Formatter):
    """For people: ``TIME LEVEL LOGGER: MESSAGE [request ID, key ID, trace ID]``."""

    def format(self, record: logging.LogRecord) -> str:
        known = ", ".join(f"{name} {value}" for name, value in _call(record).items() if value)
        # One line each, whatever is quoted.
        message = _message(record).replace("\r", "\\r").replace("\n", "\\n")
        line = f"{_time(record)} {record.levelname} {record.name}: {message}{f' [{known}]' if known else ''}"
        return "\n".join([line, *_traceback(record)])


class JsonLines(logging.Formatter):
    """For machines: one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **{f"{name}_id": value for name, value in _call(record).items() if value},
            **getattr(record, "facts", {}),
        }
        if lines := _traceback(record):
            found["traceback"] = "\n".join(lines)
        return json.dumps(found, ensure_ascii=True, default=str)


def _call(record: logging.LogRecord) -> dict[str, str]:
    trail: Trail | None = getattr(record, "trail", None)
    if trail is None:
        return {}
    return {"request": trail.request_id, "key": trail.key_id, "trace": trail.trace_id}


def _time(record: logging.LogRecord) -> str:
    seconds = math.floor(record.created)
    return f"{_second(seconds)}.{math.floor(1000 * (record.created - seconds)):03}Z"


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    """Most lines are of the second of the line before."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _message(record: logging.LogRecord) -> str:
    """Libraries put an exception's words into messages, too."""
    message = record.getMessage()
    error = record.exc_info[1] if record.exc_info else None
    for one in _chain(error) if error is not None else ():
        if str(one) and not _told(record, one):
            message = message.replace(str(one), _HIDDEN)
    return message


def _traceback(record: logging.LogRecord) -> list[str]:
    if not record.exc_info or record.exc_info[1] is None:
        return []
    lines: list[str] = []
    for error in reversed(list(_chain(record.exc_info[1]))):
        kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
        frames = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__)).format()
        lines += [line for frame in frames for line in frame.rstrip("\n").split("\n")]
        lines.append(f"{kind}: {error if _told(record, error) else _HIDDEN}")
    return lines


def _told(record: logging.LogRecord, error: BaseException) -> bool:
    return isinstance(error, _TELLING) or getattr(record, "trail", None) is None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what was behind it, and those of a group; the last one came first."""
    seen: set[int] = set()
    left = [error]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        behind = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        left += [behind] if behind is not None else []
        left += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
