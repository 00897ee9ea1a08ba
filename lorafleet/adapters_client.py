"""A typed client of a server's adapters: what there is, which version is used, and weights in and out.

::

    with AdapterClient("127.0.0.1:50051", key="lf_…") as client:
        version = client.upload("acme/sql", "path/to/adapter", licence="MIT")
        client.promote(version.reference)

Needs grpcio with grpcio-status, and nothing of the server; downloads are verified with torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Literal, Self

from lorafleet.connection import ClientTls, Connection
from lorafleet.errors import (
    AlreadyExistsError,
    CallsFullError,
    DeadlineExceededError,
    DigestMismatchError,
    InvalidInputError,
    LorafleetError,
    NotFoundError,
    UnavailableError,
)
from lorafleet.proto.registry.v1 import adapters_pb2, adapters_pb2_grpc

VersionState = Literal["staged", "evaluated", "quarantined", "retired"]
Progress = Callable[[int, int], None]
"""Is told how many bytes have gone or come, of how many."""

FILES: Final = ("adapter_config.json", "adapter_model.safetensors", "gates.safetensors", "README.md")
"""What a folder in PEFT format may have that is sent; the last two need not be there."""
CHUNK_BYTES: Final = 512 * 1024
LEG_BYTES: Final = 32 * 2**20
"""Of an upload, until the server says again what is durable: what is lost at most with a connection."""
PATIENCE_S: Final = 300.0
"""A server that loads a base of some billion parameters anew is back within it."""
_SHORTEST_S, _LONGEST_S = 0.2, 10.0
_SENT_AGAIN: Final = 3
"""Times that a file is sent whose bytes do not arrive as they are: beyond that it changes while it is read."""
_STARTED: Final = 3
"""Times that an upload is started which others end while it is sent."""
_OUT_OF_USE: Final = ("retired", "quarantined")
_PASSING: Final = (UnavailableError, DeadlineExceededError, CallsFullError)
"""What may be over after a while, without anybody doing anything about it."""


@dataclass(frozen=True)
class RemoteAdapter:
    name: str
    """``TENANT/ADAPTER``"""
    base: str
    base_digest: str
    federation: str
    """Empty for one whose versions are imported."""
    created_at: float
    """Seconds since the epoch, here and below."""


@dataclass(frozen=True)
class RemoteLineage:
    federation: str
    round: int
    rule: str
    parents: tuple[str, ...] = ()
    """Digests; for its owner only, from :meth:`AdapterClient.version`."""
    parent_count: int = 0
    """How many they are; for its owner, everywhere."""
    members: int | None = None
    """How many members' updates of that round are in it; None where nobody wrote it down."""


@dataclass(frozen=True)
class RemoteVersion:
    reference: str
    """``TENANT/ADAPTER:NUMBER``"""
    number: int
    digest: str
    base_digest: str
    rank: int
    parameters: int
    state: VersionState
    created_at: float
    licence: str
    lineage: RemoteLineage | None
    aliases: tuple[str, ...] = ()
    """What points at it; in lists and :meth:`AdapterClient.version` only."""


@dataclass(frozen=True)
class RemoteEvaluation:
    member: str
    """Empty for the tenant itself."""
    loss: float
    """Nats per token."""
    tokens: int
    created_at: float


@dataclass(frozen=True)
class RemoteDetails:
    """All that is known of a version."""

    version: RemoteVersion
    base_licence: str
    evaluations: tuple[RemoteEvaluation, ...]
    card: str


@dataclass(frozen=True)
class RemotePromotion:
    version: RemoteVersion
    alias: str
    before: int | None
    """The number that the alias pointed at."""
    loss: float | None
    loss_before: float | None
    members: int
    """How many measured both."""


@dataclass(frozen=True)
class RemoteQuarantine:
    version: RemoteVersion
    aliases: Mapping[str, int | None]
    """What pointed at it → the number that it points at now; None: at nothing usable."""


