"""Claims on weights that are being stored, holds of running engines, versions without weights, shapes of bases."""

import time

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

DOCUMENT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    with op.batch_alter_table("versions") as versions:
        versions.add_column(sa.Column("state_at", sa.Double(), nullable=True))
        versions.add_column(sa.Column("purged_at", sa.Double(), nullable=True))
    op.execute("UPDATE versions SET state_at = created_at")
    # Since when these are out of use was written down in the audit at best: their time runs from here on.
    out_of_use = sa.text("UPDATE versions SET state_at = :now WHERE state IN ('retired', 'quarantined')")
    op.get_bind().execute(out_of_use, {"now": time.time()})
    with op.batch_alter_table("versions") as versions:
        versions.alter_column("state_at", existing_type=sa.Double(), nullable=False)
        versions.create_check_constraint(
            op.f("ck_versions_purged"), "purged_at IS NULL OR state IN ('quarantined', 'retired')"
        )
    op.create_index("ix_versions_digest", "versions", ["digest"])
    op.create_index("ix_updates_digest", "updates", ["digest"])

    op.create_table(
        "blob_claims",
        sa.Column("token", sa.String(length=32), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("token", "digest", name="pk_blob_claims"),
    )
    op.create_index("ix_blob_claims_digest", "blob_claims", ["digest"])

    op.create_table(
        "engine_holds",
        sa.Column("service", sa.String(length=100), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("service", "digest", name="pk_engine_holds"),
    )
    op.create_index("ix_engine_holds_digest", "engine_holds", ["digest"])

    op.create_table(
        "base_shapes",
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("shapes", DOCUMENT, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_base_shapes"),
    )
