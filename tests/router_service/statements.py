"""What a call asks the database: the same statements take the same time, whatever they find."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy
from sqlalchemy import event


@contextmanager
def statements() -> Iterator[list[str]]:
    """Those of the calls themselves, not of the watcher, nor of the doors, which look a key up from time to time."""
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        thread = threading.current_thread()
        called = thread is threading.main_thread() or thread.name.startswith(("lorafleet-grpc_", "lorafleet-http_"))
        if called and statement != "BEGIN":
            found.append(statement)

    event.listen(sqlalchemy.Engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(sqlalchemy.Engine, "before_cursor_execute", note)
