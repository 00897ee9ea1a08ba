"""Joins a federation: keeps the base loaded, and runs a Flower SuperNode for as long as this process lives."""

from __future__ import annotations

import logging
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lorafleet.assets import base_path
from lorafleet.clients.data import Split, Texts, open_texts, split_texts
from lorafleet.clients.handover import HandedOrder, Sections, listening, receiving, serve
from lorafleet.clients.introduction import check_settings, introduction
from lorafleet.errors import InvalidInputError, NotFoundError, UnavailableError
from lorafleet.flower_commands import environment, free_port, script
from lorafleet.stopping import interruptible, leashed

log = logging.getLogger(__name__)

# A SuperNode that is told to stop finishes what it is sending; then it is killed.
STOP_TIMEOUT_S = 5.0
# A SuperNode connects within seconds, and a coordinator that runs asks new nodes before its next round.
QUIET_S = 30.0


def join_federation(
    superlink: str,
    *,
    data: str | Path | Texts,
    member: str,
    rank: int,
    base: str | Path = "tiny",
    device: str = "cpu",
    dtype: str = "bfloat16",
    insecure: bool = False,
    root_certificates: str | Path | None = None,
    private_key: str | Path | None = None,
) -> None:
    """Serve a federation as ``member`` until SIGINT, SIGTERM or SIGHUP, or until the SuperNode ends by itself.

    ``superlink`` is HOST:PORT. ``data`` is a dataset (anything with ``__len__`` and ``__getitem__`` that gives texts),
    a folder, a ``.jsonl`` file, or ``module:name`` of a dataset that Python finds from the current folder. The base is
    loaded once, and training runs in this process. The connection is TLS unless ``insecure``. Call it from the main
    thread. Raises UnavailableError where the SuperNode fails, InvalidInputError or NotFoundError for arguments that
    cannot work.
    """
    if insecure and (root_certificates or private_key):
        raise InvalidInputError("found insecure together with certificates or a key: give one of the two")
    check_settings(rank=rank, dtype=dtype)
    command = [script("flower-supernode"), "--superlink", superlink]
    # Tasks talk to their SuperNode over loopback; the default port would allow one SuperNode a machine.
    command += ["--host", "127.0.0.1", "--port", str(free_port())]
    if insecure:
        command.append("--insecure")
    for option, file in (("--root-certificates", root_certificates), ("--auth-supernode-private-key", private_key)):
        if file is not None:
            if not Path(file).is_file():
                raise NotFoundError(f"{option.strip('-')}: found no file {file}")
            command += [option, str(file)]
    if root_certificates is not None:
        _check_certificates(root_certificates)
    folder = base_path(base)
    _check_device(device)
    if isinstance(data, str) and ":" in data and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    texts = open_texts(data)
    if len(texts) == 0:
        raise NotFoundError(f"found no documents in {data}")
    split = split_texts(texts)
    try:
        # The folder is this user's alone: whoever reaches the socket can have this member train.
        with (
            interruptible() as stop_if_asked,
            tempfile.TemporaryDirectory(prefix="lorafleet-node-") as home,
            listening(Path(home) / "orders") as listener,
            _introducing(member, rank, split, superlink) as introduce,
            receiving(listener, introduce) as orders,
        ):
            command += ["--node-config", node_config({"member": member, "rank": rank, "handover": f"{home}/orders"})]
            with _supernode(command, environment(Path(home))) as child:
                # Imported and loaded while the SuperNode starts and is asked who it is.
                from lorafleet.clients.memory import give_back
                from lorafleet.clients.orders import answer, load_member

                me = load_member(member, rank=rank, split=split, base=folder, device=device, dtype=dtype)

                def carry_out(order: HandedOrder) -> Sections:
                    def check() -> None:
                        stop_if_asked()
                        order.check()

                    try:
                        return answer(me, order.sections, check=check, received_s=order.received_s)
                    finally:
                        give_back(device)

                def alive() -> bool:
                    stop_if_asked()
                    return child.poll() is None

                serve(orders, carry_out, alive=alive)
                raise UnavailableError(f"the SuperNode ended with code {child.returncode}; its output above says why")
    except KeyboardInterrupt:
        log.info("asked to stop; the SuperNode has ended")


def _check_certificates(file: str | Path) -> None:
    """Raises InvalidInputError where the file holds none: a SuperNode would say so, and then hang."""
    try:
        ssl.create_default_context(cafile=file)
    except ssl.SSLError as error:
        raise InvalidInputError(f"root-certificates: found no certificate in {file}, expected PEM ({error})") from None


def _check_device(device: str) -> None:
    """Raises InvalidInputError where this machine's torch has no such device."""
    if device == "cpu":
        return  # nothing to ask torch, which takes seconds to import
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        said = str(error).partition("\n")[0]
        raise InvalidInputError(f"device: found {device!r}, which torch cannot use here ({said})") from None


@contextmanager
def _introducing(member: str, rank: int, split: Split, superlink: str) -> Iterator[Callable[[], Sections]]:
    """Who the member is, for whoever asks; the log says when the first one does, or that nobody does."""

    def warn() -> None:
        log.warning(
            "no coordinator has asked for %s in %.0f s: does a federation run at %s, and is that its SuperLink's "
            "address, with the right certificates?", member, QUIET_S, superlink,
        )  # fmt: skip

    def introduce() -> Sections:
        if not asked.is_set():
            asked.set()
            quiet.cancel()
            log.info("%s is ready: %d documents to train on, rank %d", member, len(split.train), rank)
        return introduction(member, rank, split)

    asked, quiet = threading.Event(), threading.Timer(QUIET_S, warn)
    quiet.daemon = True
    quiet.start()
    try:
        yield introduce
    finally:
        quiet.cancel()


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
    """The child; it ends with the block, and with it all that its session holds: tasks never outlive their member.

    Where this process is killed, the leash ends the SuperNode, and Flower's own children look for their parents.
    """
    with subprocess.Popen(leashed(command), env=dict(variables), start_new_session=True) as child:
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
