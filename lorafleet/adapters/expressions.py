"""Regular expressions from outside, matched without backtracking: all that a match can have read so far, at once.

How much of a text has been read is a position 0…n, and a set of positions is an integer with bit i for position i.
A part of an expression maps the set in which it may begin to the set in which it may end: a class of characters is
``(at & where those are) << 1``, a repetition goes on until it adds no position, a look-ahead walks backwards from
every position. ``C*`` is one addition (Cameron et al., "Bitwise data parallelism in regular expression matching", PACT
2014: MatchStar). What that takes is bounded by the expression's size times the text's, and counted in steps.

Python's ``re`` tries one way after another: ``([a-z]+)+!`` on 40 letters takes longer than anyone waits, in one call
that lets no other thread run. The ``regex`` package has a time limit, which bounds neither its memory nor always its
time: ``(){999999999}`` takes 2.8 GB within a limit of 1 s, ``((){999}){999}`` 15 s.

Which expressions there are and what they mean is ``re``'s: its own parser reads them. What has no such sets is refused:
references to groups, atomic groups, possessive repetitions, and flags. Texts are of :data:`ALPHABET` alone.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby

# The module is private, but since Python 3.11 the only one that is not deprecated. An operator that a later Python adds
# is refused, as is one whose name changes.
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from lorafleet.errors import InvalidInputError

ALPHABET = string.ascii_letters + string.digits + "_.-"
LONGEST_EXPRESSION = 2_000
"""Characters; the parser takes about 2 ms for as many."""
_DEEPEST = 40
"""Groups within groups; a group is two calls of Python's, of which 1,000 may be open."""
_CATEGORIES = {
    "CATEGORY_DIGIT": string.digits,
    "CATEGORY_WORD": string.ascii_letters + string.digits + "_",
    "CATEGORY_SPACE": "",
}


class Work:
    """A number of steps that several matches may take together; a step is about 0.2 µs."""

    def __init__(self, steps: int) -> None:
        self._steps = self._left = steps

    def spend(self, steps: int) -> None:
        """InvalidInputError where that is more than is left."""
        self._left -= steps
        if self._left < 0:
            raise InvalidInputError(f"found regular expressions that take more than {self._steps} steps; simplify them")