class AdapterClient:
    """Calls one server with one API key; errors are those of :mod:`lorafleet.errors`, in the server's words.

    ``timeout_s`` bounds each call; an upload or a download is many calls. Once begun it goes on by itself after a lost
    connection or a restart of the server, and where too many calls move weights, until for ``patience_s`` nothing has
    come or gone. Without ``tls`` the key travels in the clear: right on loopback only. Thread-safe.
    """

    def __init__(
        self,
        address: str,
        *,
        key: str,
        timeout_s: float = 120.0,
        tls: ClientTls | None = None,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._connection = Connection(address, key=key, timeout_s=timeout_s, tls=tls)
        self._call = self._connection.call
        self._stub = adapters_pb2_grpc.AdapterServiceStub(self._connection.channel)  # type: ignore[no-untyped-call]
        self._patience_s, self._clock, self._sleep, self._draw = patience_s, clock, sleep, draw

    # What there is

    def create_adapter(self, name: str, *, base: str = "") -> RemoteAdapter:
        """A new adapter without versions; ``base`` is a name or digest, the server's own where it is empty."""
        request = adapters_pb2.CreateAdapterRequest(name=name, base=base)
        return _adapter(self._call(self._stub.CreateAdapter, request).adapter)

    def adapter(self, name: str) -> RemoteAdapter:
        return _adapter(self._call(self._stub.GetAdapter, adapters_pb2.GetAdapterRequest(name=name)).adapter)

    def adapters(self, tenant: str = "") -> list[RemoteAdapter]:
        """The key's tenant's own and those that it may use besides, by name; of one tenant where it is given."""
        request = adapters_pb2.ListAdaptersRequest(tenant=tenant)
        return [_adapter(found) for page in self._pages(self._stub.ListAdapters, request) for found in page.adapters]

    def versions(self, adapter: str) -> list[RemoteVersion]:
        """By number, in whatever state; of another tenant's adapter those that may be used."""
        request = adapters_pb2.ListVersionsRequest(adapter=adapter)
        return [_version(found) for page in self._pages(self._stub.ListVersions, request) for found in page.versions]

    def version(self, reference: str) -> RemoteDetails:
        """What a reference gives."""
        found = self._call(self._stub.GetVersion, adapters_pb2.GetVersionRequest(reference=reference))
        evaluations = tuple(RemoteEvaluation(e.member, e.loss, e.tokens, _seconds(e)) for e in found.evaluations)
        return RemoteDetails(_version(found.version), found.base_licence, evaluations, found.card)

    # Which version is used

    def promote(self, reference: str, alias: str = "", *, force: bool = False) -> RemotePromotion:
        """Point an alias (the champion) at a version that is measured to be better; else PromotionRefusedError."""
        request = adapters_pb2.PromoteVersionRequest(reference=reference, alias=alias, force=force)
        made = self._call(self._stub.PromoteVersion, request)
        before, loss, loss_before = (
            getattr(made, name) if made.HasField(name) else None for name in ("before", "loss", "loss_before")
        )
        return RemotePromotion(_version(made.version), made.alias, before, loss, loss_before, made.members)

    def rollback(self, adapter: str, alias: str = "") -> int:
        """Point an alias (the champion) where it pointed before; gives the number of the version."""
        request = adapters_pb2.RollbackAliasRequest(adapter=adapter, alias=alias)
        return int(self._call(self._stub.RollbackAlias, request).number)

    def retire(self, reference: str) -> RemoteVersion:
        request = adapters_pb2.RetireVersionRequest(reference=reference)
        return _version(self._call(self._stub.RetireVersion, request).version)

    def quarantine(self, reference: str) -> RemoteQuarantine:
        done = self._call(self._stub.QuarantineVersion, adapters_pb2.QuarantineVersionRequest(reference=reference))
        return RemoteQuarantine(
            _version(done.version), {alias: number or None for alias, number in sorted(done.aliases.items())}
        )

    def restore(self, reference: str) -> RemoteVersion:
        request = adapters_pb2.RestoreVersionRequest(reference=reference)
        return _version(self._call(self._stub.RestoreVersion, request).version)

    def evaluate(self, reference: str, *, loss: float, tokens: int) -> None:
        """Record what the tenant itself measured, in nats per token over so many held-out tokens."""
        try:
            request = adapters_pb2.RecordEvaluationRequest(reference=reference, loss=loss, tokens=tokens)
        except ValueError as error:
            raise InvalidInputError(f"found {tokens} tokens, expected at least 1 ({error})") from None
        self._call(self._stub.RecordEvaluation, request)

    # Weights in

    def upload(
        self,
        adapter: str,
        folder: str | Path,
        *,
        base: str = "",
        licence: str = "",
        request_id: str = "",
        progress: Progress | None = None,
    ) -> RemoteVersion:
        """Make a folder in PEFT format the next version of an adapter, which is made where it is new.

        ``base``: a name or digest of its base, the server's own where the adapter is new and this is empty. The
        folder's README.md is the version's card.

        An upload of the same files with the same arguments that was broken off within a day, by whatever process, goes
        on where that one stopped; one whose end nobody was told gives its version, while that is in use. After an
        upload that returned, the same files are another version. Two of them at the same time share what they send,
        and give one version or two. With a ``request_id`` it is the upload of that name which goes on, and one that had
        ended gives its version again, for a day.

        Goes on by itself after a lost connection; errors of the weights themselves leave nothing on the server.
        """
        folder = Path(folder)
        files = _files(folder)
        request = adapters_pb2.StartUploadRequest(
            adapter=adapter,
            files=files,
            request_id=request_id or _request_id(adapter, files, base=base, licence=licence),
            base=base,
        )
        for started in range(1, _STARTED + 1):
            upload = self._start(request)
            try:
                version = self._finish(upload, folder, licence, progress)
            except NotFoundError:  # somebody else ended it, or its day was over
                if started == _STARTED:
                    raise
                continue
            if request_id:
                break
            # Nobody has to be told this end again: else the same files would be this version for a day. It is one,
            # whatever becomes of this call.
            with suppress(LorafleetError):
                self._cancel(upload)
            if not upload.version or version.state not in _OUT_OF_USE:
                break
        return version

    def _start(self, request: adapters_pb2.StartUploadRequest) -> adapters_pb2.Upload:
        """The upload of a request, as far as it has come; its adapter is made where it is new."""
        try:
            answer: adapters_pb2.StartUploadResponse = self._call(self._stub.StartUpload, request)
        except NotFoundError:
            with suppress(AlreadyExistsError):  # somebody else was faster
                self.create_adapter(request.adapter, base=request.base)
            answer = self._call(self._stub.StartUpload, request)
        return answer.upload

    def _finish(
        self, upload: adapters_pb2.Upload, folder: Path, licence: str, progress: Progress | None
    ) -> RemoteVersion:
        """Send the rest of an upload, and make it a version."""
        retry, sent_again = self._retry(), 0
        while True:
            try:
                self._send(upload, folder, retry, progress)
                finish = adapters_pb2.FinishUploadRequest(upload=upload.id, licence=licence)
                return _version(retry.call(self._call, self._stub.FinishUpload, finish).version)
            except DigestMismatchError:
                sent_again += 1
                if sent_again == _SENT_AGAIN:
                    with suppress(UnavailableError, NotFoundError):
                        self._cancel(upload)
                    raise
                upload = retry.call(self._standing, upload.id)

    def _cancel(self, upload: adapters_pb2.Upload) -> None:
        self._call(self._stub.CancelUpload, adapters_pb2.CancelUploadRequest(upload=upload.id))

    def _send(self, upload: adapters_pb2.Upload, folder: Path, retry: _Retry, progress: Progress | None) -> None:
        """Everything that is not durable on the server yet."""
        total = sum(file.size for file in upload.files)
        while True:
            durable = sum(file.durable_size for file in upload.files)
            if progress is not None:
                progress(durable, total)
            if durable == total:
                return
            try:
                upload = self._send_leg(upload, folder)
            except _PASSING as error:
                retry.wait(error)
                upload = retry.call(self._standing, upload.id)
            if sum(file.durable_size for file in upload.files) > durable:
                retry.progressed()

    def _send_leg(self, upload: adapters_pb2.Upload, folder: Path) -> adapters_pb2.Upload:
        file = next(file for file in upload.files if file.durable_size < file.size)

        def chunks() -> Iterator[adapters_pb2.UploadChunksRequest]:
            with (folder / file.name).open("rb") as stream:
                offset = file.durable_size
                end = min(file.size, offset + LEG_BYTES)
                stream.seek(offset)
                while offset < end and (data := stream.read(min(CHUNK_BYTES, end - offset))):
                    yield adapters_pb2.UploadChunksRequest(upload=upload.id, file=file.name, offset=offset, data=data)
                    offset += len(data)

        answer: adapters_pb2.UploadChunksResponse = self._call(self._stub.UploadChunks, chunks())
        return answer.upload

    def _standing(self, upload_id: str) -> adapters_pb2.Upload:
        request = adapters_pb2.GetUploadRequest(upload=upload_id)
        answer: adapters_pb2.GetUploadResponse = self._call(self._stub.GetUpload, request)
        return answer.upload

    # Weights out

    def download(self, reference: str, folder: str | Path, *, progress: Progress | None = None) -> RemoteVersion:
        """Write a version of the key's own tenant as a folder in PEFT format, with its card as README.md.

        Files appear under their names once all of them have come and are what the version's digest says:
        DigestMismatchError otherwise. Goes on by itself after a lost connection.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        coming = _Coming(folder / f".download-{uuid.uuid4().hex}", progress)
        retry = self._retry()
        try:
            while not coming.whole:
                had = coming.size
                try:
                    for message in self._download(coming.request(reference)):
                        coming.add(message)
                    if not coming.whole:
                        raise UnavailableError(
                            f"{self._connection.address} sent a part of {reference} only; call again"
                        )
                except _PASSING as error:
                    if coming.version is None:
                        raise
                    if coming.size > had:
                        retry.progressed()
                    retry.wait(error)
            coming.publish(folder)
        finally:
            coming.remove()
        assert coming.version is not None
        return coming.version

    def _download(self, request: adapters_pb2.DownloadVersionRequest) -> Iterator[Any]:
        call = self._connection.begin(self._stub.DownloadVersion, request)
        try:
            with self._connection.translated():
                yield from call
        finally:
            call.cancel()

    # The connection

    def close(self) -> None:
        """Closes the connection; calls that run are cancelled."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _retry(self) -> _Retry:
        return _Retry(self._patience_s, self._clock, self._sleep, self._draw)

    def _pages(self, method: Any, request: Any) -> Iterator[Any]:
        while True:
            page = self._call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


class _Retry:
    """Waits that grow, each drawn at random up to its bound, so that many clients do not come back at once."""

    def __init__(
        self,
        patience_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        draw: Callable[[], float],
    ) -> None:
        self._patience_s, self._clock, self._sleep, self._draw = patience_s, clock, sleep, draw
        self.progressed()

    def progressed(self) -> None:
        self._longest_s, self._since = _SHORTEST_S, self._clock()

    def wait(self, error: Exception) -> None:
        """Wait before the next try; raises the error where there has been no progress for too long."""
        if self._clock() - self._since >= self._patience_s:
            raise error
        self._longest_s = min(_LONGEST_S, 2 * self._longest_s)
        self._sleep(self._draw() * self._longest_s)

    def call(self, ask: Callable[..., Any], *arguments: Any) -> Any:
        """What may be asked twice, until it is answered."""
        while True:
            try:
                return ask(*arguments)
            except _PASSING as error:
                self.wait(error)


@dataclass
class _Coming:
    """A download as far as it has come, in a folder of its own."""

    folder: Path
    progress: Progress | None
    version: RemoteVersion | None = None
    files: Sequence[adapters_pb2.DownloadVersionResponse.File] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def whole(self) -> bool:
        return self.version is not None and self.size == self.total

    def request(self, reference: str) -> adapters_pb2.DownloadVersionRequest:
        """What is still to come; an alias is asked for once, and may move then."""
        if self.version is None:
            return adapters_pb2.DownloadVersionRequest(reference=reference)
        file = next(file for file in self.files if self.sizes[file.name] < file.size)
        return adapters_pb2.DownloadVersionRequest(
            reference=self.version.reference, file=file.name, offset=self.sizes[file.name]
        )

    def add(self, message: adapters_pb2.DownloadVersionResponse) -> None:
        if message.HasField("manifest"):
            self._begin(message.manifest)
            return
        chunk = message.chunk
        if chunk.offset != self.sizes.get(chunk.file, -1):
            raise DigestMismatchError(f"found bytes of {chunk.file!r} from {chunk.offset} on, which are not the next")
        with self._open(chunk.file) as stream:
            stream.write(chunk.data)
        self.hashes[chunk.file].update(chunk.data)
        self.sizes[chunk.file] += len(chunk.data)
        if self.progress is not None:
            self.progress(self.size, self.total)

    def publish(self, folder: Path) -> None:
        """Verify all, and move it to where it was asked for."""
        from lorafleet.adapters.streaming import folder_digest

        for file in self.files:
            if (found := self.hashes[file.name].hexdigest()) != file.sha256:
                raise DigestMismatchError(f"{file.name}: found the SHA-256 {found}, expected {file.sha256}; try again")
        assert self.version is not None
        if (digest := folder_digest(self.folder)) != self.version.digest:
            raise DigestMismatchError(
                f"the weights that came have the digest {digest}, {self.version.reference} has {self.version.digest}; "
                "nothing was written"
            )
        names = [file.name for file in self.files]
        for name in set(FILES) - set(names):
            (folder / name).unlink(missing_ok=True)  # an earlier version's: it would be taken for this one's
        for name in names:
            (self.folder / name).replace(folder / name)

    def remove(self) -> None:
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            self.folder.rmdir()

    def _begin(self, manifest: adapters_pb2.DownloadVersionResponse.Manifest) -> None:
        if self.version is not None:
            if list(manifest.files) != list(self.files):
                raise DigestMismatchError("the server sends other files than before; start the download again")
            return
        if unknown := {file.name for file in manifest.files} - set(FILES):
            raise InvalidInputError(f"found the files {sorted(unknown)}, expected only: {', '.join(FILES)}")
        self.version, self.files = _version(manifest.version), list(manifest.files)
        self.sizes = {file.name: 0 for file in self.files}
        self.hashes = {file.name: hashlib.sha256() for file in self.files}
        self.folder.mkdir()

    def _open(self, name: str) -> BinaryIO:
        return open(self.folder / name, "ab", buffering=0)


def _files(folder: Path) -> list[adapters_pb2.UploadFile]:
    """What of a folder is sent, with sizes and digests."""
    found = []
    for name in FILES:
        path = folder / name
        if not path.is_file():
            if name in FILES[:2]:
                raise NotFoundError(f"{path} is missing: {folder} is no adapter folder in PEFT format")
            continue
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = os.fstat(stream.fileno()).st_size
        if size or name in FILES[:3]:  # an empty README is none
            found.append(adapters_pb2.UploadFile(name=name, size=size, sha256=digest))
    return found


def _request_id(adapter: str, files: Sequence[adapters_pb2.UploadFile], *, base: str, licence: str) -> str:
    """The same for the same version to be, in whatever process; 64 hex digits, the longest that a server takes."""
    what = [adapter, base, licence, [[file.name, file.size, file.sha256] for file in files]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


_STATES: Final[Mapping[int, VersionState]] = {
    adapters_pb2.VERSION_STATE_STAGED: "staged",
    adapters_pb2.VERSION_STATE_EVALUATED: "evaluated",
    adapters_pb2.VERSION_STATE_QUARANTINED: "quarantined",
    adapters_pb2.VERSION_STATE_RETIRED: "retired",
}


def _seconds(message: Any) -> float:
    """The float that the server's Timestamp was made of: its nanoseconds are finer than such floats are."""
    return float(message.create_time.seconds + message.create_time.nanos / 1e9)


def _adapter(found: adapters_pb2.Adapter) -> RemoteAdapter:
    return RemoteAdapter(found.name, found.base, found.base_digest, found.federation, _seconds(found))


def _version(found: adapters_pb2.Version) -> RemoteVersion:
    made = found.lineage
    members = made.members if made.HasField("members") else None
    lineage = RemoteLineage(made.federation, made.round, made.rule, tuple(made.parents), made.parent_count, members)
    return RemoteVersion(
        reference=found.reference,
        number=found.number,
        digest=found.digest,
        base_digest=found.base_digest,
        rank=found.rank,
        parameters=found.parameters,
        state=_STATES[found.state],
        created_at=_seconds(found),
        licence=found.licence,
        lineage=lineage if found.HasField("lineage") else None,
        aliases=tuple(found.aliases),
    )
