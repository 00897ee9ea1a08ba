"""A way to a PostgreSQL server over TCP that can stop carrying anything while it still acknowledges all."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Wire:
    """Carries bytes between callers on a free port of loopback and a server's unix socket, until ``cut`` is set.

    From then on it takes what comes and hands nothing on: what a network does that has lost its way. Calls on
    connections that were there before look as if the server were thinking.
    """

    def __init__(self, server: Path) -> None:
        self._server = server
        self.cut = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        found: int = self._listener.getsockname()[1]
        return found

    def close(self) -> None:
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(self._server))
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while found := one.recv(65536):
                if not self.cut.is_set():
                    other.sendall(found)
            if not self.cut.is_set():
                other.shutdown(socket.SHUT_WR)


@contextmanager
def wire_to(folder: Path) -> Iterator[Wire]:
    """To the server whose socket is in a folder."""
    wire = Wire(folder / ".s.PGSQL.5432")
    try:
        yield wire
    finally:
        wire.close()
