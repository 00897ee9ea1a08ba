"""Invitations to federations. Functions of a session; :class:`Registry` owns the transaction.

A token is ``lfi_CODE_SECRET``. The code names the row; the secret, 256 random bits, is the key of an HMAC-SHA256 over
all that the row grants, and only that is stored: who reads the database can accept nothing, and who writes to it cannot
make an invitation last longer, or be for another tenant or federation.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets

from sqlalchemy import select
from sqlalchemy.orm import Session

from lorafleet.errors import AlreadyExistsError, InvalidInputError
from lorafleet.registry import audit, catalog, federations
from lorafleet.registry.database import locked
from lorafleet.registry.records import Federation, Invitation, Invited, Member
from lorafleet.registry.references import not_found
from lorafleet.registry.tables import FederationRow, InvitationRow, TenantRow

PREFIX = "lfi"


def create(session: Session, federation: Federation, tenant_name: str, for_s: float, now: float) -> Invited:
    """A new one with its token; InvalidInputError where the federation has been stopped."""
    if not 0 < for_s < math.inf:
        raise InvalidInputError(f"found an invitation for {for_s} s, expected a finite time above 0")
    _refuse_stopped(federations.get(session, federation.tenant, federation.name))
    tenant = catalog.tenant(session, tenant_name)
    code, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    row = InvitationRow(
        federation_id=federation.id,
        tenant_id=tenant.id,
        code=code,
        mac="",
        created_at=now,
        expires_at=now + for_s,
        accepted_at=None,
        member_key=None,
    )
    row.mac = _mac(row, secret)
    session.add(row)
    session.flush()
    return Invited(_invitation(row, tenant.name), f"{PREFIX}_{code}_{secret}")


def check(session: Session, token: str) -> None:
    """Refuse what is no token as :func:`accept` does, but without a lock: who guesses holds nobody up."""
    _open(session, token, lock=False)


def accept(session: Session, token: str, key: str, public_key: str, now: float, by: str) -> Member:
    """Register a member by an invitation; again with the same keys it gives the same member.

    The audit says who did: ``by``, or the member itself where that is empty.

    NotFoundError for a token that is not one, was altered or is unknown, always in the same words; InvalidInputError
    where it has expired or the federation has been stopped; AlreadyExistsError where the invitation was accepted
    before, or one of the two keys is somebody's.
    """
    row, tenant_name = _open(session, token)
    federation = _federation(session, row.federation_id)
    if row.member_key is not None:
        member = next(m for m in federations.members(session, federation) if m.key == row.member_key)
        if (member.key, member.public_key) == (key, public_key) and member.revoked_at is None:
            return member
        raise AlreadyExistsError("the invitation was accepted already; ask for another one")
    if now >= row.expires_at:
        raise InvalidInputError("the invitation has expired; ask for another one")
    _refuse_stopped(federation)
    if any(member.key == key for member in federations.members(session, federation)):
        raise AlreadyExistsError(f"the key {key!r} is a member's already; choose another one")
    member, _ = federations.add_member(session, federation, key, tenant_name, now, public_key=public_key)
    row.accepted_at, row.member_key = now, key
    session.flush()
    # Said to be a member, as whoever accepts chooses the key: it may be an operator's name. It may also be longer than
    # who did something; whole it is in the details.
    details = {"federation": federation.reference, "invited": tenant_name, "member": key}
    audit.write(session, federation.tenant, "invitation.accept", row.code, now, by or f"member {key}"[:100], details)
    return member


def withdraw(session: Session, federation: Federation, code: str) -> Invitation:
    """Forget an invitation, and give it as it was; its token is then one that is not known.

    NotFoundError where the federation has none of that code, InvalidInputError where it was accepted.
    """
    statement = (
        select(InvitationRow, TenantRow.name)
        .join(TenantRow, TenantRow.id == InvitationRow.tenant_id)
        .where(InvitationRow.federation_id == federation.id, InvitationRow.code == code)
    )
    found = session.execute(locked(statement, InvitationRow)).one_or_none() if _is_code(code) else None
    if found is None:
        raise not_found(f"the invitation {code!r} to {federation.reference}")
    withdrawn = _invitation(*found)
    if withdrawn.member is not None:
        raise InvalidInputError(
            f"the invitation {code} was accepted by {withdrawn.member!r}; revoke that member instead"
        )
    session.delete(found[0])
    session.flush()
    return withdrawn


def of_federation(session: Session, federation: Federation) -> list[Invitation]:
    """In the order in which they were made."""
    statement = (
        select(InvitationRow, TenantRow.name)
        .join(TenantRow, TenantRow.id == InvitationRow.tenant_id)
        .where(InvitationRow.federation_id == federation.id)
        .order_by(InvitationRow.id)
    )
    return [_invitation(row, tenant) for row, tenant in session.execute(statement)]


def _open(session: Session, token: str, *, lock: bool = True) -> tuple[InvitationRow, str]:
    """The row that a token opens, and its tenant's name; with a lock, it is held until the transaction ends."""
    refusal = not_found("the invitation")
    prefix, _, rest = token.partition("_")
    code, _, secret = rest.partition("_")
    statement = (
        select(InvitationRow, TenantRow.name)
        .join(TenantRow, TenantRow.id == InvitationRow.tenant_id)
        .where(InvitationRow.code == code)
    )
    if prefix != PREFIX or not _is_code(code):
        raise refusal
    found = session.execute(locked(statement, InvitationRow) if lock else statement).one_or_none()
    if found is None:
        raise refusal
    row, tenant = found
    if not hmac.compare_digest(_mac(row, secret), row.mac):
        raise refusal
    return row, tenant


def _is_code(text: str) -> bool:
    return text.isalnum() and text.isascii()


def _mac(row: InvitationRow, secret: str) -> str:
    granted = (row.code, row.federation_id, row.tenant_id, row.created_at, row.expires_at)
    return hmac.new(secret.encode("utf-8", "replace"), repr(granted).encode(), hashlib.sha256).hexdigest()


def _federation(session: Session, federation_id: int) -> Federation:
    statement = (
        select(TenantRow.name, FederationRow.name)
        .join(FederationRow, FederationRow.tenant_id == TenantRow.id)
        .where(FederationRow.id == federation_id)
    )
    tenant, name = session.execute(statement).one()
    return federations.get(session, tenant, name)


def _refuse_stopped(federation: Federation) -> None:
    if federation.state == "stopped":
        raise InvalidInputError(f"federation {federation.reference} was stopped; nobody joins it any more")


def _invitation(row: InvitationRow, tenant: str) -> Invitation:
    return Invitation(
        row.code, row.federation_id, tenant, row.created_at, row.expires_at, row.accepted_at, row.member_key
    )
