"""Running a SuperNode: its settings, its environment, and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.common.config import parse_config_args

from lorafleet.adapters.wire import ORDER_SECTION, TrainOrder
from lorafleet.assets import base_digest
from lorafleet.clients import LocalLimits, join_federation
from lorafleet.clients.handover import ORDER, QUERY, Sections, ask
from lorafleet.clients.state import open_state
from lorafleet.clients.supernode import node_config
from lorafleet.errors import InvalidInputError, NotFoundError, UnavailableError


def test_node_config_reads_back_in_flower_as_it_was_meant() -> None:
    settings: dict[str, str | int] = {"member": "a b", "data": '/with space/and "quotes"\\x', "rank": 8, "base": "tiny"}
    assert parse_config_args([node_config(settings)]) == settings


@pytest.mark.parametrize("value", ["it's", "two\nlines"])
def test_node_config_refuses_what_flower_cannot_read(value: str) -> None:
    with pytest.raises(InvalidInputError, match="data"):
        node_config({"data": value})


def test_wrong_data_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="absent"):
        join_federation("127.0.0.1:1", data=tmp_path / "absent", member="a", rank=4, insecure=True)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rank": 0}, InvalidInputError),
        ({"base": "absent"}, NotFoundError),
        ({"limits": LocalLimits(device="cuda:99")}, InvalidInputError),
        ({"insecure": False, "root_certificates": Path("absent.pem")}, NotFoundError),
        ({"insecure": False, "private_key": Path("absent.pem")}, NotFoundError),
        ({"data": []}, NotFoundError),
    ],
)
def test_arguments_that_cannot_work_are_errors_before_anything_starts(
    data_folder: Path, changes: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafleet.clients.join.tempfile.TemporaryDirectory", None)  # where starting begins
    with pytest.raises(error):
        join_federation("127.0.0.1:1", **{"data": data_folder, "member": "a", "rank": 4, "insecure": True, **changes})


def test_insecure_with_certificates_is_refused(tmp_path: Path, data_folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="insecure"):
        join_federation("127.0.0.1:1", data=data_folder, member="a", rank=4, insecure=True, root_certificates=tmp_path)


def test_certificates_that_are_none_are_refused_before_anything_starts(tmp_path: Path, data_folder: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate\n")
    with pytest.raises(InvalidInputError, match=r"garbage\.pem"):
        join_federation("127.0.0.1:1", data=data_folder, member="a", rank=4, root_certificates=garbage)


def test_key_that_was_given_last_is_used_from_the_state(tmp_path: Path, data_folder: Path) -> None:
    with open_state(tmp_path / "state", member="a", private_key=str(tmp_path / "alder.key")):
        pass
    with pytest.raises(NotFoundError, match=r"alder\.key"):
        join_federation("127.0.0.1:1", data=data_folder, member="a", rank=4, state=tmp_path / "state")


def test_state_of_another_member_is_refused_before_anything_starts(tmp_path: Path, data_folder: Path) -> None:
    with open_state(tmp_path / "state", member="b"):
        pass
    with pytest.raises(InvalidInputError, match="state of 'b'"):
        join_federation("127.0.0.1:1", data=data_folder, member="a", rank=4, state=tmp_path / "state", insecure=True)


def test_join_from_another_thread_is_refused(data_folder: Path) -> None:
    with ThreadPoolExecutor() as pool:
        done = pool.submit(join_federation, "127.0.0.1:1", data=data_folder, member="a", rank=4, insecure=True)
        with pytest.raises(InvalidInputError, match="main"):
            done.result(timeout=60)


@contextlib.contextmanager
def joined(
    data: Path,
    base: Path,
    temp: Path,
    *,
    quiet_s: float = 30.0,
    before: str = "",
    rank: int | None = 4,
    probe_s: float | None = None,
    **options: Any,
) -> Iterator[Any]:
    """A process that joins a SuperLink that is not there; its output is a pipe, its temporary folder is in ``temp``."""
    script = (
        "import logging\n"
        "import lorafleet.clients.join as join\n"
        "logging.basicConfig(level=logging.WARNING)\n"
        "logging.getLogger('lorafleet').setLevel(logging.INFO)\n"
        f"join.QUIET_S = {quiet_s}\n{before}"
        f"join.join_federation('127.0.0.1:9', data={str(data)!r}, member='alder', rank={rank}, base={str(base)!r}, "
        f"probe_s={probe_s}, "
        f"limits=join.LocalLimits(dtype='float32'), **{options!r})\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(temp), "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: Any, words: str) -> str:
    """The output up to the line that holds ``words``."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"no {words!r} in:\n{''.join(lines)}")


def family(process: Any) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def words_of(process: psutil.Process) -> str:
    """The command line, empty for a process that has just ended."""
    with contextlib.suppress(psutil.NoSuchProcess):  # a zombie too
        return " ".join(process.cmdline())
    return ""


