"""Versions whose weights may go because they are out of use. Functions of a session; :class:`Registry` owns the
transaction.

The row of such a version stays, and says when. What deletes weights is :mod:`lorafleet.registry.claims`'s business.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, select
from sqlalchemy.orm import Session

from lorafleet.registry import versions
from lorafleet.registry.database import locked
from lorafleet.registry.records import Version
from lorafleet.registry.tables import AliasRow, EngineHoldRow, UpdateRow, VersionRow

OUT_OF_USE = ("retired", "quarantined")


def purgeable(session: Session, before: float, now: float) -> list[Version]:
    """Versions that are out of use since ``before`` or longer; by tenant, adapter and number.

    Not those that an alias points at, a running engine holds, or an update was trained on that may still count.
    """
    found = versions.of_ids(session, select(VersionRow.id).where(_may_go(before, now)))
    return sorted(found, key=lambda version: (version.tenant, version.adapter, version.number))


def purge(session: Session, version: Version, before: float, now: float) -> bool:
    """Mark one as without weights; False where it is in use by now, or was purged before."""
    statement = select(VersionRow).where(VersionRow.id == version.id, _may_go(before, now))
    row = session.scalar(locked(statement, VersionRow))
    if row is None:
        return False
    row.purged_at = now
    session.flush()
    return True


def _may_go(before: float, now: float) -> ColumnElement[bool]:
    pointed_at = select(AliasRow.name).where(
        AliasRow.adapter_id == VersionRow.adapter_id, AliasRow.number == VersionRow.number
    )
    held = select(EngineHoldRow.service).where(
        EngineHoldRow.digest == VersionRow.digest, EngineHoldRow.expires_at > now
    )
    trained_on = select(UpdateRow.id).where(
        UpdateRow.expert_digest == VersionRow.digest,
        UpdateRow.accepted,
        UpdateRow.counted_in.is_(None),
        UpdateRow.dropped_at.is_(None),
    )
    return and_(
        VersionRow.state.in_(OUT_OF_USE),
        VersionRow.state_at <= before,
        VersionRow.purged_at.is_(None),
        ~pointed_at.exists(),
        ~held.exists(),
        ~trained_on.exists(),
    )
