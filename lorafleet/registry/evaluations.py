"""What members measured for a version. Functions of a session; :class:`Registry` owns the transaction."""

from __future__ import annotations

import math

from sqlalchemy import select
from sqlalchemy.orm import Session

from lorafleet.errors import InvalidInputError
from lorafleet.registry import versions
from lorafleet.registry.records import Evaluation, Version
from lorafleet.registry.tables import EvaluationRow


def record(session: Session, version: Version, member: str, loss: float, tokens: int, now: float) -> None:
    """One evaluation a member and version; the same member's next one replaces it, so that it never counts twice."""
    if not math.isfinite(loss) or tokens < 1:
        raise InvalidInputError(
            f"evaluation of {version.reference} by {member!r}: found a loss of {loss} over {tokens} tokens, expected a "
            "finite loss over at least 1"
        )
    found = versions.find(session, version)
    statement = select(EvaluationRow).where(EvaluationRow.version_id == found.id, EvaluationRow.member == member)
    row = session.scalar(statement)
    if row is None:
        row = EvaluationRow(tenant_id=found.tenant_id, version_id=found.id, member=member)
        session.add(row)
    row.loss, row.tokens, row.created_at = loss, tokens, now


def of_version(session: Session, version: Version) -> list[Evaluation]:
    """In the order of member keys."""
    rows = session.scalars(select(EvaluationRow).where(EvaluationRow.version_id == version.id))
    found = [Evaluation(row.member, row.loss, row.tokens, row.created_at) for row in rows]
    return sorted(found, key=lambda evaluation: evaluation.member)
