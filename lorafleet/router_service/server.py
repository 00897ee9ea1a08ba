"""The gRPC server around an engine and a registry."""

from __future__ import annotations

import ipaddress
import logging
import signal
import sys
import threading
from concurrent import futures
from dataclasses import dataclass
from types import FrameType
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lorafleet.engine import Engine
from lorafleet.errors import InvalidInputError, UnavailableError
from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc
from lorafleet.registry import Registry
from lorafleet.router_service.admission import Admission
from lorafleet.router_service.residency import Residency
from lorafleet.router_service.service import RouterService
from lorafleet.router_service.tenancy import TenantInterceptor
from lorafleet.router_service.watcher import Watcher

SERVICE_NAME: Final[str] = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name
_SPARE_THREADS: Final = 8
_QUEUED_PER_THREAD: Final = 4
_LAST_WORDS_S: Final = 0.5
"""For what is no drained call: a listing that is being answered, a health watch that has no end of its own."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    address: str = "127.0.0.1:0"
    """``HOST:PORT``; loopback only, and port 0 takes a free one."""
    router: str = "likelihood"
    """A name in ``ROUTERS``; decides for ``Route`` and for the model ``auto``."""
    max_calls: int = 256
    """``Generate`` and ``Route`` calls at the same time; one more is RESOURCE_EXHAUSTED. Each has a thread, which
    mostly waits; what the engine has no room for waits in its queue."""
    poll_interval_s: float = 0.5
    """How often the registry is looked at for new versions."""
    drain_s: float = 30.0
    """How long calls may go on after ``stop``; then they are cancelled."""


class Server:
    """Serves RouterService and grpc.health.v1 until stopped. Engine and registry stay their owner's to close.

    Calls run on a thread pool with a few threads more than calls are admitted, so that refusals, listings and health
    checks are answered even when the server is full. A health ``Watch`` occupies no thread.
    """

    def __init__(self, engine: Engine, registry: Registry, config: ServerConfig | None = None) -> None:
        config = config or ServerConfig()
        self._config = config
        self._host, self._port = loopback_address(config.address)
        self._admission = Admission(config.max_calls)
        residency = Residency(engine, registry)
        self._watcher = Watcher(engine, registry, residency, interval_s=config.poll_interval_s)
        service = RouterService(engine, registry, residency, self._admission, router=config.router)
        self._health_threads = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="lorafleet-health")
        self._health = health.HealthServicer(
            experimental_non_blocking=True, experimental_thread_pool=self._health_threads
        )
        threads = config.max_calls + _SPARE_THREADS
        self._threads = futures.ThreadPoolExecutor(max_workers=threads, thread_name_prefix="lorafleet-grpc")
        self._grpc = grpc.server(
            self._threads,
            interceptors=[TenantInterceptor(registry)],
            # Without it a second server could share the port, and take half of the calls.
            options=[("grpc.so_reuseport", 0)],
            # Bounds what waits for a thread. HTTP/2's own limit (grpc.max_concurrent_streams) is left alone: streams
            # beyond it are reset, and a burst of clients that share a connection sees UNAVAILABLE without a reason.
            maximum_concurrent_rpcs=_QUEUED_PER_THREAD * threads,
        )
        router_pb2_grpc.add_RouterServiceServicer_to_server(service, self._grpc)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    @property
    def address(self) -> str:
        """``HOST:PORT`` as bound; the port is known after ``start``."""
        return f"{self._host}:{self._port}"

    def start(self) -> str:
        """Loads the live adapters, listens, and returns the address; UnavailableError where the port is taken."""
        try:
            self._port = self._grpc.add_insecure_port(self.address)
        except RuntimeError as error:
            raise UnavailableError(f"cannot listen on {self.address} ({error}); choose another port, or 0") from None
        self._watcher.start()
        self._grpc.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return self.address

    @property
    def closed(self) -> threading.Event:
        """Set once new calls are refused."""
        return self._admission.closed

    def wait_idle(self, *, timeout_s: float) -> bool:
        """Waits until no ``Generate`` or ``Route`` runs; False when that takes longer."""
        return self._admission.wait_idle(timeout_s=timeout_s)

    def stop(self) -> None:
        """NOT_SERVING first; then new calls are refused and running ones may end within ``drain_s``; then all ends."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._admission.close()
        if not self.wait_idle(timeout_s=self._config.drain_s):
            _log.warning(
                "%d calls still run after %g s and are cancelled", self._admission.running, self._config.drain_s
            )
        self._grpc.stop(_LAST_WORDS_S).wait()
        self._watcher.stop()
        self._threads.shutdown(wait=True)
        self._health_threads.shutdown(wait=True)

    def _set_health(self, serving: int) -> None:
        for service in ("", SERVICE_NAME):
            self._health.set(service, serving)


def serve(server: Server) -> None:
    """Starts, prints ``listening grpc=HOST:PORT`` on stdout, and stops on SIGTERM or SIGINT. Main thread only."""
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    print(f"listening grpc={server.start()}", flush=True, file=sys.stdout)
    ended.wait()
    server.stop()


def loopback_address(address: str) -> tuple[str, int]:
    """Splits ``HOST:PORT``; raises InvalidInputError unless the host is this machine's loopback.

    Callers only say which tenant they are, so that an open port would give every tenant's adapters to everyone.
    """
    host, _, port = address.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        number = int(port)
        loopback = ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        raise InvalidInputError(f"found the address {address!r}, expected HOST:PORT such as 127.0.0.1:50051") from None
    if not 0 <= number <= 65535:
        raise InvalidInputError(f"found the port {number}, expected 0 (a free one) to 65535")
    if not loopback:
        raise InvalidInputError(
            f"found the address {address!r}, expected a loopback one (127.0.0.1, [::1] or localhost): callers are not "
            "authenticated beyond the name of their tenant; put an authenticating proxy in front for other machines"
        )
    return host, number
