"""Running a SuperNode: its settings, its environment, and its end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args

from lorafleet.clients.join import join, node_config
from lorafleet.errors import InvalidInputError, NotFoundError


def test_node_config_reads_back_in_flower_as_it_was_meant() -> None:
    settings: dict[str, str | int] = {"member": "a b", "data": '/with space/and "quotes"\\x', "rank": 8, "base": "tiny"}
    assert parse_config_args([node_config(settings)]) == settings


@pytest.mark.parametrize("value", ["it's", "two\nlines"])
def test_node_config_refuses_what_flower_cannot_read(value: str) -> None:
    with pytest.raises(InvalidInputError, match="data"):
        node_config({"data": value})


def test_wrong_data_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="absent"):
        join("127.0.0.1:1", data=tmp_path / "absent", member="a", rank=4, insecure=True)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rank": 0}, InvalidInputError),
        ({"dtype": "int8"}, InvalidInputError),
        ({"base": "absent"}, NotFoundError),
        ({"data": []}, NotFoundError),
    ],
)
def test_arguments_that_cannot_work_are_errors_before_anything_starts(
    data_folder: Path, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        join("127.0.0.1:1", **{"data": data_folder, "member": "a", "rank": 4, "insecure": True, **changes})


@pytest.mark.process
def test_supernode_that_fails_ends_the_join_with_its_code(data_folder: Path, base_folder: Path) -> None:
    absent = data_folder / "absent.pem"
    script = (
        "from lorafleet.clients.join import join\n"
        f"join('127.0.0.1:9', data={str(data_folder)!r}, member='a', rank=4, base={str(base_folder)!r},"
        f" root_certificates={str(absent)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "UnavailableError: the SuperNode ended with code" in done.stderr


def test_insecure_with_certificates_is_refused(tmp_path: Path, data_folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="insecure"):
        join("127.0.0.1:1", data=data_folder, member="a", rank=4, insecure=True, root_certificates=tmp_path)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_supernode_ends_with_the_process_that_joined(data_folder: Path, number: signal.Signals) -> None:
    script = (
        "from lorafleet.clients.join import join\n"
        f"join('127.0.0.1:9', data={str(data_folder)!r}, member='alder', rank=4, insecure=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as member:
        assert member.stdout is not None
        for line in member.stdout:
            if "Starting Flower SuperNode" in line:
                break
        member.send_signal(number)
        # The SuperNode holds the other end of the pipe: reading to its end means that it is gone.
        member.stdout.read()
        assert member.wait(timeout=60) == 0
