"""Joins a federation: runs a Flower SuperNode as a child for as long as this process lives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lorafleet.clients.data import open_texts
from lorafleet.errors import InvalidInputError, NotFoundError, UnavailableError

# A SuperNode that is told to stop finishes what it is sending; then it is killed.
STOP_TIMEOUT_S = 5.0


def join(
    superlink: str,
    *,
    data: str | Path,
    member: str,
    rank: int,
    base: str = "tiny",
    device: str = "cpu",
    dtype: str = "bfloat16",
    insecure: bool = False,
    root_certificates: Path | None = None,
    private_key: Path | None = None,
) -> None:
    """Serve a federation as ``member`` until SIGINT or SIGTERM, or until the SuperNode ends by itself.

    ``superlink`` is HOST:PORT. ``data`` is a folder, a ``.jsonl`` file, or ``module:name`` of a dataset that Python
    finds from the current folder. The connection is TLS unless ``insecure``. Call it from the main thread. Raises
    UnavailableError where the SuperNode fails, InvalidInputError or NotFoundError for arguments that cannot work.
    """
    if insecure and (root_certificates or private_key):
        raise InvalidInputError("found insecure together with certificates or a key: give one of the two")
    here = str(Path.cwd())
    if str(data).partition(":")[1] and here not in sys.path:
        sys.path.append(here)
    # Opened once here, so that a wrong path is an error now and not in a task's log.
    if len(open_texts(data)) == 0:
        raise NotFoundError(f"found no documents in {data}")
    place = Path(data).expanduser()
    settings: dict[str, str | int] = {
        "member": member,
        "data": str(place.resolve()) if place.exists() else str(data),
        "rank": rank,
        "base": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "device": device,
        "dtype": dtype,
    }
    command = [str(_script("flower-supernode")), "--superlink", superlink, "--node-config", node_config(settings)]
    # Tasks talk to their SuperNode over loopback; the default port would allow one SuperNode a machine.
    command += ["--host", "127.0.0.1", "--port", str(_free_port())]
    if insecure:
        command.append("--insecure")
    if root_certificates is not None:
        command += ["--root-certificates", str(root_certificates)]
    if private_key is not None:
        command += ["--auth-supernode-private-key", str(private_key)]
    with tempfile.TemporaryDirectory(prefix="lorafleet-node-") as home:
        code = _run(command, offline_environment(Path(home), search=here))
    if code:
        raise UnavailableError(f"the SuperNode ended with code {code}; its output above says why")


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


def offline_environment(home: Path, *, search: str) -> dict[str, str]:
    """This process's environment, with Flower kept from calling home, from installing, and to a folder of its own."""
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "HF_HUB_OFFLINE": "1",
        # Flower starts its children by name, and they import a member's own dataset.
        "PATH": os.pathsep.join(filter(None, [scripts, os.environ.get("PATH", "")])),
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), search])),
    }


def _script(name: str) -> Path:
    path = Path(sys.executable).with_name(name)
    if not path.is_file():
        raise NotFoundError(f"{path} is missing: install lorafleet[client]")
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _run(command: list[str], environment: Mapping[str, str]) -> int:
    """The child's exit code; 0 where we were asked to stop and it did."""
    with _stop_requests() as asked, subprocess.Popen(command, env=dict(environment), start_new_session=True) as child:
        try:
            while True:
                try:
                    return 0 if child.wait(timeout=0.2) == 0 or asked else child.returncode
                except subprocess.TimeoutExpired:
                    if asked:
                        break
            child.terminate()
            child.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end_group(child)
    return 0


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End whatever the SuperNode's session still holds: tasks must not outlive their member."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """SIGINT and SIGTERM end up in the list, instead of ending this process before its child."""
    asked: list[int] = []

    def hear(number: int, _: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
