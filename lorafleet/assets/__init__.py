"""Files shipped with the package, and how a base is found and identified."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

from lorafleet.errors import NotFoundError

_HERE = Path(__file__).resolve().parent
SHIPPED_BASES = {"tiny": _HERE / "tiny_base"}


def base_path(name_or_path: str | Path) -> Path:
    """The folder of a base in HF format: the name of a shipped one, or a folder of your own."""
    path = SHIPPED_BASES.get(str(name_or_path), Path(name_or_path))
    if not (path / "config.json").is_file():
        raise NotFoundError(
            f"no base at {path}: expected a folder in HF format with config.json and *.safetensors, "
            f"or one of the shipped names: {', '.join(SHIPPED_BASES)}"
        )
    return path


def base_digest(path: Path) -> str:
    """``sha256:…`` over the config and the weight files of a base, in name order; what identifies it."""
    digest = hashlib.sha256()
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise NotFoundError(f"{path} has no *.safetensors; expected a base in HF format (pickled weights are refused)")
    for file in [path / "config.json", *weights]:
        digest.update(f"{file.name}\n".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


class BaseDescription(NamedTuple):
    """What a registry writes down of a base."""

    name: str
    path: Path
    digest: str
    architecture: str
    parameters: int


def describe_base(name_or_path: str | Path) -> BaseDescription:
    """Name, digest, architecture and size of a base, from its config and the headers of its weight files."""
    path = base_path(name_or_path)
    config = json.loads((path / "config.json").read_text())
    name = str(name_or_path) if str(name_or_path) in SHIPPED_BASES else path.resolve().name
    architecture = (config.get("architectures") or ["unknown"])[0]
    return BaseDescription(name, path, base_digest(path), architecture, count_parameters(path))


def count_parameters(path: Path) -> int:
    """Parameters stored in a base's weight files."""
    from safetensors import safe_open

    total = 0
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return total


def flower_app_path() -> Path:
    """The folder that ``flwr run`` submits; it names components of the installed package and holds no other code."""
    return _HERE / "flower_app"
