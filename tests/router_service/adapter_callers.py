"""Callers of AdapterService: the client, and the stubs themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from lorafleet.adapters_client import AdapterClient
from lorafleet.proto.registry.v1 import adapters_pb2, adapters_pb2_grpc
from lorafleet.router_service.server import Server
from tests.router_service.conftest import Experts, Fleet, bearer

BOTH = ("adapters:read", "adapters:write")

Adapters = Callable[..., AdapterClient]


@pytest.fixture
def adapters(fleet: Fleet) -> Iterator[Adapters]:
    """Clients with a key of a tenant for both scopes; waits between tries take no time."""
    with ExitStack() as stack:

        def client(server: Server | str, *, tenant: str = "acme", scopes: tuple[str, ...] = BOTH) -> AdapterClient:
            address = server if isinstance(server, str) else server.address
            key = fleet.token(tenant, *scopes)
            return stack.enter_context(AdapterClient(address, key=key, timeout_s=30.0, sleep=lambda _s: None))

        yield client


@pytest.fixture
def folder(experts: Experts, tmp_path: Path) -> Path:
    """An adapter as PEFT wrote it, with a card."""
    experts.digits.save(tmp_path / "digits")
    (tmp_path / "digits" / "README.md").write_bytes("# Digits\r\n\r\nGröße: 4\n".encode())
    return tmp_path / "digits"


def announced(folder: Path, **changes: dict[str, Any]) -> list[adapters_pb2.UploadFile]:
    """A folder's files as they are; ``changes`` by the first word of a file's name."""
    return [
        adapters_pb2.UploadFile(
            **{
                "name": path.name,
                "size": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                **changes.get(path.name.partition(".")[0], {}),
            }
        )
        for path in sorted(folder.iterdir())
    ]


class Raw:
    """The stubs themselves, as one tenant."""

    def __init__(self, channel: grpc.Channel, token: str) -> None:
        self._stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        self._metadata = bearer(token)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        kind = getattr(adapters_pb2, f"{name}Request")

        def call(*pieces: Any, **fields: Any) -> Any:
            request = iter(pieces) if name == "UploadChunks" else kind(**fields)
            return getattr(self._stub, name)(request, metadata=self._metadata, timeout=30)

        return call

    def begin_chunks(self, pieces: Iterator[adapters_pb2.UploadChunksRequest]) -> Any:
        """A call that runs, with its ``result`` and ``cancel``."""
        return self._stub.UploadChunks.future(pieces, metadata=self._metadata, timeout=30)

    def start(self, folder: Path, *, request_id: str = "", **changes: dict[str, Any]) -> adapters_pb2.Upload:
        files = announced(folder, **changes)
        return self.StartUpload(adapter="acme/sql", files=files, request_id=request_id).upload

    def send(self, upload: str, *pieces: tuple[str, int, bytes]) -> adapters_pb2.Upload:
        """``(file, offset, data)`` each."""
        messages = [adapters_pb2.UploadChunksRequest(upload=upload, file=f, offset=o, data=d) for f, o, d in pieces]
        return self.UploadChunks(*messages).upload

    def send_all(self, upload: str, folder: Path) -> adapters_pb2.Upload:
        return self.send(upload, *((path.name, 0, path.read_bytes()) for path in sorted(folder.iterdir())))


@pytest.fixture
def raw(fleet: Fleet) -> Iterator[Callable[..., Raw]]:
    with ExitStack() as stack:

        def client(server: Server, tenant: str = "acme") -> Raw:
            channel = stack.enter_context(grpc.insecure_channel(server.address))
            return Raw(channel, fleet.token(tenant, *BOTH))

        yield client


def refusal(call: Callable[..., Any], *arguments: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    return caught.value.code(), caught.value.details()
