"""A client's texts: where they are, which of them never train, and how they become blocks of tokens.

A dataset is anything with ``__len__`` and ``__getitem__`` whose items are strings or mappings with a ``text``. One that
has a held-out part of its own names it ``held_out``; from any other a share is held out by document. Nothing here
imports torch before :func:`pack` is called: a client answers who it is without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from lorafleet.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT_SHARE = 0.1
HELD_OUT_SEED = 0


class Texts(Protocol):
    """What a dataset must offer."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str | Mapping[str, Any]: ...


class TextFolder:
    """The ``*.txt`` files of a folder and its subfolders, in name order; read when asked for.

    Where the folder has ``train/`` and ``held_out/``, the dataset is the first and ``held_out`` is the second.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        self.held_out: TextFolder | None = None
        if (folder / "train").is_dir() and (folder / "held_out").is_dir():
            self.held_out = TextFolder(folder / "held_out")
            folder = folder / "train"
        self.files = sorted(folder.rglob("*.txt"))
        if not self.files:
            raise NotFoundError(f"found no *.txt below {folder}; expected a folder of text files")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> str:
        return self.files[index].read_text(encoding="utf-8", errors="replace")


class JsonLines:
    """A file with one JSON object a line, in UTF-8, whose text is under ``field``."""

    def __init__(self, path: str | Path, *, field: str = "text") -> None:
        self.texts: list[str] = []
        file = Path(path)
        if not file.is_file():
            raise NotFoundError(f"{file} is missing; expected a file with one JSON object a line")
        # Bytes, as only a line feed ends a line: a text may hold U+2028 and what else Unicode breaks lines at.
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    self.texts.append(text_of(json.loads(line.decode("utf-8-sig")), field=field))
                except UnicodeDecodeError as error:
                    raise InvalidInputError(
                        f"{file}, line {number}: found byte {error.object[error.start]:#x}, expected UTF-8: convert it"
                    ) from None
                except (json.JSONDecodeError, InvalidInputError) as error:
                    raise InvalidInputError(f"{file}, line {number}: {error}") from None
        if not self.texts:
            raise InvalidInputError(f"{file} has no lines; expected one JSON object a line")

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int, /) -> str:
        return self.texts[index]


def open_texts(data: str | Path | Texts) -> Texts:
    """A dataset from a folder, a ``.jsonl`` file, or ``module:name`` of a dataset (or of a function that makes one)."""
    if not isinstance(data, str | Path):
        return data
    path = Path(data).expanduser()
    if path.is_dir():
        return TextFolder(path)
    if path.is_file():
        if path.suffix.lower() != ".jsonl":
            raise InvalidInputError(f"found the file {data}, expected a folder or a .jsonl file: give its folder")
        return JsonLines(path)
    module, colon, name = str(data).partition(":")
    if not colon or not name.isidentifier():
        raise NotFoundError(f"found no folder and no file {data}; expected one, or module:name of a dataset")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise NotFoundError(f"cannot import the dataset {data}: {error}; is its folder on PYTHONPATH?") from None
    return cast(Texts, found() if callable(found) else found)


@dataclass(frozen=True)
class Split:
    """A member's documents; those of ``held_out`` never train."""

    train: list[str]
    held_out: list[str]


def split_texts(data: Texts, *, share: float = HELD_OUT_SHARE, seed: int = HELD_OUT_SEED) -> Split:
    """The dataset's own held-out part, or the documents whose seeded digest falls into ``share``.

    By content, so that it does not depend on order or names, and that copies of a document stay on one side. Blank
    documents are dropped. Raises InvalidInputError where there is not at least one to hold out and one to train on.
    """
    texts = _written(data)
    own = getattr(data, "held_out", None)
    if own is not None:
        split = Split(texts, _written(own))
        if not split.train or not split.held_out:
            raise InvalidInputError(
                f"found {len(split.train)} documents to train on and {len(split.held_out)} held out, not counting "
                "blank ones; expected at least one of each"
            )
        return split
    if not 0.0 < share < 1.0:
        raise InvalidInputError(f"found a held-out share of {share}, expected a number between 0 and 1")
    draws = {text: _draw(text, seed) for text in texts}
    if len(draws) < 2:
        raise InvalidInputError(
            f"found {len(draws)} different documents that are not blank, expected at least 2: one is held out"
        )
    held = {text for text, draw in draws.items() if draw < share} or {min(draws, key=lambda text: draws[text])}
    if len(held) == len(draws):
        held.remove(max(draws, key=lambda text: draws[text]))
    return Split([text for text in texts if text not in held], [text for text in texts if text in held])


def _written(data: Texts) -> list[str]:
    """The texts that are not blank."""
    texts = (text_of(data[index]) for index in range(len(data)))
    return [text for text in texts if text.strip()]


def text_of(item: Any, *, field: str = "text") -> str:
    """The text of one item; raises InvalidInputError where it has none."""
    text = item.get(field) if isinstance(item, Mapping) else item
    if not isinstance(text, str):
        raise InvalidInputError(
            f"found an item of type {type(item).__name__}, expected a string or a mapping with {field!r}"
        )
    return text


def _draw(text: str, seed: int) -> float:
    """A number in [0, 1) that only the content and the seed decide."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def pack(texts: Iterable[str], tokenizer: Any, length: int) -> Tensor:
    """Blocks of token ids ``[n, length + 1]``, int64: all documents in a row, each opened by the end-of-text token.

    Neighbouring blocks share one token, so that every token but the first is predicted once. The rest that fills no
    block is dropped; nothing is padded. Raises InvalidInputError where there is less than one block.
    """
    import torch

    stream: list[int] = []
    for text in texts:
        stream.append(tokenizer.eos_token_id)
        stream.extend(_encode(tokenizer, text))
    blocks = (len(stream) - 1) // length
    if blocks < 1:
        raise InvalidInputError(f"found {len(stream)} tokens of text, expected more than {length}, the sequence length")
    return torch.tensor(stream[: blocks * length + 1], dtype=torch.long).unfold(0, length + 1, length).contiguous()


def fills_block(texts: Iterable[str], tokenizer: Any, length: int) -> bool:
    """Whether :func:`pack` would find a block; reads no more texts than it takes to know."""
    tokens = 0
    for text in texts:
        tokens += 1 + len(_encode(tokenizer, text))
        if tokens > length:
            return True
    return False


def _encode(tokenizer: Any, text: str) -> Sequence[int]:
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids
