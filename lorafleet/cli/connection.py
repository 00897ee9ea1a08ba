"""How commands reach a running server: its address, the caller's key, TLS."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorafleet.adapters_client import AdapterClient
    from lorafleet.api_client import ClientTls, RouterClient

KEY_VARIABLE = "LORAFLEET_API_KEY"

ServerAddress = Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="A server's gRPC address.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar=KEY_VARIABLE,
        show_envvar=True,
        help="Says whose call it is. Other users of this machine see command lines: prefer the variable or the file.",
    ),
]
ApiKeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="The same from a file, which wins.")
]
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="How long the whole call may take.")
]
TlsAuthority = Annotated[
    Path | None, typer.Option("--tls-ca", metavar="FILE", help="Use TLS, and trust this authority's certificates.")
]
TlsCertificate = Annotated[
    Path | None, typer.Option("--tls-cert", metavar="FILE", help="One's own, for servers that ask for one.")
]
TlsKey = Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="Its private key.")]


def read_key(path: Path) -> str:
    """The key in a file: its first line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise typer.BadParameter(f"{path} holds no API key, expected one in its first line")
    return lines[0].strip()


def connect(
    server: str,
    *,
    api_key: str | None,
    api_key_file: Path | None,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    timeout: float,
) -> RouterClient:
    from lorafleet.api_client import RouterClient

    key, tls = _given_key(api_key, api_key_file), _given_tls(tls_ca, tls_cert, tls_key)
    return RouterClient(server, key=key, timeout_s=timeout, tls=tls)


def adapter_client(
    server: str,
    *,
    api_key: str | None,
    api_key_file: Path | None,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    timeout: float,
) -> AdapterClient:
    from lorafleet.adapters_client import AdapterClient

    key, tls = _given_key(api_key, api_key_file), _given_tls(tls_ca, tls_cert, tls_key)
    return AdapterClient(server, key=key, timeout_s=timeout, tls=tls)


def _given_key(api_key: str | None, api_key_file: Path | None) -> str:
    key = read_key(api_key_file) if api_key_file is not None else api_key
    if key is None:
        raise typer.BadParameter(f"no API key: give --api-key or --api-key-file, or set {KEY_VARIABLE}")
    return key


def _given_tls(authority: Path | None, certificate: Path | None, private_key: Path | None) -> ClientTls | None:
    from lorafleet.api_client import ClientTls

    secured = any((authority, certificate, private_key))
    return ClientTls(authority=authority, certificate=certificate, private_key=private_key) if secured else None
