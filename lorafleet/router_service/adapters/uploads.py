"""Uploads on their way: announced, staged on disk piece by piece, checked by digest, and then somebody's version.

::

    uploads/acme/3f9a…/manifest.json    what was announced, and what became of it
    uploads/acme/3f9a…/files/…          what has come so far, under names of a fixed list; gone once it is a version
    uploads/acme/.3f9a…-5c1e…           being made or removed; what a killed process left is swept

An upload lies under its tenant's name, so that who asks for another's id looks in the same place as who asks for one
that never was. All state is on the disk: a server that starts again, or another one on the same folder, goes on where
this one stopped. What is answered as durable was fsynced before. An upload whose manifest cannot be read is passed
over, and goes a day after it was last written.

Bytes are hashed as they come. Only how far the hash has got is in memory, and read again where it is missing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from lorafleet.adapters.format import CARD_NAME, CONFIG_NAME, GATES_NAME, LARGEST_CONFIG, WEIGHTS_NAME
from lorafleet.errors import (
    AlreadyExistsError,
    BackendError,
    DigestMismatchError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
)
from lorafleet.registry.cards import LONGEST as CARD_BYTES
from lorafleet.registry.references import not_found

NEEDED: Final = (CONFIG_NAME, WEIGHTS_NAME)
NAMES: Final = (*NEEDED, GATES_NAME, CARD_NAME)
"""All that an upload may consist of: no name on this disk is a caller's."""

_ID: Final = re.compile(r"[0-9a-f]{32}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9-]{0,64}")
_READ_BYTES: Final = 2**20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UploadLimits:
    adapter_bytes: int = 2 * 2**30
    """Of all files of an upload together."""
    tenant_bytes: int = 4 * 2**30
    """Of a tenant's unfinished uploads together, as announced."""
    tenant_uploads: int = 8
    """Unfinished ones."""
    spare_bytes: int = 256 * 2**20
    """What is left free on the disk: it may be the database's, too."""
    kept_s: float = 86400.0
    """From its announcement until an upload is forgotten, finished or not."""


@dataclass(frozen=True)
class AnnouncedFile:
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Upload:
    """An upload as it stands. ``durable`` has the bytes of each file that survive a crash, in the order of ``files``;
    ``version`` is the number that it became."""

    id: str
    tenant: str
    adapter: str
    files: tuple[AnnouncedFile, ...]
    created_at: float
    expires_at: float
    newest: int | None = None
    """The adapter's newest version when its publication began; a crash may have come after it."""
    version: int | None = None
    durable: tuple[int, ...] = ()


@dataclass
class _Hash:
    """How far a file is hashed; ``mtime_ns`` tells when another process has written to it."""

    state: Any
    position: int = 0
    mtime_ns: int = -1


