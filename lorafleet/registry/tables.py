"""The registry's tables, typed.

Every owned row carries its tenant, and composite foreign keys keep it the tenant of the row's parent: a version cannot
belong to another tenant than its adapter, an alias cannot name a version of another adapter.
"""

from __future__ import annotations

from typing import Annotated, Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

# SQLite numbers rows by itself only in a column declared exactly INTEGER, which is 64 bits wide there.
WideInteger = BigInteger().with_variant(Integer(), "sqlite")
JsonDocument = JSON().with_variant(JSONB(), "postgresql")

Id = Annotated[int, mapped_column(WideInteger, primary_key=True)]
Wide = Annotated[int, mapped_column(WideInteger)]
Name = Annotated[str, mapped_column(String(100))]
Digest = Annotated[str, mapped_column(String(71))]
Words = Annotated[str, mapped_column(Text)]
Seconds = Annotated[float, mapped_column(Double)]
Document = Annotated[dict[str, Any], mapped_column(JsonDocument)]


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING_CONVENTION)


class TenantRow(Base):
    __tablename__ = "tenants"
    __table_args__ = (UniqueConstraint("name"), CheckConstraint("weight > 0", name="weight"))

    id: Mapped[Id]
    name: Mapped[Name]
    weight: Mapped[Seconds]
    created_at: Mapped[Seconds]


class BaseRow(Base):
    """A base model. Two names may share a digest; the digest is what counts."""

    __tablename__ = "bases"
    __table_args__ = (UniqueConstraint("name"), Index(None, "digest"))

    id: Mapped[Id]
    name: Mapped[str] = mapped_column(String(300))
    digest: Mapped[Digest]
    architecture: Mapped[Words]
    parameters: Mapped[Wide]
    licence: Mapped[Words]
    created_at: Mapped[Seconds]


class BaseShapesRow(Base):
    """A base's linear layers: path → [d_out, d_in]. Apart from the bases, which are read with every adapter."""

    __tablename__ = "base_shapes"

    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    shapes: Mapped[Document]


