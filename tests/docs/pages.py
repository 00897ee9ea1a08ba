"""A page's commands, run as they stand, one after the other, in one folder.

Blocks of ``sh`` and ``python`` are run. A comment on the line before a block says otherwise, and why:

``<!-- not run: REASON -->``
    It is not run.
``<!-- install -->``
    It is run in a clone, apart from the others.
``<!-- postgres -->``
    It is run where there is a PostgreSQL server, in the order of such blocks, apart from the others.

Variables that a block exports are there in the next one, and what it leaves running goes on until the page's end.
Ports are replaced by free ones, always the same one for a number.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.docs.preloaded import write_programs

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<kind>sh|python)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
_PORT = re.compile(r"(?<=:)(?:50051|50052|8000|8001|8443)\b")
APART = ("install", "postgres")
LIMIT_S = 120.0


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    line: int
    """Of the page, where it begins."""
    not_run: str = ""
    """Why, where it is not."""
    apart: str = ""
    """Where it is run, if not with the others."""


def blocks(text: str) -> list[Block]:
    """In the order of the page; ValueError for a comment before a block that is no mark, and for an indented block."""
    if indented := re.search(r"^[ \t]+```", text, re.MULTILINE):
        line = text.count("\n", 0, indented.start()) + 1
        raise ValueError(f"line {line}: found an indented block, which would not be run; put it at the margin")
    found = []
    for match in _BLOCK.finditer(text):
        mark, line = match["mark"] or "", text.count("\n", 0, match.start()) + 1
        reason = mark.removeprefix("not run: ") if mark.startswith("not run: ") else ""
        if mark and not reason and mark not in APART:
            expected = f"`not run: REASON`, `{'` or `'.join(APART)}`"
            raise ValueError(f"line {line}: found the comment {mark!r}, expected {expected}")
        found.append(Block(match["kind"], match["text"], line, reason, mark if mark in APART else ""))
    return found


def page(name: str) -> list[Block]:
    return blocks((ROOT / "docs" / name).read_text())


class Failed(AssertionError):
    """A block that did not end with 0: where it stands, and what it said."""


@contextmanager
def programs(folder: Path) -> Iterator[Path]:
    """``lorafleet`` and ``python`` in a folder, and the process behind them; all that they run is ended with it."""
    address = folder / "socket"
    write_programs(folder, address)
    behind = subprocess.Popen(
        [sys.executable, "-m", "tests.docs.preloaded", str(address)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert behind.stdout is not None
    with behind.stdout as said:
        try:
            assert said.readline() == b"ready\n"
            yield folder
        finally:
            os.killpg(behind.pid, signal.SIGKILL)
            behind.wait()


@contextmanager
def running(
    folder: Path, programs: Path, variables: Mapping[str, str], *, limit_s: float = LIMIT_S
) -> Iterator[Runner]:
    """A runner whose blocks begin in an empty folder; all that they left running is ended with it."""
    runner = Runner(folder, programs, variables, limit_s=limit_s)
    try:
        yield runner
    finally:
        for group in runner.groups:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)


class Runner:
    def __init__(self, folder: Path, programs: Path, variables: Mapping[str, str], *, limit_s: float) -> None:
        """``limit_s``: of a block."""
        self.folder, self._private, self._limit_s = folder / "work", folder, limit_s
        self.folder.mkdir()
        self.groups: list[int] = []
        self._ports: dict[str, str] = {}
        self._environment = folder / "environment"
        self._environment.write_text("")
        self._variables = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "OMP_NUM_THREADS": "1",
            **variables,
        }

    def run(self, several: Sequence[Block]) -> list[str]:
        """What each says, on both streams; raises Failed at the first that ends with an error."""
        return [self._run(block) for block in several]

    def _run(self, block: Block) -> str:
        text = _PORT.sub(lambda found: self._port(found[0]), block.text)
        if block.kind == "python":
            text = f"python - <<'END OF THE BLOCK'\n{text}END OF THE BLOCK\n"
        script = f". {self._environment}\nset -euo pipefail\n{text}\nexport -p >{self._environment}\n"
        said = (self._private / "said").open("w+b")  # a file: what a block leaves running may hold it open
        with said:
            done = subprocess.Popen(
                ["bash", "-c", script],
                cwd=self.folder,
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.groups.append(done.pid)
            try:
                code: int | str = done.wait(self._limit_s)
            except subprocess.TimeoutExpired:
                code = f"no end within {self._limit_s:g} s"
            said.seek(0)
            output = said.read().decode(errors="replace")
        if code != 0:
            raise Failed(f"line {block.line} of the page ({code}):\n{text}\n{output[-4000:]}")
        return output

    def _port(self, number: str) -> str:
        if number not in self._ports:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self._ports[number] = str(free.getsockname()[1])
        return self._ports[number]
