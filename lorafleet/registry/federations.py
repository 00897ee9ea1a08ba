"""Federations and their members. Functions of a session; :class:`Registry` owns the transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from lorafleet.errors import AlreadyExistsError, InvalidInputError
from lorafleet.registry import catalog
from lorafleet.registry.database import insert_if_absent, locked
from lorafleet.registry.records import Federation, Member
from lorafleet.registry.references import check_name, not_found
from lorafleet.registry.tables import BaseRow, FederationRow, MemberRow, TenantRow


def create(
    session: Session, tenant_name: str, name: str, base_name: str, settings: Mapping[str, Any], now: float
) -> Federation:
    check_name("federation", name)
    owner, base = catalog.tenant(session, tenant_name), catalog.base(session, base_name)
    document = json_object(f"settings of federation {tenant_name}/{name}", settings)
    if not insert_if_absent(
        session, FederationRow, tenant_id=owner.id, name=name, base_id=base.id, settings=document, created_at=now
    ):
        raise AlreadyExistsError(f"there is a federation {tenant_name}/{name} already; choose another name")
    return get(session, tenant_name, name)


def get(session: Session, tenant_name: str, name: str) -> Federation:
    statement = (
        select(FederationRow, BaseRow)
        .join(TenantRow, TenantRow.id == FederationRow.tenant_id)
        .join(BaseRow, BaseRow.id == FederationRow.base_id)
        .where(TenantRow.name == tenant_name, FederationRow.name == name)
    )
    found = session.execute(statement).one_or_none()
    if found is None:
        raise not_found(f"federation {tenant_name}/{name}")
    row, base = found
    return Federation(row.id, tenant_name, row.name, base.name, base.digest, row.settings, row.created_at)


def lock(session: Session, federation_id: int) -> FederationRow:
    """The federation's row, held until the transaction ends: what numbers its rounds and commits them goes in turn."""
    row = session.scalar(locked(select(FederationRow).where(FederationRow.id == federation_id), FederationRow))
    if row is None:
        raise not_found(f"federation {federation_id}")
    return row


def add_member(session: Session, federation: Federation, key: str, tenant_name: str, now: float) -> Member:
    """The same key of the same tenant again changes nothing; of another tenant it is taken."""
    if not 0 < len(key) <= 500 or not key.isprintable():
        raise InvalidInputError(f"found the member key {key!r}, expected 1 to 500 printable characters")
    federation_id = get(session, federation.tenant, federation.name).id
    member_tenant = catalog.tenant(session, tenant_name)
    insert_if_absent(
        session, MemberRow, federation_id=federation_id, tenant_id=member_tenant.id, key=key, joined_at=now
    )
    member = next(member for member in members(session, federation) if member.key == key)
    if member.tenant != tenant_name:
        raise AlreadyExistsError(
            f"the key {key!r} is registered in federation {federation.tenant}/{federation.name} already; "
            "every member has a key of its own"
        )
    return member


def members(session: Session, federation: Federation) -> list[Member]:
    """In the order of their keys, by code point on every database."""
    statement = (
        select(MemberRow, TenantRow.name)
        .join(TenantRow, TenantRow.id == MemberRow.tenant_id)
        .where(MemberRow.federation_id == federation.id)
    )
    found = [
        Member(row.id, row.federation_id, row.key, tenant, row.joined_at) for row, tenant in session.execute(statement)
    ]
    return sorted(found, key=lambda member: member.key)


def json_object(what: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a value as strict JSON, which every database reads back as it was given."""
    try:
        copy = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{what}: expected a JSON object, {error}") from None
    assert isinstance(copy, dict)
    return copy
