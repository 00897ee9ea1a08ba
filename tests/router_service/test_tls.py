from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from lorafleet.api_client import ClientTls, RouterClient
from lorafleet.errors import InvalidInputError, UnavailableError
from lorafleet.router_service import grpc_server
from lorafleet.router_service.http import server as http_server
from lorafleet.router_service.server import Server
from lorafleet.router_service.tls import Tls
from tests.router_service.certificates import Authority
from tests.router_service.conftest import Fleet, Serve


def adapters(server: Server, fleet: Fleet, tls: ClientTls | None) -> int:
    with RouterClient(server.address, key=fleet.token("acme"), timeout_s=10.0, tls=tls) as client:
        return len(client.list_adapters())


def test_both_doors_are_encrypted_and_only_a_trusted_server_is_asked(
    serve: Serve, fleet: Fleet, tmp_path: Path
) -> None:
    authority = Authority(tmp_path, "ours")
    server = serve(address="0.0.0.0:0", http_address="127.0.0.1:0", tls=Tls(*authority.issue("server")))
    server_port = server.address.rpartition(":")[2]
    with RouterClient(
        f"127.0.0.1:{server_port}", key=fleet.token("acme"), timeout_s=10.0, tls=ClientTls(authority.file)
    ) as client:
        assert client.list_adapters() == []
    trusted = ssl.create_default_context(cafile=str(authority.file))
    assert httpx.get(f"https://{server.http_address}/health", verify=trusted).status_code == 200
    other = Authority(tmp_path, "another")
    for tls in (None, ClientTls(other.file)):
        with pytest.raises(UnavailableError):
            adapters(server, fleet, tls)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"https://{server.http_address}/health", verify=ssl.create_default_context(cafile=str(other.file)))


def test_with_an_authority_for_clients_a_key_alone_is_not_enough(serve: Serve, fleet: Fleet, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    certificate, private_key = authority.issue("server")
    server = serve(tls=Tls(certificate, private_key, authority.file))
    assert adapters(server, fleet, ClientTls(authority.file, *authority.issue("client"))) == 0
    with pytest.raises(UnavailableError):
        adapters(server, fleet, ClientTls(authority.file))
    with pytest.raises(UnavailableError):
        adapters(server, fleet, ClientTls(authority.file, *Authority(tmp_path, "another").issue("stranger")))


def test_files_that_do_not_belong_together_are_refused_before_anything_listens(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    certificate, private_key = authority.issue("server")
    for files in (
        (certificate, authority.issue("other")[1]),
        (tmp_path / "absent", private_key),
        (certificate, private_key, private_key),
    ):
        with pytest.raises(InvalidInputError, match="PEM"):
            Tls(*files)


def test_a_clients_certificate_needs_its_key(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="both or neither"):
        RouterClient("127.0.0.1:1", key="k", tls=ClientTls(certificate=tmp_path / "x"))


def test_who_begins_no_handshake_is_cut_off(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_HANDSHAKE_S", 0.2)
    monkeypatch.setattr(grpc_server, "_HANDSHAKE_MS", 200)
    server = serve(http_address="127.0.0.1:0", tls=Tls(*Authority(tmp_path, "ours").issue("server")))
    assert server.http_address is not None
    for address in (server.http_address, server.address):
        host, port = address.rsplit(":", 1)
        with (
            socket.create_connection((host, int(port)), timeout=5.0) as connection,
            suppress(ConnectionResetError),
        ):
            assert connection.recv(1) == b""
