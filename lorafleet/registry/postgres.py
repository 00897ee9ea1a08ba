"""Connections to PostgreSQL on which no wait is without an end.

A driver waits for an answer for as long as its connection looks alive, and a half-open one looks alive for ever: the
machine behind it has lost its network, or its process stands still, while the kernel or a proxy before it goes on to
acknowledge what arrives. Keep-alives and the server's own time-outs do not see that. So the time is taken here as well:

===========================  ======  ===================================================================================
what is waited for           at most
===========================  ======  ===================================================================================
a connection                 2 s     the least that libpq knows; each of the URL's hosts has so long
an answer, in no transaction 2 s     the look at a pooled connection before it is used: a constant, and no lock
an answer to a read          5 s     of one snapshot, which waits for no lock; as long as SQLite waits for its turn
an answer to a write         10 s    which may wait for a lock twice; the server ends such a statement at that time, too
a lock                       5 s     as SQLite's writers wait; what holds locks longer than that has lost its way
a pooled connection          5 s     then OverloadedError
a transaction's next words   60 s    the server ends it: nobody who has gone keeps its locks
===========================  ======  ===================================================================================

A call on a connection that has become half-open therefore ends after at most 4 s (the look, and another connection),
and one that was under way after 5 or 10 s, always as UnavailableError. The connection is closed, with all others that
are as old, and the next call has a new one.

Migrations are the exception: they wait for their turn and for their work however long that takes.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any, Final, TypeVar

import psycopg
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, Dialect

CONNECT_S: Final = 2
PING_S: Final = 2.0
READ_S: Final = 5.0
WRITE_S: Final = 10.0
LOCK_S: Final = 5.0
POOL_S: Final = 5.0
IDLE_S: Final = 60.0

# What the URL says of these counts instead. A dead peer is noticed in 10 + 3 * 5 s also where nothing waits for it.
_CONNECTION: Final = {
    "connect_timeout": CONNECT_S,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "lorafleet",
}
_SESSION: Final = "; ".join(
    f"SET {name} = {round(1000 * seconds)}"
    for name, seconds in {
        "statement_timeout": WRITE_S,
        "lock_timeout": LOCK_S,
        "idle_in_transaction_session_timeout": IDLE_S,
    }.items()
)

T = TypeVar("T")


class BoundedConnection(psycopg.Connection[Any]):
    """One that is closed where the server does not answer within ``answer_s``; None waits for ever."""

    answer_s: float | None = PING_S

    def wait(self, gen: Generator[Any, Any, T], *arguments: Any, **named: Any) -> T:
        """As psycopg's own, through which every wait of a connection goes."""
        if self.answer_s is None:
            return super().wait(gen, *arguments, **named)
        try:
            return super().wait(_until(gen, time.monotonic() + self.answer_s), *arguments, **named)
        except _SilentError:
            self.close()  # what it may still say belongs to a question that nobody asks any more
            raise psycopg.OperationalError(f"the server did not answer within {self.answer_s:g} s") from None


class _SilentError(Exception):
    pass


def _until(gen: Generator[Any, Any, T], deadline: float) -> Generator[Any, Any, T]:
    """The same generator, ended at a time; whoever waits for it comes by every 0.1 s."""
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() >= deadline:
                raise _SilentError
            wanted = gen.send(ready)
    except StopIteration as end:
        value: T = end.value
        return value


def make_engine(url: URL, *, writes: str, migrates: bool) -> Engine:
    """An engine with the limits above; ``writes`` is the execution option that tells a transaction that writes.

    Each process holds at most 15 connections: 5, and 10 more while they are needed.
    """
    engine = create_engine(url, pool_pre_ping=True, pool_timeout=POOL_S)

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Dialect, _record: object, arguments: list[Any], named: dict[str, Any]) -> BoundedConnection:
        connection = BoundedConnection.connect(*arguments, **{**_CONNECTION, **named}, autocommit=True)
        if migrates:
            connection.answer_s = None
        else:
            connection.execute(_SESSION)
        connection.autocommit = False
        return connection

    if migrates:
        return engine

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        bounded: Any = connection.connection.dbapi_connection  # a BoundedConnection
        bounded.answer_s = WRITE_S if connection.get_execution_options().get(writes, False) else READ_S

    @event.listens_for(engine, "checkin")
    def checkin(connection: BoundedConnection | None, _record: object) -> None:
        if connection is not None:
            connection.answer_s = PING_S

    return engine
