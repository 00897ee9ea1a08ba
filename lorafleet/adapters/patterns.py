"""PEFT's ``rank_pattern`` and ``alpha_pattern``: which number is a module's.

A key is a regular expression; the first one in the dict's order wins that matches the module's path, or all of it from
one of its dots on (PEFT's ``get_pattern_key``: ``re.match(rf"(.*\\.)?({key})$", path)``). An adapter whose modules have
ranks of their own has a key for each, so that trying every key on every path would take 4 million attempts for 2,000
modules. Almost all keys are names, though, escaped or not: they are looked up by each end of a path that follows a dot.
An unescaped dot stands for any character; keys that have theirs at the same places share a table, from which they are
found by what lies between those places. All others are expressions, tried in their order as far as the first name that
matched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

from lorafleet.adapters.expressions import Expression, Text, Work
from lorafleet.errors import InvalidInputError

MOST_EXPRESSIONS = 1_000
"""Keys that are not names. Names are not counted."""
MOST_TABLES = 1_000
"""Ways in which the unescaped dots of names lie; a key for each of 46,000 experts' layers has some dozens."""
# What stands for itself, a dot, and an escaped sign; a `^` before all that asks for the whole path.
_NAME = re.compile(r"(?P<whole>\^?)(?P<rest>(?:[^\\.^$*+?{}\[\]|()]|\.|\\[^A-Za-z0-9])*)", re.DOTALL)
_SIGN = re.compile(r"\\?(.)", re.DOTALL)


class _Table(NamedTuple):
    """Names of one length with wildcards at the same places."""

    between: Callable[[str], Any]
    """The parts of a text of that length that lie between the places"""
    order: dict[Any, int]
    """A name's parts → its place among all keys"""
    steps: int
    """How many parts they are"""


class _Names:
    """Keys that are names, with the places that they have among all keys."""

    def __init__(self) -> None:
        self._exact: dict[str, int] = {}
        self._tables: dict[int, dict[tuple[int, ...], _Table]] = {}
        """Length → places of wildcards → their table."""
        self._count = 0

    def add(self, key: str, place: int) -> None:
        signs = list(_SIGN.finditer(key))
        name = "".join(sign[1] for sign in signs)
        wild = tuple(at for at, sign in enumerate(signs) if sign[0] == ".")
        if not wild:
            self._exact.setdefault(name, place)
            return
        tables = self._tables.setdefault(len(name), {})
        if wild not in tables:
            self._count += 1
            if self._count > MOST_TABLES:
                raise InvalidInputError(
                    f"found names with unescaped dots at more than {MOST_TABLES} different places; escape the dots"
                )
            bounds = zip((0, *(at + 1 for at in wild)), (*wild, len(name)), strict=True)
            tables[wild] = _Table(itemgetter(*(slice(*each) for each in bounds)), {}, 1 + len(wild))
        table = tables[wild]
        table.order.setdefault(table.between(name), place)

    def places(self, name: str, work: Work) -> Iterator[int]:
        """Those of the keys that match the whole name, the first of each table."""
        tables = self._tables.get(len(name), {})
        work.spend(1)
        if name in self._exact:
            yield self._exact[name]
        for table in tables.values():
            work.spend(table.steps)
            place = table.order.get(table.between(name))
            if place is not None:
                yield place


class ModulePatterns:
    """One of the two dicts, read once; InvalidInputError where a key is no expression, or one that is not supported."""

    def __init__(self, numbers: Mapping[str, Any]) -> None:
        self._values = list(numbers.values())
        self._ends, self._wholes = _Names(), _Names()
        self._expressions: list[tuple[int, Expression]] = []
        for place, key in enumerate(numbers):
            if found := _NAME.fullmatch(key):
                (self._wholes if found["whole"] else self._ends).add(found["rest"], place)
                continue
            if len(self._expressions) == MOST_EXPRESSIONS:
                raise InvalidInputError(
                    f"found more than {MOST_EXPRESSIONS} keys that are regular expressions, expected names of modules"
                )
            # Whole, as PEFT puts it together: a key may close the group that it stands in.
            try:
                expression = Expression(rf"(.*\.)?({key})$")
            except InvalidInputError as error:
                raise InvalidInputError(f"found the key {key[:80]!r}: {error}") from None
            self._expressions.append((place, expression))

    def find(self, path: str, default: Any, work: Work) -> Any:
        """The value of the first key that matches, or the default; InvalidInputError where there is no work left."""
        first = len(self._values)
        for place in self._wholes.places(path, work):
            first = min(first, place)
        start = 0
        while True:
            for place in self._ends.places(path[start:], work):
                first = min(first, place)
            start = path.find(".", start) + 1
            if not start:
                break
        if self._expressions and self._expressions[0][0] < first:
            text = Text(path, work)
            for place, expression in self._expressions:
                if place > first:
                    break
                if expression.matches(text):
                    first = place
                    break
        return default if first == len(self._values) else self._values[first]
