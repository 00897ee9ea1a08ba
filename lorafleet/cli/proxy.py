"""``lorafleet coordinator proxy``: what stands between members and a SuperLink."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from lorafleet.stopping import interruptible


def proxy(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where members come in; port 0 takes a free one.")],
    superlink: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The SuperLink, which should listen on loopback alone.")
    ],
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What members are shown, PEM; with --private-key.")
    ] = None,
    private_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Of the certificate, PEM.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve members without TLS, also where --listen is not loopback.")
    ] = False,
    root_certificates: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What the SuperLink's certificate is checked against. (default: no TLS where it is on loopback)",
        ),
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Let only nodes of its members pass, and accept invitations; with --blobs."),
    ] = None,
    blobs: Annotated[str | None, typer.Option(metavar="DIR|URL", help="The registry's weights.")] = None,
    max_request_mb: Annotated[int, typer.Option(min=1, help="Larger requests are refused.")] = 32,
) -> None:
    """Let members reach a SuperLink's Fleet API, and nothing else of it, until SIGTERM or SIGINT.

    Prints one line on stdout when it is ready: listening fleet=HOST:PORT
    """
    from lorafleet.coordinator.fleet_proxy import ProxySettings, run_proxy
    from lorafleet.coordinator.settings import is_loopback, without_tls

    if certificate is None and not insecure and not is_loopback(listen):
        raise typer.BadParameter(
            f"--listen {listen} may be reached from other machines: expected --certificate and --private-key, or "
            "--insecure"
        )
    if certificate is not None and insecure:
        raise typer.BadParameter("found --insecure together with --certificate: give one of the two")
    if (registry is None) != (blobs is None):
        raise typer.BadParameter("found one of --registry and --blobs, expected both")
    settings = ProxySettings(
        listen=listen,
        superlink=superlink,
        certificate=certificate,
        private_key=private_key,
        superlink_insecure=without_tls(superlink, insecure=None, root_certificates=root_certificates),
        root_certificates=root_certificates,
        max_request_bytes=max_request_mb << 20,
    )
    with contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
        store = None
        if registry is not None and blobs is not None:
            from lorafleet.registry.store import Registry

            store = stack.enter_context(Registry.open(registry, blobs))
        stack.enter_context(interruptible())
        run_proxy(settings, store, ready=lambda address: typer.echo(f"listening fleet={address}"))
