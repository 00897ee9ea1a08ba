"""Deals the texts of the four domains to eight owners, and writes them where a client finds them.

Owner k's size is drawn log-uniformly, its shares of the domains from a Dirichlet distribution around one dominant
domain (two owners have each domain as theirs). Every source file goes to one place only: the training part or the
held-out part of one owner, or the held-out part of its domain.

::

    out/owners/<name>/train/*.txt       out/domains/<name>/held_out/*.txt
    out/owners/<name>/held_out/*.txt    out/corpora.json
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lorafleet.demo.corpora.sources import DOMAINS, Document, base_corpus_digests, documents, sha256
from lorafleet.errors import AlreadyExistsError, InvalidInputError, NotFoundError

OWNERS = ("alder", "birch", "cedar", "dogwood", "elm", "fir", "hazel", "juniper")
TRAIN_BYTES = (150_000, 600_000)
OWNER_HELD_OUT_SHARE = 0.08
DOMAIN_HELD_OUT_BYTES = 60_000
# Dirichlet parameters: the dominant domain has 8 / (8 + 3 · 0.5) = 84% on average, rarely below 65%.
DOMINANT, OTHER = 8.0, 0.5
# What a domain needs for the held-out part and two owners of the largest size, with room for files that fit nowhere.
POOL_BYTES = 2_000_000
MIN_POOL_BYTES = 500_000


@dataclass(frozen=True)
class File:
    """Where a written text came from."""

    name: str
    """Path below the corpora's folder."""
    domain: str
    source: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Owner:
    name: str
    domain: str
    """The dominant one."""
    folder: Path
    train_bytes: int
    held_out_bytes: int
    shares: Mapping[str, float]
    """Domain → its share of the training bytes."""


@dataclass(frozen=True)
class Domain:
    name: str
    held_out: Path
    """Folder of texts that no owner has."""
    held_out_bytes: int
    provenance: str


@dataclass(frozen=True)
class Corpora:
    folder: Path
    seed: int
    owners: tuple[Owner, ...]
    domains: tuple[Domain, ...]
    files: tuple[File, ...]

    @classmethod
    def load(cls, folder: Path) -> Corpora:
        """Read back what :func:`build_corpora` wrote."""
        path = folder / "corpora.json"
        if not path.is_file():
            raise NotFoundError(f"{path} is missing: build the corpora there first")
        said = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            folder,
            said["seed"],
            tuple(Owner(**{**owner, "folder": folder / owner["folder"]}) for owner in said["owners"]),
            tuple(Domain(**{**domain, "held_out": folder / domain["held_out"]}) for domain in said["domains"]),
            tuple(File(**file) for file in said["files"]),
        )

    def of_domains(self, names: Collection[str]) -> Corpora:
        """Only these domains and the owners whose dominant domain is one of them."""
        if unknown := set(names) - {domain.name for domain in self.domains}:
            raise InvalidInputError(f"unknown domains {sorted(unknown)}; known are {', '.join(DOMAINS)}")
        return replace(
            self,
            owners=tuple(owner for owner in self.owners if owner.domain in names),
            domains=tuple(domain for domain in self.domains if domain.name in names),
        )


PROVENANCE = {
    "cpp": "C and C++ headers that torch installs",
    "math": "sympy's Python sources and tests",
    "prose": "descriptions, read-mes, manuals and licences of the installed Python packages",
    "sql": "written by lorafleet's seeded grammar of database scripts",
}


def build_corpora(out: Path, *, seed: int, root: Path | None = None) -> Corpora:
    """Write the private data of the demo's owners; the same seed and environment give the same bytes.

    ``root`` is the site-packages folder to take text from: the running environment's where it is not given. ``out``
    must be empty or absent (AlreadyExistsError); an environment with too little text of a domain is a NotFoundError.
    """
    if out.exists() and any(out.iterdir()):
        raise AlreadyExistsError(f"{out} is not empty: name a new folder, or remove this one")
    pools = documents(root=root, seed=seed, excluded=base_corpus_digests(), limit_bytes=POOL_BYTES)
    for domain, pool in pools.items():
        size = sum(document.size_bytes for document in pool)
        if size < MIN_POOL_BYTES:
            raise NotFoundError(
                f"found {size / 1e3:.0f} kB of {domain} text in this environment, expected at least "
                f"{MIN_POOL_BYTES / 1e3:.0f} kB: install lorafleet[demo] with its dependencies"
            )
        random.Random(f"{seed}/deal/{domain}").shuffle(pool)
    part = out.with_name(f".{out.name}.part")
    if part.exists():
        shutil.rmtree(part)
    corpora = _deal(part, pools, seed)
    _write_json(part, corpora)
    if out.exists():
        out.rmdir()
    part.replace(out)
    return Corpora.load(out)


