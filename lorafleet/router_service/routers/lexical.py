"""Okapi BM25 over words and character n-grams: how much of a text is said in each of some short documents.

For a text's distinct terms t and a document d of |d| terms, where n_t of N documents have t (Robertson and Zaragoza
2009, "The Probabilistic Relevance Framework: BM25 and Beyond", section 3.4; the logarithm is Lucene's, which is never
negative):

    score(d) = Σ_t w_t idf_t tf / (tf + k1 (1 - b + b |d| / mean |d|))
    idf_t = ln(1 + (N - n_t + 1/2) / (n_t + 1/2))

A term's part rises with its count in the document to w_t idf_t and not beyond. So ``Σ_t w_t idf_t`` is the most that
any document could have, and a score's share of it says how much of the text the document knows: terms that no document
has count there, too. Terms that more than half of four or more documents have are passed over: they tell nothing apart,
and cost the most.

Terms are words, and the four-letter pieces of words with their borders (McNamee and Mayfield 2004, "Character N-Gram
Tokenization for European Language Text Retrieval"), which find inflections and parts of identifiers. Pieces of a word
are several and say the same again: each counts a quarter.

A piece is one number, its four letters' sixteen bits each (UTF-16; letters beyond have two halves), so that those of a
text are looked up all at once: a text of 25 new words has 130, and a dictionary takes longer to find them than the rest
takes altogether. Where there is a compiler, :mod:`lorafleet.native.lexical` looks them up and adds, with the same bits.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorafleet.native import lexical as native

K1: Final = 1.2
B: Final = 0.75
PIECE: Final = 4
PIECE_WEIGHT: Final = 0.25
NAME_COUNT: Final = 3
"""A name counts as if the document said it so often more."""
LONGEST: Final = 8192
"""Characters of a document that are read, so that an index of many stays small."""
COMMON: Final = 0.5
FEW: Final = 4
"""Of fewer documents no term is too common."""
_WORD: Final = re.compile(r"[^\W_]+")
_SPACE: Final = ord(" ")
_NO_PIECE: Final = np.uint64(2**64 - 1)
"""U+FFFF is no character."""


class Document(NamedTuple):
    name: str
    text: str


class Match(NamedTuple):
    """A text beside the documents of an index."""

    best: list[tuple[int, float]]
    """Number and score (nats) of documents that share anything with the text, best first; of equal ones the first."""
    most: float
    """That a document could have; 0 for a text without terms."""
    words: list[int]
    """Rows of the text's words that the index holds, in order."""


def words(text: str) -> list[str]:
    """Runs of letters and digits, without case."""
    return _WORD.findall(text.casefold())


def pieces(words: Iterable[str]) -> NDArray[np.uint64]:
    """The n-grams of words between two spaces, as often as they are there; none of a word that is not longer than a
    piece would be."""
    text = _bordered(words)
    units = np.frombuffer(text, "<u2")
    if len(units) < PIECE:
        return np.empty(0, np.uint64)
    # Windows of eight bytes, one for each letter; one with a space inside is of two words.
    windows: NDArray[np.uint64] = np.ndarray((len(units) - PIECE + 1,), "<u8", text, strides=(2,))
    inner = units != _SPACE
    found: NDArray[np.uint64] = windows[inner[1:-2] & inner[2:-1]]
    return found


def _bordered(words: Iterable[str]) -> bytes:
    longer = [word for word in words if len(word) >= PIECE - 1]
    return f" {' '.join(longer)} ".encode("utf-16-le", "surrogatepass")


