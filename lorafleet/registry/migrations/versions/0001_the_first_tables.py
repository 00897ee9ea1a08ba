"""The first tables: tenants, bases, adapters and their versions, federations and their rounds."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

WIDE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON_DOCUMENT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "bases",
        sa.Column("id", WIDE, nullable=False),
        sa.Column("name", sa.String(length=300), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("architecture", sa.Text(), nullable=False),
        sa.Column("parameters", WIDE, nullable=False),
        sa.Column("licence", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_bases"),
        sa.UniqueConstraint("name", name="uq_bases_name"),
    )
    op.create_index("ix_bases_digest", "bases", ["digest"])

    op.create_table(
        "revision",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("value", WIDE, nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_revision_single")),
        sa.PrimaryKeyConstraint("id", name="pk_revision"),
    )
    op.execute("INSERT INTO revision (id, value) VALUES (1, 0)")
    op.create_table(
        "tenants",
        sa.Column("id", WIDE, nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("weight > 0", name=op.f("ck_tenants_weight")),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
        sa.UniqueConstraint("name", name="uq_tenants_name"),
    )
    op.create_table(
        "federations",
        sa.Column("id", WIDE, nullable=False),
        sa.Column("tenant_id", WIDE, nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("base_id", WIDE, nullable=False),
        sa.Column("settings", JSON_DOCUMENT, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name="fk_federations_base_id_bases"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_federations_tenant_id_tenants"),
        sa.PrimaryKeyConstraint("id", name="pk_federations"),
        sa.UniqueConstraint("id", "tenant_id", name="uq_federations_id_tenant_id"),
        sa.UniqueConstraint("tenant_id", "name", name="uq_federations_tenant_id_name"),
    )
    op.create_table(
        "adapters",
        sa.Column("id", WIDE, nullable=False),
        sa.Column("tenant_id", WIDE, nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("base_id", WIDE, nullable=False),
        sa.Column("federation_id", WIDE, nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["base_id"], ["bases.id"], name="fk_adapters_base_id_bases"),
        sa.ForeignKeyConstraint(
            ["federation_id", "tenant_id"],
            ["federations.id", "federations.tenant_id"],
            name="fk_adapters_federation_id_tenant_id_federations",
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_adapters_tenant_id_tenants"),
        sa.PrimaryKeyConstraint("id", name="pk_adapters"),
        sa.UniqueConstraint("id", "tenant_id", name="uq_adapters_id_tenant_id"),
        sa.UniqueConstraint("tenant_id", "name", name="uq_adapters_tenant_id_name"),
    )
    op.create_index("ix_adapters_federation_id", "adapters", ["federation_id"])

    op.create_table(
        "members",
        sa.Column("id", WIDE, nullable=False),
        sa.Column("federation_id", WIDE, nullable=False),
        sa.Column("tenant_id", WIDE, nullable=False),
        sa.Column("key", sa.String(length=500), nullable=False),
        sa.Column("joined_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["federation_id"], ["federations.id"], name="fk_members_federation_id_federations"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_members_tenant_id_tenants"),
        sa.PrimaryKeyConstraint("id", name="pk_members"),
        sa.UniqueConstraint("federation_id", "key", name="uq_members_federation_id_key"),
    )
    op.create_index("ix_members_tenant_id", "members", ["tenant_id"])

    op.create_table(
        "rounds",
        sa.Column("id", WIDE, nullable=False),
        sa.Column("tenant_id", WIDE, nullable=False),
        sa.Column("federation_id", WIDE, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("opened_at", sa.Double(), nullable=False),
        sa.Column("closed_at", sa.Double(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("report", JSON_DOCUMENT, nullable=False),
        sa.CheckConstraint("(state = 'open') = (closed_at IS NULL)", name=op.f("ck_rounds_closed")),
        sa.CheckConstraint("state IN ('open', 'committed', 'abandoned')", name=op.f("ck_rounds_state")),
        sa.CheckConstraint("number >= 1", name=op.f("ck_rounds_number")),
        sa.ForeignKeyConstraint(
            ["federation_id", "tenant_id"],
            ["federations.id", "federations.tenant_id"],
            name="fk_rounds_federation_id_tenant_id_federations",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_rounds"),
        sa.UniqueConstraint("federation_id", "number", name="uq_rounds_federation_id_number"),
        sa.UniqueConstraint("id", "federation_id", name="uq_rounds_id_federation_id"),
        sa.UniqueConstraint("id", "tenant_id", name="uq_rounds_id_tenant_id"),
    )
    op.create_table(
        "updates",
        sa.Column("id", WIDE, nullable=False),
        sa.Column("tenant_id", WIDE, nullable=False),
        sa.Column("federation_id", WIDE, nullable=False),
        sa.Column("round_id", WIDE, nullable=False),
        sa.Column("member_key", sa.String(length=500), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("accepted", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("num_examples", WIDE, nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("size_bytes", WIDE, nullable=False),
        sa.Column("metrics", JSON_DOCUMENT, nullable=False),
        sa.Column("recorded_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["federation_id", "member_key"],
            ["members.federation_id", "members.key"],
            name="fk_updates_federation_id_member_key_members",
        ),
        sa.ForeignKeyConstraint(
            ["round_id", "federation_id"],
            ["rounds.id", "rounds.federation_id"],
            name="fk_updates_round_id_federation_id_rounds",
        ),
        sa.ForeignKeyConstraint(
            ["round_id", "tenant_id"], ["rounds.id", "rounds.tenant_id"], name="fk_updates_round_id_tenant_id_rounds"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_updates"),
        sa.UniqueConstraint("round_id", "member_key", "attempt", name="uq_updates_round_id_member_key_attempt"),
    )
    op.create_index(
        "uq_updates_round_id_member_key_accepted",
        "updates",
        ["round_id", "member_key"],
        unique=True,
        sqlite_where=sa.text("accepted"),
        postgresql_where=sa.text("accepted"),
    )

    op.create_table(
        "versions",
        sa.Column("id", WIDE, nullable=False),
        sa.Column("tenant_id", WIDE, nullable=False),
        sa.Column("adapter_id", WIDE, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("parameters", WIDE, nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("licence", sa.Text(), nullable=False),
        sa.Column("lineage", JSON_DOCUMENT, nullable=True),
        sa.Column("round_id", WIDE, nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint(
            "state IN ('staged', 'evaluated', 'quarantined', 'retired')", name=op.f("ck_versions_state")
        ),
        sa.CheckConstraint("number >= 1", name=op.f("ck_versions_number")),
        sa.ForeignKeyConstraint(
            ["adapter_id", "tenant_id"],
            ["adapters.id", "adapters.tenant_id"],
            name="fk_versions_adapter_id_tenant_id_adapters",
        ),
        sa.ForeignKeyConstraint(
            ["round_id", "tenant_id"], ["rounds.id", "rounds.tenant_id"], name="fk_versions_round_id_tenant_id_rounds"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_versions"),
        sa.UniqueConstraint("adapter_id", "number", name="uq_versions_adapter_id_number"),
        sa.UniqueConstraint("id", "tenant_id", name="uq_versions_id_tenant_id"),
    )
    op.create_index("ix_versions_round_id", "versions", ["round_id"])

    op.create_table(
        "aliases",
        sa.Column("adapter_id", WIDE, nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("tenant_id", WIDE, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("moved_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id", "number"],
            ["versions.adapter_id", "versions.number"],
            name="fk_aliases_adapter_id_number_versions",
        ),
        sa.ForeignKeyConstraint(
            ["adapter_id", "tenant_id"],
            ["adapters.id", "adapters.tenant_id"],
            name="fk_aliases_adapter_id_tenant_id_adapters",
        ),
        sa.PrimaryKeyConstraint("adapter_id", "name", name="pk_aliases"),
    )
    op.create_table(
        "evaluations",
        sa.Column("id", WIDE, nullable=False),
        sa.Column("tenant_id", WIDE, nullable=False),
        sa.Column("version_id", WIDE, nullable=False),
        sa.Column("member", sa.String(length=500), nullable=False),
        sa.Column("loss", sa.Double(), nullable=False),
        sa.Column("tokens", WIDE, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["version_id", "tenant_id"],
            ["versions.id", "versions.tenant_id"],
            name="fk_evaluations_version_id_tenant_id_versions",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
        sa.UniqueConstraint("version_id", "member", name="uq_evaluations_version_id_member"),
    )
