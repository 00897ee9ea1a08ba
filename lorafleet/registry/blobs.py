"""Adapter weights under the digests of what they hold, verified whenever they are stored and read.

Each is a folder in PEFT format, in a place behind :mod:`lorafleet.registry.files`. The config names no base, as equal
weights of two tenants share a folder. Who may store and who may delete is agreed on in the database
(:mod:`lorafleet.registry.claims`). What is damaged is written over when it is stored again, and never deleted for it:
whoever writes under a digest writes the same bytes, and others may name them.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from safetensors import SafetensorError

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.adapters.format import (
    CONFIG_NAME,
    GATES_NAME,
    LARGEST_CONFIG,
    WEIGHTS_NAME,
    load_modules,
    read_config,
    refuse_other_weights,
)
from lorafleet.adapters.streaming import AdapterReader, Contents, check_header_size, folder_digest, transcribe
from lorafleet.errors import AdapterFormatError, BackendError, InvalidInputError, NotFoundError
from lorafleet.registry.files import Deletion, StoredBlob, open_files
from lorafleet.registry.references import check_digest, is_digest

DELETING_S = 20.0
"""See :meth:`BlobStore.delete`; with the requests of what was begun it is half a minute."""
_COPIED_BYTES = 2**20
T = TypeVar("T")


class Received(NamedTuple):
    """A folder that came from outside, checked, and written anew for the store."""

    contents: Contents
    folder: Path


class BlobStore:
    """Content-addressed adapters in one place; safe for any number of threads and processes."""

    def __init__(self, place: str | Path) -> None:
        """``place`` is a folder, or a URL (:mod:`lorafleet.registry.object_files` has the forms)."""
        self._files = open_files(place)

    @property
    def name(self) -> str:
        """The place, for messages."""
        return self._files.name

    def path(self, digest: str) -> Path:
        """Where a digest's folder is on this machine, or would be.

        With weights far away it is a copy, which stays until others that are read need its place.
        """
        return self._files.path(check_digest("blob", digest))

    def put(self, adapter: LoraAdapter) -> str:
        """Store an adapter and return its digest; when this returns, it survives a loss of power.

        What is there already is read and verified, and written again where it is damaged: from an object store it is
        downloaded for that, whatever copies there are of it here.
        """
        digest = adapter.digest
        with self._explaining(digest):
            state = self._state(digest)
            if state != "sound":
                with self._files.incoming() as folder:
                    LoraAdapter(adapter.modules, gates=adapter.gates).save(folder)
                    self._store(digest, folder, state)
        return digest

    @contextmanager
    def receive(
        self, folder: Path, *, headers: Callable[[AdapterReader], None], check: Callable[[str, LoraPair], None]
    ) -> Iterator[Received]:
        """A folder in PEFT format from outside, copied, checked and ready for :meth:`adopt`; gone at the block's end.

        In memory for a few modules, however large it is. The copy is what is checked, so that nobody can exchange the
        files meanwhile. Raises what :func:`~lorafleet.adapters.streaming.transcribe` raises.
        """
        refuse_other_weights(folder)
        # Both again of the copy, which may take long to make.
        if (folder / CONFIG_NAME).is_file():
            read_config(folder / CONFIG_NAME)
        if (folder / WEIGHTS_NAME).is_file():
            check_header_size(folder / WEIGHTS_NAME)
        with self._files.incoming() as work:
            with self._explaining(f"of {folder}"):
                copied, written = work / "copied", work / "written"
                copied.mkdir()
                written.mkdir()
                for name in (CONFIG_NAME, WEIGHTS_NAME, GATES_NAME):
                    _copy(folder / name, copied / name, most=LARGEST_CONFIG + 1 if name == CONFIG_NAME else None)
            with _naming(folder, instead_of=copied), self._explaining(f"of {folder}"):
                contents = transcribe(copied, written, headers=headers, check=check)
            yield Received(contents, written)

    def adopt(self, received: Received) -> None:
        """Store what :meth:`receive` gave, as :meth:`put` does."""
        digest = received.contents.digest
        with self._explaining(digest):
            state = self._state(digest)
            if state != "sound":
                self._store(digest, received.folder, state)

    def delete(self, digests: Sequence[str]) -> Deletion:
        """Remove weights, where they are there, and say what became of each. Only what the database has a mark on.

        Nothing is begun any more after 20 s, long before the mark ends.
        """
        return self._files.delete([check_digest("blob", each) for each in digests], until=time.monotonic() + DELETING_S)

    def stored(self) -> Iterator[StoredBlob]:
        """Everything that is there, also what a killed process left half stored."""
        try:
            yield from (blob for blob in self._files.stored() if is_digest(blob.digest))
        except OSError as error:
            raise BackendError(f"{self.name} cannot be listed ({error}); call again") from error

    def secret(self, name: str, fresh: bytes) -> bytes:
        """A small secret beside the weights: its bytes, or ``fresh`` where there was none. Raises OSError."""
        return self._files.secret(name, fresh)

    def read(self, digest: str) -> LoraAdapter:
        """The adapter of a digest, checked against it; UnavailableError where what is stored is not that."""
        return self._once_more(digest, self._read)

    def verify(self, digest: str) -> None:
        """:meth:`read` without its result, in memory for a few modules."""
        self._once_more(digest, self._verify)

    @contextmanager
    def held(self, digest: str) -> Iterator[Path]:
        """The folder of a digest's files on this machine, verified, there until the block's end."""
        self.verify(digest)
        with ExitStack() as stack:
            with self._blaming(digest):  # and not for what goes wrong inside the block
                path = stack.enter_context(self._files.held(digest))
            if path is None:
                raise BackendError(f"the weights {digest} went from {self.name} while they were read; call again")
            yield path

    def read_modules(self, digest: str, paths: Collection[str]) -> dict[str, LoraPair]:
        """Those of the modules ``paths`` that the adapter of a digest has, read alone.

        The digest is of the whole, so that this cannot be checked against it: for who has called :meth:`read` before.
        """
        with self._reading(digest) as path:
            return load_modules(path, paths)[0]

    def _read(self, digest: str) -> LoraAdapter:
        with self._reading(digest) as path:
            stored = LoraAdapter.load(path)
            # A copy: what was loaded may be a mapping of the file, and what is checked must be what is returned.
            pairs = {name: LoraPair(a.clone(), b.clone()) for name, (a, b) in stored.modules.items()}
            adapter = LoraAdapter(pairs, gates={name: gate.clone() for name, gate in stored.gates.items()})
            if adapter.digest != digest:
                raise InvalidInputError(f"what {path} holds has the digest {adapter.digest}")
            return adapter

    @contextmanager
    def _reading(self, digest: str) -> Iterator[Path]:
        """The folder of a digest; what goes wrong inside is UnavailableError."""
        check_digest("blob", digest)
        with self._blaming(digest), self._files.held(digest) as path:
            if path is None:
                raise BackendError(f"the weights {digest} are missing from {self.name}; restore them from a backup")
            yield path

    @contextmanager
    def _blaming(self, digest: str) -> Iterator[None]:
        try:
            yield
        except (InvalidInputError, NotFoundError) as error:
            raise _DamagedError(f"the weights {digest} are damaged ({error}); restore them from a backup") from error
        except OSError as error:
            raise BackendError(f"the weights {digest} cannot be read from {self.name} ({error})") from error

    def _once_more(self, digest: str, read: Callable[[str], T]) -> T:
        """What reads a digest's files; again where only a copy of this machine is damaged."""
        try:
            return read(digest)
        except _DamagedError:
            if not self._files.fetch_again(digest):
                raise
            return read(digest)

    def _state(self, digest: str) -> Literal["absent", "sound", "damaged"]:
        """What the place itself has under a digest. BackendError where it cannot be read now: it may be sound."""
        try:
            with self._blaming(digest), self._files.original(check_digest("blob", digest)) as path:
                if path is None:
                    return "absent"
                _check_digest_of(path, digest)
        except _DamagedError:
            return "damaged"
        return "sound"

    def _store(self, digest: str, folder: Path, state: Literal["absent", "damaged"]) -> None:
        (self._files.publish if state == "absent" else self._files.mend)(digest, folder)

    def _verify(self, digest: str) -> None:
        with self._reading(digest) as path:
            _check_digest_of(path, digest)

    @contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise BackendError(
                f"the weights {what} cannot be written under {self.name} ({error}); nothing was "
                "stored; make room or check the disk, and call again"
            ) from error


class _DamagedError(BackendError):
    """What is stored is not what its digest says."""


def _check_digest_of(folder: Path, digest: str) -> None:
    found = folder_digest(folder)
    if found != digest:
        raise InvalidInputError(f"what {folder} holds has the digest {found}")


def _copy(source: Path, target: Path, *, most: int | None) -> None:
    """Copy a regular file, or its first ``most`` bytes; nothing where it is not there."""
    try:
        # A pipe would keep its reader waiting.
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise AdapterFormatError(f"{source} cannot be read ({error}); expected a file of an adapter") from None
    with os.fdopen(descriptor, "rb") as reading:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AdapterFormatError(f"{source} is no regular file; expected a file of an adapter")
        with target.open("xb") as writing:
            left = most
            while piece := reading.read(_COPIED_BYTES if left is None else min(_COPIED_BYTES, left)):
                writing.write(piece)
                left = None if left is None else left - len(piece)


@contextmanager
def _naming(folder: Path, *, instead_of: Path) -> Iterator[None]:
    """Errors about a copy are about the folder that it was made of."""
    try:
        yield
    except (AdapterFormatError, NotFoundError) as error:
        raise type(error)(str(error).replace(str(instead_of), str(folder))) from None
