"""Blobs in a folder of this machine.

::

    blobs/sha256/3f/3fa2…/    adapter_config.json  adapter_model.safetensors     never changes once it is there
    blobs/incoming/…          being written; whatever a killed process left here is swept by the next start
    blobs/incoming.lock       held shared by writers, exclusively by the sweep

A folder appears under its final name by one rename, after its files are on the disk, and goes by one; a process that is
killed at any point leaves the old state or the new one. obstore's own local store writes without fsync, so that this is
not made of it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from lorafleet.errors import BackendError
from lorafleet.registry.files import Deletion, StoredBlob, blob_path, check_time


class LocalFiles:
    """:class:`~lorafleet.registry.files.BlobFiles` in a folder; ``durable=False`` is for what can be had again."""

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.folder = folder.resolve()
        self._incoming = self.folder / "incoming"
        self._sync = _sync if durable else _do_not_sync
        try:
            for path in (self.folder, self._incoming, self.folder / "sha256"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep()
        except OSError as error:
            raise BackendError(
                f"the blob folder {self.folder} cannot be used ({error}); give one that this process may write to"
            ) from error

    @property
    def name(self) -> str:
        return str(self.folder)

    def path(self, digest: str) -> Path:
        return self.folder / blob_path(digest)

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        with self._lock_file() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            folder = Path(tempfile.mkdtemp(dir=self._incoming))  # 0700
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, digest: str, folder: Path) -> None:
        target = self.path(digest)
        for file in folder.iterdir():
            self._sync(file)
        self._sync(folder)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        self._sync(target.parent.parent)
        try:
            folder.rename(target)
        except OSError:
            # Somebody else was faster; a folder that is not empty cannot be renamed onto.
            if not target.is_dir():
                raise
        self._sync(target.parent)

    def mend(self, digest: str, folder: Path) -> None:
        target = self.path(digest)
        names = sorted(file.name for file in folder.iterdir())
        for name in names:
            self._sync(folder / name)
        for name in names:
            (folder / name).replace(target / name)
        for file in target.iterdir():
            if file.name not in names:
                file.unlink(missing_ok=True)
        self._sync(target)

    @contextmanager
    def held(self, digest: str) -> Iterator[Path | None]:
        path = self.path(digest)
        yield path if path.is_dir() else None

    def original(self, digest: str) -> AbstractContextManager[Path | None]:
        return self.held(digest)

    def fetch_again(self, digest: str) -> bool:
        return False

    def delete(self, digests: Sequence[str], *, until: float) -> Deletion:
        gone: list[str] = []
        try:
            for digest in digests:
                check_time(until)
                with suppress(FileNotFoundError), self.incoming() as grave:
                    self.path(digest).rename(grave / "blob")
                gone.append(digest)
        except OSError as error:
            # A rename is done when it returns, and not done when it fails.
            return Deletion(gone, list(digests[len(gone) :]), [], error)
        return Deletion(gone, [], [], None)

    def stored(self) -> Iterator[StoredBlob]:
        for shard in sorted((self.folder / "sha256").iterdir()):
            for folder in sorted(shard.glob("?" * 64)):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    size = sum(file.stat().st_size for file in folder.iterdir())
                    yield StoredBlob(f"sha256:{folder.name}", size, folder.stat().st_mtime)

    def secret(self, name: str, fresh: bytes) -> bytes:
        path = self.folder / name
        if not path.exists():
            with self.incoming() as folder:
                (folder / name).touch(mode=0o600)
                (folder / name).write_bytes(fresh)
                self._sync(folder / name)
                with suppress(FileExistsError):  # somebody was faster: theirs it is
                    os.link(folder / name, path)
            self._sync(self.folder)
        return path.read_bytes()

    def _sweep(self) -> None:
        with self._lock_file() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # somebody is writing; a later start sweeps
            if self._incoming.is_symlink():
                return  # what it leads to may be somebody's
            for left in self._incoming.iterdir():
                shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def _lock_file(self) -> Iterator[int]:
        descriptor = os.open(self.folder / "incoming.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _do_not_sync(path: Path) -> None:
    """A loss of power may leave half of it: for what is checked when it is read, and can be had again."""
