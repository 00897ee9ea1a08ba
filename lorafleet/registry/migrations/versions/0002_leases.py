"""Leases: one coordinator at a time works for a federation."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

WIDE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "leases",
        sa.Column("federation_id", WIDE, autoincrement=False, nullable=False),
        sa.Column("tenant_id", WIDE, nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("taken_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["federation_id", "tenant_id"],
            ["federations.id", "federations.tenant_id"],
            name="fk_leases_federation_id_tenant_id_federations",
        ),
        sa.PrimaryKeyConstraint("federation_id", name="pk_leases"),
    )
