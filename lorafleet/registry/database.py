"""Connections and transactions, on SQLite and PostgreSQL.

========  ==========================================  =======================================================
          SQLite                                      PostgreSQL
========  ==========================================  =======================================================
read      ``BEGIN``: one snapshot (WAL)               ``REPEATABLE READ READ ONLY``: one snapshot
write     ``BEGIN IMMEDIATE``: one writer at a time,  ``READ COMMITTED``; the row that a decision rests on is
          waited for up to 5 s                        locked before it is read (:func:`locked`)
waits     for its turn only                           for a bounded time each (:mod:`lorafleet.registry.postgres`)
========  ==========================================  =======================================================

Locks are taken in one order: tenant, federation, round, adapters by name, versions by number, windows of usage by
length, revision; several claims, and several holds, by key. A write therefore never fails because of another one, and
nothing here is retried behind the caller's back.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVarTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Delete,
    Engine,
    Select,
    create_engine,
    delete,
    event,
    inspect,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from lorafleet.errors import BackendError, InvalidInputError, OverloadedError
from lorafleet.registry import postgres
from lorafleet.registry.tables import Base, RevisionRow

BUSY_TIMEOUT_MS = 5000
_WRITE = "lorafleet_write"
Columns = TypeVarTuple("Columns")


def parse_url(url: str) -> URL:
    """A URL with a driver that is installed; InvalidInputError for anything but a SQLite file or PostgreSQL."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise InvalidInputError(
            "the registry's URL cannot be read; expected sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        ) from None
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if not parsed.database or ":memory:" in parsed.database or "mode" in parsed.query:
            raise InvalidInputError(
                "an in-memory SQLite database is private to one connection; expected sqlite:///FILE"
            )
        return parsed.set(drivername="sqlite+pysqlite")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise InvalidInputError(f"found a {backend} URL for the registry, expected sqlite:/// or postgresql://")


def anchored_url(url: str, folder: Path) -> str:
    """The URL with a SQLite file's relative path taken from a folder, whatever folder a process works in later."""
    database = parse_url(url).database
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or database is None or database.startswith("file:"):
        return url
    return parsed.set(database=str(folder / database)).render_as_string(hide_password=False)


def make_engine(url: URL, *, migrates: bool = False) -> Engine:
    """An engine whose transactions are the table above; connections to SQLite get their pragmas.

    With ``migrates`` foreign keys are not checked as it goes on: SQLite alters a table by building another one and
    renaming it, and a pragma cannot change within a transaction. And PostgreSQL is waited for without an end.
    """
    if url.get_backend_name() != "sqlite":
        return postgres.make_engine(url, writes=_WRITE, migrates=migrates)
    assert url.database is not None
    try:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        if not url.database.startswith("file:"):
            # Losses, hashes of tokens, the seed of a round's noise: this user's alone, as the weights are.
            with suppress(FileExistsError):
                Path(url.database).touch(mode=0o600, exist_ok=False)
    except OSError as error:
        raise BackendError(
            f"the registry's database {url.database} cannot be made ({error}); choose another folder"
        ) from error
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})

    @event.listens_for(engine, "connect")
    def set_pragmas(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver opens no transaction by itself; `begin` below does
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA foreign_keys = {'OFF' if migrates else 'ON'}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later would fail at the upgrade when another one wrote in between.
        writes = connection.get_execution_options().get(_WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def for_writing(engine: Engine) -> Engine:
    """The same pool, with transactions that write."""
    return engine.execution_options(**{_WRITE: True})


def for_reading(engine: Engine) -> Engine:
    """The same pool, with transactions that see one snapshot and cannot write."""
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


@contextmanager
def translated_errors() -> Iterator[None]:
    """The driver's errors in the package's terms; anything unexpected passes as it is."""
    try:
        yield
    except PoolTimeoutError:
        raise OverloadedError("all of the registry's database connections are in use; call again later") from None
    except (OperationalError, InterfaceError) as error:
        raise BackendError(
            f"the registry's database did not take the transaction ({error.orig}); nothing was changed unless the "
            "connection broke while committing; call again"
        ) from error
    except DataError as error:
        raise InvalidInputError(f"the registry's database cannot hold a value as given ({error.orig})") from error
    except (UnicodeEncodeError, OverflowError) as error:  # before it was sent: half of a surrogate pair, 2**70
        raise InvalidInputError(f"the registry's database cannot hold a value as given ({error})") from None


class Database:
    """Reading and writing transactions on one database."""

    def __init__(self, url: URL) -> None:
        self._engine = make_engine(url)
        self._reading, self._writing = for_reading(self._engine), for_writing(self._engine)
        # SQLite's own waiting is polling, and unfair: threads of one process queue here instead.
        self._turn: AbstractContextManager[object] = (
            threading.Lock() if self._engine.dialect.name == "sqlite" else nullcontext()
        )

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction on one snapshot."""
        with translated_errors(), Session(self._reading) as session, session.begin():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is committed at the end of the block, and rolled back whole where it raises."""
        with self._turn, translated_errors(), Session(self._writing) as session, session.begin():
            yield session

    def close(self) -> None:
        self._engine.dispose()


def locked(statement: Select[*Columns], of: type[Base]) -> Select[*Columns]:
    """Lock the rows of one table until the transaction ends (on SQLite the whole database is locked already).

    ``FOR NO KEY UPDATE`` excludes every other locker but not the foreign-key checks of rows that point here. What the
    session read before it had the lock is replaced by what is there now.
    """
    return statement.with_for_update(key_share=True, of=of).execution_options(populate_existing=True)


def delete_in_order(of: type[Base], *which: ColumnElement[bool]) -> Delete:
    """A deletion of rows that locks them in the order of their keys, and no others.

    A plain one locks them in whatever order it finds them, so that two of them may wait for each other.
    """
    keys = inspect(of).primary_key
    return delete(of).where(tuple_(*keys).in_(select(*keys).where(*which).order_by(*keys).with_for_update()))


def insert_if_absent(session: Session, row: type[Base], **values: Any) -> bool:
    """Insert a row unless a unique constraint already has it; says whether it was inserted.

    On PostgreSQL this waits for a transaction that is inserting the same key, and the next statement sees its row.
    """
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    statement = insert(row).values(**values).on_conflict_do_nothing().returning(literal(1))
    return session.execute(statement).first() is not None


def insert_or_update(session: Session, row: type[Base], keys: Sequence[dict[str, Any]], **values: Any) -> None:
    """Rows of these primary keys with these values, whether they were there before or not; locked in the given order.

    One statement: between two, somebody else may delete a row that was there.
    """
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    statement = insert(row).values([key | values for key in keys])
    session.execute(statement.on_conflict_do_update(index_elements=inspect(row).primary_key, set_=values))


def bump_revision(session: Session) -> None:
    """Tell watchers that something changed. Last in its transaction: every writer waits on this one row."""
    session.flush()
    session.execute(update(RevisionRow).values(value=RevisionRow.value + 1))