class FederationRow(Base):
    """``state_at``, ``state_by`` and ``state_reason`` say when, by whom and why it was put into its state."""

    __tablename__ = "federations"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name"),
        UniqueConstraint("id", "tenant_id"),
        CheckConstraint("state IN ('active', 'paused', 'stopped')", name="state"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[Wide] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[Name]
    base_id: Mapped[Wide] = mapped_column(ForeignKey("bases.id"))
    settings: Mapped[Document]
    created_at: Mapped[Seconds]
    state: Mapped[str] = mapped_column(String(20))
    state_at: Mapped[Seconds]
    state_by: Mapped[Name]
    state_reason: Mapped[Words]


class LeaseRow(Base):
    """Which coordinator works for a federation, and until when it is believed to live; ``token`` counts the holders."""

    __tablename__ = "leases"
    __table_args__ = (
        ForeignKeyConstraint(["federation_id", "tenant_id"], ["federations.id", "federations.tenant_id"]),
    )

    federation_id: Mapped[int] = mapped_column(WideInteger, primary_key=True, autoincrement=False)
    tenant_id: Mapped[Wide]
    owner: Mapped[Name]
    taken_at: Mapped[Seconds]
    expires_at: Mapped[Seconds]
    token: Mapped[Wide]


class AdapterRow(Base):
    """``federation_id`` says which federation made it; such an adapter is granted to that federation's members."""

    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name"),
        UniqueConstraint("id", "tenant_id"),
        ForeignKeyConstraint(["federation_id", "tenant_id"], ["federations.id", "federations.tenant_id"]),
        Index(None, "federation_id"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[Wide] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[Name]
    base_id: Mapped[Wide] = mapped_column(ForeignKey("bases.id"))
    federation_id: Mapped[int | None] = mapped_column(WideInteger)
    created_at: Mapped[Seconds]


class RoundRow(Base):
    """``noise_seed``, in hex, is what a private round's noise is drawn from: a secret, there until it is closed."""

    __tablename__ = "rounds"
    __table_args__ = (
        UniqueConstraint("federation_id", "number"),
        UniqueConstraint("id", "federation_id"),
        UniqueConstraint("id", "tenant_id"),
        ForeignKeyConstraint(["federation_id", "tenant_id"], ["federations.id", "federations.tenant_id"]),
        CheckConstraint("number >= 1", name="number"),
        CheckConstraint("state IN ('open', 'committed', 'abandoned')", name="state"),
        CheckConstraint("(state = 'open') = (closed_at IS NULL)", name="closed"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[Wide]
    federation_id: Mapped[Wide]
    number: Mapped[int]
    state: Mapped[str] = mapped_column(String(20))
    opened_at: Mapped[Seconds]
    closed_at: Mapped[float | None] = mapped_column(Double)
    reason: Mapped[Words]
    report: Mapped[Document]
    noise_seed: Mapped[str | None] = mapped_column(String(64))


class VersionRow(Base):
    """``round_id`` is set by a round's commit only; ``lineage`` is what the record says, also of imported versions.

    ``state_at`` says since when it is in its state, ``purged_at`` when it lost its weights for being out of use.
    """

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "number"),
        UniqueConstraint("id", "tenant_id"),
        ForeignKeyConstraint(["adapter_id", "tenant_id"], ["adapters.id", "adapters.tenant_id"]),
        ForeignKeyConstraint(["round_id", "tenant_id"], ["rounds.id", "rounds.tenant_id"]),
        CheckConstraint("number >= 1", name="number"),
        CheckConstraint("state IN ('staged', 'evaluated', 'quarantined', 'retired')", name="state"),
        CheckConstraint("purged_at IS NULL OR state IN ('quarantined', 'retired')", name="purged"),
        Index(None, "round_id"),
        Index(None, "digest"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[Wide]
    adapter_id: Mapped[Wide]
    number: Mapped[int]
    digest: Mapped[Digest]
    rank: Mapped[int]
    parameters: Mapped[Wide]
    state: Mapped[str] = mapped_column(String(20))
    licence: Mapped[Words]
    lineage: Mapped[dict[str, Any] | None] = mapped_column(
        JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
    )
    round_id: Mapped[int | None] = mapped_column(WideInteger)
    created_at: Mapped[Seconds]
    state_at: Mapped[Seconds]
    purged_at: Mapped[float | None] = mapped_column(Double)


class AliasRow(Base):
    __tablename__ = "aliases"
    __table_args__ = (
        ForeignKeyConstraint(["adapter_id", "tenant_id"], ["adapters.id", "adapters.tenant_id"]),
        ForeignKeyConstraint(["adapter_id", "number"], ["versions.adapter_id", "versions.number"]),
    )

    adapter_id: Mapped[int] = mapped_column(WideInteger, primary_key=True)
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    tenant_id: Mapped[Wide]
    number: Mapped[int]
    moved_at: Mapped[Seconds]


class AliasMoveRow(Base):
    """Where an alias pointed, in the order of ``id``; a rollback marks what it takes back, and adds nothing.

    The last row of an alias that is not undone has the number that the alias has.
    """

    __tablename__ = "alias_moves"
    __table_args__ = (
        ForeignKeyConstraint(["adapter_id", "tenant_id"], ["adapters.id", "adapters.tenant_id"]),
        ForeignKeyConstraint(["adapter_id", "number"], ["versions.adapter_id", "versions.number"]),
        Index(None, "adapter_id", "alias"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[Wide]
    adapter_id: Mapped[Wide]
    alias: Mapped[Name]
    number: Mapped[int]
    moved_at: Mapped[Seconds]
    undone_at: Mapped[float | None] = mapped_column(Double)


class CardRow(Base):
    """A version's README, apart from the versions, which are read far more often."""

    __tablename__ = "cards"
    __table_args__ = (ForeignKeyConstraint(["version_id", "tenant_id"], ["versions.id", "versions.tenant_id"]),)

    version_id: Mapped[int] = mapped_column(WideInteger, primary_key=True, autoincrement=False)
    tenant_id: Mapped[Wide]
    text: Mapped[Words]


class MemberRow(Base):
    """``tenant_id`` is the member's own tenant, not the federation's owner.

    ``public_key`` is empty for a member that is known by its word alone; no two members of a federation share one.
    """

    __tablename__ = "members"
    __table_args__ = (
        UniqueConstraint("federation_id", "key"),
        Index(None, "tenant_id"),
        Index(
            "uq_members_federation_id_public_key_given",
            "federation_id",
            "public_key",
            unique=True,
            sqlite_where=text("public_key <> ''"),
            postgresql_where=text("public_key <> ''"),
        ),
        CheckConstraint("revoked_at IS NOT NULL OR (revoked_by = '' AND revoked_reason = '')", name="revoked"),
    )

    id: Mapped[Id]
    federation_id: Mapped[Wide] = mapped_column(ForeignKey("federations.id"))
    tenant_id: Mapped[Wide] = mapped_column(ForeignKey("tenants.id"))
    key: Mapped[str] = mapped_column(String(500))
    joined_at: Mapped[Seconds]
    public_key: Mapped[str] = mapped_column(String(2000))
    revoked_at: Mapped[float | None] = mapped_column(Double)
    revoked_by: Mapped[Name]
    revoked_reason: Mapped[Words]


class InvitationRow(Base):
    """The right to become a member, once. ``mac`` is of the other columns under a secret that is kept nowhere."""

    __tablename__ = "invitations"
    __table_args__ = (
        UniqueConstraint("code"),
        ForeignKeyConstraint(["federation_id", "member_key"], ["members.federation_id", "members.key"]),
        CheckConstraint("(accepted_at IS NULL) = (member_key IS NULL)", name="accepted"),
        Index(None, "federation_id"),
    )

    id: Mapped[Id]
    federation_id: Mapped[Wide] = mapped_column(ForeignKey("federations.id"))
    tenant_id: Mapped[Wide] = mapped_column(ForeignKey("tenants.id"))
    code: Mapped[str] = mapped_column(String(32))
    mac: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[Seconds]
    expires_at: Mapped[Seconds]
    accepted_at: Mapped[float | None] = mapped_column(Double)
    member_key: Mapped[str | None] = mapped_column(String(500))


class UpdateRow(Base):
    """The journal. The partial index lets one accepted update count for each piece of work, whatever was resent.

    A row stays for good; ``dropped_at`` says when its factors were deleted.

    A piece of work is the ``work``-th that a member was given in round ``ordered_in``. Its update may come in a later
    round, ``round_id``, and count in a still later one, ``counted_in``, with weight ``share``.
    """

    __tablename__ = "updates"
    __table_args__ = (
        UniqueConstraint("federation_id", "member_key", "ordered_in", "attempt"),
        Index(
            "uq_updates_federation_id_member_key_ordered_in_work_accepted",
            "federation_id",
            "member_key",
            "ordered_in",
            "work",
            unique=True,
            sqlite_where=text("accepted"),
            postgresql_where=text("accepted"),
        ),
        ForeignKeyConstraint(["round_id", "tenant_id"], ["rounds.id", "rounds.tenant_id"]),
        ForeignKeyConstraint(["round_id", "federation_id"], ["rounds.id", "rounds.federation_id"]),
        ForeignKeyConstraint(["federation_id", "member_key"], ["members.federation_id", "members.key"]),
        Index(None, "round_id"),
        Index(None, "digest"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[Wide]
    federation_id: Mapped[Wide]
    round_id: Mapped[Wide]
    member_key: Mapped[str] = mapped_column(String(500))
    ordered_in: Mapped[int]
    work: Mapped[int]
    attempt: Mapped[int]
    accepted: Mapped[bool]
    reason: Mapped[Words]
    digest: Mapped[Digest]
    num_examples: Mapped[Wide]
    rank: Mapped[int]
    size_bytes: Mapped[Wide]
    metrics: Mapped[Document]
    expert_digest: Mapped[Digest]
    steps: Mapped[int]
    seconds: Mapped[Seconds]
    recorded_at: Mapped[Seconds]
    counted_in: Mapped[int | None]
    share: Mapped[float | None] = mapped_column(Double)
    dropped_at: Mapped[float | None] = mapped_column(Double)


class EvaluationRow(Base):
    __tablename__ = "evaluations"
    __table_args__ = (
        UniqueConstraint("version_id", "member"),
        ForeignKeyConstraint(["version_id", "tenant_id"], ["versions.id", "versions.tenant_id"]),
    )

    id: Mapped[Id]
    tenant_id: Mapped[Wide]
    version_id: Mapped[Wide]
    member: Mapped[str] = mapped_column(String(500))
    loss: Mapped[Seconds]
    tokens: Mapped[Wide]
    created_at: Mapped[Seconds]


class BlobClaimRow(Base):
    """Weights that somebody is storing, and will name; ``token`` is of one call, which may store several."""

    __tablename__ = "blob_claims"
    __table_args__ = (Index(None, "digest"),)

    token: Mapped[str] = mapped_column(String(32), primary_key=True)
    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    expires_at: Mapped[Seconds]


class BlobDeletionRow(Base):
    """Weights that somebody is deleting; ``token`` is of one call, which may delete several.

    A row that is there after ``until`` is of a deletion that nobody has seen the end of.
    """

    __tablename__ = "blob_deletions"
    __table_args__ = (Index(None, "until"),)

    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    token: Mapped[str] = mapped_column(String(32))
    until: Mapped[Seconds]


class EngineHoldRow(Base):
    """Weights that a running service has loaded, or is about to."""

    __tablename__ = "engine_holds"
    __table_args__ = (Index(None, "digest"),)

    service: Mapped[str] = mapped_column(String(100), primary_key=True)
    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    expires_at: Mapped[Seconds]


class KeyRow(Base):
    """An API key without its secret: ``mac`` is of the whole token, under a pepper that no database holds."""

    __tablename__ = "keys"
    __table_args__ = (UniqueConstraint("key_id"), Index(None, "tenant_id"))

    id: Mapped[Id]
    tenant_id: Mapped[Wide] = mapped_column(ForeignKey("tenants.id"))
    key_id: Mapped[str] = mapped_column(String(12))
    name: Mapped[Name]
    scopes: Mapped[str] = mapped_column(String(200))
    """With a space between two."""
    mac: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[Seconds]
    expires_at: Mapped[float | None] = mapped_column(Double)
    revoked_at: Mapped[float | None] = mapped_column(Double)


class GrantRow(Base):
    """``tenant_id`` is the adapter's owner; ``to_tenant_id`` whom it is granted to, NULL for all tenants."""

    __tablename__ = "grants"
    __table_args__ = (
        UniqueConstraint("adapter_id", "to_tenant_id"),
        # NULLs are never equal to a unique constraint.
        Index(
            "uq_grants_adapter_id_to_all",
            "adapter_id",
            unique=True,
            sqlite_where=text("to_tenant_id IS NULL"),
            postgresql_where=text("to_tenant_id IS NULL"),
        ),
        ForeignKeyConstraint(["adapter_id", "tenant_id"], ["adapters.id", "adapters.tenant_id"]),
        CheckConstraint("to_tenant_id <> tenant_id", name="to_another"),
        Index(None, "to_tenant_id"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[Wide]
    adapter_id: Mapped[Wide]
    to_tenant_id: Mapped[int | None] = mapped_column(WideInteger, ForeignKey("tenants.id"))
    granted_at: Mapped[Seconds]


class QuotaRow(Base):
    """What a tenant may use; NULL is no limit."""

    __tablename__ = "quotas"
    __table_args__ = (CheckConstraint("(budget_tokens IS NULL) = (budget_period_s IS NULL)", name="budget"),)

    tenant_id: Mapped[int] = mapped_column(WideInteger, ForeignKey("tenants.id"), primary_key=True, autoincrement=False)
    requests_per_minute: Mapped[int | None] = mapped_column(WideInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(WideInteger)
    concurrent_requests: Mapped[int | None] = mapped_column(WideInteger)
    adapters: Mapped[int | None] = mapped_column(WideInteger)
    budget_tokens: Mapped[int | None] = mapped_column(WideInteger)
    budget_period_s: Mapped[int | None] = mapped_column(WideInteger)


class UsageRow(Base):
    """A tenant's use in one window of time, which starts at a multiple of its period.

    ``taken_*`` is what blocks hold or have used, and what quotas are compared with; the others are what was used.
    """

    __tablename__ = "usage"
    __table_args__ = (Index(None, "tenant_id", "starts_at"),)

    tenant_id: Mapped[int] = mapped_column(WideInteger, ForeignKey("tenants.id"), primary_key=True, autoincrement=False)
    period_s: Mapped[int] = mapped_column(WideInteger, primary_key=True, autoincrement=False)
    starts_at: Mapped[int] = mapped_column(WideInteger, primary_key=True, autoincrement=False)
    taken_requests: Mapped[Wide]
    taken_tokens: Mapped[Wide]
    requests: Mapped[Wide]
    prompt_tokens: Mapped[Wide]
    generated_tokens: Mapped[Wide]


class UsageBlockRow(Base):
    """A block of requests and tokens that a service holds; gone when it is settled, which then happens once.

    ``windows`` maps a period to the start of its window, as the block was taken from them.
    """

    __tablename__ = "usage_blocks"
    __table_args__ = (Index(None, "tenant_id", "taken_at"),)

    id: Mapped[Id]
    tenant_id: Mapped[Wide] = mapped_column(ForeignKey("tenants.id"))
    requests: Mapped[Wide]
    tokens: Mapped[Wide]
    windows: Mapped[Document]
    taken_at: Mapped[Seconds]


class AuditRow(Base):
    """Who changed what, written in the transaction of the change. ``tenant_id`` is whose things it was about."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "tenant_id", "id"),)

    id: Mapped[Id]
    tenant_id: Mapped[Wide] = mapped_column(ForeignKey("tenants.id"))
    at: Mapped[Seconds]
    by: Mapped[Name]
    action: Mapped[str] = mapped_column(String(50))
    subject: Mapped[Words]
    details: Mapped[Document]


class RevisionRow(Base):
    """One row, locked last in a writing transaction: who sees revision n sees all changes up to n."""

    __tablename__ = "revision"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[Wide]
