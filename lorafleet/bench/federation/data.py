"""Text of the demo's four domains, cut into pieces: what clients are dealt, and what nobody trains on."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lorafleet.bench.federation.splits import STYLES, Share
from lorafleet.clients.packing import pack
from lorafleet.demo.corpora.sources import base_corpus_digests, documents

# About 250 tokens of the shipped base.
PIECE_CHARACTERS = 800
# Little, as private data are: with five times as much no arm comes near its end in a budget of minutes, and what is
# compared is who has the most steps in a row.
TRAIN_BYTES, HELD_OUT_BYTES = 100_000, 60_000


@dataclass(frozen=True)
class Pools:
    """Domain → pieces of text. No document, and no text, has pieces in both."""

    train: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]

    def save(self, file: Path) -> None:
        file.write_text(json.dumps({"train": self.train, "held_out": self.held_out}), encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> Self:
        return cls(**json.loads(file.read_text(encoding="utf-8")))


def build_pools(*, seed: int, root: Path | None = None) -> Pools:
    """The same seed and environment give the same pieces; NotFoundError where the environment has no text."""
    found = documents(
        root=root, seed=seed, excluded=base_corpus_digests(),
        limit_bytes=TRAIN_BYTES + HELD_OUT_BYTES,
    )  # fmt: skip
    train: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    for domain, texts in found.items():
        train[domain], held_out[domain] = [], []
        random.Random(f"{seed}/{domain}").shuffle(texts)
        held = 0
        for document in texts:
            # Long documents would be most of the held-out part.
            if held < HELD_OUT_BYTES and document.size_bytes <= HELD_OUT_BYTES // 6:
                held += document.size_bytes
                held_out[domain] += cut(document.text)
            else:
                train[domain] += cut(document.text)
    # Documents share passages, licences above all: what is held out is not trained on anywhere.
    unseen = {piece for pieces in held_out.values() for piece in pieces}
    return Pools({domain: [p for p in pieces if p not in unseen] for domain, pieces in train.items()}, held_out)


def cut(text: str) -> list[str]:
    """Pieces of about :data:`PIECE_CHARACTERS`, at the ends of lines; what is left over is dropped."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE_CHARACTERS:
            pieces.append(piece)
            piece = ""
    return pieces


def client_pieces(pools: Pools, share: Share, *, seed: int) -> list[str]:
    """A client's pieces in its style, in a seeded order: domains lie among one another."""
    write = STYLES[share.style]
    pieces = [write(pools.train[domain][number]) for domain, numbers in share.pieces.items() for number in numbers]
    random.Random(seed).shuffle(pieces)
    return pieces


def held_out_blocks(
    pools: Pools, tokenizer: Any, *, styles: Sequence[str], length: int, blocks: int
) -> dict[tuple[str, str], Tensor]:
    """(domain, style) → ids ``[n, length + 1]``; about ``blocks`` in all, spread evenly over the held-out pieces."""
    each = max(1, blocks // (len(styles) * len(pools.held_out)))
    found = {}
    for domain, pieces in pools.held_out.items():
        for style in styles:
            packed = pack([STYLES[style](piece) for piece in pieces], tokenizer, length)
            count = min(each, len(packed))
            found[domain, style] = packed[torch.arange(count) * len(packed) // count]
    return found
