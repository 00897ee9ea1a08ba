"""Where the demo's text comes from: files beside torch and sympy in the running environment, and a written grammar.

Nothing is downloaded. Only packages that ``lorafleet[demo]`` needs are read: whatever else is installed changes no
text. The shipped base was trained on CPython's standard library; whatever has the digest of one of those files is left
out, so that no domain is one that the base has read. Near-duplicates (generated headers, the same licence in forty
packages) are left out too, or a held-out text would be known from training.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from lorafleet.assets import SHIPPED_BASES
from lorafleet.demo.corpora.sql import sql_script
from lorafleet.errors import NotFoundError

MIN_BYTES, MAX_BYTES = 1_000, 32_000
# What gzip shrinks more than eightfold is a table, not language (the base's own corpus draws the same line).
MAX_GZIP_RATIO = 8.0
# A text more than half of whose telling lines stood in earlier texts is a copy of one.
MAX_KNOWN_SHARE = 0.5
TELLING_LINE = 20

SKIPPED_FOLDERS = {"__pycache__", "node_modules", "lorafleet"}
_PROSE_NAME = re.compile(r"(licen[cs]e|copying|notice|readme|changes|changelog)[\w-]*(\.txt)?", re.IGNORECASE)


class Document(NamedTuple):
    source: str
    """Path relative to site-packages, or the grammar with its seed and number."""
    text: str

    @property
    def size_bytes(self) -> int:
        return len(self.text.encode())


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def site_packages() -> Path:
    """The folder that holds torch; found without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotFoundError(
            "found no torch in this environment, whose files the demo's data are built from: install it"
        )
    return Path(spec.origin).parent.parent


def required_files(root: Path) -> list[str]:
    """Paths below ``root`` of the installed packages that ``lorafleet[demo]`` needs; in the order of a walk."""
    seen: set[str] = set()
    names: set[str] = set()
    waiting = [Requirement("lorafleet[demo]")]
    while waiting:
        requirement = waiting.pop()
        for extra in requirement.extras or {""}:
            key = f"{re.sub(r'[-_.]+', '-', requirement.name).lower()}[{extra}]"
            if key in seen or (found := _installed(requirement.name)) is None:
                continue
            seen.add(key)
            if not requirement.extras:
                names.update(_files_below(found, root))
            needed = [Requirement(text) for text in found.requires or ()]
            waiting += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]
            if extra:
                waiting.append(Requirement(requirement.name))
    if not names:
        raise NotFoundError(f"found none of lorafleet's packages under {root}: install lorafleet[demo] there")
    return sorted(names, key=_walked)


def _walked(name: str) -> list[tuple[bool, str]]:
    """Sorts a folder's files before its folders, as walking through it gives them."""
    *folders, file = name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]


def _installed(name: str) -> Distribution | None:
    """None for what is not installed: another platform's, or an extra that nobody asked for."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _files_below(found: Distribution, root: Path) -> Iterator[str]:
    for file in found.files or ():
        path = Path(os.path.normpath(str(found.locate_file(file))))
        if path.is_relative_to(root):
            name = path.relative_to(root)
            if not any(part in SKIPPED_FOLDERS or part.startswith(".") for part in name.parts[:-1]):
                yield name.as_posix()


def base_corpus_digests() -> frozenset[str]:
    """SHA-256 of every text that the shipped base was trained or evaluated on."""
    path = SHIPPED_BASES["tiny"] / "corpus.json"
    if not path.is_file():
        raise NotFoundError(f"{path} is missing: reinstall lorafleet")
    return frozenset(json.loads(path.read_text(encoding="utf-8"))["files"].values())


def is_cpp(name: str) -> bool:
    """C++ and C headers of torch."""
    return name.startswith("torch/include/") and name.endswith((".h", ".hpp", ".cuh"))


def is_math(name: str) -> bool:
    """sympy's Python: symbolic mathematics and its tests, a Python that the standard library does not speak."""
    return name.startswith("sympy/") and name.endswith(".py")


def is_prose(name: str) -> bool:
    """Descriptions, licences, read-mes and manuals of the installed packages."""
    file = name.rpartition("/")[2]
    return file == "METADATA" or file.endswith((".md", ".rst")) or _PROSE_NAME.fullmatch(file) is not None


FILE_DOMAINS: dict[str, Callable[[str], bool]] = {"cpp": is_cpp, "math": is_math, "prose": is_prose}
DOMAINS = (*FILE_DOMAINS, "sql")


def documents(
    *, root: Path | None, seed: int, excluded: Collection[str], limit_bytes: int
) -> dict[str, list[Document]]:
    """Domain → usable texts in a seeded order: no tables, no copies, no digest in ``excluded``.

    ``root`` is a folder laid out as site-packages, of which all files count; None: the running environment's, and of
    that the packages that ``lorafleet[demo]`` needs. Each domain stops after about ``limit_bytes``; it may hold less
    where the environment does.
    """
    if root is None:
        root = site_packages()
        names = required_files(root)
    else:
        names = list(_file_names(root))
    pools: dict[str, list[Document]] = {}
    for domain in DOMAINS:
        if domain == "sql":
            found = (Document(f"sql grammar, seed {seed}, script {n}", sql_script(seed, n)) for n in count())
        else:
            chosen = [name for name in names if FILE_DOMAINS[domain](name)]
            random.Random(f"{seed}/{domain}").shuffle(chosen)
            found = (document for name in chosen for document in _read(root, name, excluded))
        pools[domain] = _take(_distinct(found), limit_bytes)
    return pools


def _file_names(root: Path) -> Iterator[str]:
    """Paths of all files below ``root``, relative to it, in a stable order; hidden folders are left out."""
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in SKIPPED_FOLDERS and not name.startswith("."))
        for file in sorted(files):
            yield Path(folder, file).relative_to(root).as_posix()


def _read(root: Path, name: str, excluded: Collection[str]) -> Iterator[Document]:
    """The text of one file, at most MAX_BYTES of it; nothing where it is excluded, no UTF-8, too short, or a table."""
    raw = (root / name).read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return
    if sha256(text) in excluded:
        return
    if name.endswith("/METADATA"):
        # The headers are key: value lines; the description after them is what somebody wrote.
        text = text.partition("\n\n")[2]
    text = _cut(text.strip() + "\n")
    size = len(text.encode())
    if size >= MIN_BYTES and size / len(gzip.compress(text.encode(), 6)) <= MAX_GZIP_RATIO:
        yield Document(name, text)


def _cut(text: str) -> str:
    """The text up to the last line that ends within MAX_BYTES."""
    raw = text.encode()
    return text if len(raw) <= MAX_BYTES else raw[: raw.rfind(b"\n", 0, MAX_BYTES) + 1].decode()


def _distinct(found: Iterator[Document]) -> Iterator[Document]:
    """Without the texts that mostly repeat lines of the ones before them."""
    known: set[str] = set()
    for document in found:
        lines = {line.strip() for line in document.text.splitlines()}
        telling = {line for line in lines if len(line) >= TELLING_LINE}
        if telling and len(telling & known) <= MAX_KNOWN_SHARE * len(telling):
            known |= telling
            yield document


def _take(found: Iterator[Document], limit_bytes: int) -> list[Document]:
    taken: list[Document] = []
    size = 0
    for document in found:
        taken.append(document)
        size += document.size_bytes
        if size >= limit_bytes:
            break
    return taken
