"""Token ids to text, piece by piece: never half a character, never the beginning of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What decoders write for bytes that are no character (yet).
_REPLACEMENT = "\ufffd"
# A character has at most four bytes; a window that found no clean border in this many tokens holds bytes that never
# become characters, and is let go as it is, so that decoding stays linear in the number of tokens.
_WINDOW_TOKENS = 32

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Decodes a growing list of tokens. What ``push`` and ``flush`` return joins to the text of all of them.

    Only a window of tokens is decoded again: those since the last clean border, with the piece before it as context,
    because some tokenizers write a token differently at the beginning of a text.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context = 0  # tokens at the head of the window that are out already
        self._out = 0  # characters of the window's text that are out already

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens settle; it may be empty."""
        self._window.extend(tokens)
        text = self._decode(self._window)
        settled = text.rstrip(_REPLACEMENT)
        if len(settled) < len(text) and len(self._window) - self._context < _WINDOW_TOKENS:
            piece = settled[self._out :]
            self._out = max(self._out, len(settled))
            return piece
        piece = text[self._out :]
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._out = len(self._decode(self._window))
        return piece

    def flush(self) -> str:
        """What is left at the end, incomplete characters as the decoder writes them."""
        piece = self._decode(self._window)[self._out :]
        self._out += len(piece)
        return piece


class StopFinder:
    """Lets text through up to the first stop text, and holds back what might be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str, *, may_end: bool = True) -> str:
        """The text that is certainly before any stop text. Nothing comes after ``found`` is set.

        Where it may not end yet, a stop text that is complete within ``text`` is text like any other.
        """
        if self.found:
            return ""
        if not self._stops:
            return text
        held = len(self._held)  # no stop text that counts ends in here
        text = self._held + text
        if may_end:
            starts = (text.find(stop, max(0, held - len(stop) + 1)) for stop in self._stops)
            at = min((start for start in starts if start >= 0), default=-1)
            if at >= 0:
                self.found, self._held = True, ""
                return text[:at]
        hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back and turned out to be no stop text."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, shorter than all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
