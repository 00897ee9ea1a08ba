"""Where the files of blobs lie: a folder of this machine, or an object store under a URL. Either behind one interface.

A blob is a few files under a digest: ``adapter_config.json``, ``adapter_model.safetensors`` and, where it has gates,
``gates.safetensors``. What they hold is the business of :mod:`lorafleet.registry.blobs`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol


class StoredBlob(NamedTuple):
    """What lies under a digest, whole or not."""

    digest: str
    size: int
    """Bytes of its files"""
    modified_at: float
    """Seconds since the epoch, by the store's clock"""


class Deletion(NamedTuple):
    """What became of digests that were to be deleted."""

    gone: list[str]
    """By a clean answer: nothing is on its way any more"""
    untouched: list[str]
    """Nothing is on its way either, and some or all of each is still there"""
    unsure: list[str]
    """A request was sent, and nobody knows whether it was carried out, or will be"""
    error: OSError | None
    """Why not all of them are gone"""


class BlobFiles(Protocol):
    """The files of blobs in one place. Safe for any number of threads and processes.

    What cannot be done now, and may be later, raises OSError.
    """

    @property
    def name(self) -> str:
        """The place, for messages; without credentials."""

    def incoming(self) -> AbstractContextManager[Path]:
        """An empty private folder of this machine, gone at the end of the block."""

    def publish(self, digest: str, folder: Path) -> None:
        """Store a folder that :meth:`incoming` gave, as it is; nothing happens where the digest is there already.

        When this returns, it survives a loss of power. A process that is killed in it leaves all of it, or nothing
        that :meth:`held` would find.
        """

    def mend(self, digest: str, folder: Path) -> None:
        """:meth:`publish` over what is there, file by file, so that none is missing in between.

        Any number may do so at once, as they all write the same bytes.
        """

    def held(self, digest: str) -> AbstractContextManager[Path | None]:
        """A folder of this machine with a digest's files, there until the block's end; None where there is none."""

    def original(self, digest: str) -> AbstractContextManager[Path | None]:
        """As :meth:`held`, of what the place itself has, and never of a copy that was made before.

        A block that raises says that the files are not sound: they are kept nowhere.
        """

    def path(self, digest: str) -> Path:
        """The same folder, or where it would be; without a promise of how long."""

    def fetch_again(self, digest: str) -> bool:
        """Forget a copy of this machine that turned out to be damaged; False where there is no other to be had.

        UnavailableError where the copy stays because somebody reads it.
        """

    def delete(self, digests: Sequence[str], *, until: float) -> Deletion:
        """Remove them, where they are there; each goes at once for :meth:`held`. Raises no OSError.

        Nothing is begun after ``until`` by the monotonic clock: then the error is a TimeoutError.
        """

    def stored(self) -> Iterator[StoredBlob]:
        """Everything that is there, also what a killed process left half stored."""

    def secret(self, name: str, fresh: bytes) -> bytes:
        """The bytes of a small file, made of ``fresh`` where there was none. Whoever is first, all get the same."""


def blob_path(digest: str) -> str:
    """``sha256/3f/3fa2…``: where a digest's files lie below the root, everywhere."""
    algorithm, hexadecimal = digest.split(":")
    return f"{algorithm}/{hexadecimal[:2]}/{hexadecimal}"


def check_time(until: float) -> None:
    """TimeoutError where it is later than that."""
    if time.monotonic() > until:
        raise TimeoutError("it takes too long")


def open_files(place: str | Path) -> BlobFiles:
    """The files of a folder, or of ``s3://BUCKET/PREFIX``, ``gs://…`` or ``az://…``.

    InvalidInputError for another URL; UnavailableError where the folder cannot be used.
    """
    if isinstance(place, str) and "://" in place:
        from lorafleet.registry.object_files import ObjectFiles  # its library takes 10 ms to load

        return ObjectFiles(place)
    from lorafleet.registry.local_files import LocalFiles

    return LocalFiles(Path(place))
