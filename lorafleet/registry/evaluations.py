"""What members, or the tenant itself, measured for a version. Functions of a session; :class:`Registry` owns the
transaction.
"""

from __future__ import annotations

import math

from sqlalchemy import select
from sqlalchemy.orm import Session

from lorafleet.errors import InvalidInputError
from lorafleet.registry import versions
from lorafleet.registry.records import Evaluation, Version
from lorafleet.registry.tables import EvaluationRow

OWNER = ""
"""Who measured what the tenant itself measured: no member's key is empty."""
MOST_TOKENS = 2**53
"""Beyond any text, and exact in every database and in JSON."""


def record(session: Session, version: Version, member: str, loss: float, tokens: int, now: float) -> None:
    """One evaluation a member and version; the same member's next one replaces it, so that it never counts twice."""
    if not math.isfinite(loss) or not 1 <= tokens <= MOST_TOKENS:
        raise InvalidInputError(
            f"evaluation of {version.reference}{f' by {member!r}' if member else ''}: found a loss of {loss} over "
            f"{tokens} tokens, expected a finite loss over at least 1"
        )
    found = versions.find(session, version)
    statement = select(EvaluationRow).where(EvaluationRow.version_id == found.id, EvaluationRow.member == member)
    row = session.scalar(statement)
    if row is None:
        row = EvaluationRow(tenant_id=found.tenant_id, version_id=found.id, member=member)
        session.add(row)
    row.loss, row.tokens, row.created_at = loss, tokens, now


def record_own(session: Session, version: Version, loss: float, tokens: int, now: float) -> None:
    """What the tenant measured for a version that it imported."""
    if versions.is_federations(session, version):
        raise InvalidInputError(
            f"{version.reference} was made by a federation, expected a version that was imported: the members measure "
            "what their federation makes"
        )
    record(session, version, OWNER, loss, tokens, now)


def of_version(session: Session, version: Version) -> list[Evaluation]:
    """In the order of member keys."""
    rows = session.scalars(select(EvaluationRow).where(EvaluationRow.version_id == version.id))
    found = [Evaluation(row.member, row.loss, row.tokens, row.created_at) for row in rows]
    return sorted(found, key=lambda evaluation: evaluation.member)
