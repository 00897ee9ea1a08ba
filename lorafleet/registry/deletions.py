"""Deleting weights: a mark in the database, the store's deletion outside of transactions, the end of the mark.

What the marks are for, and what happens to one whose owner died, is :mod:`lorafleet.registry.claims`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorafleet.errors import BackendError
from lorafleet.registry import claims
from lorafleet.registry.blobs import BlobStore
from lorafleet.registry.database import Database


class Deletions:
    """Of one registry's weights; safe to share among threads."""

    def __init__(self, database: Database, blobs: BlobStore, clock: Callable[[], float]) -> None:
        self._database, self._blobs, self._clock = database, blobs, clock

    def delete_unneeded(self, digests: Sequence[str]) -> list[str]:
        """Delete those of at most ``claims.AT_ONCE`` digests that nothing needs; gives them.

        BackendError where some of them stay.
        """
        return self.delete(self._mark(digests))

    def finish(self) -> None:
        """Delete again what others began to delete, and nobody has seen the end of."""
        with self._database.read() as session:
            unfinished = claims.unfinished(session, self._clock())
        self.delete_unneeded(unfinished)

    def delete(self, marked: claims.Mark) -> list[str]:
        """Delete what a transaction that has ended has marked; gives what is gone.

        BackendError where some of it stays.
        """
        gone: list[str] = []
        while marked.digests:
            done = self._blobs.delete(marked.digests)
            with self._database.write() as session:
                claims.unmark(session, marked, gone=done.gone, untouched=done.untouched, now=self._clock())
            gone += done.gone
            if done.error is None:
                break
            if not (done.gone and isinstance(done.error, TimeoutError) and not done.unsure):
                raise BackendError(
                    f"{len(gone)} weights were deleted from {self._blobs.name}, and "
                    f"{len(done.untouched) + len(done.unsure)} could not be ({done.error}); call again"
                ) from done.error
            # What was begun in time is gone: the rest has its turn.
            marked = self._mark(done.untouched)
        return gone

    def _mark(self, digests: Sequence[str]) -> claims.Mark:
        if not digests:
            return claims.NO_MARK
        with self._database.write() as session:
            now = self._clock()
            claims.begin_deleting(session, digests, now)
            return claims.mark(session, digests, now, marked_at=self._clock())
