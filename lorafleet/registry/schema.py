"""Bringing a database to this version's tables, under one lock, and saying whether it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.engine import URL

from lorafleet.errors import UnavailableError
from lorafleet.registry.database import for_writing, make_engine, parse_url, translated_errors
from lorafleet.registry.tables import Base

_MIGRATIONS = Path(__file__).resolve().parent / "migrations"
# PostgreSQL's advisory locks are numbers; any that nothing else in the database uses.
_LOCK = 0x6C6F7261_666C6565


def migrations_config(connection: Connection | None = None) -> Config:
    """Alembic's configuration without a file; ``env.py`` works on the connection given."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


@contextmanager
def _exclusive(url: URL) -> Iterator[Connection]:
    """A writing transaction that no other migration of this database runs beside."""
    engine = make_engine(url, migrates=True)
    try:
        with translated_errors(), for_writing(engine).begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            yield connection
    finally:
        engine.dispose()


def upgrade(url: str) -> str:
    """Migrate to the newest revision and return its name; all of it happens, or nothing.

    A database from a newer version of the package is refused with UnavailableError. Any number of processes may call
    this at once: the first migrates, the others wait and find nothing to do.
    """
    with _exclusive(parse_url(url)) as connection:
        head = ScriptDirectory.from_config(migrations_config()).get_current_head()
        assert head is not None
        if MigrationContext.configure(connection).get_current_revision() != head:
            try:
                command.upgrade(migrations_config(connection), "head")
            except CommandError as error:
                raise UnavailableError(
                    f"the registry's database cannot be migrated ({error}); where a newer lorafleet has used it, "
                    "install that version here too"
                ) from error
            if connection.dialect.name == "sqlite":
                broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                assert not broken, f"the migration left rows that point nowhere: {broken}"
    return head


def check(url: str) -> list[str]:
    """What differs between a database and this version's tables, one line each; empty where they agree."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        return [f"there is no database at {parsed.database}; run `lorafleet db upgrade`"]
    engine = make_engine(parsed)
    try:
        with translated_errors(), engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True, "render_as_batch": True})
            head = ScriptDirectory.from_config(migrations_config()).get_current_head()
            current = context.get_current_revision()
            lines = (
                []
                if current == head
                else [f"revision: found {current or 'none'}, expected {head}; run `lorafleet db upgrade`"]
            )
            return lines + [f"tables: {difference}" for difference in compare_metadata(context, Base.metadata)]
    finally:
        engine.dispose()
