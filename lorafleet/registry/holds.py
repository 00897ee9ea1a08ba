"""What running engines hold, so that garbage collection leaves it. Functions of a session.

A hold ends by itself, so that an engine that is gone holds nothing for long.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy.orm import Session

from lorafleet.registry.database import delete_in_order, insert_or_update
from lorafleet.registry.references import check_digest
from lorafleet.registry.tables import EngineHoldRow


def put(session: Session, service: str, digests: Collection[str], until: float) -> None:
    """A service holds these until then, beside what it held before."""
    held = [{"service": service, "digest": check_digest("hold", digest)} for digest in sorted(set(digests))]
    if held:
        insert_or_update(session, EngineHoldRow, held, expires_at=until)


def remove(session: Session, service: str, *, keep: Collection[str] = ()) -> None:
    """A service lets go of everything but ``keep``."""
    others = [EngineHoldRow.digest.not_in(keep)] if keep else []
    session.execute(delete_in_order(EngineHoldRow, EngineHoldRow.service == service, *others))


def forget_expired(session: Session, now: float) -> None:
    """Remove holds that have ended."""
    session.execute(delete_in_order(EngineHoldRow, EngineHoldRow.expires_at <= now))
