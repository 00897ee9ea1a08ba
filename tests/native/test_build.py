"""Compiling at first use: once, whole or not at all, and nothing lost where it cannot be.

The compiler is a script here; that the real one makes what the other tests use is seen there.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet import native
from lorafleet.engine import Engine, SamplingParams
from lorafleet.native.build import KERNELS, LEXICAL, BuildError, Library, build, cache_folder

# The module: in the package its function has the same name.
building = sys.modules[build.__module__]

# Writes the word "whole" to the file behind -o, and a line to the log.
COMPILES = 'echo run >> "$LOG"\nwhile [ "$1" != -o ]; do shift; done\necho whole > "$2"\n'


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """``compiler(script)`` is the only g++ from then on; gives its log."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))

    def put(script: str) -> Path:
        program = folder / "g++"
        program.write_text(f"#!/bin/sh\n{script}")
        program.chmod(0o755)
        return tmp_path / "log"

    return put


def runs(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_it_compiles_once_for_each_version(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    log = compiler(COMPILES)
    folder = tmp_path / "not" / "there" / "yet"
    made = build(folder)
    written = made.stat().st_mtime_ns
    assert build(folder) == made
    assert runs(log) == 1
    assert (made.parent, made.suffix, made.read_text()) == (folder, ".so", "whole\n")
    assert made.stat().st_mtime_ns == written
    assert list(folder.iterdir()) == [made]


def test_a_file_that_is_there_needs_no_compiler(
    compiler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(COMPILES)
    made = build(tmp_path / "cache")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert build(tmp_path / "cache") == made


def test_the_compiler_gets_every_source_and_the_flags(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    log = compiler('printf "%s\\n" "$@" > "$LOG"\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    build(tmp_path / "cache")
    arguments = log.read_text().splitlines()
    assert {"-shared", "-fopenmp", "-mamx-bf16"} <= set(arguments)
    assert {Path(a).name for a in arguments if a.endswith(".cpp")} == {
        "attention.cpp",
        "layout.cpp",
        "linear.cpp",
        "logprobs.cpp",
    }


def test_another_flag_or_source_is_another_file(
    compiler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = compiler(COMPILES)
    sources, folder = tmp_path / "sources", tmp_path / "cache"
    sources.mkdir()
    (sources / "common.h").write_text("// shared")
    (sources / "linear.cpp").write_text("// one")
    (sources / "new.cpp").write_text("// not yet among them")
    monkeypatch.setattr(building, "_SOURCES", sources)
    library = Library("some", ("linear.cpp",), ("-O3",), ("common.h",))
    made = [build(folder, library)]
    made.append(build(folder, library._replace(flags=("-O3", "-g"))))
    made.append(build(folder, library._replace(sources=("linear.cpp", "new.cpp"))))
    made.append(build(folder, library._replace(name="another")))
    for name in ("common.h", "linear.cpp"):
        (sources / name).write_text(f"// another {name}")
        made.append(build(folder, library))
    assert len(set(made)) == len(made) == runs(log)
    assert set(folder.iterdir()) == set(made)


def test_every_source_is_compiled_into_one_library() -> None:
    compiled = [name for library in (KERNELS, LEXICAL) for name in (*library.sources, *library.headers)]
    folder = Path(building.__file__).parent
    assert sorted(compiled) == sorted(file.name for kind in ("*.cpp", "*.h") for file in folder.glob(kind))


def test_two_that_start_together_end_with_one_whole_file(
    compiler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = compiler(COMPILES)
    folder, run, both = tmp_path / "cache", subprocess.run, threading.Barrier(2, timeout=60)

    def together(*args: Any, **options: Any) -> Any:
        both.wait()  # each has seen that there is no file
        done = run(*args, **options)
        assert list(folder.glob("*.so")) == []  # neither has shown its own before both are whole
        both.wait()
        return done

    monkeypatch.setattr(subprocess, "run", together)
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(build(folder))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs(log) == 2
    assert made == [made[0]] * 2
    assert made[0].read_text() == "whole\n"
    assert list(folder.iterdir()) == [made[0]]


def test_without_a_compiler_the_reason_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(BuildError, match=r"no g\+\+ was found; install GCC 11"):
        build(tmp_path / "cache")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('echo "in file x" >&2\necho "x.h:7: error: no such flag -mamx-bf16" >&2\nexit 1\n', "no such flag -mamx-bf16"),
        ('echo "killed" >&2\nexit 1\n', "killed"),
        ("exit 1\n", "it said nothing"),
        # Half a file, and then an error.
        ('while [ "$1" != -o ]; do shift; done\necho hal > "$2"\necho "error: disk full" >&2\nexit 1\n', "disk full"),
    ],
)
def test_a_compiler_that_fails_leaves_its_first_error_and_no_file(
    compiler: Callable[[str], Path], tmp_path: Path, script: str, words: str
) -> None:
    compiler(script)
    with pytest.raises(BuildError, match=rf"bin/g\+\+ failed; GCC 11 or newer is needed: .*{words}"):
        build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_never_ends_is_given_up(
    compiler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("exec tail -f /dev/null\n")
    monkeypatch.setattr(building, "_SECONDS", 0.1)
    with pytest.raises(BuildError, match=r"could not be compiled into .*cache: .*timed out"):
        build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    compiler(COMPILES)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BuildError, match=r"could not be compiled into .*file/lorafleet"):
        build(tmp_path / "file" / "lorafleet")


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_what_others_may_write_is_not_loaded(compiler: Callable[[str], Path], tmp_path: Path, mode: int) -> None:
    compiler(COMPILES)
    made = build(tmp_path / "cache")
    made.chmod(mode)
    with pytest.raises(BuildError, match="writable by nobody else"):
        build(tmp_path / "cache")
    made.chmod(0o700)
    assert build(tmp_path / "cache") == made
    (tmp_path / "cache").chmod(mode | 0o700)
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        build(tmp_path / "cache")


def test_a_folder_that_is_made_is_for_nobody_else(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    compiler(COMPILES)
    build(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_versions_that_were_used_long_ago_go(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    compiler(COMPILES)
    folder = tmp_path / "cache"
    folder.mkdir()
    for age in range(9):
        old = folder / f"kernels-{age:016}.so"
        old.touch()
        os.utime(old, (1e9 - age, 1e9 - age))
    made = build(folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [made.name, *(f"kernels-{age:016}.so" for age in range(5))]
    )


def test_what_is_asked_for_again_is_compiled_again(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    compiler(COMPILES)
    made = build(tmp_path / "cache")
    made.write_text("damaged")
    assert build(tmp_path / "cache").read_text() == "damaged"
    assert build(tmp_path / "cache", again=True).read_text() != "damaged"


def test_cache_is_the_users() -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/some/cache"}) == Path("/some/cache/lorafleet")
    assert cache_folder({}) == cache_folder({"XDG_CACHE_HOME": ""}) == Path.home() / ".cache" / "lorafleet"


@pytest.fixture
def anew() -> Iterator[None]:
    """The library is looked for anew in the test, and again after it."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@pytest.fixture
def no_matrix_unit(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def test_without_a_matrix_unit_there_is_no_library_and_a_reason(
    no_matrix_unit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "build", lambda _: pytest.fail("nothing is compiled where it could not run"))
    assert native.library() is None
    assert "no matrix unit (AMX)" in native.why_not()


def test_a_torch_without_these_names_is_no_error(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert native.library() is None
    assert "this version of torch" in native.why_not()


def test_where_the_system_forbids_the_matrix_unit_there_is_no_library_and_a_reason(
    anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, found in (("_is_amx_tile_supported", True), ("_is_avx512_bf16_supported", True), ("_init_amx", False)):
        monkeypatch.setattr(torch.cpu, name, lambda found=found: found)
    assert native.library() is None
    assert "does not let this process" in native.why_not()


@pytest.mark.parametrize("script", ['echo "error: too old" >&2\nexit 1\n', COMPILES], ids=["fails", "makes no library"])
def test_a_build_that_fails_is_said_once_and_costs_nothing_else(
    anew: None,
    compiler: Callable[[str], Path],
    script: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiler(script)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_init_amx"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path / "cache")
    with caplog.at_level(logging.WARNING, native.__name__):
        assert native.library() is None
        assert native.library() is None
    assert native.why_not()
    (record,) = caplog.records
    assert native.why_not() in record.getMessage()


def test_the_engine_answers_without_the_library(no_matrix_unit: None) -> None:
    engine = Engine.load("tiny", max_sequences=2, max_batch_tokens=64, kv_tokens=256)
    assert not engine._base.tiled
    assert not engine._base.tiled_attention
    (answer,) = engine.generate(["Once upon a time"], sampling=SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(answer.token_ids) == 4
    engine.stop()
