"""Who may delete weights: what is agreed on in the database, by users on any machines. Functions of a session.

Weights are stored before the transaction that names them, and weights that are there already are not stored again. So
who deletes must know of transactions that are still to come, and who stores of deletions that are. In turn:

1. Whoever wants to store weights writes a claim on their digests, and commits it (:func:`take`).
2. It stores them, or finds that they are there. What is damaged it writes over: the bytes under a digest are the same
   whoever writes them, so that no order of writers does harm, and nothing is deleted for it.
3. The transaction that names them removes the claim (:func:`settle`); without the claim it fails.

Whoever deletes what nobody needs, a few digests at a time:

1. In one transaction it locks the digests, as a claim does (:func:`begin_deleting`), looks at what nothing names,
   claims or holds, and writes a mark on that (:func:`mark`).
2. It deletes, without a transaction: a store that does not answer keeps nobody waiting for a lock.
3. It removes the mark from all that the store has said to be gone (:func:`unmark`).

- Of a digest there is never a claim and a mark at a time: a claim that was committed before is seen, so that its
  weights stay, and one that comes while there is a mark is refused, and has to come again.
- Claims and names are read by one statement, on one snapshot: what loses its claim has its name in it.
- A claim ends after an hour, so that one who died leaves nothing for ever. Who deletes then also removes the claim, and
  its late owner fails at step 3 instead of naming what is gone.
- A request to delete that nobody has seen the answer of may still be carried out: the client gave up on it, or died.
  Its mark stays, and ends by itself, when the store does not take such a request any more (:data:`UNSURE_S`). Without
  it others would find the weights there, name them, and lose them. What the database cannot see is a deleter that
  stands still for longer than that right before it sends a request.
- A deleter that dies leaves whole weights, none, or half of them, which count as none. The next one takes its mark over
  once it has ended (:func:`unfinished`), and finds the rest.

On SQLite a writing transaction is alone, which is the lock. On PostgreSQL it is an advisory one, of 64 bits of the
digest: two digests that share them wait for each other, and no harm is done.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Iterable
from typing import NamedTuple

from sqlalchemy import ColumnElement, func, select, text, union
from sqlalchemy.orm import Session

from lorafleet.errors import UnavailableError
from lorafleet.registry.database import delete_in_order, locked
from lorafleet.registry.tables import BlobClaimRow, BlobDeletionRow, EngineHoldRow, UpdateRow, VersionRow

LASTS_S = 3600.0
"""Of a claim: longer than storing any weights takes."""
AT_ONCE = 100
"""Digests that one transaction marks: PostgreSQL has room for some thousand locks of all its sessions."""
UNSURE_S = 960.0
"""Of a mark: S3 refuses a request 15 minutes after it was signed, and Azure one that an account's key signed; Google's
tokens say nothing of the time of a request, which is then merely far longer than one waits that was received. A minute
more, as the last request is signed up to 30 s after the mark was written, and for clocks that differ."""


class Claim(NamedTuple):
    token: str
    digests: frozenset[str]


NOTHING = Claim("", frozenset())


class Mark(NamedTuple):
    token: str
    digests: tuple[str, ...]


NO_MARK = Mark("", ())


def begin_deleting(session: Session, digests: Collection[str], now: float) -> None:
    """Keep others from claiming or marking these until the transaction ends; first in the transaction."""
    _lock(session, digests)
    # Before names are read: the owner of such a claim either has named its weights by then, or never will.
    _remove(session, BlobClaimRow.digest.in_(digests), BlobClaimRow.expires_at <= now)


def _lock(session: Session, digests: Iterable[str]) -> None:
    if session.get_bind().dialect.name != "postgresql":
        return
    for key in sorted({int.from_bytes(bytes.fromhex(digest[-16:]), "big", signed=True) for digest in digests}):
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def take(session: Session, digests: Iterable[str], now: float) -> Claim:
    """Say that weights are going to be stored and named; alone in its transaction.

    UnavailableError where somebody is deleting some of them, or it is not known whether that has come to its end.
    """
    claim = Claim(secrets.token_hex(16), frozenset(digests))
    _lock(session, claim.digests)
    marked = BlobDeletionRow.digest.in_(claim.digests)
    until = session.scalar(select(func.max(BlobDeletionRow.until)).where(marked, BlobDeletionRow.until > now))
    if until is not None:
        raise UnavailableError(
            "these weights are being deleted, and would go after they were stored; nothing was changed, call again in "
            f"{math.ceil(until - now)} s, or earlier where the deletion has ended"
        )
    session.execute(delete_in_order(BlobDeletionRow, marked))
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


def mark(session: Session, digests: Collection[str], now: float, *, marked_at: float) -> Mark:
    """Say of those digests that nothing needs that they are being deleted; after :func:`begin_deleting`, with its
    ``now``. It may have waited for a hundred locks since: the mark lasts from ``marked_at`` on.

    Marks of others that have ended are taken over, and removed from what is needed again.
    """
    free = unreferenced(session, digests, now)
    session.execute(delete_in_order(BlobDeletionRow, BlobDeletionRow.digest.in_(digests), BlobDeletionRow.until <= now))
    made = Mark(secrets.token_hex(16), tuple(free))
    session.add_all(BlobDeletionRow(digest=each, token=made.token, until=marked_at + UNSURE_S) for each in sorted(free))
    session.flush()
    return made


def unmark(session: Session, made: Mark, *, gone: Collection[str], untouched: Collection[str], now: float) -> None:
    """Remove a mark from what is gone; of what nobody has begun to delete it has ended, and somebody else may.

    It stays on the rest, and everywhere where somebody has taken it over.
    """
    mine = select(BlobDeletionRow).where(BlobDeletionRow.token == made.token).order_by(BlobDeletionRow.digest)
    for row in session.scalars(locked(mine, BlobDeletionRow)):
        if row.digest in gone:
            session.delete(row)
        elif row.digest in untouched:
            row.until = now
    session.flush()


def unfinished(session: Session, now: float) -> list[str]:
    """Some digests whose marks have ended, those of the oldest first: of deletions that nobody has seen the end of."""
    ended = select(BlobDeletionRow.digest).where(BlobDeletionRow.until <= now)
    return list(session.scalars(ended.order_by(BlobDeletionRow.until, BlobDeletionRow.digest).limit(AT_ONCE)))


def _remove(session: Session, *which: ColumnElement[bool]) -> set[str]:
    """The digests of the claims that are removed."""
    return set(session.scalars(delete_in_order(BlobClaimRow, *which).returning(BlobClaimRow.digest)))


def unreferenced(
    session: Session, digests: Collection[str], now: float, *, without_versions: Collection[int] = ()
) -> list[str]:
    """Those digests that no version and no update names, nobody claims or deletes and no engine holds; in their order.

    Only after :func:`begin_deleting`, and with its ``now``, does it stay so until the transaction ends: a claim that
    ended between two times would be neither removed there nor counted here. ``without_versions`` are ids of versions
    that do not count.
    """
    versions = select(VersionRow.digest).where(VersionRow.digest.in_(digests), VersionRow.purged_at.is_(None))
    if without_versions:
        versions = versions.where(VersionRow.id.not_in(without_versions))
    found = union(
        select(BlobClaimRow.digest).where(BlobClaimRow.digest.in_(digests), BlobClaimRow.expires_at > now),
        select(BlobDeletionRow.digest).where(BlobDeletionRow.digest.in_(digests), BlobDeletionRow.until > now),
        select(EngineHoldRow.digest).where(EngineHoldRow.digest.in_(digests), EngineHoldRow.expires_at > now),
        select(UpdateRow.digest).where(UpdateRow.digest.in_(digests), UpdateRow.dropped_at.is_(None)),
        versions,
    )
    referenced = set(session.scalars(found))
    return [digest for digest in digests if digest not in referenced]
