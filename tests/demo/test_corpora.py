"""The demo's private data: dealt once each, reproducible, and nothing that the base has read."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from lorafleet.demo.corpora import Corpora, build_corpora
from lorafleet.demo.corpora import build as build_module
from lorafleet.demo.corpora.sources import base_corpus_digests, documents, required_files, site_packages
from lorafleet.demo.corpora.sql import sql_script
from lorafleet.errors import AlreadyExistsError, InvalidInputError, NotFoundError

WORDS = ["matrix", "tensor", "river", "window", "letter", "garden", "signal", "copper", "module", "answer", "market"]


def write_texts(folder: Path, suffix: str, *, files: int, lines: int, seed: int) -> None:
    """Files of distinct lines, so that none is a copy of another."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        text = "\n".join(f"{number} {line} " + " ".join(rng.choices(WORDS, k=8)) for line in range(lines))
        (folder / f"file{number}{suffix}").write_text(text + "\n")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small site-packages with enough of each domain."""
    root = tmp_path_factory.mktemp("site-packages")
    write_texts(root / "torch" / "include" / "ATen", ".h", files=150, lines=80, seed=1)
    write_texts(root / "sympy" / "core", ".py", files=150, lines=80, seed=2)
    write_texts(root / "manuals", ".rst", files=150, lines=80, seed=3)
    return root


@pytest.fixture(scope="module")
def corpora(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return build_corpora(tmp_path_factory.mktemp("corpora") / "out", seed=7, root=environment)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_source_goes_to_one_place_only(corpora: Corpora) -> None:
    sources = [file.source for file in corpora.files]
    assert len(sources) == len(set(sources))
    digests = [file.sha256 for file in corpora.files]
    assert len(digests) == len(set(digests))


def test_files_on_disk_are_those_that_are_listed(corpora: Corpora) -> None:
    written = {path.relative_to(corpora.folder).as_posix() for path in corpora.folder.rglob("*.txt")}
    assert written == {file.name for file in corpora.files}
    for file in corpora.files:
        raw = (corpora.folder / file.name).read_bytes()
        assert (hashlib.sha256(raw).hexdigest(), len(raw)) == (file.sha256, file.size_bytes)


def test_two_owners_dominate_each_domain_and_sizes_are_uneven(corpora: Corpora) -> None:
    dominant = [owner.domain for owner in corpora.owners]
    assert sorted(dominant) == sorted(2 * [domain.name for domain in corpora.domains])
    for owner in corpora.owners:
        assert owner.shares[owner.domain] == max(owner.shares.values())
        assert sum(owner.shares.values()) == pytest.approx(1.0)
        assert sum(path.stat().st_size for path in (owner.folder / "train").iterdir()) == owner.train_bytes
        assert 0 < owner.held_out_bytes < 0.2 * owner.train_bytes
    sizes = [owner.train_bytes for owner in corpora.owners]
    assert max(sizes) > 1.3 * min(sizes)


def test_same_seed_gives_the_same_bytes_and_another_seed_others(
    environment: Path, corpora: Corpora, tmp_path: Path
) -> None:
    again = build_corpora(tmp_path / "again", seed=7, root=environment)
    assert tree(again.folder) == tree(corpora.folder)
    other = build_corpora(tmp_path / "other", seed=8, root=environment)
    assert tree(other.folder) != tree(corpora.folder)


def test_corpora_load_back_as_they_were_built(corpora: Corpora) -> None:
    assert Corpora.load(corpora.folder) == corpora


def test_nothing_written_names_a_place_on_this_machine(corpora: Corpora, environment: Path) -> None:
    said = (corpora.folder / "corpora.json").read_text()
    assert str(environment) not in said
    assert str(corpora.folder) not in said


def test_selected_domains_bring_their_owners(corpora: Corpora) -> None:
    some = corpora.of_domains(("sql", "cpp"))
    assert {domain.name for domain in some.domains} == {"sql", "cpp"}
    assert len(some.owners) == 4
    with pytest.raises(InvalidInputError, match="cobol"):
        corpora.of_domains(("cobol",))


def read_by_the_base(corpora: Corpora, root: Path, digests: Collection[str]) -> set[str]:
    """Sources of the corpora whose whole text has one of the digests, by the rule of scripts/train_tiny_base.py.

    Files are read again from ``root``: what the corpora hold of them is cut, and has another digest.
    """
    found = set()
    for file in corpora.files:
        # SQL has no source but the text that was written.
        raw = (corpora.folder / file.name if file.domain == "sql" else root / file.source).read_bytes()
        if hashlib.sha256(raw.decode("utf-8").encode()).hexdigest() in digests:
            found.add(file.source)
    return found


def test_a_source_that_the_base_has_read_is_found_although_its_text_is_cut_and_is_then_left_out(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "site-packages"
    shutil.copytree(environment, root)
    # Longer than what is taken of a file, and with a header that is taken off.
    write_texts(root / "sympy" / "long", ".py", files=1, lines=600, seed=9)
    write_texts(root / "package-1.0.dist-info", ".rst", files=1, lines=60, seed=10)
    description = root / "package-1.0.dist-info" / "file0.rst"
    description.with_name("METADATA").write_text(f"Name: package\n\n{description.read_text()}")
    description.unlink()
    planted = {"sympy/long/file0.py", "package-1.0.dist-info/METADATA"}
    digests = frozenset(hashlib.sha256((root / source).read_bytes()).hexdigest() for source in planted)

    before = build_corpora(tmp_path / "before", seed=7, root=root)
    assert not digests & {file.sha256 for file in before.files}
    assert read_by_the_base(before, root, digests) == planted

    monkeypatch.setattr(build_module, "base_corpus_digests", lambda: digests)
    after = build_corpora(tmp_path / "after", seed=7, root=root)
    assert read_by_the_base(after, root, digests) == set()


def test_texts_that_the_base_has_read_are_left_out(environment: Path) -> None:
    everything = documents(root=environment, seed=0, excluded=frozenset(), limit_bytes=1_000_000)["math"]
    read = hashlib.sha256((environment / everything[0].source).read_bytes()).hexdigest()
    rest = documents(root=environment, seed=0, excluded={read}, limit_bytes=1_000_000)["math"]
    assert {d.source for d in everything} - {d.source for d in rest} == {everything[0].source}


def test_shipped_list_knows_the_standard_library() -> None:
    pinned = base_corpus_digests()
    assert len(pinned) > 1000
    assert all(len(digest) == 64 for digest in pinned)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text,
        lambda text: text + "\n".join(f"{n} one more line at the end" for n in range(20)),
        lambda text: "\n".join(reversed(text.splitlines())),
    ],
    ids=["copy", "copy with an addition", "same lines in another order"],
)
def test_near_duplicates_are_left_out(tmp_path: Path, spoil: Callable[[str], str]) -> None:
    folder = tmp_path / "sympy"
    write_texts(folder, ".py", files=3, lines=60, seed=5)
    (folder / "twin.py").write_text(spoil((folder / "file1.py").read_text()))
    found = documents(root=tmp_path, seed=0, excluded=frozenset(), limit_bytes=1_000_000)["math"]
    assert len(found) == 3
    assert len({"sympy/twin.py", "sympy/file1.py"} & {document.source for document in found}) == 1


def test_tables_binaries_and_fragments_are_no_texts(tmp_path: Path) -> None:
    folder = tmp_path / "sympy"
    write_texts(folder, ".py", files=1, lines=60, seed=6)
    (folder / "table.py").write_text("x = [\n" + "    0x00, 0x01, 0x02, 0x03,\n" * 500 + "]\n")
    (folder / "latin.py").write_bytes(b"\xff\xfe" + random.Random(0).randbytes(4000))
    (folder / "short.py").write_text("import sympy\n")
    found = documents(root=tmp_path, seed=0, excluded=frozenset(), limit_bytes=1_000_000)["math"]
    assert [document.source for document in found] == ["sympy/file0.py"]


def test_metadata_counts_from_its_description_on(tmp_path: Path) -> None:
    folder = tmp_path / "package-1.0.dist-info"
    write_texts(folder, ".rst", files=1, lines=60, seed=7)
    description = (folder / "file0.rst").read_text()
    (folder / "file0.rst").unlink()
    (folder / "METADATA").write_text(f"Name: package\nVersion: 1.0\n\n{description}")
    (found,) = documents(root=tmp_path, seed=0, excluded=frozenset(), limit_bytes=1_000_000)["prose"]
    assert found.text == description


def test_environment_with_too_little_text_is_an_error_that_says_so(tmp_path: Path) -> None:
    write_texts(tmp_path / "sympy", ".py", files=3, lines=60, seed=8)
    with pytest.raises(NotFoundError, match="kB of cpp text"):
        build_corpora(tmp_path / "out", seed=0, root=tmp_path)
    assert not (tmp_path / "out").exists()


def test_occupied_folder_is_refused(tmp_path: Path, environment: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(AlreadyExistsError):
        build_corpora(tmp_path, seed=0, root=environment)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_half_written_corpora_never_stand_at_the_named_folder(
    tmp_path: Path, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(build_module, "_write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        build_corpora(tmp_path / "out", seed=0, root=environment)
    assert not (tmp_path / "out").exists()


def test_running_environment_gives_the_sizes_that_the_demo_needs(tmp_path: Path) -> None:
    corpora = build_corpora(tmp_path / "out", seed=7)
    assert len(corpora.owners) == 8
    for owner in corpora.owners:
        assert 100_000 < owner.train_bytes <= 620_000
        assert owner.shares[owner.domain] > 0.4
    for domain in corpora.domains:
        assert 40_000 <= domain.held_out_bytes <= 80_000
    assert read_by_the_base(corpora, site_packages(), base_corpus_digests()) == set()
    assert json.loads((corpora.folder / "corpora.json").read_text())["seed"] == 7


def test_packages_that_the_demo_does_not_need_give_it_no_text() -> None:
    names = required_files(site_packages())
    packages = {name.partition("/")[0] for name in names}
    assert {"torch", "sympy", "transformers", "ray"} <= packages
    assert not {"pytest", "mypy", "hypothesis", "ruff"} & packages
    for name in random.Random(5).sample(names, 200):
        assert (site_packages() / name).is_file()


def test_folder_without_the_packages_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"install lorafleet\[demo\]"):
        required_files(tmp_path)


def test_sqlite_scripts_of_the_grammar_run_with_their_foreign_keys_checked() -> None:
    scripts = [sql_script(3, number) for number in range(120)]
    ours = [script for script in scripts if "(SQLite)" in script.partition("\n")[0]]
    assert len(ours) > 10
    for script in ours:
        with sqlite3.connect(":memory:") as database:
            database.executescript("PRAGMA foreign_keys = ON;\n" + script)


def test_grammar_is_a_function_of_seed_and_number_and_does_not_repeat_itself() -> None:
    assert sql_script(1, 5) == sql_script(1, 5)
    scripts = [sql_script(1, number) for number in range(60)]
    lines = [line for script in scripts for line in script.splitlines() if len(line) > 30]
    assert len(set(lines)) > 0.7 * len(lines)
    assert sql_script(2, 5) != scripts[5]
