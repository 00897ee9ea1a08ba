"""The service around an engine and a registry: a gRPC server and, where it is asked for, an HTTP server."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Final

from lorafleet.engine import Engine
from lorafleet.registry import Registry
from lorafleet.router_service.adapters.service import AdapterService
from lorafleet.router_service.adapters.transfers import TransferLimits
from lorafleet.router_service.adapters.uploads import UploadLimits, Uploads
from lorafleet.router_service.addresses import listen_address
from lorafleet.router_service.admission import Admission
from lorafleet.router_service.answering import Answering
from lorafleet.router_service.authentication import Authenticator
from lorafleet.router_service.grpc_server import GrpcServer
from lorafleet.router_service.http.app import HttpApp
from lorafleet.router_service.http.server import HttpServer
from lorafleet.router_service.metering import Metering
from lorafleet.router_service.metrics import Metrics
from lorafleet.router_service.residency import Residency
from lorafleet.router_service.tls import Tls
from lorafleet.router_service.trail import Begin, untraced
from lorafleet.router_service.watcher import Watcher
from lorafleet.router_service.weights import Weights

SWITCH_S: Final = 0.0005
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    address: str = "127.0.0.1:0"
    """gRPC's, ``HOST:PORT``; port 0 takes a free one."""
    http_address: str | None = None
    """HTTP's; None: no HTTP."""
    tls: Tls | None = None
    """For both; without it addresses are loopback ones."""
    insecure_any_address: bool = False
    """Any address without TLS: callers' keys travel in the clear."""
    router: str = "likelihood"
    """A name in ``ROUTERS``; decides for ``Route`` and for the model ``auto``."""
    max_calls: int = 256
    """Generating and routing calls at the same time, over gRPC and HTTP together; one more is RESOURCE_EXHAUSTED. One
    tenant alone has three quarters of them (:class:`Admission`). What the engine has no room for waits in its queue."""
    longest_call_s: float = 600.0
    """gRPC callers have to set a deadline, at most this far away; over HTTP it is everyone's."""
    poll_interval_s: float = 0.5
    """How often the registry is looked at for new versions and revoked keys."""
    drain_s: float = 30.0
    """How long calls may go on after ``stop``; then they are cancelled."""
    uploads: Path | None = None
    """Where uploads are staged, on the disk of the weights for preference; None: in a folder that goes with the server,
    so that no upload outlives it."""
    upload_limits: UploadLimits = field(default_factory=UploadLimits)
    transfer_limits: TransferLimits = field(default_factory=TransferLimits)


