"""Joins a federation: keeps the base loaded, and runs a Flower SuperNode for as long as this process lives."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from lorafleet.assets import base_path
from lorafleet.clients.data import Texts, open_texts, split_texts
from lorafleet.clients.handover import QUERY, Sections, listening, serve
from lorafleet.clients.introduction import check_settings, introduction
from lorafleet.errors import InvalidInputError, NotFoundError, UnavailableError
from lorafleet.flower_commands import environment, free_port, script

log = logging.getLogger(__name__)

# A SuperNode that is told to stop finishes what it is sending; then it is killed.
STOP_TIMEOUT_S = 5.0


class _Stopped(BaseException):
    """SIGINT or SIGTERM; no Exception, so that no handler of an order's errors takes it for one."""


def join(
    superlink: str,
    *,
    data: str | Path | Texts,
    member: str,
    rank: int,
    base: str | Path = "tiny",
    device: str = "cpu",
    dtype: str = "bfloat16",
    insecure: bool = False,
    root_certificates: Path | None = None,
    private_key: Path | None = None,
) -> None:
    """Serve a federation as ``member`` until SIGINT or SIGTERM, or until the SuperNode ends by itself.

    ``superlink`` is HOST:PORT. ``data`` is a dataset (anything with ``__len__`` and ``__getitem__`` that gives texts),
    a folder, a ``.jsonl`` file, or ``module:name`` of a dataset that Python finds from the current folder. The base is
    loaded once, and training runs in this process. The connection is TLS unless ``insecure``. Call it from the main
    thread. Raises UnavailableError where the SuperNode fails, InvalidInputError or NotFoundError for arguments that
    cannot work.
    """
    if insecure and (root_certificates or private_key):
        raise InvalidInputError("found insecure together with certificates or a key: give one of the two")
    check_settings(rank=rank, dtype=dtype)
    folder = base_path(base)
    if isinstance(data, str) and ":" in data and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    texts = open_texts(data)
    if len(texts) == 0:
        raise NotFoundError(f"found no documents in {data}")
    split = split_texts(texts)
    command = [script("flower-supernode"), "--superlink", superlink]
    # Tasks talk to their SuperNode over loopback; the default port would allow one SuperNode a machine.
    command += ["--host", "127.0.0.1", "--port", str(free_port())]
    if insecure:
        command.append("--insecure")
    if root_certificates is not None:
        command += ["--root-certificates", str(root_certificates)]
    if private_key is not None:
        command += ["--auth-supernode-private-key", str(private_key)]
    # The folder is this user's alone: whoever reaches the socket can have this member train.
    with tempfile.TemporaryDirectory(prefix="lorafleet-node-") as home, listening(Path(home) / "orders") as orders:
        command += ["--node-config", node_config({"member": member, "rank": rank, "handover": f"{home}/orders"})]
        with _stoppable(), _supernode(command, environment(Path(home))) as child:
            # Loaded while the SuperNode starts and connects, which takes about as long for a small base.
            from lorafleet.clients.orders import answer, load_member

            me = load_member(member, rank=rank, split=split, base=folder, device=device, dtype=dtype)
            log.info("%s is ready: %d documents to train on, rank %d", member, len(split.train), rank)

            def carry_out(kind: str, asked: Sections, check: Callable[[], None]) -> Sections:
                return introduction(member, rank, split) if kind == QUERY else answer(me, asked, check=check)

            serve(orders, carry_out, alive=lambda: child.poll() is None)
            raise UnavailableError(f"the SuperNode ended with code {child.returncode}; its output above says why")


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


@contextmanager
def _supernode(command: list[str], variables: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The child; it ends with the block, and with it all that its session holds: tasks never outlive their member."""
    with subprocess.Popen(command, env=dict(variables), start_new_session=True) as child:
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                log.warning("the SuperNode did not end within %.0f s and is killed", STOP_TIMEOUT_S)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM end the block, also in the middle of a training, and do not disturb the cleaning up."""

    def stop(number: int, _: FrameType | None) -> None:
        for later in before:
            signal.signal(later, signal.SIG_IGN)
        raise _Stopped

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    except _Stopped:
        log.info("asked to stop; the SuperNode has ended")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