def _deal(folder: Path, pools: dict[str, list[Document]], seed: int) -> Corpora:
    """Domains' held-out parts first, then owners' held-out and training parts; pools shrink as they are dealt."""
    files: list[File] = []
    domains = []
    for name in DOMAINS:
        held_out = folder / "domains" / name / "held_out"
        drawn = _draw(pools[name], DOMAIN_HELD_OUT_BYTES, largest_bytes=DOMAIN_HELD_OUT_BYTES // 6)
        written = _write(folder, held_out, {name: drawn})
        files += written
        domains.append(Domain(name, held_out, sum(file.size_bytes for file in written), PROVENANCE[name]))

    wanted = _wanted(seed)
    demand = {name: sum(want[name] for want in wanted.values()) * (1 + OWNER_HELD_OUT_SHARE) for name in DOMAINS}
    # Where the environment has too little of a domain, every owner gets the same share of what it wanted.
    supply = {name: sum(document.size_bytes for document in pools[name]) for name in DOMAINS}
    scale = {name: min(1.0, 0.95 * supply[name] / demand[name]) for name in DOMAINS}
    owners = []
    for number, (owner, want) in enumerate(wanted.items()):
        home = folder / "owners" / owner
        sizes = {name: want[name] * scale[name] for name in DOMAINS}
        held = {name: _draw(pools[name], sizes[name] * OWNER_HELD_OUT_SHARE) for name in DOMAINS}
        held_files = _write(folder, home / "held_out", held)
        train_files = _write(folder, home / "train", {name: _draw(pools[name], sizes[name]) for name in DOMAINS})
        files += held_files + train_files
        total = sum(file.size_bytes for file in train_files)
        shares = {name: sum(f.size_bytes for f in train_files if f.domain == name) / total for name in DOMAINS}
        held_bytes = sum(file.size_bytes for file in held_files)
        owners.append(Owner(owner, DOMAINS[number % len(DOMAINS)], home, total, held_bytes, shares))
    return Corpora(folder, seed, tuple(owners), tuple(domains), tuple(files))


def _wanted(seed: int) -> dict[str, dict[str, float]]:
    """Owner → domain → training bytes."""
    wanted = {}
    for number, owner in enumerate(OWNERS):
        rng = random.Random(f"{seed}/owner/{owner}")
        size = math.exp(rng.uniform(*map(math.log, TRAIN_BYTES)))
        dominant = DOMAINS[number % len(DOMAINS)]
        gammas = {name: rng.gammavariate(DOMINANT if name == dominant else OTHER, 1.0) for name in DOMAINS}
        wanted[owner] = {name: size * gamma / sum(gammas.values()) for name, gamma in gammas.items()}
    return wanted


def _draw(pool: list[Document], size_bytes: float, *, largest_bytes: float = math.inf) -> list[Document]:
    """Take documents out of the pool, in its order, as long as they fit into the rest of ``size_bytes``."""
    drawn: list[Document] = []
    left: list[Document] = []
    for document in pool:
        if document.size_bytes <= min(size_bytes, largest_bytes):
            drawn.append(document)
            size_bytes -= document.size_bytes
        else:
            left.append(document)
    pool[:] = left
    return drawn


def _write(root: Path, folder: Path, texts: Mapping[str, list[Document]]) -> list[File]:
    folder.mkdir(parents=True)
    files = []
    for domain, drawn in texts.items():
        for number, document in enumerate(drawn):
            path = folder / f"{domain}-{number:03}.txt"
            path.write_bytes(document.text.encode())
            name = path.relative_to(root).as_posix()
            files.append(File(name, domain, document.source, sha256(document.text), document.size_bytes))
    return files


def _write_json(folder: Path, corpora: Corpora) -> None:
    def relative(said: dict[str, object]) -> dict[str, object]:
        return {k: v.relative_to(folder).as_posix() if isinstance(v, Path) else v for k, v in said.items()}

    said = {
        "seed": corpora.seed,
        "owners": [relative(asdict(owner)) for owner in corpora.owners],
        "domains": [relative(asdict(domain)) for domain in corpora.domains],
        "files": [asdict(file) for file in corpora.files],
    }
    (folder / "corpora.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
