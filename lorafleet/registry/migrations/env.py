"""Alembic's entry point: runs the revisions on the connection, and in the transaction, of ``schema.upgrade``."""

from alembic import context
from sqlalchemy import Connection

from lorafleet.registry.tables import Base

connection = context.config.attributes["connection"]
assert isinstance(connection, Connection), "run migrations through lorafleet.registry.schema, which holds the lock"

context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
