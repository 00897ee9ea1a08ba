"""``lorafleet serve``."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.cli import connection, stores
from lorafleet.errors import AlreadyExistsError, NotFoundError

if TYPE_CHECKING:
    from lorafleet.registry import Registry
    from lorafleet.router_service.trail import Begin

LOCAL_TENANT = "local"
_log = logging.getLogger(__name__)
OTLP_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
OTLP_TRACES_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
"""OpenTelemetry's own: the first is where a collector listens, the second its address for traces as it stands."""


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Router(StrEnum):
    likelihood = "likelihood"
    cards = "cards"
    both = "cards+likelihood"


class Dtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class LogFormat(StrEnum):
    text = "text"
    json = "json"


class LogLevel(StrEnum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def serve(
    base: Annotated[str, typer.Option(metavar="PATH|tiny", help="The base: a folder in HF format, or a shipped one.")],
    adapter: Annotated[
        list[str], typer.Option(metavar="NAME=DIR", help="Serve this folder in PEFT format as local/NAME; repeatable.")
    ] = [],  # noqa: B006 (Typer never changes a default)
    registry: Annotated[
        str | None, typer.Option(metavar="URL", help="Serve this registry. (default: a temporary one, tenant 'local')")
    ] = None,
    blobs: Annotated[str | None, typer.Option(metavar=stores.BLOBS_METAVAR, help=stores.BLOBS_HELP)] = None,
    grpc: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Loopback, or any with TLS; port 0 is a free one.")
    ] = "127.0.0.1:50051",
    http: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Of the OpenAI-compatible API, likewise; '' turns it off.")
    ] = "127.0.0.1:8000",
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="The key of the temporary registry's tenant; at least 16 characters. (default: a new one, on stderr)",
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The same from a file.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="TLS with this certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key.")] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="gRPC callers also show a certificate of this authority (mTLS)."),
    ] = None,
    insecure_any_address: Annotated[
        bool,
        typer.Option(
            "--insecure-any-address",
            help="Any address without TLS. Don't: whoever sees the network reads every caller's key and texts. Only "
            "for a network of its own behind something that ends TLS.",
        ),
    ] = False,
    device: Annotated[Device, typer.Option(help="auto: CUDA where there is a device.")] = Device.auto,
    dtype: Annotated[Dtype, typer.Option(help="auto: bfloat16 where the device multiplies it.")] = Dtype.auto,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for the model. (default: torch's)")] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Requests that run at a time; others wait.")] = 64,
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="Keys and values of so many tokens. (default: what free memory allows)")
    ] = None,
    adapter_mb: Annotated[
        int | None, typer.Option(min=1, help="Adapters' rows on the device, MB. (default: a share of what is free)")
    ] = None,
    host_mb: Annotated[
        int | None, typer.Option(min=0, help="Adapters' rows in host memory, MB. (default: a share of what is free)")
    ] = None,
    router: Annotated[
        Router,
        typer.Option(
            help="Who decides for `route` and the model auto: the model, adapters' model cards, or the model among "
            "those whose cards are nearest."
        ),
    ] = Router.likelihood,
    cost_model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `lorafleet bench kernels --fit` wrote on this machine.")
    ] = None,
    uploads: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where uploads lie until they are whole. (default: DIR/uploads of --blobs)"),
    ] = None,
    max_adapter_bytes: Annotated[
        int, typer.Option(min=1, help="The largest adapter that is taken over gRPC; a tenant may send two at a time.")
    ] = 2 * 2**30,
    log_format: Annotated[
        LogFormat, typer.Option(help="Of the log on stderr: lines, or a JSON object a line.")
    ] = LogFormat.text,
    log_level: Annotated[LogLevel | None, typer.Option(help="The least that is logged. (default: info)")] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar=OTLP_VARIABLE,
            show_envvar=True,
            help="Send traces to this collector (OTLP over HTTP, such as http://127.0.0.1:4318). (default: no traces)",
        ),
    ] = None,
) -> None:
    """Serve mixtures of adapters over gRPC and HTTP until SIGTERM or SIGINT.

    Callers need an API key: of `lorafleet key create` with --registry, otherwise --api-key's or the one on stderr.
    Prints one line on stdout when it is ready: listening grpc=HOST:PORT http=HOST:PORT
    """
    if (registry is None) != (blobs is None):
        raise typer.BadParameter("--registry and --blobs belong together: give both or neither")
    if registry is not None and adapter:
        raise typer.BadParameter(
            "--adapter is for a temporary registry; use `lorafleet adapter import` with --registry"
        )
    if registry is not None and (api_key or api_key_file):
        raise typer.BadParameter("--api-key is for a temporary registry; use `lorafleet key create` with --registry")
    if api_key and api_key_file:
        raise typer.BadParameter("give --api-key or --api-key-file, not both")
    if log_format is LogFormat.json and registry is None and not (api_key or api_key_file):
        raise typer.BadParameter("--log-format json needs --api-key-file: a new key would stand in the collected log")
    if (tls_cert is None) != (tls_key is None) or (client_ca is not None and tls_cert is None):
        raise typer.BadParameter("--tls-cert and --tls-key belong together, and --client-ca needs them")
    token = connection.read_key(api_key_file) if api_key_file is not None else api_key
    folders = stores.named_values(adapter, form="NAME=DIR")
    # Until the server has handlers of its own: leave through the clean-up below.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))

    import torch
    from transformers.utils.logging import disable_progress_bar

    from lorafleet.engine import Engine
    from lorafleet.registry import Registry
    from lorafleet.router_service import logs
    from lorafleet.router_service.adapters.uploads import UploadLimits
    from lorafleet.router_service.addresses import listen_address
    from lorafleet.router_service.server import Server, ServerConfig
    from lorafleet.router_service.server import serve as serve_until_signal
    from lorafleet.router_service.tls import Tls

    logs.set_up(sys.stderr, form=log_format.value, level=None if log_level is None else log_level.value)
    tls = None if tls_cert is None or tls_key is None else Tls(tls_cert, tls_key, client_ca)
    for address in filter(None, (grpc, http)):  # before the base is loaded
        listen_address(address, secured=tls is not None, anywhere=insecure_any_address)
    config = ServerConfig(
        address=grpc,
        http_address=http or None,
        tls=tls,
        insecure_any_address=insecure_any_address,
        router=router.value,
        uploads=uploads if uploads is not None or blobs is None or "://" in blobs else Path(blobs) / "uploads",
        upload_limits=UploadLimits(adapter_bytes=max_adapter_bytes, tenant_bytes=2 * max_adapter_bytes),
    )
    if not sys.stderr.isatty():
        disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    with ExitStack() as stack:
        begin = _tracing(stack, otlp_endpoint)
        if registry is None or blobs is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="lorafleet-")))
            store = stack.enter_context(Registry.open(f"sqlite:///{folder / 'registry.db'}", folder / "blobs"))
            _fill(store, base, folders, token)
        else:
            store = stack.enter_context(Registry.open(registry, blobs))
        loaded = Engine.load(
            base,
            device=device.value,
            dtype=dtype.value,
            max_sequences=max_sequences,
            max_batch_tokens=max(max_sequences, 1024),
            kv_tokens=kv_tokens,
            adapter_bytes=None if adapter_mb is None else adapter_mb * 10**6,
            host_bytes=None if host_mb is None else host_mb * 10**6,
            cost_model=cost_model,
        )
        engine = stack.enter_context(loaded)
        if registry is not None:
            _register_base(store, base, engine.base_digest)
        serve_until_signal(Server(engine, store, config, begin=begin))


