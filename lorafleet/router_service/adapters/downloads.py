"""A version as files that are sent piece by piece: opened once, so that what is hashed is what is sent."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Final

from lorafleet.adapters.format import CARD_NAME, CONFIG_NAME, GATES_NAME, WEIGHTS_NAME
from lorafleet.errors import InvalidInputError
from lorafleet.registry import Registry
from lorafleet.registry.records import Version

CHUNK_BYTES: Final = 512 * 1024


@dataclass(frozen=True)
class OpenFile:
    name: str
    stream: BinaryIO
    size: int
    sha256: str

    def chunks(self, offset: int) -> Iterator[tuple[int, bytes]]:
        """Its bytes from ``offset`` on, each piece with where it begins."""
        self.stream.seek(offset)
        while data := self.stream.read(CHUNK_BYTES):
            yield offset, data
            offset += len(data)


@contextmanager
def opened(registry: Registry, version: Version) -> Iterator[list[OpenFile]]:
    """A version's files in PEFT format: its verified weights, the config that names its base, and its card."""
    with ExitStack() as stack:
        folder = stack.enter_context(registry.folder(version))
        config = json.loads((folder / CONFIG_NAME).read_bytes())
        # Stored weights name no base, as two tenants' may share a folder.
        config["base_model_name_or_path"] = version.base_digest
        streams: dict[str, BinaryIO] = {
            CONFIG_NAME: io.BytesIO(f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode())
        }
        for name in (WEIGHTS_NAME, GATES_NAME):
            if (folder / name).is_file():
                streams[name] = stack.enter_context((folder / name).open("rb"))
        if card := registry.card(version):
            streams[CARD_NAME] = io.BytesIO(card.encode())
        yield [_open_file(name, stream) for name, stream in streams.items()]


def from_where(files: list[OpenFile], name: str, offset: int) -> list[tuple[OpenFile, int]]:
    """The files from one of them on, each with the offset to begin at; InvalidInputError for what is not there."""
    names = [file.name for file in files]
    if (name or offset) and name not in names:
        raise InvalidInputError(f"found the file {name!r}, expected one of: {', '.join(names)}")
    rest = files[names.index(name) if name else 0 :]
    if offset > rest[0].size:
        raise InvalidInputError(f"{name}: found the offset {offset}, expected at most its size, {rest[0].size}")
    return [(file, 0 if number else offset) for number, file in enumerate(rest)]


def _open_file(name: str, stream: BinaryIO) -> OpenFile:
    digest = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    return OpenFile(name, stream, stream.seek(0, io.SEEK_END), digest)
