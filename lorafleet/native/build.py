"""Compiles the C++ of this folder, once for each version of it, where it can run and a compiler is there.

As PyTorch's inductor and Triton do, on the machine that runs them: 2 s at the first use, then a file in the user's
cache, which nobody else may write. Nothing depends on it: without, the library's own products serve.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")


class Library(NamedTuple):
    """What is compiled together."""

    name: str
    sources: tuple[str, ...]
    flags: tuple[str, ...]
    headers: tuple[str, ...] = ()


KERNELS: Final = Library(
    "kernels",
    ("attention.cpp", "layout.cpp", "linear.cpp", "logprobs.cpp"),
    # Not -march=native: virtual machines report processors that compilers know without the matrix unit.
    (
        *_FLAGS, "-fopenmp", "-fno-math-errno",
        "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # GCC 12 finds them in its own headers (its bug 105593)
        "-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mamx-tile",
        "-mamx-bf16",
    ),
    ("common.h", "mixture.h"),
)  # fmt: skip
"""For processors with a matrix unit."""
LEXICAL: Final = Library("lexical", ("lexical.cpp",), (*_FLAGS, "-ffp-contract=off"))
"""For every processor, with the same bits as numpy's."""
_SECONDS = 300.0
# Versions of each that are kept: those of a few checkouts and environments that are used in turns.
_KEPT = 6


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


def build(folder: Path, library: Library = KERNELS, *, again: bool = False) -> Path:
    """The compiled library's file in ``folder``, made now unless it is there; ``again``: made in any case.

    Raises BuildError where no compiler is found or it fails, or where others may write what would be loaded.
    """
    # What it runs on counts: a home may be shared by machines with different C libraries.
    digest = hashlib.sha256("\0".join((*library.flags, platform.machine(), *platform.libc_ver())).encode())
    for name in (*library.headers, *library.sources):
        digest.update(name.encode() + b"\0" + (_SOURCES / name).read_bytes() + b"\0")
    made = folder / f"{library.name}-{digest.hexdigest()[:16]}.so"
    try:
        if again or not made.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(folder)
            _compile(library, made)
            _forget_old(folder, library, made)
        _check_owner(folder)
        _check_owner(made)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{library.name} could not be compiled into {folder}: {error}") from None
    return made


def _compile(library: Library, made: Path) -> None:
    # GCC alone: its OpenMP is torch's. With another's, two teams of threads would share the cores.
    compiler = shutil.which("g++")
    if compiler is None:
        raise BuildError("no g++ was found; install GCC 11 or newer")
    # Under another name first: processes that start together must not load half a file.
    with tempfile.TemporaryDirectory(dir=made.parent) as work:
        unfinished = Path(work) / made.name
        sources = [str(_SOURCES / name) for name in library.sources]
        command = [compiler, *library.flags, *sources, "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode != 0:
            raise BuildError(f"{compiler} failed; GCC 11 or newer is needed: {_first_error(done.stderr)}")
        unfinished.chmod(0o700)
        unfinished.replace(made)


def _check_owner(path: Path) -> None:
    """Whoever can write what is loaded here runs code as this user."""
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"{path} belongs to user {found.st_uid} with mode {stat.filemode(found.st_mode)}; expected this user's "
            f"({os.geteuid()}) own, and writable by nobody else: remove it, or set XDG_CACHE_HOME to another folder"
        )


def _forget_old(folder: Path, library: Library, made: Path) -> None:
    others = sorted(folder.glob(f"{library.name}-*.so"), key=lambda file: file.stat().st_mtime)
    for file in [file for file in others if file != made][: 1 - _KEPT]:
        file.unlink(missing_ok=True)


def _first_error(text: str) -> str:
    lines = text.splitlines() or ["it said nothing"]
    return next((line for line in lines if "error" in line), lines[0])