class Uploads:
    """The uploads under one folder. Thread-safe, and safe for processes that share the folder."""

    def __init__(
        self,
        folder: Path,
        limits: UploadLimits | None = None,
        *,
        clock: Callable[[], float] = time.time,
        wait_s: float = 2.0,
    ) -> None:
        """``wait_s`` is for another call to let go of an upload: longer than any write takes."""
        self.limits = limits or UploadLimits()
        self._folder, self._clock, self._wait_s = folder, clock, wait_s
        self._hashes: dict[tuple[str, str, str], _Hash] = {}
        """Each is used under its upload's lock only, and may be gone the next time: then it is made again."""
        self._unreadable: set[Path] = set()
        """What was logged."""
        with _translated():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)

    def start(self, tenant: str, adapter: str, files: Sequence[AnnouncedFile], *, request_id: str = "") -> Upload:
        """A new upload for an adapter, or the one that the same ``request_id`` began before.

        Raises InvalidInputError for files that can never be an adapter, AlreadyExistsError for a request id that began
        another upload, and OverloadedError where there is no room for it now.
        """
        _check_files(files, self.limits.adapter_bytes)
        if not _REQUEST_ID.fullmatch(request_id):
            raise InvalidInputError("found a request_id that is not at most 64 letters, digits and '-'; send a UUID")
        upload_id = secrets.token_hex(16)
        if request_id:
            upload_id = hashlib.sha256(f"{tenant}/{request_id}".encode()).hexdigest()[:32]
        with _translated(), _locked(self._folder, wait_s=self._wait_s):
            found = self._read(self._path(tenant, upload_id))
            if found is None:
                return self._announce(tenant, adapter, files, upload_id)
        if (found.adapter, found.files) != (adapter, tuple(files)):
            raise AlreadyExistsError(f"the request_id {request_id!r} began an upload of other files; choose a new one")
        # Not under the folder's lock: who works on this one may take minutes, and nobody else should wait for that.
        return self.get(tenant, upload_id)

    def _announce(self, tenant: str, adapter: str, files: Sequence[AnnouncedFile], upload_id: str) -> Upload:
        """A new upload; under the folder's lock."""
        self._check_room(tenant, sum(file.size for file in files))
        now, target = self._clock(), self._path(tenant, upload_id)
        upload = Upload(upload_id, tenant, adapter, tuple(files), now, now + self.limits.kept_s)
        if target.exists():  # expired
            with _locked(target, wait_s=self._wait_s):
                self._remove(target)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        making = _hidden(target)
        try:
            (making / "files").mkdir(mode=0o700, parents=True)
            making.chmod(0o700)
            _write_manifest(making, upload)
            making.rename(target)
        except OSError:
            shutil.rmtree(making, ignore_errors=True)
            raise
        for folder in (target.parent, self._folder):
            _sync(folder)
        return replace(upload, durable=(0,) * len(files))

    def get(self, tenant: str, upload_id: str) -> Upload:
        """An upload with what is durable of it: what was written is fsynced first.

        NotFoundError, in the same words, for one that is not there, has expired, or is another tenant's.
        """
        with self._open(tenant, upload_id) as upload, _translated():
            return self._synced(upload)

    def write(self, tenant: str, upload_id: str, name: str, offset: int, data: bytes) -> None:
        """Add bytes to the end of a file; what is there already is passed over.

        Raises InvalidInputError for a gap and for more than was announced, and DigestMismatchError where the file is
        whole and not the one that was announced: then it is empty again.
        """
        with self._open(tenant, upload_id) as upload:
            announced = _announced(upload, name)
            if offset + len(data) > announced.size:
                raise InvalidInputError(
                    f"{name}: found bytes up to {offset + len(data)}, expected {announced.size} as announced"
                )
            if upload.version is not None:  # somebody else sent the rest, and finished it
                return
            with _translated(), self._file(upload, name) as descriptor:
                size = os.fstat(descriptor).st_size
                if offset > size:
                    raise InvalidInputError(
                        f"{name}: found bytes from {offset} on, expected them from {size}; ask what is durable, and go "
                        "on there"
                    )
                self._append(upload, announced, descriptor, size, memoryview(data)[size - offset :])

    def cancel(self, tenant: str, upload_id: str) -> None:
        """Remove an upload, and what was sent of it."""
        with self._open(tenant, upload_id), _translated():
            self._remove(self._path(tenant, upload_id))

    @contextmanager
    def finishing(self, tenant: str, upload_id: str) -> Iterator[Staged]:
        """A whole upload whose digests are right, held until the block's end; one that is a version already as it is.

        Raises InvalidInputError where bytes are missing, and DigestMismatchError as :meth:`write` does.
        """
        with self._open(tenant, upload_id) as upload:
            if upload.version is None:
                with _translated():
                    self._check_whole(upload)
            yield Staged(self, upload)

    def sweep(self) -> None:
        """Remove what has expired, and what killed processes left; forget what others ended."""
        with _translated(), _locked(self._folder, wait_s=self._wait_s):
            for tenant in _folders(self._folder):
                for path in _folders(tenant):
                    if path.name.startswith("."):
                        shutil.rmtree(path, ignore_errors=True)
                        continue
                    try:
                        if self._is_over(path):
                            with _locked(path, wait_s=0.0):
                                self._remove(path)
                    except (FileNotFoundError, UnavailableError):  # it has gone; somebody works on it: a later sweep
                        continue
        for tenant_name, upload_id, _ in list(self._hashes):
            if not (self._path(tenant_name, upload_id) / "files").is_dir():
                self._forget(tenant_name, upload_id)

    # Inside of an upload's lock

    def begin_publication(self, upload: Upload, newest: int) -> Upload:
        return self._record(replace(upload, newest=newest))

    def end_publication(self, upload: Upload, number: int) -> Upload:
        done = self._record(replace(upload, version=number))
        self._forget(upload.tenant, upload.id)
        shutil.rmtree(self.files(upload), ignore_errors=True)
        return done

    def drop(self, upload: Upload) -> None:
        self._remove(self._path(upload.tenant, upload.id))

    def files(self, upload: Upload) -> Path:
        return self._path(upload.tenant, upload.id) / "files"

    def _record(self, upload: Upload) -> Upload:
        with _translated():
            _write_manifest(self._path(upload.tenant, upload.id), upload)
        return upload

    @contextmanager
    def _open(self, tenant: str, upload_id: str) -> Iterator[Upload]:
        """An upload that nobody else touches inside the block."""
        refusal = not_found("this upload")
        if not _ID.fullmatch(upload_id):
            raise refusal
        path = self._path(tenant, upload_id)
        with ExitStack() as stack:
            try:
                stack.enter_context(_locked(path, wait_s=self._wait_s))
            except FileNotFoundError:
                raise refusal from None
            upload = self._read(path)
            if upload is None:
                raise refusal
            yield upload

    def _path(self, tenant: str, upload_id: str) -> Path:
        return self._folder / tenant / upload_id

    def _read(self, path: Path) -> Upload | None:
        """What its manifest says; None where there is none that has not expired."""
        try:
            said = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            upload = Upload(**said | {"files": tuple(AnnouncedFile(**file) for file in said["files"]), "durable": ()})
            return upload if self._clock() < upload.expires_at else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _UnreadableError(
                f"the manifest of the upload {path.name} cannot be read ({error}); start another upload"
            ) from error

    def _is_over(self, path: Path) -> bool:
        """Whether an upload has expired; one that cannot be read is logged once, and lasts as long as any."""
        try:
            return self._read(path) is None
        except _UnreadableError as error:
            if path not in self._unreadable:
                self._unreadable.add(path)
                _log.error("%s/%s is set aside, and will be removed: %s", path.parent.name, path.name, error)
            return self._clock() >= path.stat().st_mtime + self.limits.kept_s

    @contextmanager
    def _file(self, upload: Upload, name: str) -> Iterator[int]:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.files(upload) / name, flags, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _append(self, upload: Upload, announced: AnnouncedFile, descriptor: int, size: int, data: memoryview) -> None:
        if not len(data):
            return
        done = self._hashed(upload, announced, descriptor, size)
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], size + written)
        done.state.update(data)
        done.position += len(data)
        done.mtime_ns = os.fstat(descriptor).st_mtime_ns
        if size + len(data) == announced.size:
            self._check_digest(upload, announced, descriptor)

    def _hashed(self, upload: Upload, announced: AnnouncedFile, descriptor: int, size: int) -> _Hash:
        """The hash of the file's first ``size`` bytes, read again where it is not known."""
        key = (upload.tenant, upload.id, announced.name)
        found = self._hashes.get(key)
        mtime_ns = os.fstat(descriptor).st_mtime_ns
        if found is None or (found.position, found.mtime_ns) != (size, mtime_ns):
            found = self._hashes[key] = _Hash(hashlib.sha256(), 0, mtime_ns)
            while found.position < size:
                part = os.pread(descriptor, min(_READ_BYTES, size - found.position), found.position)
                if not part:
                    raise UnavailableError(f"{announced.name} became shorter while it was read; call again")
                found.state.update(part)
                found.position += len(part)
        return found

    def _check_digest(self, upload: Upload, announced: AnnouncedFile, descriptor: int) -> None:
        found = self._hashed(upload, announced, descriptor, announced.size).state.hexdigest()
        if found == announced.sha256:
            return
        os.ftruncate(descriptor, 0)
        os.fsync(descriptor)
        self._hashes.pop((upload.tenant, upload.id, announced.name), None)
        raise DigestMismatchError(
            f"{announced.name}: the bytes that came have the SHA-256 {found}, expected {announced.sha256} as "
            "announced; they were dropped: send the file again from its start"
        )

    def _check_whole(self, upload: Upload) -> None:
        self._synced(upload)
        for announced in upload.files:
            with self._file(upload, announced.name) as descriptor:
                size = os.fstat(descriptor).st_size
                if size != announced.size:
                    raise InvalidInputError(
                        f"{announced.name}: found {size} of {announced.size} bytes; send the rest, then finish"
                    )
                self._check_digest(upload, announced, descriptor)

    def _synced(self, upload: Upload) -> Upload:
        if upload.version is not None:
            return replace(upload, durable=tuple(file.size for file in upload.files))
        durable = []
        for announced in upload.files:
            path = self.files(upload) / announced.name
            if path.exists():
                _sync(path)
            durable.append(path.stat().st_size if path.exists() else 0)
        _sync(self.files(upload))
        return replace(upload, durable=tuple(durable))

    def _check_room(self, tenant: str, size: int) -> None:
        """Raise OverloadedError where the tenant or the disk has no room for so many bytes; under the folder's lock."""
        limits = self.limits
        own = list(self._unfinished(self._folder / tenant))
        announced = sum(file.size for upload in own for file in upload.files)
        if len(own) >= limits.tenant_uploads or announced + size > limits.tenant_bytes:
            raise OverloadedError(
                f"found {len(own)} unfinished uploads of this tenant with {announced} bytes, and one more with {size}; "
                f"expected at most {limits.tenant_uploads} with {limits.tenant_bytes} together; finish or cancel one"
            )
        coming = size
        for folder in _folders(self._folder):
            for upload in self._unfinished(folder):
                coming += sum(file.size for file in upload.files) - _bytes_under(self.files(upload))
        # Three times more for this one: it is copied when it becomes a version, and 16 bits are written as 32.
        if shutil.disk_usage(self._folder).free < coming + 3 * size + limits.spare_bytes:
            raise OverloadedError(f"the server's disk has no room for {size} more bytes; try again later")

    def _unfinished(self, folder: Path) -> Iterator[Upload]:
        for path in _folders(folder):
            if not path.name.startswith(".") and (path / "files").is_dir():
                with suppress(_UnreadableError):
                    upload = self._read(path)
                    if upload is not None and upload.version is None:
                        yield upload

    def _remove(self, path: Path) -> None:
        """At once for whoever looks: by one rename."""
        self._forget(path.parent.name, path.name)
        self._unreadable.discard(path)
        grave = _hidden(path)
        path.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)

    def _forget(self, tenant: str, upload_id: str) -> None:
        for name in NAMES:
            self._hashes.pop((tenant, upload_id, name), None)


