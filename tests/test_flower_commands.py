"""How Flower's commands are found and run."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from lorafleet.errors import NotFoundError
from lorafleet.flower_commands import environment, free_port, script


def test_environment_keeps_flower_offline_and_finds_its_commands(tmp_path: Path) -> None:
    variables = environment(tmp_path, search=str(tmp_path / "mine"))
    assert variables["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert variables["FLWR_TELEMETRY_ENABLED"] == "0"
    assert variables["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert variables["FLWR_HOME"] == str(tmp_path)
    assert variables["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert variables["PYTHONPATH"].split(os.pathsep)[-1] == str(tmp_path / "mine")


def test_commands_are_those_beside_the_interpreter() -> None:
    assert Path(script("flwr")).parent == Path(sys.executable).parent
    with pytest.raises(NotFoundError, match=r"lorafleet\[client\]"):
        script("flower-does-not-exist")


def test_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
        assert server.getsockname()[1] > 0
