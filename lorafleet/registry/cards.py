"""Model cards: the README of a version. Functions of a session; :class:`Registry` owns the transaction."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from lorafleet.errors import InvalidInputError
from lorafleet.registry import versions
from lorafleet.registry.federations import storable
from lorafleet.registry.records import Version
from lorafleet.registry.tables import CardRow

LONGEST = 64 * 1024
"""Bytes of a card in UTF-8."""
_A_STATEMENT = 1000
"""Versions that one asks for: databases bound what a statement brings along."""


def check(card: str) -> str:
    """The text as every database can hold it; InvalidInputError where it is too long."""
    text = storable(card)
    if (size := len(text.encode())) > LONGEST:
        raise InvalidInputError(f"found a model card of {size} bytes, expected at most {LONGEST}; shorten the README")
    return text


def put(session: Session, version: Version, card: str) -> None:
    row = versions.find(session, version)
    session.add(CardRow(version_id=row.id, tenant_id=row.tenant_id, text=card))
    session.flush()


def of_version(session: Session, version: Version) -> str:
    """Empty where there is none."""
    row = session.get(CardRow, versions.find(session, version, lock=False).id)
    return "" if row is None else row.text


def of_versions(session: Session, versions: Sequence[Version]) -> list[str]:
    """One for each, in their order; empty where there is none."""
    found: dict[int, str] = {}
    for first in range(0, len(versions), _A_STATEMENT):
        ids = [version.id for version in versions[first : first + _A_STATEMENT]]
        for row in session.execute(select(CardRow.version_id, CardRow.text).where(CardRow.version_id.in_(ids))):
            found[row.version_id] = row.text
    return [found.get(version.id, "") for version in versions]
