"""The RPCs of lorafleet.registry.v1.AdapterService: a shell around the registry, uploads and downloads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Final

from lorafleet.adapters.format import CARD_NAME
from lorafleet.adapters.streaming import folder_digest
from lorafleet.errors import BaseMismatchError, InvalidInputError, NotFoundError
from lorafleet.proto.registry.v1 import adapters_pb2, adapters_pb2_grpc
from lorafleet.registry import Registry, cards
from lorafleet.registry.records import CHAMPION, Adapter, Key, Version
from lorafleet.registry.references import Reference, not_found, parse_reference
from lorafleet.router_service import access
from lorafleet.router_service.adapters import downloads, messages
from lorafleet.router_service.adapters.paging import last_before, page_size, token_after
from lorafleet.router_service.adapters.transfers import Transfer, TransferLimits, Transfers
from lorafleet.router_service.adapters.uploads import Staged, Uploads
from lorafleet.router_service.grpc_blocking import Blocking

_TICK_S: Final = 5.0
_SWEEP_TICKS: Final = 12
_LONGEST_LICENCE: Final = 200
_PAGE_BYTES: Final = 2**20
"""Of a list's messages, but for one that alone has more: clients of gRPC take 4 MiB."""
_READ_VERSIONS: Final = 25
"""Rows at a time, as one may have the digests of 10,000 parents: 18 MB of them."""
_log = logging.getLogger(__name__)


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Callers were checked before (:mod:`lorafleet.router_service.grpc_door`); whose adapters they may see or change is
    checked here, before anything is looked for by its name.
    """

    def __init__(
        self, registry: Registry, uploads: Uploads, transfers: TransferLimits | None = None, *, base_digest: str
    ) -> None:
        """``base_digest`` is of the base that new adapters are for where their makers name none."""
        self._registry, self._uploads, self._base_digest = registry, uploads, base_digest
        limits = transfers or TransferLimits()
        self.most_transfers = limits.calls
        """At the same time; each has a thread."""
        self._transfers = Transfers(limits)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_house, name="lorafleet-uploads", daemon=True)

    def start(self) -> None:
        """Removes uploads that expired, then and from time to time; ends calls in which nothing moves."""
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    # What there is

    def CreateAdapter(
        self, request: adapters_pb2.CreateAdapterRequest, context: Blocking
    ) -> adapters_pb2.CreateAdapterResponse:
        key = context.key
        named = _own_adapter(key, request.name)
        base = request.base or self._base_digest
        made = self._registry.create_adapter(named.tenant, named.adapter, base=base, by=key.key_id)
        return adapters_pb2.CreateAdapterResponse(adapter=messages.adapter(made, reader=key.tenant))

    def GetAdapter(self, request: adapters_pb2.GetAdapterRequest, context: Blocking) -> adapters_pb2.GetAdapterResponse:
        key = context.key
        found = self._visible_adapter(key, request.name)
        shown = messages.adapter(found, reader=key.tenant, origins=self._origins(key, found.tenant))
        return adapters_pb2.GetAdapterResponse(adapter=shown)

    def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Blocking
    ) -> adapters_pb2.ListAdaptersResponse:
        tenant, size, last = context.key.tenant, page_size(request.page_size), last_before(request.page_token)
        live = self._registry.live(tenant)
        names = {(version.tenant, version.adapter) for version in live}
        names |= {(tenant, own.name) for own in self._registry.adapters(tenant)}  # also those without versions
        after = tuple(last.split("/", 1))
        rest = sorted(name for name in names if name > after and request.tenant in ("", name[0]))
        page, origins = rest[:size], _with_lineage(live)
        found = [self._registry.adapter(*name) for name in page]
        return adapters_pb2.ListAdaptersResponse(
            adapters=[messages.adapter(adapter, reader=tenant, origins=origins) for adapter in found],
            next_page_token=token_after("/".join(page[-1])) if len(rest) > size else "",
        )

    def ListVersions(
        self, request: adapters_pb2.ListVersionsRequest, context: Blocking
    ) -> adapters_pb2.ListVersionsResponse:
        key, size, last = context.key, page_size(request.page_size), last_before(request.page_token)
        if last and not (last.isdecimal() and len(last) < 10):
            raise InvalidInputError("found a page_token of another list, expected this one's")
        adapter = self._visible_adapter(key, request.adapter)
        aliases = self._registry.aliases(adapter.tenant, adapter.name, shown_to=key.tenant)
        origins = self._origins(key, adapter.tenant)
        page, page_bytes, token = list[adapters_pb2.Version](), 0, ""
        for version in self._listed(key, adapter, after=int(last or 0), limit=min(size + 1, _READ_VERSIONS)):
            shown = messages.version(version, reader=key.tenant, aliases=aliases, origins=origins)
            page_bytes += shown.ByteSize()
            if page and (len(page) == size or page_bytes > _PAGE_BYTES):
                token = token_after(str(page[-1].number))
                break
            page.append(shown)
        return adapters_pb2.ListVersionsResponse(versions=page, next_page_token=token)

    def GetVersion(self, request: adapters_pb2.GetVersionRequest, context: Blocking) -> adapters_pb2.GetVersionResponse:
        key, registry = context.key, self._registry
        found = self._visible_version(key, request.reference)
        origins = self._origins(key, found.tenant)
        # Whose texts they are of is for who owns it.
        evaluations = registry.evaluations(found) if found.tenant == key.tenant else ()
        aliases = registry.aliases(found.tenant, found.adapter, shown_to=key.tenant)
        return adapters_pb2.GetVersionResponse(
            version=messages.version(found, reader=key.tenant, aliases=aliases, origins=origins, with_parents=True),
            base_licence=registry.base(found.base_digest).licence,
            evaluations=[messages.evaluation(evaluation) for evaluation in evaluations],
            card=registry.card(found),
        )

    # Which version is used

    def PromoteVersion(
        self, request: adapters_pb2.PromoteVersionRequest, context: Blocking
    ) -> adapters_pb2.PromoteVersionResponse:
        key = context.key
        named = _own(key, request.reference)
        if not (named.alias or named.number):
            raise InvalidInputError(f"found {request.reference!r}, expected a reference with a number or an alias")
        version, alias = self._registry.resolve(request.reference), request.alias or CHAMPION
        made = self._registry.promote(version, alias, force=request.force, by=key.key_id)
        return messages.promotion(made, reader=key.tenant)

    def RollbackAlias(
        self, request: adapters_pb2.RollbackAliasRequest, context: Blocking
    ) -> adapters_pb2.RollbackAliasResponse:
        key = context.key
        named = _own_adapter(key, request.adapter)
        alias = request.alias or CHAMPION
        number = self._registry.rollback(named.tenant, named.adapter, alias, by=key.key_id)
        return adapters_pb2.RollbackAliasResponse(number=number)

    def RetireVersion(
        self, request: adapters_pb2.RetireVersionRequest, context: Blocking
    ) -> adapters_pb2.RetireVersionResponse:
        key = context.key
        changed = self._registry.retire(self._numbered(key, request.reference), by=key.key_id)
        return adapters_pb2.RetireVersionResponse(version=messages.version(changed, reader=key.tenant))

    def QuarantineVersion(
        self, request: adapters_pb2.QuarantineVersionRequest, context: Blocking
    ) -> adapters_pb2.QuarantineVersionResponse:
        key = context.key
        done = self._registry.quarantine(self._numbered(key, request.reference), by=key.key_id)
        return messages.quarantined(done, reader=key.tenant)

    def RestoreVersion(
        self, request: adapters_pb2.RestoreVersionRequest, context: Blocking
    ) -> adapters_pb2.RestoreVersionResponse:
        key = context.key
        changed = self._registry.restore(self._numbered(key, request.reference), by=key.key_id)
        return adapters_pb2.RestoreVersionResponse(version=messages.version(changed, reader=key.tenant))

    def RecordEvaluation(
        self, request: adapters_pb2.RecordEvaluationRequest, context: Blocking
    ) -> adapters_pb2.RecordEvaluationResponse:
        key = context.key
        version = self._numbered(key, request.reference)
        self._registry.evaluate(version, loss=request.loss, tokens=request.tokens, by=key.key_id)
        return adapters_pb2.RecordEvaluationResponse()

    # Weights in

    def StartUpload(
        self, request: adapters_pb2.StartUploadRequest, context: Blocking
    ) -> adapters_pb2.StartUploadResponse:
        key = context.key
        named = _own_adapter(key, request.adapter)
        adapter = self._registry.adapter(named.tenant, named.adapter)
        if request.base and request.base not in (adapter.base, adapter.base_digest):
            raise BaseMismatchError(
                f"{named} is for the base {adapter.base} ({adapter.base_digest}), found {request.base!r}; give the "
                "adapter another name"
            )
        files = messages.announced(request.files)
        upload = self._uploads.start(key.tenant, adapter.name, files, request_id=request.request_id)
        return adapters_pb2.StartUploadResponse(upload=messages.upload(upload))

    def UploadChunks(
        self, requests: Iterator[adapters_pb2.UploadChunksRequest], context: Blocking
    ) -> adapters_pb2.UploadChunksResponse:
        tenant, upload_id = context.key.tenant, None
        with self._transfers.enter(tenant, context.cancel) as transfer:
            for request in _noted(requests, transfer):
                if request.upload != (upload_id := request.upload if upload_id is None else upload_id):
                    raise InvalidInputError("found the ids of two uploads in a call, expected one")
                self._uploads.write(tenant, upload_id, request.file, request.offset, request.data)
            if upload_id is None:
                raise InvalidInputError("the call has no message, expected at least one")
            with transfer.working():
                upload = self._uploads.get(tenant, upload_id)
        return adapters_pb2.UploadChunksResponse(upload=messages.upload(upload))

    def GetUpload(self, request: adapters_pb2.GetUploadRequest, context: Blocking) -> adapters_pb2.GetUploadResponse:
        upload = self._uploads.get(context.key.tenant, request.upload)
        return adapters_pb2.GetUploadResponse(upload=messages.upload(upload))

    def FinishUpload(
        self, request: adapters_pb2.FinishUploadRequest, context: Blocking
    ) -> adapters_pb2.FinishUploadResponse:
        key = context.key
        licence = request.licence
        if len(licence) > _LONGEST_LICENCE or not licence.isprintable():
            raise InvalidInputError(
                f"found a licence of {len(licence)} characters, expected at most {_LONGEST_LICENCE} printable ones"
            )
        with (
            self._transfers.enter(key.tenant, context.cancel) as transfer,
            transfer.working(),
            self._uploads.finishing(key.tenant, request.upload) as staged,
        ):
            number = staged.upload.version
            if number is None:
                number = self._publish(key, staged, licence, request.card)
        version = self._registry.version(key.tenant, staged.upload.adapter, number)
        return adapters_pb2.FinishUploadResponse(version=messages.version(version, reader=key.tenant))

    def CancelUpload(
        self, request: adapters_pb2.CancelUploadRequest, context: Blocking
    ) -> adapters_pb2.CancelUploadResponse:
        self._uploads.cancel(context.key.tenant, request.upload)
        return adapters_pb2.CancelUploadResponse()

    # Weights out

    def DownloadVersion(
        self, request: adapters_pb2.DownloadVersionRequest, context: Blocking
    ) -> Iterator[adapters_pb2.DownloadVersionResponse]:
        answer = adapters_pb2.DownloadVersionResponse
        key = context.key
        # To use another tenant's adapter is not to have its weights.
        _own(key, request.reference)
        version = self._registry.resolve(request.reference)
        with ExitStack() as stack:
            transfer = stack.enter_context(self._transfers.enter(key.tenant, context.cancel))
            with transfer.working():
                files = stack.enter_context(downloads.opened(self._registry, version))
            parts = downloads.from_where(files, request.file, request.offset)
            described = [answer.File(name=file.name, size=file.size, sha256=file.sha256) for file in files]
            yield answer(
                manifest=answer.Manifest(version=messages.version(version, reader=key.tenant), files=described)
            )
            for file, begin in parts:
                for offset, data in file.chunks(begin):
                    transfer.moved()
                    yield answer(chunk=answer.Chunk(file=file.name, offset=offset, data=data))

    # What they share

    def _visible_adapter(self, key: Key, name: str) -> Adapter:
        """An adapter that the caller may use; the same words, and the same time, for a missing and a foreign one."""
        named = parse_reference(name)
        if named.alias or named.number:
            raise InvalidInputError(f"found {name!r}, expected TENANT/ADAPTER, without an alias or a number")
        if named.tenant != key.tenant:
            live = {(version.tenant, version.adapter) for version in self._registry.live(key.tenant)}
            if (named.tenant, named.adapter) not in live:
                raise not_found(f"adapter {named}")
        return self._registry.adapter(named.tenant, named.adapter)

    def _visible_version(self, key: Key, reference: str) -> Version:
        """What a reference gives, where the caller may use it; the same answer otherwise."""
        named = parse_reference(reference)
        if named.tenant == key.tenant:
            return self._registry.resolve(reference)
        try:
            return access.visible(self._registry, key.tenant, reference)
        except NotFoundError:
            raise not_found(f"version {named}") from None

    def _origins(self, key: Key, owner: str) -> set[tuple[str, str]]:
        """Of another tenant's adapters those of which the caller may know which federation made them: its tenant has,
        or had, a member there."""
        if owner == key.tenant:
            return set()
        return _with_lineage(self._registry.live(key.tenant))

    def _listed(self, key: Key, adapter: Adapter, *, after: int, limit: int) -> Iterator[Version]:
        """An adapter's versions above a number that the caller may know of, by number, read ``limit`` at a time.

        Nothing of the others is left to be seen: pages are cut after this.
        """
        usable_by = None if adapter.tenant == key.tenant else key.tenant
        name = (adapter.tenant, adapter.name)
        while found := self._registry.versions(*name, after=after, limit=limit, usable_by=usable_by):
            yield from found
            if len(found) < limit:
                return
            after = found[-1].number

    def _numbered(self, key: Key, reference: str) -> Version:
        """A version of the caller's own, in whatever state."""
        named = _own(key, reference)
        if named.number is None:
            raise InvalidInputError(f"found {reference!r}, expected TENANT/ADAPTER:NUMBER")
        return self._registry.version(named.tenant, named.adapter, named.number)

    def _publish(self, key: Key, staged: Staged, licence: str, card: str) -> int:
        """Make a whole upload a version, once, also where a server died after it had."""
        upload, registry = staged.upload, self._registry
        card = _card(staged, card)
        number = None
        try:
            if upload.newest is None:
                staged.begin(registry.newest_number(upload.tenant, upload.adapter))
            else:
                number = self._published(staged, upload.newest, licence, card)
            if number is None:
                number = registry.import_version(
                    upload.tenant, upload.adapter, staged.folder, licence=licence, card=card, by=key.key_id
                ).number
        except (InvalidInputError, BaseMismatchError) as error:
            words = str(error).replace(f"{staged.folder}/", "")  # this disk's folders are nobody's to know
            staged.drop()  # its bytes are those that were announced: sent again they would be no better
            raise type(error)(words) from None
        staged.done(number)
        return number

    def _published(self, staged: Staged, newest: int, licence: str, card: str) -> int | None:
        """The version that an attempt before made, whose end nobody wrote down; None where it made none.

        It is told by all that it would have. Of two equal uploads it may be the other one's: whoever asks gets what
        was sent.
        """
        upload, registry = staged.upload, self._registry
        later = registry.versions(upload.tenant, upload.adapter, after=newest)
        if not later:
            return None
        digest = folder_digest(staged.folder)
        same = (v for v in later if (v.digest, v.licence, registry.card(v)) == (digest, licence, card))
        return next((version.number for version in same), None)

    def _keep_house(self) -> None:
        ticks = 0
        while True:
            try:
                if ticks % _SWEEP_TICKS == 0:
                    self._uploads.sweep()
                self._transfers.end_idle()
            except Exception:
                _log.exception("uploads cannot be looked after; trying again")
            if self._stop.wait(_TICK_S):
                return
            ticks += 1