class _UnreadableError(BackendError):
    """A manifest is damaged, or the disk does not give it."""


class Staged:
    """A whole upload, held by one call."""

    def __init__(self, uploads: Uploads, upload: Upload) -> None:
        self._uploads, self.upload = uploads, upload

    @property
    def folder(self) -> Path:
        """In PEFT format."""
        return self._uploads.files(self.upload)

    def begin(self, newest: int) -> None:
        """Put on record, durably, that a version above ``newest`` may be this upload's from now on."""
        self.upload = self._uploads.begin_publication(self.upload, newest)

    def done(self, number: int) -> None:
        """It is this version: its files go, and whoever finishes it again gets that."""
        self.upload = self._uploads.end_publication(self.upload, number)

    def drop(self) -> None:
        """It can never be a version."""
        self._uploads.drop(self.upload)


def _check_files(files: Sequence[AnnouncedFile], most: int) -> None:
    names = [file.name for file in files]
    if unknown := sorted(set(names) - set(NAMES)):
        raise InvalidInputError(f"found a file {unknown[0]!r}, expected only: {', '.join(NAMES)}")
    if len(names) != len(set(names)) or not set(NEEDED) <= set(names):
        raise InvalidInputError(f"found the files {', '.join(names) or 'none'}, expected {' and '.join(NEEDED)}, once")
    for file in files:
        longest = {CONFIG_NAME: LARGEST_CONFIG, CARD_NAME: CARD_BYTES}.get(file.name, most)
        if not 1 <= file.size <= longest:
            raise InvalidInputError(f"{file.name}: found {file.size} bytes, expected 1 to {longest}")
        if not _SHA256.fullmatch(file.sha256):
            raise InvalidInputError(f"{file.name}: found a sha256 that is not 64 lower-case hex digits")
    if (total := sum(file.size for file in files)) > most:
        raise InvalidInputError(f"found {total} bytes together, expected at most {most}, which is this server's limit")


