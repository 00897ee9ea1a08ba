"""Federations and their members. Functions of a session; :class:`Registry` owns the transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from sqlalchemy import select
from sqlalchemy.orm import Session

from lorafleet.errors import AlreadyExistsError, InvalidInputError
from lorafleet.registry import catalog
from lorafleet.registry.database import insert_if_absent, locked
from lorafleet.registry.records import Federation, FederationState, Member
from lorafleet.registry.references import check_name, not_found
from lorafleet.registry.tables import BaseRow, FederationRow, MemberRow, TenantRow


def create(
    session: Session, tenant_name: str, name: str, base_name: str, settings: Mapping[str, Any], now: float
) -> Federation:
    check_name("federation", name)
    owner, base = catalog.tenant(session, tenant_name), catalog.base(session, base_name)
    document = json_object(f"settings of federation {tenant_name}/{name}", settings)
    if not insert_if_absent(
        session,
        FederationRow,
        tenant_id=owner.id,
        name=name,
        base_id=base.id,
        settings=document,
        created_at=now,
        state="active",
        state_at=now,
        state_by="",
        state_reason="",
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
    return Federation(
        row.id, tenant_name, row.name, base.name, base.digest, row.settings, row.created_at,
        cast(FederationState, row.state), row.state_at, row.state_by, row.state_reason,
    )  # fmt: skip


def lock(session: Session, federation_id: int) -> FederationRow:
    """The federation's row, held until the transaction ends: what numbers its rounds and commits them goes in turn."""
    row = session.scalar(locked(select(FederationRow).where(FederationRow.id == federation_id), FederationRow))
    if row is None:
        raise not_found(f"federation {federation_id}")
    return row


def set_state(
    session: Session, federation: Federation, state: FederationState, by: str, reason: str, now: float
) -> tuple[Federation, FederationState]:
    """The federation afterwards, and the state that it was in; in that one it stays as it was put there.

    A stopped one stays so.
    """
    if state not in get_args(FederationState):
        raise InvalidInputError(f"found the state {state!r}, expected one of: {', '.join(get_args(FederationState))}")
    check_who("federation", by)
    row = lock(session, federation.id)
    if row.state == "stopped" and state != "stopped":
        raise InvalidInputError(
            f"federation {federation.reference} was stopped, which is for good; create another one under another name"
        )
    before = cast(FederationState, row.state)
    if before != state:
        row.state, row.state_at, row.state_by, row.state_reason = state, now, by, storable(reason)
        session.flush()
    return get(session, federation.tenant, federation.name), before


def add_member(
    session: Session, federation: Federation, key: str, tenant_name: str, now: float, *, public_key: str = ""
) -> tuple[Member, Literal["new", "public_key"] | None]:
    """The member, and what this call changed: it is new, or got a public key; None for nothing.

    A key that is a member's of another tenant is taken.
    """
    if not 0 < len(key) <= 500 or not key.isprintable():
        raise InvalidInputError(f"found the member key {key!r}, expected 1 to 500 printable characters")
    if len(public_key) > 2000 or not public_key.isprintable():
        raise InvalidInputError(
            f"member {key!r}: found a public key of {len(public_key)} characters, expected one line"
        )
    federation_id = get(session, federation.tenant, federation.name).id
    member_tenant = catalog.tenant(session, tenant_name)
    lock(session, federation_id)
    here = members(session, federation)
    if public_key and any(member.public_key == public_key and member.key != key for member in here):
        raise AlreadyExistsError(
            f"the public key of {key!r} is another member's in federation {federation.reference}; make a new one"
        )
    known = next((member for member in here if member.key == key), None)
    changed: Literal["new", "public_key"] | None = None
    if known is None:
        changed = "new"
        session.add(
            MemberRow(
                federation_id=federation_id,
                tenant_id=member_tenant.id,
                key=key,
                joined_at=now,
                public_key=public_key,
                revoked_at=None,
                revoked_by="",
                revoked_reason="",
            )
        )
    elif known.tenant != tenant_name or (public_key and known.public_key not in ("", public_key)):
        raise AlreadyExistsError(
            f"the key {key!r} is registered in federation {federation.reference} already; "
            "every member has a key of its own"
        )
    elif public_key and not known.public_key:
        changed = "public_key"
        _member_row(session, federation, key).public_key = public_key
    session.flush()
    return next(member for member in members(session, federation) if member.key == key), changed


def revoke_member(
    session: Session, federation: Federation, key: str, by: str, reason: str, now: float
) -> tuple[Member, bool]:
    """The member afterwards, and whether this call revoked it; one that is revoked stays so for its first reason."""
    check_who(f"member {key!r}", by)
    lock(session, federation.id)
    row = _member_row(session, federation, key)
    changed = row.revoked_at is None
    if changed:
        row.revoked_at, row.revoked_by, row.revoked_reason = now, by, storable(reason)
        session.flush()
    return next(member for member in members(session, federation) if member.key == key), changed


def _member_row(session: Session, federation: Federation, key: str) -> MemberRow:
    statement = select(MemberRow).where(MemberRow.federation_id == federation.id, MemberRow.key == key)
    row = session.scalar(locked(statement, MemberRow))
    if row is None:
        raise not_found(f"member {key!r} of federation {federation.reference}")
    return row


def members(session: Session, federation: Federation) -> list[Member]:
    """In the order of their keys, by code point on every database."""
    statement = (
        select(MemberRow, TenantRow.name)
        .join(TenantRow, TenantRow.id == MemberRow.tenant_id)
        .where(MemberRow.federation_id == federation.id)
    )
    found = [
        Member(
            row.id, row.federation_id, row.key, tenant, row.joined_at,
            row.public_key, row.revoked_at, row.revoked_by, row.revoked_reason,
        )
        for row, tenant in session.execute(statement)
    ]  # fmt: skip
    return sorted(found, key=lambda member: member.key)


def public_keys(session: Session) -> list[str]:
    """Those of all members that are not revoked, of federations that are not stopped; in order, each once."""
    statement = (
        select(MemberRow.public_key)
        .join(FederationRow, FederationRow.id == MemberRow.federation_id)
        .where(MemberRow.public_key != "", MemberRow.revoked_at.is_(None), FederationRow.state != "stopped")
    )
    return sorted(set(session.scalars(statement)))


def check_who(what: str, by: str) -> None:
    if len(by) > 100 or not by.isprintable():
        raise InvalidInputError(f"{what}: found {by!r} for who does it, expected at most 100 printable characters")


def storable(words: str) -> str:
    """Words without NUL and lone surrogates: PostgreSQL holds neither, and what a member says must not stop a write."""
    return words.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def json_object(what: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a value as strict JSON, which every database reads back as it was given."""
    try:
        copy = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{what}: expected a JSON object, {error}") from None
    assert isinstance(copy, dict)
    return copy