def _with_lineage(live: Sequence[Version]) -> set[tuple[str, str]]:
    return {(version.tenant, version.adapter) for version in live if version.lineage is not None}


def _own(key: Key, reference: str) -> Reference:
    """A reference to an adapter of the caller's tenant; any other is answered before anything is looked for."""
    named = parse_reference(reference)
    if named.tenant != key.tenant:
        raise not_found(f"version {named}")
    return named


def _own_adapter(key: Key, name: str) -> Reference:
    named = parse_reference(name)
    if named.alias or named.number:
        raise InvalidInputError(f"found {name!r}, expected TENANT/ADAPTER, without an alias or a number")
    if named.tenant != key.tenant:
        raise not_found(f"adapter {named}")
    return named


def _card(staged: Staged, card: str) -> str:
    """The model card, of the request or of a file among those that were sent."""
    path = staged.folder / CARD_NAME
    if not path.exists():
        return cards.check(card)
    if card:
        raise InvalidInputError(f"found a card and a file {CARD_NAME}, expected at most one of the two")
    try:
        return cards.check(path.read_bytes().decode())
    except UnicodeDecodeError:
        staged.drop()
        raise InvalidInputError(f"{CARD_NAME} is not UTF-8; convert it, and send the files again") from None


def _noted(
    requests: Iterator[adapters_pb2.UploadChunksRequest], transfer: Transfer
) -> Iterator[adapters_pb2.UploadChunksRequest]:
    """A call's messages; each one tells that it moves."""
    for request in requests:
        transfer.moved()
        yield request
