"""Who may delete weights: what is agreed on in the database, by users on any machines. Functions of a session.

Weights are stored before the transaction that names them, and weights that are there already are not stored again. So
who deletes must know of transactions that are still to come. In turn:

1. Whoever wants to store weights writes a claim on their digests, and commits it (:func:`take`).
2. It stores them, or finds that they are there.
3. The transaction that names them removes the claim (:func:`settle`); without the claim it fails.

Whoever stores and finds damaged weights deletes them first, in a transaction of its own that has locked their digest.
Others have the same claim, and may have stored them again by then: only what is still the same goes.

Whoever deletes what nobody needs does it in one transaction for a few digests at a time. It locks the digests, as a
claim does (:func:`begin_deleting`), looks at what nothing names, claims or holds (:func:`unreferenced`), deletes that,
and commits.

- A claim that was committed before is seen, so that its weights stay. One that comes later waits for the end of the
  deletion, then finds nothing, and stores the weights again.
- Claims and names are read by one statement, on one snapshot: what loses its claim has its name in it.
- A claim ends after an hour, so that one who died leaves nothing for ever. Who deletes then also removes the claim, and
  its late owner fails at step 3 instead of naming what is gone.
- A deleter that dies leaves whole weights, none, or half of them, which count as none; its transaction and its locks
  end with its connection, and the next one finds the rest. There is no mark to take over from it, and no clock in
  that: this is why the weights go within the transaction.

On SQLite a writing transaction is alone, which is the lock. On PostgreSQL it is an advisory one, of 64 bits of the
digest: two digests that share them wait for each other, and no harm is done.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable
from typing import NamedTuple

from sqlalchemy import ColumnElement, select, text, union
from sqlalchemy.orm import Session

from lorafleet.errors import UnavailableError
from lorafleet.registry.database import delete_in_order
from lorafleet.registry.tables import BlobClaimRow, EngineHoldRow, UpdateRow, VersionRow

LASTS_S = 3600.0
"""Of a claim: longer than storing any weights takes."""
AT_ONCE = 100
"""Digests that one transaction deletes: PostgreSQL has room for some thousand locks of all its sessions."""


class Claim(NamedTuple):
    token: str
    digests: frozenset[str]


NOTHING = Claim("", frozenset())


def begin_deleting(session: Session, digests: Collection[str], now: float) -> None:
    """Keep others from claiming or deleting these until the transaction ends; first in the transaction."""
    _lock(session, digests)
    # Before names are read: the owner of such a claim either has named its weights by then, or never will.
    _remove(session, BlobClaimRow.digest.in_(digests), BlobClaimRow.expires_at <= now)


def _lock(session: Session, digests: Iterable[str]) -> None:
    if session.get_bind().dialect.name != "postgresql":
        return
    for key in sorted({int.from_bytes(bytes.fromhex(digest[-16:]), "big", signed=True) for digest in digests}):
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def take(session: Session, digests: Iterable[str], now: float) -> Claim:
    """Say that weights are going to be stored and named; alone in its transaction."""
    claim = Claim(secrets.token_hex(16), frozenset(digests))
    _lock(session, claim.digests)
    rows = [BlobClaimRow(token=claim.token, digest=each, expires_at=now + LASTS_S) for each in sorted(claim.digests)]
    session.add_all(rows)
    session.flush()
    return claim


def settle(session: Session, claim: Claim) -> None:
    """Give a claim up to what this transaction names; UnavailableError where it ended before."""
    if not claim.digests:
        return
    if _remove(session, BlobClaimRow.token == claim.token) != claim.digests:
        raise UnavailableError(
            f"storing weights took longer than {LASTS_S:g} s, so that others may have deleted them meanwhile; nothing "
            "was changed, call again"
        )


def release(session: Session, claim: Claim) -> None:
    """Give a claim up; nothing happens where it ended before."""
    _remove(session, BlobClaimRow.token == claim.token)


def forget_expired(session: Session, now: float) -> None:
    """Remove claims that have ended."""
    _remove(session, BlobClaimRow.expires_at <= now)


def _remove(session: Session, *which: ColumnElement[bool]) -> set[str]:
    """The digests of the claims that are removed."""
    return set(session.scalars(delete_in_order(BlobClaimRow, *which).returning(BlobClaimRow.digest)))


def unreferenced(
    session: Session, digests: Collection[str], now: float, *, without_versions: Collection[int] = ()
) -> list[str]:
    """Those digests that no version and no update names, nobody claims and no engine holds; in their order.

    Only after :func:`begin_deleting`, and with its ``now``, does it stay so until the transaction ends: a claim that
    ended between two times would be neither removed there nor counted here. ``without_versions`` are ids of versions
    that do not count.
    """
    versions = select(VersionRow.digest).where(VersionRow.digest.in_(digests), VersionRow.purged_at.is_(None))
    if without_versions:
        versions = versions.where(VersionRow.id.not_in(without_versions))
    found = union(
        select(BlobClaimRow.digest).where(BlobClaimRow.digest.in_(digests), BlobClaimRow.expires_at > now),
        select(EngineHoldRow.digest).where(EngineHoldRow.digest.in_(digests), EngineHoldRow.expires_at > now),
        select(UpdateRow.digest).where(UpdateRow.digest.in_(digests), UpdateRow.dropped_at.is_(None)),
        versions,
    )
    referenced = set(session.scalars(found))
    return [digest for digest in digests if digest not in referenced]
