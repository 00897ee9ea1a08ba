"""Copies of blobs on this machine, of what lies far away: bounded in size, the least recently used goes first.

A copy is there whole or not at all, as in :mod:`lorafleet.registry.local_files`. Whoever reads one holds its folder's
lock shared, and only who gets that lock alone takes the copy away, so that nothing goes under a reader's hands, of
whatever process.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from lorafleet.errors import BackendError
from lorafleet.registry.local_files import LocalFiles


class BlobCache:
    """A folder of copies, at most about ``most_bytes`` of them. Safe for any number of threads and processes."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        _check(folder)  # before what lies in it is swept: it may be what somebody else wants to be rid of
        self._files = LocalFiles(folder, durable=False)
        self._most_bytes = most_bytes

    @property
    def folder(self) -> Path:
        return self._files.folder

    def path(self, digest: str) -> Path:
        return self._files.path(digest)

    def incoming(self) -> AbstractContextManager[Path]:
        return self._files.incoming()

    @contextmanager
    def held(self, digest: str) -> Iterator[Path | None]:
        """A copy's folder, which stays until the block's end; None where there is none."""
        path = self.path(digest)
        with _locked(path, fcntl.LOCK_SH) as there:
            if there:
                os.utime(path)
            yield path if there else None

    def add(self, digest: str, folder: Path) -> None:
        """Keep a folder that :meth:`incoming` gave as a copy, and take others away for it."""
        self._files.publish(digest, folder)
        self._evict(keep=digest)

    def discard(self, digest: str) -> bool:
        """Whether the copy is gone now: it stays while somebody reads it."""
        path = self.path(digest)
        with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as there:
            if there:
                with suppress(FileNotFoundError), self.incoming() as grave:
                    path.rename(grave / "blob")
        return not path.exists()

    def _evict(self, *, keep: str) -> None:
        copies = sorted(self._files.stored(), key=lambda copy: copy.modified_at)
        size = sum(copy.size for copy in copies)
        for copy in copies:
            if size <= self._most_bytes:
                return
            if copy.digest != keep and self.discard(copy.digest):
                size -= copy.size


def _check(folder: Path) -> None:
    """Make the folder where it is not there; BackendError where it is not this user's alone."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise BackendError(
            f"the cache of weights {folder} cannot be used ({error}); give a folder that this process may write to"
        ) from error
    if stat.S_ISLNK(found.st_mode):
        raise BackendError(
            f"the cache of weights {folder} is a symbolic link, expected a folder; give the one that it leads to"
        )
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise BackendError(
            f"the cache of weights {folder} is another user's, or open to others (mode {found.st_mode & 0o777:o}); "
            "expected a folder of this user's alone (mode 700)"
        )


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """Whether the folder is there and locked, until the block's end."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, how)
            there = os.path.samestat(os.stat(folder), os.fstat(descriptor))
        except (BlockingIOError, FileNotFoundError):  # somebody reads it; it went before the lock came
            there = False
        yield there
    finally:
        os.close(descriptor)
