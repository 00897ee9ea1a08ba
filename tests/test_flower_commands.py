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
    variables = environment(tmp_path)
    assert variables["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert variables["FLWR_TELEMETRY_ENABLED"] == "0"
    assert variables["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert variables["FLWR_HOME"] == str(tmp_path)
    assert variables["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert variables.get("PYTHONPATH") == os.environ.get("PYTHONPATH")


def test_commands_are_those_beside_the_interpreter() -> None:
    assert Path(script("flwr")).parent == Path(sys.executable).parent


@pytest.mark.parametrize(
    ("name", "extra"), [("flower-supernode", "client"), ("flower-superlink", "server"), ("flwr", "server")]
)
def test_a_missing_command_names_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(NotFoundError, match=rf"{name} is missing: pip install 'lorafleet\[{extra}\]'"):
        script(name)


def test_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
        assert server.getsockname()[1] > 0