def idf(documents: int, having: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Of terms that ``having`` of the documents have."""
    return np.log1p((documents - np.asarray(having, np.float64) + 0.5) / (np.asarray(having, np.float64) + 0.5))


def saturated(
    counts: NDArray[np.float64], lengths: NDArray[np.float64], mean_length: float, *, k1: float = K1, b: float = B
) -> NDArray[np.float64]:
    """``tf / (tf + k1 (1 - b + b |d| / mean))`` of counts in documents of these lengths."""
    return counts / (counts + k1 * (1.0 - b + b * lengths / mean_length))


class Index:
    """Some documents' terms, for scoring texts against all of them at once. Immutable."""

    def __init__(self, documents: Sequence[Document], *, compiled: bool = True) -> None:
        """Not ``compiled``: numpy adds, as it does where there is no compiler."""
        self.documents = len(documents)
        counted = [_counted(document) for document in documents]
        lengths = np.array([sum(said.values()) + int(counts.sum()) for said, _, counts in counted], np.float64)
        most = COMMON * self.documents if self.documents >= FEW else float(self.documents)
        held: dict[str, list[tuple[int, int]]] = {}
        for number, (said, _, _) in enumerate(counted):
            for word, count in said.items():
                held.setdefault(word, []).append((number, count))
        kept = [(word, places) for word, places in held.items() if len(places) <= most]
        self._names = [word for word, _ in kept]
        of_words = np.array([place for _, places in kept for place in places], np.int64).reshape(-1, 2)
        having_words = np.array([len(places) for _, places in kept], np.int64)

        # A piece is in a document once: one place for each, in the order of pieces and of documents.
        keys = np.concatenate([np.empty(0, np.uint64), *(keys for _, keys, _ in counted)])
        numbers = np.repeat(np.arange(self.documents), [len(keys) for _, keys, _ in counted])
        counts = np.concatenate([np.empty(0, np.int64), *(counts for _, _, counts in counted)])
        order = np.argsort(keys, kind="stable")
        distinct, having_pieces = np.unique(keys, return_counts=True)
        is_kept = having_pieces <= most
        of_pieces = np.stack([numbers[order], counts[order]], axis=1)[np.repeat(is_kept, having_pieces)]

        # Rows: words, then pieces, then one without a place for what is too common.
        self._having = having = np.concatenate([having_words, having_pieces[is_kept], [0]])
        self._starts = np.cumsum(having) - having
        last = len(having) - 1
        self._words = dict.fromkeys(held, last) | {word: row for row, word in enumerate(self._names)}
        self._pieces = np.append(distinct, _NO_PIECE)
        self._piece_rows = np.full(len(distinct), last, np.int64)
        self._piece_rows[is_kept] = np.arange(len(kept), last)

        places = np.concatenate([of_words, of_pieces])
        self._documents = np.ascontiguousarray(places[:, 0])
        weights = np.where(np.arange(last + 1) < len(kept), 1.0, PIECE_WEIGHT)
        self._most = weights * idf(self.documents, having.astype(np.float64))
        self._most[last] = 0.0
        mean = float(lengths.mean()) if self.documents else 0.0
        shares = saturated(places[:, 1].astype(np.float64), lengths[self._documents], mean or 1.0)
        self._parts = shares * np.repeat(self._most, having)
        self._unknown = float(idf(self.documents, 0.0))
        self._matcher: native.Matcher | None = None
        if compiled and native.available():
            arrays = (self._pieces, self._piece_rows, self._starts, having, self._most, self._documents, self._parts)
            self._matcher = native.Matcher(self.documents, len(distinct), arrays)

    @property
    def postings(self) -> int:
        """Terms, and pairs of a term and a document, that are held: about 100 bytes each at most."""
        return len(self._documents) + len(self._words) + len(self._pieces)

    def match(self, text: str, *, most: int) -> Match:
        """BM25 of the text in the documents; at most so many of the best."""
        said = set(words(text))
        found = [self._words.get(word, -1) for word in said]
        # In order: sums of floats then do not depend on the order of a set.
        of_words = sorted([row for row in found if row >= 0])
        if self._matcher is not None:
            best, known, unknown_pieces = self._matcher.match(_bordered(said), of_words, most)
        else:
            best, known, unknown_pieces = self._match(pieces(said), of_words, most)
        unknown = found.count(-1) + PIECE_WEIGHT * unknown_pieces
        return Match(best, known + unknown * self._unknown, of_words)

    def _match(
        self, keys: NDArray[np.uint64], of_words: list[int], most: int
    ) -> tuple[list[tuple[int, float]], float, int]:
        """What ``Matcher.match`` gives."""
        keys = np.unique(keys)
        at = self._pieces.searchsorted(keys)
        is_known = self._pieces.take(at) == keys
        rows = np.concatenate([np.array(of_words, np.int64), self._piece_rows.take(at[is_known])])
        places = self._places(rows)
        scores = np.bincount(self._documents.take(places), self._parts.take(places), self.documents)
        numbers = np.argsort(-scores, kind="stable")[:most]
        best = zip(numbers.tolist(), scores.take(numbers).tolist(), strict=True)
        known = self._most.take(rows).cumsum()[-1:]  # one after another, as nothing else of numpy adds
        return (
            [(number, score) for number, score in best if score > 0],
            float(known.sum()),
            len(keys) - int(np.count_nonzero(is_known)),
        )

    def shared(self, match: Match, document: int, *, most: int = 3) -> list[str]:
        """The text's words that count most in a document, the weightiest first."""
        documents, found = self._documents.data, []
        for row in match.words:
            start = int(self._starts[row])
            end = start + int(self._having[row])
            at = bisect_left(documents, document, start, end)
            if at < end and documents[at] == document:
                found.append((-float(self._parts[at]), self._names[row]))
        return [word for _, word in sorted(found)[:most]]

    def _places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the postings of these rows lie, one row after another."""
        having = self._having.take(rows)
        ends = having.cumsum()
        places: NDArray[np.int64] = (self._starts.take(rows) - ends + having).repeat(having)
        places += np.arange(len(places))
        return places


def _counted(document: Document) -> tuple[Counter[str], NDArray[np.uint64], NDArray[np.int64]]:
    """A document's words, and its pieces with how often each is there."""
    said: Counter[str] = Counter()
    for text, times in ((document.name, NAME_COUNT), (document.text[:LONGEST], 1)):
        for word in words(text):
            said[word] += times
    keys, counts = np.unique(pieces(said.elements()), return_counts=True)
    return said, keys, counts
