"""Compiles the C++ kernels of this folder, once for each version of them, where they can run and a compiler is there.

As PyTorch's inductor and Triton do, on the machine that runs them: 10 s at the first use, then a file in the user's
cache. Nothing depends on it: without, the library's own products serve.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

_SOURCES = Path(__file__).parent
# Not -march=native: virtual machines report processors that compilers know without the matrix unit.
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC 12 finds them in its own headers
    "-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mamx-tile",
    "-mamx-bf16",
)  # fmt: skip
_SECONDS = 300.0


class BuildError(Exception):
    """Why there is no compiled library; the message says what would help."""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where compiled kernels lie: ``$XDG_CACHE_HOME/lorafleet``, or ``~/.cache/lorafleet``.

    Raises BuildError where this user has no home.
    """
    root = environment.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "lorafleet"
    except RuntimeError:
        raise BuildError("this user has no home folder to keep compiled kernels in; set XDG_CACHE_HOME") from None


def build(folder: Path) -> Path:
    """The compiled library's file in ``folder``, made now unless it is there.

    Raises BuildError where no compiler is found or it fails.
    """
    sources = sorted(_SOURCES.glob("*.cpp"))
    digest = hashlib.sha256("\0".join(_FLAGS).encode())
    for source in sorted(_SOURCES.glob("*.h")) + sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    made = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    if made.exists():
        return made
    # GCC alone: its OpenMP is torch's. With another's, two teams of threads would share the cores.
    compiler = shutil.which("g++")
    if compiler is None:
        raise BuildError("no g++ was found; install GCC 11 or newer")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Under another name first: processes that start together must not load half a file.
        with tempfile.TemporaryDirectory(dir=folder) as work:
            unfinished = Path(work) / made.name
            command = [compiler, *_FLAGS, *map(str, sources), "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
            if done.returncode != 0:
                raise BuildError(f"{compiler} failed; GCC 11 or newer is needed: {_first_error(done.stderr)}")
            unfinished.replace(made)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the kernels could not be compiled into {folder}: {error}") from None
    return made


def _first_error(text: str) -> str:
    lines = text.splitlines() or ["it said nothing"]
    return next((line for line in lines if "error" in line), lines[0])