def _announced(upload: Upload, name: str) -> AnnouncedFile:
    for file in upload.files:
        if file.name == name:
            return file
    raise InvalidInputError(f"found bytes of a file {name!r}, expected one of the files that were announced")


def _write_manifest(folder: Path, upload: Upload) -> None:
    """Durably, by one rename."""
    part = folder / "manifest.part"
    with open(part, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        json.dump(asdict(upload), file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / "manifest.json")
    _sync(folder)


@contextmanager
def _locked(folder: Path, *, wait_s: float) -> Iterator[None]:
    """Alone with a folder, among threads and processes; FileNotFoundError without it, UnavailableError after a wait."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise UnavailableError("another call works on this upload; call again") from None
                time.sleep(0.005)
        if not os.path.samestat(os.stat(folder), os.fstat(descriptor)):
            raise FileNotFoundError(errno.ENOENT, "removed meanwhile", str(folder))
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _translated() -> Iterator[None]:
    """The file system's errors in the package's terms."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OverloadedError("the server's disk is full; try again later, from what is durable") from None
        raise BackendError(f"the folder of uploads cannot be used ({error})") from error


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _bytes_under(folder: Path) -> int:
    size = 0
    with suppress(FileNotFoundError):  # it goes while it is looked at
        for path in folder.iterdir():
            size += path.stat().st_size
    return size


def _hidden(path: Path) -> Path:
    """A name beside it that nobody else takes: one upload may be removed while the same is announced anew."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
