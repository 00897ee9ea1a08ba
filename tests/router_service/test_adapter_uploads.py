"""Uploads over a real server: broken off, resumed, damaged, bounded."""

from __future__ import annotations

import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from lorafleet import adapters_client
from lorafleet.adapters import LoraAdapter
from lorafleet.adapters_client import AdapterClient
from lorafleet.errors import (
    AdapterFormatError,
    BaseMismatchError,
    CallsFullError,
    DigestMismatchError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
)
from lorafleet.proto.registry.v1 import adapters_pb2
from lorafleet.router_service.adapters import downloads, service
from lorafleet.router_service.adapters.transfers import TransferLimits, Transfers
from lorafleet.router_service.adapters.uploads import AnnouncedFile, UploadLimits, Uploads
from lorafleet.router_service.server import Server
from tests.registry.test_concurrency import at_once
from tests.registry.test_import import tmpfs
from tests.router_service.adapter_callers import BOTH, Adapters, Raw, adapters, announced, folder, raw, refusal
from tests.router_service.conftest import Experts, Fleet, Serve
from tests.waiting import wait_until

__all__ = ["adapters", "folder", "raw"]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """Where the servers of a test keep uploads."""
    return tmp_path / "uploads"


@pytest.fixture
def server(serve: Serve, staged: Path, fleet: Fleet) -> Server:
    """With an adapter ``acme/sql`` that has no versions."""
    fleet.registry.create_adapter("acme", "sql", base="small")
    return serve(uploads=staged)


def durable(upload: adapters_pb2.Upload, name: str = WEIGHTS) -> int:
    (size,) = (file.durable_size for file in upload.files if file.name == name)
    return int(size)


def digests(fleet: Fleet) -> list[str]:
    return [version.digest for version in fleet.registry.versions("acme", "sql")]


def left(staged: Path) -> list[Path]:
    """All files and folders of uploads."""
    return [path for tenant in staged.iterdir() for path in tenant.iterdir()]


# Broken off


def test_an_upload_goes_on_from_any_byte_also_on_another_server(
    server: Server, serve: Serve, raw: Callable[..., Raw], fleet: Fleet, folder: Path, staged: Path, experts: Experts
) -> None:
    weights, draw = (folder / WEIGHTS).read_bytes(), random.Random(7)
    cuts = sorted({0, 1, len(weights) - 1, *(draw.randrange(len(weights)) for _ in range(8))})
    one = raw(server)
    upload = one.start(folder).id
    for number, (begin, end) in enumerate(zip(cuts, [*cuts[1:], len(weights)], strict=True)):
        if number == len(cuts) // 2:
            server.stop()
            server = serve(uploads=staged)
            one = raw(server)
        assert durable(one.GetUpload(upload=upload).upload) == begin
        assert durable(one.send(upload, (WEIGHTS, begin, weights[begin:end]))) == end
    whole = one.send(upload, *((n, 0, (folder / n).read_bytes()) for n in (CONFIG, "README.md")))
    assert all(file.durable_size == file.size for file in whole.files)
    assert one.FinishUpload(upload=upload).version.digest == experts.digits.digest
    assert digests(fleet) == [experts.digits.digest]


def test_a_call_that_is_broken_off_leaves_what_had_come(
    server: Server, raw: Callable[..., Raw], fleet: Fleet, folder: Path
) -> None:
    weights, one = (folder / WEIGHTS).read_bytes(), raw(server)
    upload = one.start(folder).id
    arrived = threading.Event()

    def pieces() -> Iterator[adapters_pb2.UploadChunksRequest]:
        for offset in (0, 100):
            yield adapters_pb2.UploadChunksRequest(
                upload=upload, file=WEIGHTS, offset=offset, data=weights[offset : offset + 100]
            )
        arrived.wait(30)

    call = one.begin_chunks(pieces())
    while durable(one.GetUpload(upload=upload).upload) < 200:
        pass
    call.cancel()
    arrived.set()
    assert durable(one.send(upload, (WEIGHTS, 200, weights[200:]))) == len(weights)


