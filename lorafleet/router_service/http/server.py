"""The HTTP server: uvicorn in a thread of its own, on a socket that was bound before."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from functools import partial
from typing import Any, Final

import uvicorn

from lorafleet.errors import UnavailableError
from lorafleet.router_service.http.app import CALLERS_PER_CALL, HttpApp
from lorafleet.router_service.http.connection import Connection, Strangers
from lorafleet.router_service.tls import Tls

_STRANGERS_PER_CALL: Final = 2
"""So many connections may be without a request whose key is good: most clients keep one for their next request. With
more, those that have waited longest are closed."""
_CONNECTIONS_PER_CALL: Final = _STRANGERS_PER_CALL + CALLERS_PER_CALL
"""Bounds open connections."""
_HANDSHAKE_S: Final = 10.0
"""For TLS to be agreed on; Python's own limit is 60 s."""
_LAST_WORDS_S: Final = 1
"""For streams that were just cancelled to say so."""


class HttpServer:
    def __init__(self, app: HttpApp, *, max_calls: int) -> None:
        self._app, self._max_calls = app, max_calls
        self._socket: socket.socket | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def bind(self, host: str, port: int) -> int:
        """Takes a port and returns it; raises UnavailableError where it is taken."""
        plain = host.removeprefix("[").removesuffix("]")
        listener = socket.socket(socket.AF_INET6 if ":" in plain else socket.AF_INET)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((plain, port))
            listener.listen(2048)
        except OSError as error:
            listener.close()
            raise UnavailableError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another port for HTTP, or 0"
            ) from None
        self._socket = listener
        bound: int = listener.getsockname()[1]
        return bound

    def unbind(self) -> None:
        """Gives a port back that was bound, before :meth:`start`."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._app.close()

    def start(self, tls: Tls | None) -> None:
        """Answers requests on the bound socket."""
        assert self._socket is not None, "bind() comes first"
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._app,
                # Of h11, which bounds headers to 64 KiB.
                http=partial(Connection, strangers=Strangers(_STRANGERS_PER_CALL * self._max_calls)),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=_CONNECTIONS_PER_CALL * self._max_calls,
                timeout_graceful_shutdown=_LAST_WORDS_S,
                ssl_certfile=None if tls is None else tls.certificate,
                ssl_keyfile=None if tls is None else tls.private_key,
                ssl_version=ssl.PROTOCOL_TLS_SERVER,
            )
        )
        run = partial(_run, self._server, self._socket)
        self._thread = threading.Thread(target=run, name="lorafleet-uvicorn", daemon=True)
        self._thread.start()

    def set_serving(self, serving: bool) -> None:
        """What health says."""
        self._app.serving = serving

    def stop(self) -> None:
        """Cuts off what still runs."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
        self.unbind()


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """``server.run``, in a loop that bounds TLS handshakes, for which uvicorn has no setting."""
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        loop: Any = runner.get_loop()
        if server.config.is_ssl:
            loop.create_server = partial(loop.create_server, ssl_handshake_timeout=_HANDSHAKE_S)
        runner.run(server.serve([listener]))
