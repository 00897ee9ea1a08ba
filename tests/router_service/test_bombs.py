"""What is small on the wire and large when it is unpacked, or says that it is: refused in bounded memory."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from lorafleet.errors import AdapterFormatError
from lorafleet.proto.router.v1 import router_pb2
from lorafleet.router_service import grpc_server
from lorafleet.router_service.server import Server
from tests.router_service.conftest import Experts, Fleet, Serve, bearer

GIB = 2**30
ROOM = 64 * 2**20
PATH = "/lorafleet.router.v1.RouterService/Generate"


@dataclass
class Memory:
    grown: int = 0
    """Bytes that this process had resident at most beyond what it had at first."""


@contextmanager
def watched_memory() -> Iterator[Memory]:
    """Looked at every millisecond; to unpack a gibibyte takes a second."""
    page, found, done = os.sysconf("SC_PAGE_SIZE"), Memory(), threading.Event()
    statm = os.open("/proc/self/statm", os.O_RDONLY)

    def resident() -> int:
        return int(os.pread(statm, 200, 0).split()[1]) * page

    first = resident()

    def look() -> None:
        while not done.wait(0.001):
            found.grown = max(found.grown, resident() - first)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        os.close(statm)


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """A gibibyte of zeros under gzip, in less than a mebibyte; whole, with the right checksum."""
    block, times = bytes(16 * 2**20), 64
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = 0
    for _ in range(times):
        checksum = zlib.crc32(block, checksum)
    end = zlib.compressobj(9, zlib.DEFLATED, -15).flush()
    whole = b"\x1f\x8b\x08" + bytes(6) + b"\xff" + packed * times + end + struct.pack("<II", checksum, GIB % 2**32)
    assert len(whole) < 2**20
    return whole


def test_the_memory_that_is_looked_for_would_be_seen(bomb: bytes) -> None:
    with watched_memory() as memory:
        unpacked = zlib.decompressobj(31).decompress(bomb, 2 * ROOM)
    assert memory.grown > ROOM and len(unpacked) == 2 * ROOM


@pytest.fixture
def server(fleet: Fleet, experts: Experts, serve: Serve) -> Server:
    fleet.add("acme/digits", experts.digits)
    return serve(http_address="127.0.0.1:0")


# HTTP


@pytest.mark.parametrize("how", ["content-encoding: gzip", "transfer-encoding: gzip, chunked"])
def test_a_packed_body_is_refused_and_never_unpacked(server: Server, fleet: Fleet, bomb: bytes, how: str) -> None:
    host, _, port = str(server.http_address).rpartition(":")
    length = "" if how.startswith("transfer") else f"content-length: {len(bomb)}\r\n"
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {fleet.token('acme')}\r\n"
        f"content-type: application/json\r\nconnection: close\r\n{how}\r\n{length}\r\n"
    )
    body = bomb if length else b"%x\r\n%s\r\n0\r\n\r\n" % (len(bomb), bomb)
    answer = b""
    with watched_memory() as memory, socket.create_connection((host, int(port)), timeout=30.0) as connection:
        with suppress(ConnectionError):  # what is refused need not be read
            connection.sendall(head.encode() + body)
        with suppress(ConnectionError):
            while part := connection.recv(65536):
                answer += part
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501")), answer
    assert memory.grown < ROOM


# gRPC


@dataclass
class Http2:
    """As much of HTTP/2 as sends one request, frame by frame; answers are not read, but for their end."""

    connection: socket.socket
    windows: list[int] = field(default_factory=lambda: [65535, 65535])
    """What may be sent: on the connection, and in the stream."""
    ended: bool = False

    def frame(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        self.connection.sendall(struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream))
        self.connection.sendall(payload)

    def begin(self, headers: dict[str, str]) -> None:
        self.connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.frame(4, 0, 0)
        self.frame(1, 4, 1, b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items()))

    def send(self, content: bytes) -> None:
        """Until all is sent, or the other side has ended the stream."""
        at = 0
        while at < len(content) and not self.ended:
            size = min(16384, *self.windows, len(content) - at)
            if size <= 0:
                self.read()
                continue
            last = at + size == len(content)
            self.frame(0, int(last), 1, content[at : at + size])
            self.windows = [window - size for window in self.windows]
            at += size

    def read(self) -> None:
        """One frame."""
        head = self._exactly(9)
        length, kind, flags = int.from_bytes(head[:3]), head[3], head[4]
        stream = int.from_bytes(head[5:]) & 0x7FFFFFFF
        payload = self._exactly(length)
        if kind == 8:  # WINDOW_UPDATE
            self.windows[min(stream, 1)] += int.from_bytes(payload) & 0x7FFFFFFF
        elif kind == 4 and not flags & 1:  # SETTINGS, of which one sets the window of streams
            for name, value in struct.iter_unpack(">HI", payload):
                if name == 4:
                    self.windows[1] += value - 65535
            self.frame(4, 1, 0)
        self.ended = self.ended or kind in (3, 7) or (kind in (0, 1) and stream == 1 and bool(flags & 1))

    def _exactly(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            part = self.connection.recv(size - len(found))
            if not part:
                raise ConnectionError("the server has closed the connection")
            found += part
        return found


def _text(text: str) -> bytes:
    """As HPACK has it, without Huffman's code and an index."""
    length = len(text)
    if length < 127:
        return bytes((length,)) + text.encode()
    assert length - 127 < 128
    return bytes((127, length - 127)) + text.encode()