def test_the_client_goes_on_by_itself_when_the_server_comes_back(
    server: Server, serve: Serve, fleet: Fleet, folder: Path, staged: Path, experts: Experts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(adapters_client, "LEG_BYTES", 4096)
    monkeypatch.setattr(adapters_client, "CHUNK_BYTES", 1000)
    address, waits = server.address, []

    def come_back(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            serve(uploads=staged, address=address)
        grpc.channel_ready_future(client._connection.channel).result(timeout=30)

    def stop_once(done: int, _total: int) -> None:
        if done and not waits:
            server.stop()

    key = fleet.token("acme", *BOTH)
    with AdapterClient(address, key=key, timeout_s=30.0, sleep=come_back, draw=lambda: 1.0) as client:
        assert client.upload("acme/sql", folder, progress=stop_once).digest == experts.digits.digest
        assert waits == [0.4]
        waits.clear()
        out = folder.parent / "out"
        done: list[int] = []

        def stop_again(size: int, _total: int) -> None:
            done.append(size)

        assert client.download("acme/sql", out, progress=stop_again).digest == LoraAdapter.load(out).digest
        assert done == sorted(done)


def test_a_client_tries_for_minutes_what_it_has_begun_and_nothing_else(
    server: Server, fleet: Fleet, folder: Path
) -> None:
    waits: list[float] = []
    key = fleet.token("acme", *BOTH)
    with AdapterClient(
        server.address, key=key, clock=lambda: sum(waits), sleep=waits.append, draw=lambda: 1.0
    ) as client:
        with pytest.raises(UnavailableError):
            client.upload("acme/sql", folder, progress=lambda *_: server.stop())
        assert waits[:7] == [0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
        assert 300.0 <= sum(waits) < 310.0
        waits.clear()
        for call in (lambda: client.upload("acme/sql", folder), lambda: client.download("acme/sql", folder)):
            with pytest.raises(UnavailableError, match="no server answers"):
                call()
        assert waits == []


def test_a_finished_upload_gives_its_version_again(
    server: Server, raw: Callable[..., Raw], fleet: Fleet, folder: Path, staged: Path
) -> None:
    one = raw(server)
    upload = one.start(folder, request_id="r-1")
    one.send_all(upload.id, folder)
    first = one.FinishUpload(upload=upload.id, licence="MIT").version
    assert one.FinishUpload(upload=upload.id).version == first
    again = one.start(folder, request_id="r-1")
    assert (again.id, again.version) == (upload.id, "acme/sql:1")
    assert [file.durable_size for file in again.files] == [file.size for file in again.files]
    assert len(digests(fleet)) == 1
    assert [path.name for path in left(staged)[0].iterdir()] == ["manifest.json"]
    assert one.send(upload.id, (CONFIG, 0, b"x")) == again  # whoever sent the rest, too, is told that all is there
    assert refusal(one.send, upload.id, (CONFIG, 2**20, b"x"))[0] == grpc.StatusCode.INVALID_ARGUMENT
    one.CancelUpload(upload=upload.id)
    assert (one.start(folder, request_id="r-1").version, len(digests(fleet))) == ("", 1)


class KilledError(BaseException):
    """In the place of a signal: nothing of the client runs after it."""


@pytest.fixture
def small_legs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the weights go in a dozen calls."""
    monkeypatch.setattr(adapters_client, "LEG_BYTES", 4096)
    monkeypatch.setattr(adapters_client, "CHUNK_BYTES", 1000)


def killed_at(client: AdapterClient, folder: Path, least: int) -> int:
    """Ends an upload when so many bytes are durable; gives how many were."""
    reached = []

    def die(done: int, _total: int) -> None:
        if done >= least:
            reached.append(done)
            raise KilledError

    with pytest.raises(KilledError):
        client.upload("acme/sql", folder, progress=die)
    return reached[0]


def killed_before_it_said_so(client: AdapterClient, folder: Path) -> None:
    """Ends an upload between the answer that it is a version and its caller."""

    def die(_upload: object) -> None:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(client, "_cancel", die)
        client.upload("acme/sql", folder)


@pytest.mark.usefixtures("small_legs")
def test_another_client_goes_on_with_the_same_files_and_with_no_others(
    server: Server, adapters: Adapters, fleet: Fleet, folder: Path, staged: Path
) -> None:
    done: list[int] = []

    def begun(**options: str) -> int:
        """Where an upload begins that is killed there."""
        done.clear()
        with pytest.raises(KilledError):
            adapters(server).upload("acme/sql", folder, progress=note, **options)
        return done[0]

    def note(size: int, _total: int) -> None:
        done.append(size)
        raise KilledError

    sent = killed_at(adapters(server), folder, 10_000)
    assert begun() == sent
    assert begun(licence="MIT") == begun(base="small") == 0
    card = (folder / "README.md").read_bytes()
    (folder / "README.md").write_bytes(card + b"more\n")
    assert begun() == 0
    (folder / "README.md").write_bytes(card)
    assert adapters(server).upload("acme/sql", folder, progress=lambda size, _: done.append(size)).number == 1
    assert done[1] == sent
    assert len(left(staged)) == 3  # those that nobody went on with


@pytest.mark.usefixtures("small_legs")
def test_an_upload_whose_end_nobody_was_told_gives_its_version_once(
    server: Server, adapters: Adapters, fleet: Fleet, folder: Path, staged: Path
) -> None:
    killed_before_it_said_so(adapters(server), folder)
    assert len(digests(fleet)) == 1
    done: list[int] = []
    told = adapters(server).upload("acme/sql", folder, progress=lambda *sizes: done.extend(sizes))
    assert (told.number, len(set(done))) == (1, 1)  # nothing was sent
    assert left(staged) == []
    assert adapters(server).upload("acme/sql", folder).number == 2


@pytest.mark.parametrize("verb", ["retire", "quarantine"])
def test_files_of_a_version_that_is_out_of_use_are_another_version(
    server: Server, adapters: Adapters, fleet: Fleet, folder: Path, verb: str
) -> None:
    client = adapters(server)
    killed_before_it_said_so(client, folder)
    getattr(client, verb)("acme/sql:1")
    assert client.upload("acme/sql", folder).reference == "acme/sql:2"


@pytest.mark.usefixtures("small_legs")
@pytest.mark.parametrize("told", [True, False], ids=["told", "killed"])
def test_an_upload_that_another_client_ends_meanwhile_ends_too(
    server: Server, adapters: Adapters, fleet: Fleet, folder: Path, experts: Experts, told: bool
) -> None:
    one, other = adapters(server), adapters(server)
    ended: list[str] = []

    def end(done: int, _total: int) -> None:
        if done >= 10_000 and not ended:
            ended.append("by the other")
            if told:
                assert other.upload("acme/sql", folder).number == 1
            else:
                killed_before_it_said_so(other, folder)

    assert one.upload("acme/sql", folder, progress=end).number == (2 if told else 1)
    assert ended and set(digests(fleet)) == {experts.digits.digest}


@pytest.mark.parametrize("published", [True, False], ids=["after it was published", "before"])
def test_a_server_that_dies_while_it_publishes_makes_one_version(
    server: Server, raw: Callable[..., Raw], fleet: Fleet, folder: Path, staged: Path, published: bool
) -> None:
    one = raw(server)
    upload = one.start(folder)
    one.send_all(upload.id, folder)
    with Uploads(staged).finishing("acme", upload.id) as held:
        held.begin(0)
        if published:
            card = (folder / "README.md").read_bytes().decode()
            fleet.registry.import_version("acme", "sql", held.folder, licence="MIT", card=card)
    assert one.FinishUpload(upload=upload.id, licence="MIT").version.number == 1
    assert len(digests(fleet)) == 1


def test_a_server_that_stops_cuts_an_upload_off_but_not_the_version_that_it_is_being_made(
    server: Server,
    serve: Serve,
    raw: Callable[..., Raw],
    fleet: Fleet,
    folder: Path,
    staged: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, make, done = raw(server), fleet.registry.import_version, list[str]()
    upload = one.start(folder).id
    one.send_all(upload, folder)
    answered = threading.Event()

    def stop() -> None:
        server.stop()
        done.append("stopped")

    stopping = threading.Thread(target=stop, daemon=True)

    def slowly(*arguments: Any, **named: Any) -> Any:
        stopping.start()
        assert answered.wait(30.0)
        version = make(*arguments, **named)
        done.append("made")
        return version

    monkeypatch.setattr(fleet.registry, "import_version", slowly)
    code, _ = refusal(lambda: one.FinishUpload(upload=upload))
    answered.set()
    stopping.join(30.0)
    assert (code, done) == (grpc.StatusCode.UNAVAILABLE, ["made", "stopped"])
    assert raw(serve(uploads=staged)).FinishUpload(upload=upload).version.number == 1
    assert len(digests(fleet)) == 1


# Pieces that are not the next


def test_pieces_may_come_twice_and_overlap_but_leave_no_gap(
    server: Server, raw: Callable[..., Raw], folder: Path
) -> None:
    weights, one = (folder / WEIGHTS).read_bytes(), raw(server)
    upload = one.start(folder).id
    assert durable(one.send(upload, *[(WEIGHTS, 0, weights[:300])] * 2, (WEIGHTS, 200, weights[200:500]))) == 500
    for piece, words in (
        ((WEIGHTS, 501, b"x"), "expected them from 500"),
        ((WEIGHTS, len(weights), b"x"), "as announced"),
        ((WEIGHTS, 2**63, b"x"), "as announced"),
        (("gates.safetensors", 0, b"x"), "expected one of the files that were announced"),
        (("../../registry.db", 0, b"x"), "expected one of the files that were announced"),
    ):
        code, said = refusal(one.send, upload, piece)
        assert code == grpc.StatusCode.INVALID_ARGUMENT and words in said
    other = one.start(folder).id
    messages = [adapters_pb2.UploadChunksRequest(upload=name, file=CONFIG) for name in (upload, other)]
    assert "two uploads" in refusal(one.UploadChunks, *messages)[1]
    assert "no message" in refusal(one.UploadChunks)[1]
    assert durable(one.GetUpload(upload=upload).upload) == 500


def test_a_file_that_is_not_the_one_announced_is_asked_for_again(
    server: Server, raw: Callable[..., Raw], fleet: Fleet, folder: Path
) -> None:
    weights, one = bytearray((folder / WEIGHTS).read_bytes()), raw(server)
    upload = one.start(folder).id
    one.send(upload, (CONFIG, 0, (folder / CONFIG).read_bytes()), ("README.md", 0, (folder / "README.md").read_bytes()))
    weights[1000] ^= 1
    code, words = refusal(one.send, upload, (WEIGHTS, 0, bytes(weights)))
    assert code == grpc.StatusCode.DATA_LOSS and "send the file again" in words
    standing = one.GetUpload(upload=upload).upload
    assert (durable(standing), durable(standing, CONFIG)) == (0, (folder / CONFIG).stat().st_size)
    code, words = refusal(lambda: one.FinishUpload(upload=upload))
    assert code == grpc.StatusCode.INVALID_ARGUMENT and "send the rest" in words
    weights[1000] ^= 1
    one.send(upload, (WEIGHTS, 0, bytes(weights)))
    assert one.FinishUpload(upload=upload).version.number == 1


def test_a_file_that_changes_while_it_is_sent_is_sent_a_few_times_and_leaves_nothing(
    server: Server, adapters: Adapters, fleet: Fleet, folder: Path, staged: Path
) -> None:
    path = folder / WEIGHTS

    def flip(done: int, _total: int) -> None:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ (1 + bool(done))]))

    with pytest.raises(DigestMismatchError, match=r"adapter_model\.safetensors"):
        adapters(server).upload("acme/sql", folder, progress=flip)
    assert (left(staged), digests(fleet)) == ([], [])


# What can never be a version


def flipped(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    **{f"cut at {size}": (WEIGHTS, lambda data, size=size: data[:size]) for size in (1, 7, 8, 9, 300, -1)},
    **{f"flipped at {position}": (WEIGHTS, flipped(position)) for position in (0, 5, 8, 60, 200)},
    "longer": (WEIGHTS, lambda data: data + b"\0"),
    "nan": (WEIGHTS, lambda data: data[:-4] + b"\xff\xff\xff\xff"),
    "header of 2 GiB": (WEIGHTS, lambda data: (2**31).to_bytes(8, "little") + data[8:]),
    "no JSON": (CONFIG, lambda data: data[:-3]),
    "another kind": (CONFIG, lambda data: data.replace(b'"LORA"', b'"IA3"')),
    "another base": (CONFIG, lambda data: re.sub(rb'(_or_path": )"[^"]*"', rb'\1"sha256:' + b"07e7" * 16 + b'"', data)),
    "no text": ("README.md", lambda data: b"\xff\xfe"),
}


def test_damaged_files_are_refused_by_kind_and_leave_nothing(
    server: Server, adapters: Adapters, fleet: Fleet, folder: Path, staged: Path
) -> None:
    client, revision = adapters(server), fleet.registry.revision()
    for kind, (name, damage) in DAMAGES.items():
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(damage(whole))
        assert (folder / name).read_bytes() != whole, kind
        expected = {"another base": BaseMismatchError, "no text": InvalidInputError}.get(kind, AdapterFormatError)
        with pytest.raises(expected) as caught:
            client.upload("acme/sql", folder)
        assert str(staged) not in str(caught.value), kind
        assert (left(staged), digests(fleet)) == ([], []), kind
        (folder / name).write_bytes(whole)
    assert fleet.registry.revision() == revision
    assert client.upload("acme/sql", folder).number == 1


def test_two_uploads_of_the_same_content_at_once_are_two_versions(
    server: Server, adapters: Adapters, fleet: Fleet, folder: Path, experts: Experts
) -> None:
    clients = [adapters(server), adapters(server)]
    versions = at_once(lambda n: clients[n].upload("acme/sql", folder, request_id=f"r-{n}"), threads=2)
    assert sorted(version.number for version in versions) == [1, 2]
    assert digests(fleet) == [experts.digits.digest] * 2


# Bounds


def test_an_announcement_that_can_be_no_adapter_is_refused(
    server: Server, raw: Callable[..., Raw], folder: Path, staged: Path
) -> None:
    files, one = {file.name: file for file in announced(folder)}, raw(server)
    config, weights = files[CONFIG], files[WEIGHTS]

    def changed(file: adapters_pb2.UploadFile, **fields: Any) -> adapters_pb2.UploadFile:
        copy = adapters_pb2.UploadFile()
        copy.CopyFrom(file)
        for name, value in fields.items():
            setattr(copy, name, value)
        return copy

    for wrong, words in (
        ([], "found the files none"),
        ([config], "expected adapter_config.json and"),
        ([config, weights, weights], "once"),
        ([config, weights, changed(config, name="../x")], "expected only: adapter_config.json"),
        ([config, weights, changed(config, name="adapter_model.bin")], "expected only"),
        ([config, changed(weights, size=0)], "expected 1 to"),
        ([config, changed(weights, size=2**63)], "expected 1 to"),
        ([changed(config, size=2**20 + 1), weights], "expected 1 to 1048576"),
        ([config, weights, changed(files["README.md"], size=2**16 + 1)], "expected 1 to 65536"),
        ([config, changed(weights, size=2 * 2**30)], "this server's limit"),
        ([config, changed(weights, sha256="x" * 64)], "64 lower-case hex digits"),
    ):
        code, said = refusal(lambda wrong=wrong: one.StartUpload(adapter="acme/sql", files=wrong))  # type: ignore[misc]
        assert code == grpc.StatusCode.INVALID_ARGUMENT and words in said
    code, said = refusal(lambda: one.start(folder, request_id="no spaces"))
    assert code == grpc.StatusCode.INVALID_ARGUMENT and "request_id" in said
    assert left(staged) == []


def test_a_tenant_stages_so_much_and_no_more(
    serve: Serve, raw: Callable[..., Raw], fleet: Fleet, folder: Path, staged: Path
) -> None:
    fleet.registry.create_adapter("acme", "sql", base="small")
    size = sum(path.stat().st_size for path in folder.iterdir())

    def begun(limits: UploadLimits) -> tuple[int, str]:
        """How many uploads begin before one is refused, and with what words."""
        one, ids = raw(serve(uploads=staged, upload_limits=limits)), []
        words = ""
        while not words:
            try:
                ids.append(one.start(folder).id)
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                words = error.details()
        if ids:
            one.CancelUpload(upload=ids[0])  # makes room for another one
            one.start(folder)
        for path in left(staged):
            Uploads(staged).cancel("acme", path.name)
        return len(ids), words

    assert begun(UploadLimits(tenant_uploads=3))[0] == 3
    assert begun(UploadLimits(tenant_bytes=2 * size))[0] == 2
    number, words = begun(UploadLimits(spare_bytes=2**60))
    assert (number, "no room" in words) == (0, True)


def test_calls_that_move_weights_are_bounded_for_a_tenant_and_for_all(
    serve: Serve, raw: Callable[..., Raw], fleet: Fleet, folder: Path, staged: Path
) -> None:
    fleet.registry.create_adapter("acme", "sql", base="small")
    server = serve(uploads=staged, transfer_limits=TransferLimits(calls=2, tenant_calls=1))
    one, other = raw(server), raw(server, "rival")
    upload, go_on = one.start(folder).id, threading.Event()

    def pieces() -> Iterator[adapters_pb2.UploadChunksRequest]:
        yield adapters_pb2.UploadChunksRequest(upload=upload, file=CONFIG, data=b"{")
        go_on.wait(30)

    call = one.begin_chunks(pieces())
    while durable(one.GetUpload(upload=upload).upload, CONFIG) == 0:
        pass
    code, words = refusal(one.send, upload, (WEIGHTS, 0, b"x"))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "of this tenant" in words
    assert refusal(other.send, upload, (WEIGHTS, 0, b"x"))[0] == grpc.StatusCode.NOT_FOUND
    go_on.set()
    assert call.result().upload.id == upload
    one.send(upload, (CONFIG, 0, b"{"))


def test_a_call_that_sends_nothing_any_more_is_ended(
    serve: Serve, raw: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_TICK_S", 0.05)
    one = raw(serve(transfer_limits=TransferLimits(idle_s=0.1)))
    go_on = threading.Event()

    def nothing() -> Iterator[adapters_pb2.UploadChunksRequest]:
        go_on.wait(30)
        yield from ()

    assert one.begin_chunks(nothing()).code() == grpc.StatusCode.CANCELLED
    go_on.set()


def test_a_download_that_nobody_reads_is_ended_and_its_place_is_free(
    serve: Serve, raw: Callable[..., Raw], fleet: Fleet, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of it than lies between a caller and the server, long before the call's deadline."""
    monkeypatch.setattr(service, "_TICK_S", 0.05)
    monkeypatch.setattr(service.downloads, "opened", large)
    fleet.add("acme/sql", experts.other)
    one = raw(serve(transfer_limits=TransferLimits(idle_s=0.2, tenant_calls=1)))
    closed.clear()
    call = one.DownloadVersion(reference="acme/sql")
    assert next(call).HasField("manifest")
    assert closed.wait(10.0)
    assert next(one.DownloadVersion(reference="acme/sql")).HasField("manifest")
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call:
            pass
    assert caught.value.code() == grpc.StatusCode.CANCELLED


closed = threading.Event()


@contextmanager
def large(_registry: object, _version: object) -> Iterator[list[downloads.OpenFile]]:
    """A version of 64 MiB; ``closed`` tells that it was closed."""
    try:
        yield [downloads.OpenFile(WEIGHTS, BytesIO(bytes(2**26)), 2**26, "0" * 64)]
    finally:
        closed.set()


@pytest.mark.usefixtures("small_legs")
@pytest.mark.parametrize("when", ["at first", "half-way", "at the end"])
def test_an_upload_waits_for_a_place_among_the_calls_that_move_weights(
    serve: Serve, raw: Callable[..., Raw], fleet: Fleet, folder: Path, experts: Experts, when: str
) -> None:
    fleet.registry.create_adapter("acme", "sql", base="small")
    server = serve(transfer_limits=TransferLimits(tenant_calls=1))
    one, go_on, waits, held = raw(server), threading.Event(), list[float](), list[Any]()
    other = one.start(folder, request_id="other").id

    def pieces() -> Iterator[adapters_pb2.UploadChunksRequest]:
        yield adapters_pb2.UploadChunksRequest(upload=other, file=CONFIG, data=b"{")
        go_on.wait(30)

    def take_the_place(done: int, total: int) -> None:
        if not held and done >= {"at first": 0, "half-way": total // 2, "at the end": total}[when]:
            held.append(one.begin_chunks(pieces()))
            wait_until(lambda: durable(one.GetUpload(upload=other).upload, CONFIG) > 0)

    def leave_it(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            go_on.set()
            held[0].result()

    key = fleet.token("acme", *BOTH)
    with AdapterClient(server.address, key=key, timeout_s=30.0, sleep=leave_it, draw=lambda: 1.0) as client:
        assert client.upload("acme/sql", folder, progress=take_the_place).digest == experts.digits.digest
    assert waits == [0.4, 0.8, 1.6]


def test_an_upload_waits_for_a_place_for_minutes_and_no_longer(
    serve: Serve, raw: Callable[..., Raw], fleet: Fleet, folder: Path
) -> None:
    fleet.registry.create_adapter("acme", "sql", base="small")
    server, waits = serve(transfer_limits=TransferLimits(calls=0)), list[float]()
    with (
        AdapterClient(
            server.address,
            key=fleet.token("acme", *BOTH),
            clock=lambda: sum(waits),
            sleep=waits.append,
            draw=lambda: 1.0,
        ) as client,
        pytest.raises(CallsFullError, match="calls of this tenant that move weights"),
    ):
        client.upload("acme/sql", folder)
    assert 300.0 <= sum(waits) < 310.0


def test_a_transfer_in_which_nothing_moves_is_ended_and_one_that_waits_for_us_is_not() -> None:
    now, ended = [0.0], []
    transfers = Transfers(TransferLimits(calls=4, tenant_calls=2, idle_s=30.0), clock=lambda: now[0])
    with (
        transfers.enter("a", lambda: ended.append("idle")),
        transfers.enter("a", lambda: ended.append("moving")) as moving,
        transfers.enter("b", lambda: ended.append("working")) as working,
    ):
        with pytest.raises(OverloadedError, match="2 calls of this tenant"):
            transfers.enter("a", list).__enter__()
        with working.working():
            now[0] = 29.0
            moving.moved()
            now[0] = 31.0
            transfers.end_idle()
        assert ended == ["idle"]
        now[0] = 59.5
        transfers.end_idle()
    assert sorted(ended) == ["idle", "idle", "moving"]
    with transfers.enter("a", list), transfers.enter("a", list):
        pass


# A disk without room


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with tmpfs(tmp_path / "disk", 2**20):
        yield tmp_path / "disk"


def fill(disk: Path, *, free: int = 0) -> None:
    """Until so many bytes are left of it: another program's file."""
    with (disk / "filler").open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.ftruncate(file.fileno(), file.tell() - free)


@pytest.fixture
def server_on_disk(serve: Serve, fleet: Fleet, disk: Path) -> Server:
    fleet.registry.create_adapter("acme", "sql", base="small")
    return serve(uploads=disk / "uploads", upload_limits=UploadLimits(spare_bytes=0))


@pytest.mark.parametrize("pages", [0, 1, 3])
def test_an_upload_on_a_disk_that_fills_goes_on_when_there_is_room(
    server_on_disk: Server, adapters: Adapters, fleet: Fleet, folder: Path, disk: Path, experts: Experts, pages: int
) -> None:
    client, done = adapters(server_on_disk), list[int]()
    for free in (4096 * pages, 0):  # the second one goes on, and finds what the first one did
        with pytest.raises(OverloadedError, match="disk is full"):
            client.upload("acme/sql", folder, progress=lambda *_, free=free: fill(disk, free=free))
        assert (digests(fleet), len(left(disk / "uploads"))) == ([], 1)
    (disk / "filler").unlink()
    version = client.upload("acme/sql", folder, progress=lambda size, _: done.append(size))
    assert version.digest == experts.digits.digest and bool(done[0]) == bool(pages)
    assert (len(digests(fleet)), left(disk / "uploads")) == (1, [])


@pytest.mark.parametrize("published", [True, False], ids=["after it was published", "before"])
def test_a_disk_that_fills_while_a_version_is_made_leaves_one_or_none(
    server_on_disk: Server, raw: Callable[..., Raw], fleet: Fleet, folder: Path, disk: Path, published: bool
) -> None:
    one = raw(server_on_disk)
    upload = one.start(folder)
    one.send_all(upload.id, folder)
    if published:
        with Uploads(disk / "uploads").finishing("acme", upload.id) as held:
            held.begin(0)
            card = (folder / "README.md").read_bytes().decode()
            fleet.registry.import_version("acme", "sql", held.folder, card=card)
            fill(disk)
            with pytest.raises(OverloadedError, match="disk is full"):
                held.done(1)
    else:
        fill(disk)
        code, words = refusal(lambda: one.FinishUpload(upload=upload.id))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "disk is full" in words
    assert len(digests(fleet)) == published
    (disk / "filler").unlink()
    assert one.FinishUpload(upload=upload.id).version.number == 1
    assert len(digests(fleet)) == 1


def test_an_announcement_that_finds_the_disk_full_leaves_nothing_and_a_cancelled_upload_makes_room(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads(disk / "uploads", UploadLimits(spare_bytes=0))
    before = uploads.start("acme", "sql", FILES)
    uploads.write("acme", before.id, CONFIG, 0, b"abcd")
    fill(disk)
    with pytest.raises(OverloadedError, match="no room"):
        uploads.start("acme", "sql", FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))  # it fills right after
    with pytest.raises(OverloadedError, match="disk is full"):
        uploads.start("acme", "sql", FILES)
    assert [path.name for path in left(disk / "uploads")] == [before.id]
    uploads.cancel("acme", before.id)
    assert uploads.start("acme", "sql", FILES).durable == (0, 0)


# On the disk


FILES = [AnnouncedFile(name, 4, "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589") for name in (
    CONFIG, WEIGHTS)]  # fmt: skip
"""Each of them is ``abcd``."""


def test_an_upload_expires_after_a_day_whatever_it_became(tmp_path: Path) -> None:
    now = [1000.0]
    uploads = Uploads(tmp_path, clock=lambda: now[0])
    kept = uploads.start("acme", "sql", FILES, request_id="same")
    now[0] += 86399.0
    assert uploads.get("acme", kept.id).expires_at == 87400.0
    uploads.sweep()
    assert len(left(tmp_path)) == 1
    now[0] += 1.0
    with pytest.raises(LookupError):
        uploads.get("acme", kept.id)
    again = uploads.start("acme", "sql", FILES, request_id="same")
    assert (again.id, again.expires_at) == (kept.id, 87400.0 + 86400.0)
    now[0] += 90000.0
    (tmp_path / "acme" / ".half").mkdir()
    uploads.sweep()
    assert left(tmp_path) == []


DAMAGED = pytest.mark.parametrize("manifest", [b"{", b"\xff", b"[]", b"{}", b'{"files": [], "id": 1}', None])


@DAMAGED
def test_an_upload_whose_manifest_cannot_be_read_is_in_nobodys_way_and_goes_when_it_is_old(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, manifest: bytes | None
) -> None:
    now = [1000.0]
    uploads = Uploads(tmp_path, UploadLimits(kept_s=100.0), clock=lambda: now[0])
    unreadable, _expired = uploads.start("acme", "sql", FILES), uploads.start("acme", "sql", FILES)
    place = tmp_path / "acme" / unreadable.id
    (place / "manifest.json").unlink()
    if manifest is None:
        (place / "manifest.json").mkdir()
    else:
        (place / "manifest.json").write_bytes(manifest)
    os.utime(place, (1050.0, 1050.0))
    now[0] += 60.0
    kept = uploads.start("acme", "sql", FILES)
    now[0] += 89.0
    for _ in range(2):
        uploads.sweep()
    assert {path.name for path in left(tmp_path)} == {unreadable.id, kept.id}
    [line] = caplog.messages
    assert f"acme/{unreadable.id}" in line
    with pytest.raises(UnavailableError, match=unreadable.id):
        uploads.get("acme", unreadable.id)
    now[0] += 1.0
    uploads.sweep()
    assert {path.name for path in left(tmp_path)} == {kept.id}


def test_hashes_are_forgotten_with_their_upload_whoever_ended_it(tmp_path: Path) -> None:
    now = [1000.0]
    one, other = (Uploads(tmp_path, clock=lambda: now[0]) for _ in range(2))
    cancelled, finished, expired, going_on = (one.start("acme", "sql", FILES) for _ in range(4))
    for upload in (cancelled, finished, expired, going_on):
        one.write("acme", upload.id, CONFIG, 0, b"abcd")
    other.cancel("acme", cancelled.id)
    other.write("acme", finished.id, WEIGHTS, 0, b"abcd")
    with other.finishing("acme", finished.id) as staged:
        staged.begin(0)
        staged.done(1)
    one.sweep()
    assert {upload_id for _, upload_id, _ in one._hashes} == {expired.id, going_on.id}
    now[0] += 86400.0
    one.sweep()
    assert not one._hashes and not other._hashes


def test_an_upload_needs_room_for_what_it_is_copied_and_written_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads, free = Uploads(tmp_path, UploadLimits(spare_bytes=100)), [131]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    with pytest.raises(OverloadedError, match="no room"):
        uploads.start("acme", "sql", FILES)  # 8 bytes
    free[0] += 1
    assert uploads.start("acme", "sql", FILES).durable == (0, 0)


def test_who_asks_for_an_upload_that_is_worked_on_keeps_nobody_from_starting_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads(tmp_path, wait_s=0.1)
    upload = uploads.start("acme", "sql", FILES, request_id="same")
    others: list[str] = []

    def and_start(tenant: str, upload_id: str) -> None:
        others.append(Uploads(tmp_path, wait_s=0.0).start("rival", "sql", FILES).id)
        raise UnavailableError("another call works on it")

    monkeypatch.setattr(uploads, "get", and_start)
    with pytest.raises(UnavailableError):
        uploads.start("acme", "sql", FILES, request_id="same")
    assert len(others) == 1 and others[0] != upload.id


def test_an_upload_is_announced_anew_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(tmp_path)
    upload = uploads.start("acme", "sql", FILES, request_id="same")
    rmtree = shutil.rmtree

    def meanwhile(path: Path, **options: bool) -> None:
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        assert uploads.start("acme", "sql", FILES, request_id="same").id == upload.id
        uploads.write("acme", upload.id, CONFIG, 0, b"ab")
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", meanwhile)
    uploads.cancel("acme", upload.id)
    assert uploads.get("acme", upload.id).durable == (2, 0)
    assert [path.name for path in left(tmp_path)] == [upload.id]


def test_what_is_staged_is_its_owners_alone(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "u")
    upload = uploads.start("acme", "sql", FILES)
    uploads.write("acme", upload.id, CONFIG, 0, b"ab")
    for path in [tmp_path / "u", *(tmp_path / "u").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_another_process_on_the_same_folder_goes_on_and_hashes_all_of_it(tmp_path: Path) -> None:
    one, other = Uploads(tmp_path, wait_s=0.01), Uploads(tmp_path)
    upload = one.start("acme", "sql", FILES)
    for uploads, offset, data in ((one, 0, b"a"), (other, 1, b"b"), (one, 2, b"c"), (other, 3, b"d")):
        uploads.write("acme", upload.id, CONFIG, offset, data)
    assert other.get("acme", upload.id).durable == (4, 0)
    one.write("acme", upload.id, WEIGHTS, 0, b"abc")
    with pytest.raises(DigestMismatchError):
        other.write("acme", upload.id, WEIGHTS, 3, b"x")
    one.write("acme", upload.id, WEIGHTS, 0, b"abcd")
    with other.finishing("acme", upload.id) as staged:
        assert (staged.folder / WEIGHTS).read_bytes() == b"abcd"
        with pytest.raises(UnavailableError, match="another call"):
            one.cancel("acme", upload.id)