class Server:
    """Serves RouterService, AdapterService, grpc.health.v1 and the HTTP API until stopped. Engine and registry stay
    their owner's to close; the engine's stepping thread has to run.
    """

    def __init__(
        self, engine: Engine, registry: Registry, config: ServerConfig | None = None, *, begin: Begin = untraced
    ) -> None:
        """``begin``: where traces of calls are kept."""
        config = config or ServerConfig()
        self._config = config
        self._host, self._port = self._listen_address(config.address)
        self._http_host, self._http_port = self._listen_address(config.http_address or "127.0.0.1:0")
        self._admission = Admission(config.max_calls)
        metrics = Metrics(engine)
        residency = Residency(engine, registry)
        authenticator = Authenticator(registry)
        self._metering = metering = Metering(registry)
        weights = Weights(registry)

        def changed() -> None:
            authenticator.forget()
            metering.forget()
            answering.forget()
            weights.renew()  # last: it reads, and may fail

        self._watcher = Watcher(engine, registry, residency, changed=changed, interval_s=config.poll_interval_s)
        answering = Answering(
            engine,
            registry,
            residency,
            self._admission,
            metering,
            router=config.router,
            follow=metrics.follow,
            weight_of=weights.of,
        )
        self._clean_up = ExitStack()
        uploads = config.uploads or Path(self._clean_up.enter_context(TemporaryDirectory(prefix="lorafleet-uploads-")))
        self._adapters = AdapterService(
            registry,
            Uploads(uploads, config.upload_limits),
            config.transfer_limits,
            base_digest=engine.base_digest,
        )
        self._grpc = GrpcServer(
            answering,
            self._adapters,
            authenticator,
            max_calls=config.max_calls,
            longest_call_s=config.longest_call_s,
            begin=begin,
        )
        self._http: HttpServer | None = None
        if config.http_address is not None:
            app = HttpApp(
                answering,
                authenticator,
                metrics,
                max_calls=config.max_calls,
                longest_call_s=config.longest_call_s,
                begin=begin,
            )
            self._http = HttpServer(app, max_calls=config.max_calls)

    @property
    def address(self) -> str:
        """gRPC's ``HOST:PORT`` as bound; the port is known after ``start``."""
        return f"{self._host}:{self._port}"

    @property
    def http_address(self) -> str | None:
        """HTTP's, or None."""
        return f"{self._http_host}:{self._http_port}" if self._http is not None else None

    def start(self) -> None:
        """Loads the live adapters and listens; UnavailableError where a port is taken, and nothing runs then."""
        if self._http is not None:  # before the adapters: a port that is taken is told at once
            self._http_port = self._http.bind(self._http_host, self._http_port)
        try:
            self._port = self._grpc.bind(self.address, self._config.tls)
            self._watcher.start()
        except BaseException:
            if self._http is not None:
                self._http.unbind()
            self._grpc.stop()
            raise
        self._metering.start()
        self._adapters.start()
        self._grpc.start()
        if self._http is not None:
            self._http.start(self._config.tls)
        self._set_serving(True)

    @property
    def closed(self) -> threading.Event:
        """Set once new calls are refused."""
        return self._admission.closed

    def wait_idle(self, *, timeout_s: float) -> bool:
        """Waits until no generating or routing call runs; False when that takes longer."""
        return self._admission.wait_idle(timeout_s=timeout_s)

    def stop(self) -> None:
        """NOT_SERVING first; then new calls are refused and running ones may end within ``drain_s``; then all ends."""
        self._set_serving(False)
        self._admission.close()
        if not self.wait_idle(timeout_s=self._config.drain_s):
            _log.warning(
                "%d calls still run after %g s and are cancelled", self._admission.running, self._config.drain_s
            )
        if self._http is not None:
            self._http.stop()
        self._grpc.stop()
        self._adapters.stop()
        self._clean_up.close()
        self._watcher.stop()
        self._metering.stop()  # last: calls that were just cut off go on record, too

    def _listen_address(self, address: str) -> tuple[str, int]:
        config = self._config
        return listen_address(address, secured=config.tls is not None, anywhere=config.insecure_any_address)

    def _set_serving(self, serving: bool) -> None:
        self._grpc.set_serving(serving)
        if self._http is not None:
            self._http.set_serving(serving)


def serve(server: Server) -> None:
    """Starts, prints ``listening grpc=HOST:PORT`` (and ``http=HOST:PORT`` where there is HTTP) on stdout, and stops on
    SIGTERM or SIGINT. Main thread only.
    """
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    # Threads that read and write for callers take turns with the engine's, which lets go of the interpreter in every
    # product. Beside a flood, with Python's 5 ms, a quiet tenant waited 7 to 60 times as long for a first token as
    # alone; with this, 2 to 4 times, on two cores that others kept busy.
    sys.setswitchinterval(SWITCH_S)
    server.start()
    # The base, its tokenizer and the libraries stay: a full garbage collection that looks at them stops every thread.
    gc.collect()
    gc.freeze()
    # Once more, of nothing: Python waits with the next full one for a quarter of what the last one left, and cycles of
    # requests would pile up to a quarter of the base and the libraries.
    gc.collect()
    http = "" if server.http_address is None else f" http={server.http_address}"
    print(f"listening grpc={server.address}{http}", flush=True, file=sys.stdout)
    ended.wait()
    server.stop()