def test_a_packed_message_is_refused_and_never_unpacked(server: Server, fleet: Fleet, bomb: bytes) -> None:
    """C-core unpacks until it has as many bytes as a message may have, and then refuses it."""
    host, _, port = server.address.rpartition(":")
    headers = {
        ":method": "POST", ":scheme": "http", ":path": PATH, ":authority": "x", "te": "trailers",
        "content-type": "application/grpc", "grpc-encoding": "gzip", "grpc-timeout": "30S",
        "authorization": f"Bearer {fleet.token('acme')}",
    }  # fmt: skip
    with watched_memory() as memory, socket.create_connection((host, int(port)), timeout=30.0) as connection:
        call = Http2(connection)
        call.begin(headers)
        assert not call.ended
        with suppress(ConnectionError):
            call.send(b"\x01" + struct.pack(">I", len(bomb)) + bomb)
            while not call.ended:
                call.read()
        time.sleep(0.1)  # for what the server may do after its answer
    assert memory.grown < ROOM


@pytest.mark.parametrize(
    ("characters", "code"),
    [(400, None), (grpc_server.MAX_REQUEST_BYTES, grpc.StatusCode.RESOURCE_EXHAUSTED)],
    ids=["a prompt", "too much"],
)
@pytest.mark.parametrize("packed", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_counts_as_it_is_unpacked(
    server: Server, fleet: Fleet, packed: grpc.Compression, characters: int, code: grpc.StatusCode | None
) -> None:
    request = router_pb2.RouteRequest(text="3" * characters)
    with grpc.insecure_channel(server.address) as channel:
        route = channel.unary_unary(PATH.replace("Generate", "Route"), router_pb2.RouteRequest.SerializeToString)
        try:
            route(request, metadata=bearer(fleet.token("acme")), timeout=30.0, compression=packed)
            found = None
        except grpc.RpcError as error:
            found = error.code()
    assert found == code


# Weights


@pytest.mark.parametrize("claimed", [2 * GIB, 2**63, 2**64 - 1, GIB])
@pytest.mark.parametrize("size", [64, 2 * ROOM], ids=["a short file", "a sparse one"])
def test_a_header_that_claims_too_much_is_refused(
    fleet: Fleet, experts: Experts, tmp_path: Path, claimed: int, size: int
) -> None:
    folder, registry = tmp_path / "adapter", fleet.registry
    experts.digits.save(folder)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", claimed) + b'{"a":')
        file.truncate(size)
    registry.create_adapter("acme", "sql", base=fleet.base_digest)
    with watched_memory() as memory, pytest.raises(AdapterFormatError):
        registry.import_version("acme", "sql", folder)
    assert memory.grown < ROOM
    assert registry.versions("acme", "sql") == []