def _tracing(stack: ExitStack, endpoint: str | None) -> Begin:
    """How calls' traces are begun, until the stack is left; OpenTelemetry is loaded only where there are any."""
    from lorafleet.router_service.trail import untraced

    url = os.environ.get(OTLP_TRACES_VARIABLE) or (endpoint.rstrip("/") + "/v1/traces" if endpoint else None)
    if url is None:
        return untraced
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"found {url!r} as --otlp-endpoint, expected a URL such as http://127.0.0.1:4318")
    from lorafleet.router_service.tracing import Tracing

    tracing = Tracing.over_http(url, service_name=os.environ.get("OTEL_SERVICE_NAME", "lorafleet"))
    stack.callback(tracing.close)
    return tracing.begin


def _register_base(registry: Registry, base: str, digest: str) -> None:
    """Enter the base that is served, and its modules' shapes, where the registry does not know them: adapters can be
    made for it then, and are checked when they come. One that is known, by whatever name, is not hashed again."""
    from lorafleet.adapters.base_shapes import base_shapes
    from lorafleet.assets import base_path

    try:
        known = registry.base(digest)
    except NotFoundError:
        try:
            stores.register_base(registry, base)
        except AlreadyExistsError as error:
            _log.warning("%s: adapters for it can be imported on this machine only", error)
        return
    registry.register_base(
        known.name,
        digest,
        architecture=known.architecture,
        parameters=known.parameters,
        shapes=base_shapes(base_path(base)),
    )


def _fill(registry: Registry, base: str, folders: list[tuple[str, str]], token: str | None) -> None:
    """The one tenant, its key and its adapters. The machine is the tenant's own: the key opens the metrics, too."""
    registry.create_tenant(LOCAL_TENANT)
    scopes = ("admin", "metrics")
    if token is None:
        issued = registry.create_key(LOCAL_TENANT, name="serve", scopes=scopes)
        typer.echo(f"API key of tenant {LOCAL_TENANT!r}, shown this once: {issued.token}", err=True)
    else:
        registry.add_key(LOCAL_TENANT, token, name="serve", scopes=scopes)
    record = stores.register_base(registry, base)
    for name, folder in folders:
        registry.import_version(LOCAL_TENANT, name, Path(folder), base=record.digest)


def openapi() -> None:
    """Print the description of the HTTP API: OpenAPI 3.1, as a server has it at /openapi.json."""
    from lorafleet.router_service.http.openapi import document_json

    typer.echo(document_json())