class Text:
    """What is matched, of n characters, and the sets of positions in it that expressions ask for."""

    def __init__(self, characters: str, work: Work) -> None:
        self.work = work
        self.end = 1 << len(characters)
        self.all = 2 * self.end - 1
        self._characters = characters
        self._before: dict[str, int] = {}
        for position, character in enumerate(characters):
            self._before[character] = self._before.get(character, 0) | 1 << position
        assert self._before.keys() <= set(ALPHABET)
        self._classes = {ALPHABET: self.end - 1}
        self._words: dict[str, int] = {}

    def before(self, characters: str) -> int:
        """The positions before one of these characters."""
        found = self._classes.get(characters)
        if found is None:
            found = 0
            self.work.spend(1 + len(characters) // 4)
            for character in characters:
                found |= self._before.get(character, 0)
            self._classes[characters] = found
        return found

    def __len__(self) -> int:
        return len(self._characters)

    def starts(self, word: str) -> int:
        """The positions before a word, which may overlap itself."""
        found = self._words.get(word)
        if found is None:
            found, position = 0, self._characters.find(word)
            self.work.spend(1)
            while position >= 0:
                self.work.spend(1)
                found |= 1 << position
                position = self._characters.find(word, position + 1)
            self._words[word] = found
        return found

    @cached_property
    def boundaries(self) -> int:
        """The positions with a character of a word on one side alone."""
        words = self.before(_CATEGORIES["CATEGORY_WORD"])
        return words ^ (words << 1)


Walk = Callable[[Text, int], int]
"""The set of positions that a part of an expression leads to from a set of positions."""


class Expression:
    """One regular expression; InvalidInputError where it is none, or not one that can be matched so."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > LONGEST_EXPRESSION:
            raise InvalidInputError(
                f"it has {len(pattern)} characters, expected a regular expression of at most {LONGEST_EXPRESSION}"
            )
        try:
            tree = _parser.parse(pattern)
        except (re.error, OverflowError, RecursionError) as error:  # Overflow: of a number of repetitions
            raise InvalidInputError(f"expected a regular expression ({error or type(error).__name__})") from None
        try:
            self._walk = _sequence(tree, forward=True, depth=0)
        except _RefusedError as error:
            raise InvalidInputError(f"{error}; write the regular expression without") from None

    def matches(self, text: Text) -> bool:
        """What ``re.match`` finds: whether the text begins with what the expression describes."""
        return self._walk(text, 1) != 0


class _RefusedError(Exception):
    """What of an expression is not supported."""


def _sequence(tree: Any, *, forward: bool, depth: int) -> Walk:
    if depth > _DEEPEST:
        raise _RefusedError(f"more than {_DEEPEST} groups within groups are not supported")
    walks: list[Walk] = []
    for is_word, parts in groupby(tree, key=lambda part: str(part[0]) == "LITERAL"):
        if is_word:
            walks.append(_word("".join(chr(code) for _, code in parts), forward=forward))
        else:
            walks += [_part(str(op), argument, forward=forward, depth=depth) for op, argument in parts]
    if not forward:
        walks.reverse()
    steps = 1 + len(walks)

    def walk(text: Text, at: int) -> int:
        text.work.spend(steps)
        for each in walks:
            at = each(text, at)
            if not at:
                break
        return at

    return walk


def _part(op: str, argument: Any, *, forward: bool, depth: int) -> Walk:
    characters = _characters(op, argument)
    if characters is not None:
        return _one_of(characters, forward=forward)
    match op:
        case "MAX_REPEAT" | "MIN_REPEAT":  # they differ in which way is tried first, not in which ways there are
            low, high, body = argument
            return _repeat(int(low), int(high), body, forward=forward, depth=depth)
        case "BRANCH":
            return _either([_sequence(each, forward=forward, depth=depth + 1) for each in argument[1]])
        case "SUBPATTERN":
            _, added, removed, body = argument
            if added or removed:
                raise _RefusedError("flags are not supported")
            return _sequence(body, forward=forward, depth=depth + 1)
        case "ASSERT" | "ASSERT_NOT":
            direction, body = argument
            return _look(body, ahead=direction > 0, negated=op == "ASSERT_NOT", depth=depth)
        case "AT":
            return _place(str(argument))
        case "FAILURE":
            return lambda text, at: 0
    raise _RefusedError(f"{op.lower().replace('_', ' ')} is not supported")


def _characters(op: str, argument: Any) -> str | None:
    """The characters of the alphabet that a part stands for, None where it is no class of characters."""
    match op:
        case "ANY":
            return ALPHABET  # a line's end is not in it
        case "LITERAL":
            return _chosen(lambda c: ord(c) == argument)
        case "NOT_LITERAL":
            return _chosen(lambda c: ord(c) != argument)
        case "RANGE":
            return _chosen(lambda c: argument[0] <= ord(c) <= argument[1])
        case "CATEGORY":
            name = str(argument)
            category = _CATEGORIES.get(name.replace("_NOT_", "_"))
            if category is None:
                raise _RefusedError(f"{name.lower().replace('_', ' ')} is not supported")
            return _chosen(lambda c: (c in category) != ("_NOT_" in name))
        case "IN":
            negated = bool(argument) and str(argument[0][0]) == "NEGATE"
            members = {c for part in argument[negated:] for c in _characters(str(part[0]), part[1]) or ""}
            return _chosen(lambda c: (c in members) != negated)
    return None


def _chosen(belongs: Callable[[str], bool]) -> str:
    return "".join(filter(belongs, ALPHABET))


def _one_of(characters: str, *, forward: bool) -> Walk:
    if forward:
        return lambda text, at: (at & text.before(characters)) << 1
    return lambda text, at: (at >> 1) & text.before(characters)


def _word(word: str, *, forward: bool) -> Walk:
    length = len(word)
    if forward:
        return lambda text, at: (at & text.starts(word)) << length
    return lambda text, at: (at >> length) & text.starts(word)


def _either(walks: Sequence[Walk]) -> Walk:
    def walk(text: Text, at: int) -> int:
        reached = 0
        for each in walks:
            reached |= each(text, at)
        return reached

    return walk


def _repeat(low: int, high: int, body: Any, *, forward: bool, depth: int) -> Walk:
    once = _sequence(body, forward=forward, depth=depth + 1)
    # (?:.*) and its like: what one addition does, whose carry runs upwards alone.
    characters = _characters(str(body[0][0]), body[0][1]) if forward and len(body) == 1 else None

    def walk(text: Text, at: int) -> int:
        for _ in range(low):
            following = once(text, at)
            # Comes within n + 1 rounds: of more rounds than that, one has read nothing and may be done again, or not.
            if following == at:
                break
            at = following
        if characters is not None and high >= low + len(text):
            ran = text.before(characters)
            return (((at & ran) + ran) ^ ran) | at
        reached = added = at
        for _ in range(high - low):
            added = once(text, added) & ~reached
            if not added:
                break
            reached |= added
        return reached

    return walk


def _look(body: Any, *, ahead: bool, negated: bool, depth: int) -> Walk:
    narrowest, widest = body.getwidth()
    if not ahead and narrowest != widest:  # what re's compiler refuses, rather than its parser
        raise _RefusedError("a look-behind of no fixed width is not supported")
    # Ahead: where something begins that the body describes, by walking back from every place where it may end.
    inside = _sequence(body, forward=not ahead, depth=depth + 1)

    def walk(text: Text, at: int) -> int:
        found = inside(text, text.all)
        return at & ~found if negated else at & found

    return walk


def _place(name: str) -> Walk:
    match name:
        case "AT_BEGINNING" | "AT_BEGINNING_STRING":
            return lambda text, at: at & 1
        case "AT_END" | "AT_END_STRING":  # the same where no line ends
            return lambda text, at: at & text.end
        case "AT_BOUNDARY":
            return lambda text, at: at & text.boundaries
        case "AT_NON_BOUNDARY":
            return lambda text, at: at & ~text.boundaries
    raise _RefusedError(f"{name.lower().replace('_', ' ')} is not supported")