def assert_gone(processes: list[psutil.Process]) -> None:
    """Waits for it, as a busy machine and whoever inherits an orphan take their time."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    assert alive == []


def long_order(base: Path) -> Sections:
    order = TrainOrder(
        federation="t/f", round=1, attempt=1, member="alder", base_digest=base_digest(base), expert_digest="", rank=0,
        steps=1_000_000, batch_size=2, sequence_length=16, learning_rate=1e-9, seed=1, init_seed=2, deadline_s=600.0,
    )  # fmt: skip
    return Sections({ORDER_SECTION: order.to_config()}, {}, {})


@pytest.fixture
def temp() -> Iterator[Path]:
    # A socket's path is short, pytest's folders are not.
    with tempfile.TemporaryDirectory(prefix="lf-") as folder:
        yield Path(folder)


@pytest.mark.process
def test_supernode_that_fails_ends_the_join_with_its_code(data_folder: Path, base_folder: Path, temp: Path) -> None:
    garbage = data_folder / "garbage.key"
    garbage.write_text("no key\n")
    with joined(data_folder, base_folder, temp, private_key=str(garbage)) as process:
        output = process.stdout.read()
        assert process.wait(timeout=60) == 1
    assert "UnavailableError: the SuperNode ended with code" in output


@pytest.mark.process
@pytest.mark.parametrize(("rank", "probe_s", "announced"), [(4, None, 4), (None, 0.0, 32), (None, None, 8)])
def test_member_is_ready_once_somebody_asks_and_says_that_nobody_does(
    data_folder: Path, base_folder: Path, temp: Path, rank: int | None, probe_s: float | None, announced: int
) -> None:
    settings = {"quiet_s": 0.5, "rank": rank, "probe_s": probe_s}
    with joined(data_folder, base_folder, temp, insecure=True, **settings) as process:
        before = read_until(process, "no coordinator has asked")
        assert "127.0.0.1:9" in before.splitlines()[-1]
        assert "is ready" not in before
        (socket,) = temp.glob("lorafleet-node-*/orders")
        said = ask(socket, QUERY, Sections.empty()).configs["header"]
        assert said == {"member": "alder", "rank": announced, "num_examples": 6}
        read_until(process, "alder is ready")
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0, rest


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_supernode_ends_with_the_process_that_joined(
    data_folder: Path, base_folder: Path, temp: Path, number: signal.Signals
) -> None:
    with joined(data_folder, base_folder, temp, insecure=True) as process:
        read_until(process, "Starting Flower SuperExec")
        children = family(process)
        assert len(children) >= 2  # and for a moment what they call
        process.send_signal(number)
        # The children hold the other end of the pipe: reading to its end means that they are gone.
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0, rest
    assert_gone(children)
    assert list(temp.iterdir()) == []


@pytest.mark.process
def test_supernode_that_is_lost_is_started_again(data_folder: Path, base_folder: Path, temp: Path) -> None:
    with joined(data_folder, base_folder, temp, insecure=True) as process:
        read_until(process, "Starting Flower SuperExec")
        (lost,) = (child for child in family(process) if "flower-supernode" in words_of(child))
        lost.kill()
        assert "127.0.0.1:9 is lost" in read_until(process, "trying again in")
        read_until(process, "Starting Flower SuperExec")
        children = family(process)
        assert lost.pid not in {child.pid for child in children}
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0, rest
    assert_gone(children)


@pytest.mark.process
def test_a_second_ctrl_c_in_a_training_does_not_disturb_the_end(
    data_folder: Path, base_folder: Path, temp: Path
) -> None:
    with joined(data_folder, base_folder, temp, insecure=True) as process, ThreadPoolExecutor() as tasks:
        read_until(process, "Starting Flower SuperExec")
        (socket,) = temp.glob("lorafleet-node-*/orders")
        task = tasks.submit(ask, socket, ORDER, long_order(base_folder))
        read_until(process, "1000000 steps")
        children = family(process)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0, rest
        with pytest.raises(UnavailableError, match="join again"):
            task.result(timeout=30)
    assert "Traceback" not in rest
    assert_gone(children)
    assert list(temp.iterdir()) == []


STOP = "os.kill(os.getpid(), signal.SIGTERM); signal.sigtimedwait([], 0.1)"


@pytest.mark.process
@pytest.mark.parametrize(
    "work",
    [
        pytest.param(f"exec({STOP!r})", id="below an exec of a string, as when a dataclass is made"),
        pytest.param("Lost()", id="in a destructor, which Python lets nothing out of"),
    ],
)
def test_request_to_stop_that_strikes_at_a_bad_place_is_heeded(
    data_folder: Path, base_folder: Path, temp: Path, work: str
) -> None:
    before = (
        "import os, signal\n"
        "import lorafleet.clients.orders as orders\n"
        f"class Lost:\n    def __del__(self): {STOP}\n"
        f"orders.load_member = lambda *_, **__: {work} and None\n"
    )
    with joined(data_folder, base_folder, temp, before=before, insecure=True) as process:
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0, rest


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_nothing_of_flower_outlives_a_member_that_is_killed(data_folder: Path, base_folder: Path, temp: Path) -> None:
    with joined(data_folder, base_folder, temp, insecure=True) as process:
        read_until(process, "Starting Flower SuperExec")
        children = family(process)
        assert len(children) >= 2  # and for a moment what they call
        process.kill()
        assert_gone(children)
