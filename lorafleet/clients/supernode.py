"""The Flower SuperNode that a member runs: how it is called, that it ends with its member, and that it comes back.

A SuperNode tries again by itself while its SuperLink does not answer. One that comes back without knowing its nodes, as
a SuperLink without a database does, refuses it, and it ends with code 0; it is then started anew, each time after a
longer pause. One that ends with an error before it was ever connected cannot work as it was called, and ends the join;
so does one that was connected and whose member the federation has put out.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from lorafleet.errors import InvalidInputError
from lorafleet.stopping import leashed

log = logging.getLogger(__name__)

# A SuperNode that is told to stop finishes what it is sending; then it is killed.
STOP_TIMEOUT_S = 5.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 120.0
# One that has lived for so long was connected: the next pause is a short one again.
SETTLED_S = 60.0


def node_config(settings: Mapping[str, str | int]) -> str:
    """Flower's ``key=value`` list; strings are quoted as TOML literals, which know no escapes."""
    parts = []
    for key, value in settings.items():
        if isinstance(value, str):
            if "'" in value or "\n" in value:
                raise InvalidInputError(
                    f"{key}: found {value!r}; a quote or a line break cannot be passed on: rename it"
                )
            parts.append(f"{key}='{value}'")
        else:
            parts.append(f"{key}={value}")
    return " ".join(parts)


def pause_s(failures: int, *, draw: float) -> float:
    """Before the next try after so many in a row that failed, from 1: doubling, of which ``draw`` (0 to 1) takes up to
    half, so that members who lost the same SuperLink do not all come back at once."""
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 1, 30))
    return longest * (1.0 - 0.5 * draw)


class SuperNode:
    """A child that is started again when its connection was lost. ``start`` makes one that runs.

    ``is_out`` says whether the federation takes its member no more; it is asked each time that the connection was lost.
    """

    def __init__(
        self,
        start: Callable[[], subprocess.Popen[bytes]],
        *,
        superlink: str,
        is_out: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._start, self._superlink, self._clock, self._draw = start, superlink, clock, draw
        self._is_out = is_out
        self.out = False
        """Whether the federation has put its member out."""
        self._connected, self._failures = False, 0
        self._again_at: float | None = None
        self._child, self._since = start(), clock()

    @property
    def code(self) -> int | None:
        """Of the child that ended last; None while one runs."""
        return self._child.returncode

    def connected(self) -> None:
        """Somebody has spoken through it."""
        self._connected = True

    def alive(self) -> bool:
        """Whether one runs or will; starts it when its time has come. False where it can never work."""
        if self._again_at is not None:
            if self._clock() >= self._again_at:
                self._again_at = None
                self._child, self._since = self._start(), self._clock()
            return True
        code = self._child.poll()
        if code is None:
            return True
        # By a signal: whoever sent it, it was none of its own errors.
        if code > 0 and not self._connected:
            return False
        _end(self._child)
        if self._is_out():
            self.out = True
            return False
        self._connected = True
        lived_s = self._clock() - self._since
        self._failures = 1 if lived_s >= SETTLED_S else self._failures + 1
        wait_s = pause_s(self._failures, draw=self._draw())
        log.warning(
            "the connection to %s is lost: the SuperNode ended with code %d after %.0f s; trying again in %.1f s",
            self._superlink, code, lived_s, wait_s,
        )  # fmt: skip
        self._again_at = self._clock() + wait_s
        return True

    def stop(self) -> None:
        _end(self._child)


@contextmanager
def supernode(
    command: Callable[[], list[str]],
    variables: Mapping[str, str],
    *,
    superlink: str,
    is_out: Callable[[], bool] = lambda: False,
) -> Iterator[SuperNode]:
    """A SuperNode for the block; ``command`` is asked before every start. With it ends all that its session holds:
    tasks never outlive their member.

    Where this process is killed, the leash ends the SuperNode, and Flower's own children look for their parents.
    """

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(leashed(command()), env=dict(variables), start_new_session=True)

    node = SuperNode(start, superlink=superlink, is_out=is_out)
    try:
        yield node
    finally:
        node.stop()


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("the SuperNode did not end within %.0f s and is killed", STOP_TIMEOUT_S)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
