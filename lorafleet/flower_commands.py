"""How Flower's commands are found and run: offline, with a home of their own, on a free port."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from lorafleet.errors import NotFoundError


def script(name: str) -> str:
    """The path of a command that is installed beside this interpreter; raises NotFoundError where it is not."""
    path = Path(sys.executable).with_name(name)
    if not path.is_file():
        # A data owner runs SuperNodes; whoever submits runs, or runs a SuperLink, is on the coordinator's side.
        extra = "client" if name == "flower-supernode" else "server"
        raise NotFoundError(f"{path} is missing: pip install 'lorafleet[{extra}]', which brings it")
    return str(path)


def environment(home: Path) -> dict[str, str]:
    """This process's environment for a Flower command: no telemetry, no update check, no installing at run time.

    ``home`` is Flower's own folder.
    """
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        # Flower starts its own children by name: they must be found where this interpreter's scripts are.
        "PATH": os.pathsep.join(filter(None, [scripts, os.environ.get("PATH", "")])),
    }


def free_port() -> int:
    """A TCP port on loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
