"""Aliases, and where they pointed before. Functions of a session; :class:`Registry` owns the transaction.

The moves of an alias are rows of their own, and not read from the audit: a round moves a champion, too, and a rollback
must not depend on how long an audit is kept. They are a stack. A move adds to it, a rollback takes from it, so that two
rollbacks go two moves back, and a rollback never comes back to what was rolled back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from lorafleet.errors import InvalidInputError
from lorafleet.registry.database import locked
from lorafleet.registry.records import Adapter
from lorafleet.registry.references import check_name, not_found
from lorafleet.registry.tables import AdapterRow, AliasMoveRow, AliasRow, VersionRow
from lorafleet.registry.versions import USABLE, is_shared_with


class Moved(NamedTuple):
    """From which version's number to which; None: it was not there."""

    before: int | None
    now: int


def lock(session: Session, adapter: Adapter) -> int:
    """Hold an adapter's row, as everybody does who moves one of its aliases; gives the id of its tenant."""
    statement = select(AdapterRow.tenant_id).where(AdapterRow.id == adapter.id)
    return session.scalars(locked(statement, AdapterRow)).one()


def move(session: Session, adapter: Adapter, alias: str, number: int, now: float) -> Moved:
    """Move an alias to a usable version, creating it where it is new."""
    check_name("alias", alias)
    tenant_id = lock(session, adapter)
    # Its lock keeps the version usable until the alias points at it.
    statement = select(VersionRow).where(VersionRow.adapter_id == adapter.id, VersionRow.number == number)
    version = session.scalar(locked(statement, VersionRow))
    if version is None:
        raise not_found(f"version {adapter.tenant}/{adapter.name}:{number}")
    if version.state not in USABLE:
        raise InvalidInputError(
            f"version {adapter.tenant}/{adapter.name}:{number} is {version.state}, an alias names a version that is "
            f"{' or '.join(USABLE)}; restore it first, or choose another one"
        )
    before = pointed_at(session, adapter, alias)
    session.merge(AliasRow(adapter_id=adapter.id, name=alias, tenant_id=tenant_id, number=number, moved_at=now))
    if before != number:
        session.add(AliasMoveRow(tenant_id=tenant_id, adapter_id=adapter.id, alias=alias, number=number, moved_at=now))
    session.flush()
    return Moved(before, number)


def pointed_at(session: Session, adapter: Adapter, alias: str) -> int | None:
    """The number of an alias's version; None where there is no such alias."""
    return session.scalar(select(AliasRow.number).where(AliasRow.adapter_id == adapter.id, AliasRow.name == alias))


def of_adapter(session: Session, adapter: Adapter, *, shown_to: int | None = None) -> dict[str, int]:
    """Alias → number; none of them to a tenant that has the adapter only as it was."""
    statement = select(AliasRow).where(AliasRow.adapter_id == adapter.id)
    if shown_to is not None:
        statement = statement.join(AdapterRow, AdapterRow.id == AliasRow.adapter_id)
        statement = statement.where(is_shared_with(session, shown_to))
    rows = session.scalars(statement)
    return dict(sorted((row.name, row.number) for row in rows))


def rollback(session: Session, adapter: Adapter, alias: str, now: float) -> Moved:
    """Point an alias where it pointed before; NotFoundError without it, InvalidInputError where nothing usable was."""
    check_name("alias", alias)
    lock(session, adapter)
    name = f"{adapter.tenant}/{adapter.name}@{alias}"
    if pointed_at(session, adapter, alias) is None:
        raise not_found(f"alias {name}")
    moved = fall_back(session, adapter, alias, now)
    if moved is None:
        raise InvalidInputError(f"{name} pointed at nothing before that is still usable; promote a version instead")
    return moved


def fall_back(session: Session, adapter: Adapter, alias: str, now: float) -> Moved | None:
    """The move back, on a locked adapter, over what is not usable any more; None, and nothing done, without a goal."""
    moves = session.scalars(
        select(AliasMoveRow)
        .where(AliasMoveRow.adapter_id == adapter.id, AliasMoveRow.alias == alias, AliasMoveRow.undone_at.is_(None))
        .order_by(AliasMoveRow.id.desc())
    ).all()
    numbers = [move.number for move in moves]
    versions = select(VersionRow).where(VersionRow.adapter_id == adapter.id, VersionRow.number.in_(numbers))
    # Their locks keep them usable until the alias points there.
    rows = session.scalars(locked(versions.order_by(VersionRow.number), VersionRow))
    steps = steps_back(numbers, {row.number for row in rows if row.state in USABLE})
    if steps is None:
        return None
    for move in moves[:steps]:
        move.undone_at = now
    row = session.scalars(select(AliasRow).where(AliasRow.adapter_id == adapter.id, AliasRow.name == alias)).one()
    row.number, row.moved_at = numbers[steps], now
    session.flush()
    return Moved(numbers[0], numbers[steps])


def steps_back(numbers: Sequence[int], usable: Collection[int]) -> int | None:
    """How many moves to take back: to the last version that is usable and another one than the first.

    ``numbers`` are where the moves went, the newest first. None where there is no such version.
    """
    goals = (step for step, number in enumerate(numbers) if number != numbers[0] and number in usable)
    return next(goals, None)
