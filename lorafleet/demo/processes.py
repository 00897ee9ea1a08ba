"""The demo's child processes: each in a group of its own, logged to a file, and ended with all its children."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from lorafleet.errors import UnavailableError
from lorafleet.stopping import leashed

# SuperNodes finish what they are sending and tell the SuperLink that they go; ten seconds is many times what they need.
STOP_TIMEOUT_S = 10.0


def wait_for_port(port: int, process: subprocess.Popen[bytes], name: str, log: Path, timeout_s: float = 60.0) -> None:
    """Return once something accepts connections on a loopback port; raises with the log's end where it never does."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.1)
    ended = "ended" if process.poll() is not None else f"did not listen within {timeout_s:.0f} s"
    raise UnavailableError(f"{name} {ended}; the end of {log}:\n{tail(log)}")


def wait_for_line(
    log: Path, pattern: str, process: subprocess.Popen[bytes], name: str, timeout_s: float = 120.0
) -> re.Match[str]:
    """The first whole line of a child's log that the pattern matches from end to end; a line still being written waits.

    UnavailableError with the log's end where the child ends, or ``timeout_s`` passes, before it wrote one.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        # Looked at before the log is read: what the child wrote before it ended is in there.
        ended, late = process.poll() is not None, time.monotonic() >= deadline
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            if line.endswith("\n") and (found := re.fullmatch(pattern, line.strip())):
                return found
        if ended or late:
            state = "ended" if ended else f"did not write {pattern!r} within {timeout_s:.0f} s"
            raise UnavailableError(f"{name} {state}; the end of {log}:\n{tail(log)}")
        time.sleep(0.1)


def tail(log: Path, lines: int = 12) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-lines:])


class Processes:
    """Starts children and, on leaving, ends every one of them and whatever they started.

    Where this process is killed and leaves nothing, they are told to end by the system (on Linux).
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._may_end: set[str] = set()
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        may_end: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start a child by its absolute path; its output goes to ``NAME.log``. To be called in the main thread.

        ``may_end``: the child has an end of its own, and has done its work where that is with code 0.
        """
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                leashed(command),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A group of its own: Ctrl-C reaches the demo alone, which ends its children in order.
                start_new_session=True,
            )
        self._running[name] = process
        if may_end:
            self._may_end.add(name)
        return process

    def check(self) -> None:
        """Raise where a child has ended that should not have."""
        for name, process in self._running.items():
            code = process.poll()
            if code is not None and not (code == 0 and name in self._may_end):
                raise UnavailableError(
                    f"{name} ended with {process.returncode}; the end of its log:\n{tail(self.log(name))}"
                )

    def stop(self, *names: str) -> None:
        """End the named children, or all, in reverse order of their start; by force after a while."""
        chosen = [name for name in reversed(self._running) if not names or name in names]
        families = {name: _family(self._running[name]) for name in chosen}
        for name in chosen:
            _signal_group(self._running[name], signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for name in chosen:
            _, alive = psutil.wait_procs(families[name], timeout=max(0.1, deadline - time.monotonic()))
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            _signal_group(self._running[name], signal.SIGKILL)
            self._running.pop(name).wait()


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        head = psutil.Process(process.pid)
        return [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


class MemoryMeter:
    """Peak memory of this process and all its descendants, sampled; shared pages are counted once (PSS)."""

    def __init__(self) -> None:
        self.peak_bytes = 0

    def sample(self) -> None:
        head = psutil.Process()
        total = 0
        for process in [head, *head.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
                full = process.memory_full_info()
                total += getattr(full, "pss", full.rss)
        self.peak_bytes = max(self.peak_bytes, total)
