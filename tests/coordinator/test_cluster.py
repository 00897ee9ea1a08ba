"""Two nodes on this machine by the scripts of deploy/ray, and what runs on them."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.coordinator.cluster_job import here

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "deploy" / "ray"
WAIT_S = 90.0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Cluster:
    """A head and a worker node, in processes of this test's own."""

    def __init__(self, folder: Path, *, jobs: bool) -> None:
        self.folder = folder
        self.port, jobs_port, client, *agents = free_ports(5)
        self.jobs = f"http://127.0.0.1:{jobs_port}"
        self.environment = {
            **os.environ,
            "RAY": str(Path(sys.executable).with_name("ray")),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
        }
        own = ["--cpus", "1", "--memory", "100000000", "--host", "127.0.0.1"]
        self.head = self._start(
            "head", *own, "--port", str(self.port), "--jobs-port", str(jobs_port if jobs else 0),
            "--temp", str(folder), "--", "--block", "--ray-client-server-port", str(client),
            "--dashboard-agent-listen-port", str(agents[0]),
        )  # fmt: skip
        self._wait(self.head, lambda: self._listens(self.port) and (not jobs or self._listens(jobs_port)))
        self.worker = self._start(
            "worker", *own, "--head", f"127.0.0.1:{self.port}", "--", "--block",
            "--dashboard-agent-listen-port", str(agents[1]),
        )  # fmt: skip
        self._wait(self.worker, lambda: "Ray runtime started" in self.log("worker"))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [SCRIPTS / f"start-{name}.sh", *arguments],
                env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _wait(self, process: subprocess.Popen[bytes], condition: object) -> None:
        assert callable(condition)
        deadline = time.monotonic() + WAIT_S
        while not condition():
            logs = "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))
            assert process.poll() is None and time.monotonic() < deadline, logs
            time.sleep(0.1)

    @staticmethod
    def _listens(port: int) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
        return False

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """All processes of a node at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            head = psutil.Process(node.pid)
            for process in [*head.children(recursive=True), head]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        node.wait()

    def run(self, *command: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env={**self.environment, "RAY_ADDRESS": f"127.0.0.1:{self.port}"}, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


@contextlib.contextmanager
def cluster(*, jobs: bool) -> Iterator[Cluster]:
    # A short path: Ray's sockets live there, and a socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="lf-ray-"))
    made: Cluster | None = None
    try:
        made = Cluster(folder, jobs=jobs)
        yield made
    finally:
        if made is not None:
            made.kill(made.worker)
            made.kill(made.head)
        shutil.rmtree(folder, ignore_errors=True)


def said(out: str) -> list[str]:
    return [line for line in out.splitlines() if re.match(r"(nodes|experts|sum) ", line)]


@pytest.mark.long
@pytest.mark.process
def test_a_federation_on_two_nodes_gives_the_bits_of_one_process_and_a_sum_outlives_the_second(tmp_path: Path) -> None:
    with cluster(jobs=False) as nodes:
        job = nodes.run(sys.executable, "-m", "tests.coordinator.cluster_job", tmp_path, "--lose-a-node")
        deadline = time.monotonic() + WAIT_S
        while not (tmp_path / "kill").exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        nodes.kill(nodes.worker)
        (tmp_path / "killed").touch()
        out, _ = job.communicate(timeout=WAIT_S)
        assert nodes.head.poll() is None  # the cluster runs on without the federation
    (tmp_path / "here").mkdir()
    assert said(out) == ["nodes 2", *here(tmp_path / "here")], out


@pytest.mark.process
@pytest.mark.skipif(find_spec("aiohttp_cors") is None, reason="Ray's job server needs the extra 'cluster'")
def test_a_federation_is_submitted_as_a_job(tmp_path: Path) -> None:
    with cluster(jobs=True) as nodes:
        command = ("--", sys.executable, "-m", "tests.coordinator.cluster_job", str(tmp_path))
        out, _ = nodes.run(SCRIPTS / "submit.sh", "--jobs", nodes.jobs, *command).communicate(timeout=2 * WAIT_S)
        assert nodes.head.poll() is None
    (tmp_path / "here").mkdir()
    assert said(out) == ["nodes 2", *here(tmp_path / "here")], out


@pytest.mark.parametrize("script", ["start-head.sh", "start-worker.sh", "submit.sh"])
def test_a_script_explains_itself_and_refuses_what_it_does_not_know(script: str) -> None:
    shown = subprocess.run([SCRIPTS / script, "--help"], capture_output=True, text=True, check=True)
    assert f"Usage: {script}" in shown.stdout and "RAY_AUTH_MODE" in shown.stdout
    wrong = subprocess.run([SCRIPTS / script, "--gone"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "--gone" in wrong.stderr
    nothing = subprocess.run([SCRIPTS / script, "--temp"], capture_output=True, text=True, check=False)
    assert nothing.returncode == 2
