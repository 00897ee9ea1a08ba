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
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
_PASSED_OVER = -1
"""The row of terms that are too common."""
_Term = tuple[str, bool]
"""A word, or a piece of one."""


class Document(NamedTuple):
    name: str
    text: str


class Match(NamedTuple):
    """A text beside the N documents of an index."""

    scores: NDArray[np.float64]
    """``[N]``: BM25, in nats."""
    most: float
    """That a document could have; 0 for a text without terms."""
    rows: NDArray[np.int64]
    """The text's terms that the index holds, in order."""


def words(text: str) -> list[str]:
    """Runs of letters and digits, without case."""
    return _WORD.findall(text.casefold())


def pieces(word: str) -> list[str]:
    """The n-grams of a word between two spaces; none of one that is not longer than a piece would be."""
    if len(word) < PIECE - 1:
        return []
    bordered = f" {word} "
    return [bordered[start : start + PIECE] for start in range(len(bordered) - PIECE + 1)]


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

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = len(documents)
        counted = [_terms(document) for document in documents]
        lengths = np.array([sum(terms.values()) for terms in counted], np.float64)
        held: dict[_Term, list[tuple[int, int]]] = {}
        for number, terms in enumerate(counted):
            for term, count in terms.items():
                held.setdefault(term, []).append((number, count))
        most = COMMON * self.documents if self.documents >= FEW else float(self.documents)
        # Words come first: a row's number tells what it is.
        kept = {term: places for term, places in sorted(held.items(), key=_is_piece) if len(places) <= most}
        rows = {term: row for row, term in enumerate(kept)}
        self._words = [text for text, is_piece in kept if not is_piece]
        self._pieces = {text: rows.get((text, True), _PASSED_OVER) for text, is_piece in held if is_piece}
        self._terms = {
            word: tuple(row for row in map(rows.get, _terms_of(word)) if row is not None)
            for word, is_piece in held
            if not is_piece
        }
        """word → rows of itself and its pieces, for every word of the documents"""
        self._having = having = np.array([len(places) for places in kept.values()], np.int64)
        self._starts = np.cumsum(having) - having
        self._documents = np.array([number for places in kept.values() for number, _ in places], np.int64)
        counts = np.array([count for places in kept.values() for _, count in places], np.float64)
        weights = np.array([PIECE_WEIGHT if is_piece else 1.0 for _, is_piece in kept], np.float64)
        self._most = weights * idf(self.documents, having.astype(np.float64))
        mean = float(lengths.mean()) if self.documents else 0.0
        self._parts = saturated(counts, lengths[self._documents], mean or 1.0) * np.repeat(self._most, having)
        self._unknown = float(idf(self.documents, 0.0))

    @property
    def postings(self) -> int:
        """Terms, and pairs of a term and a document, that are held: about 100 bytes each."""
        return len(self._documents) + len(self._terms) + len(self._pieces)

    def match(self, text: str) -> Match:
        """BM25 of the text in every document."""
        found: set[int] = set()
        unknown: set[_Term] = set()
        for word in set(words(text)):
            known = self._terms.get(word)
            if known is None:  # of words that documents have, all pieces are known
                unknown.add((word, False))
                for piece in pieces(word):
                    row = self._pieces.get(piece)
                    if row is None:
                        unknown.add((piece, True))
                    elif row != _PASSED_OVER:
                        found.add(row)
            else:
                found.update(known)
        # In order: sums of floats then do not depend on the order of a set.
        rows = np.fromiter(found, np.int64, len(found))
        rows.sort()
        places = self._places(rows)
        parts = np.bincount(self._documents.take(places), self._parts.take(places), self.documents)
        weight = sum([PIECE_WEIGHT if is_piece else 1.0 for _, is_piece in unknown])
        most = float(self._most[rows].sum()) + weight * self._unknown
        return Match(parts.astype(np.float64, copy=False), most, rows)

    def shared(self, match: Match, document: int, *, most: int = 3) -> list[str]:
        """The text's words that count most in a document, the weightiest first."""
        rows = match.rows[: match.rows.searchsorted(len(self._words))]
        places = self._places(rows)
        of_document = self._documents.take(places) == document
        found = zip(
            (-self._parts.take(places)[of_document]).tolist(),
            [self._words[row] for row in rows.repeat(self._having[rows])[of_document].tolist()],
            strict=True,
        )
        return [word for _, word in sorted(found)[:most]]

    def _places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the postings of these rows lie, one row after another."""
        having = self._having[rows]
        ends = having.cumsum()
        places: NDArray[np.int64] = (self._starts[rows] - ends + having).repeat(having)
        places += np.arange(len(places))
        return places


def _is_piece(held: tuple[_Term, object]) -> bool:
    return held[0][1]


def _terms_of(word: str) -> list[_Term]:
    return [(word, False), *((piece, True) for piece in pieces(word))]


def _terms(document: Document) -> Counter[_Term]:
    counted: Counter[str] = Counter()
    for text, times in ((document.name, NAME_COUNT), (document.text[:LONGEST], 1)):
        for word in words(text):
            counted[word] += times
    terms: Counter[_Term] = Counter({(word, False): count for word, count in counted.items()})
    for word, count in counted.items():
        for piece in pieces(word):
            terms[(piece, True)] += count
    return terms
