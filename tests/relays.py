"""A connection's middle: what goes through is counted, and may end there."""

from __future__ import annotations

import math
import socket
import threading
from contextlib import suppress
from typing import Self


class Relay:
    """Passes bytes between clients and one server. Beyond ``most``, what clients send does not arrive any more."""

    def __init__(self, server: str, *, most: float = math.inf) -> None:
        host, port = server.rsplit(":", 1)
        self._server, self._most = (host, int(port)), most
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = 0
        """Bytes that clients sent."""
        self.full = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._sockets):
            each.close()

    def _run(self, target: object, *arguments: socket.socket) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener was shut down
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._sockets += [client, server]
                self._run(self._in, client, server)
                self._run(self._out, server, client)

    def _in(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                self.sent += len(data)
                if self.sent > self._most:
                    self.full.set()
                else:
                    server.sendall(data)
        _end(server)

    def _out(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
        _end(client)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
