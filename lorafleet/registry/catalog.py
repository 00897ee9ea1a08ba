"""Tenants, bases and adapters: what has a name. Functions of a session; :class:`Registry` owns the transaction."""

from __future__ import annotations

import math

from sqlalchemy import Select, or_, select, update
from sqlalchemy.orm import Session

from lorafleet.adapters.base_shapes import ModuleShapes
from lorafleet.errors import AlreadyExistsError, InvalidInputError
from lorafleet.registry.database import insert_if_absent
from lorafleet.registry.records import Adapter, Base, Tenant
from lorafleet.registry.references import check_digest, check_name, not_found
from lorafleet.registry.tables import AdapterRow, BaseRow, BaseShapesRow, FederationRow, TenantRow


def create_tenant(session: Session, name: str, weight: float, now: float) -> Tenant:
    check_name("tenant", name)
    _check_weight(name, weight)
    if not insert_if_absent(session, TenantRow, name=name, weight=weight, created_at=now):
        raise AlreadyExistsError(f"there is a tenant {name!r} already; choose another name")
    return tenant(session, name)


def set_weight(session: Session, name: str, weight: float) -> Tenant:
    _check_weight(name, weight)
    session.execute(update(TenantRow).where(TenantRow.id == tenant(session, name).id).values(weight=weight))
    return tenant(session, name)


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise InvalidInputError(f"tenant {name!r}: found the weight {weight}, expected a finite number above 0")


def tenant(session: Session, name: str) -> Tenant:
    row = session.scalar(select(TenantRow).where(TenantRow.name == name))
    if row is None:
        raise not_found(f"tenant {name!r}")
    return _tenant(row)


def tenants(session: Session) -> list[Tenant]:
    return sorted((_tenant(row) for row in session.scalars(select(TenantRow))), key=lambda tenant: tenant.name)


def _tenant(row: TenantRow) -> Tenant:
    return Tenant(row.id, row.name, row.weight, row.created_at)


def register_base(
    session: Session, name: str, digest: str, architecture: str, parameters: int, licence: str, now: float
) -> Base:
    check_digest(f"base {name!r}", digest)
    if not 0 < len(name) <= 300 or name.startswith("sha256:"):
        raise InvalidInputError(f"found the base name {name!r}, expected 1 to 300 characters that are not a digest")
    if parameters < 1:
        raise InvalidInputError(f"base {name!r}: found {parameters} parameters, expected at least 1")
    insert_if_absent(
        session,
        BaseRow,
        name=name,
        digest=digest,
        architecture=architecture,
        parameters=parameters,
        licence=licence,
        created_at=now,
    )
    found = base(session, name)
    if licence and not found.licence and found.digest == digest:
        session.execute(update(BaseRow).where(BaseRow.id == found.id).values(licence=licence))
        found = base(session, name)
    if found.digest != digest:
        raise AlreadyExistsError(
            f"the base {name!r} is registered with the digest {found.digest}, found {digest}; "
            "other weights or another config are another base: choose another name"
        )
    return found


def base(session: Session, name_or_digest: str) -> Base:
    """By name, or the first registered of a digest."""
    statement = select(BaseRow).where(or_(BaseRow.name == name_or_digest, BaseRow.digest == name_or_digest))
    row = session.scalars(statement.order_by(BaseRow.id)).first()
    if row is None:
        raise not_found(f"base {name_or_digest!r}")
    return Base(row.id, row.name, row.digest, row.architecture, row.parameters, row.licence, row.created_at)


def put_shapes(session: Session, digest: str, shapes: ModuleShapes) -> None:
    """Nothing happens where they are known: a digest has one set of them."""
    insert_if_absent(session, BaseShapesRow, digest=digest, shapes={path: list(both) for path, both in shapes.items()})


def shapes(session: Session, digest: str) -> ModuleShapes | None:
    """None where whoever registered the base did not say."""
    found = session.scalar(select(BaseShapesRow.shapes).where(BaseShapesRow.digest == digest))
    return None if found is None else {path: (d_out, d_in) for path, (d_out, d_in) in found.items()}


def create_adapter(
    session: Session, tenant_name: str, name: str, base_name: str, now: float, *, federation_id: int | None = None
) -> Adapter:
    """AlreadyExistsError where the name is taken; ``federation_id`` is set for an adapter that a federation makes."""
    check_name("adapter", name)
    owner, on = tenant(session, tenant_name), base(session, base_name)
    if not insert_if_absent(
        session,
        AdapterRow,
        tenant_id=owner.id,
        name=name,
        base_id=on.id,
        federation_id=federation_id,
        created_at=now,
    ):
        raise AlreadyExistsError(f"there is an adapter {tenant_name}/{name} already; choose another name")
    return adapter(session, tenant_name, name)


def adapter(session: Session, tenant_name: str, name: str) -> Adapter:
    row = session.execute(_adapters().where(TenantRow.name == tenant_name, AdapterRow.name == name)).one_or_none()
    if row is None:
        raise not_found(f"adapter {tenant_name}/{name}")
    return _adapter(*row)


def adapters(session: Session, tenant_name: str) -> list[Adapter]:
    owner = tenant(session, tenant_name)
    rows = session.execute(_adapters().where(AdapterRow.tenant_id == owner.id))
    return sorted((_adapter(*row) for row in rows), key=lambda adapter: adapter.name)


def _adapters() -> Select[AdapterRow, str, BaseRow, str]:
    return (
        select(AdapterRow, TenantRow.name, BaseRow, FederationRow.name)
        .join(TenantRow, TenantRow.id == AdapterRow.tenant_id)
        .join(BaseRow, BaseRow.id == AdapterRow.base_id)
        .outerjoin(FederationRow, FederationRow.id == AdapterRow.federation_id)
    )


def _adapter(row: AdapterRow, owner: str, base: BaseRow, federation: str | None) -> Adapter:
    return Adapter(row.id, owner, row.name, base.name, base.digest, federation, row.created_at)
