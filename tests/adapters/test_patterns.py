"""rank_pattern and alpha_pattern: what a key matches is what PEFT matches, in bounded time."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorafleet.adapters import format
from lorafleet.adapters.expressions import LONGEST_EXPRESSION, Expression, Text, Work
from lorafleet.adapters.format import LARGEST_WORK, read_scalings
from lorafleet.adapters.lora import LONGEST_PATH
from lorafleet.adapters.patterns import MOST_EXPRESSIONS, MOST_TABLES, ModulePatterns
from lorafleet.errors import AdapterFormatError, InvalidInputError

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
PATHS = [f"model.layers.{layer}.{name}" for layer in range(400) for name in PROJECTIONS]
"""2,000 modules."""


def found(keys: list[str], path: str) -> str | None:
    return ModulePatterns({key: key for key in keys}).find(path, None, Work(LARGEST_WORK))


def pefts(keys: list[str], path: str) -> str | None:
    """None where no key matches; a key that is the path is told apart from that."""
    key = get_pattern_key(keys, path)
    return key if any(re.match(rf"(.*\.)?({each})$", path) for each in keys) else None


LETTERS = "ab1_-."
plain = st.text(LETTERS, min_size=1, max_size=5)
atoms = st.one_of(
    plain,
    plain.map(re.escape),
    st.sampled_from([
        ".", r"\.", r"\-", r"\_", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"\b", r"\B", r"\A", r"\Z", "^", "$",
        "[ab]", "[^a]", "[^.]", "[a-z1]", r"[\w.]", r"[^\d]", r"\x61", "é", "", "[]a]", "[-a]", "]", "}", "{", "{a}",
        "(?!)",
    ]),
)  # fmt: skip
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{,2}", "{2,}", "{0}"])).map(
            lambda both: f"(?:{both[0]}){both[1]}"
        ),
        st.tuples(st.sampled_from(["(", "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?P<n>"]), inner).map(
            lambda both: f"{both[0]}{both[1]})"
        ),
    ),
    max_leaves=8,
)
paths = st.text(LETTERS, min_size=1, max_size=10)


def is_read_by_re(key: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({key})$")
    except re.error:
        return False
    return True


@settings(deadline=None, max_examples=200)
@given(st.lists(expressions, min_size=1, max_size=6), st.lists(paths, min_size=1, max_size=8))
def test_the_first_key_that_matches_is_pefts(keys: list[str], modules: list[str]) -> None:
    keys = [key for key in dict.fromkeys(keys) if is_read_by_re(key)]
    for path in modules:
        assert found(keys, path) == pefts(keys, path)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text("a.", max_size=4), min_size=1, max_size=8), st.text("ab.", min_size=1, max_size=6))
def test_names_with_wildcards_are_found_in_pefts_order(names: list[str], path: str) -> None:
    keys = list(dict.fromkeys([*names, *(f"^{name}" for name in names[::2]), *(re.escape(name) for name in names)]))
    assert found(keys, path) == pefts(keys, path)


@settings(deadline=None, max_examples=200)
@given(expressions)
def test_what_re_does_not_read_is_refused(key: str) -> None:
    if not is_read_by_re(key):
        with pytest.raises(InvalidInputError):
            ModulePatterns({key: 1})


@pytest.mark.parametrize(
    ("keys", "path", "expected"),
    [
        (["layers.1"], "layersx1", "layers.1"),
        ([r"layers\.1"], "layersx1", None),
        (["q", "b.q", "(a|b).q"], "a.b.q", "q"),
        (["(a|b).q", "q"], "a.b.q", "(a|b).q"),
        (["^b.q", "q"], "a.b.q", "q"),
        (["^a.b.q", "q"], "a.b.q", "^a.b.q"),
        (["q"], "a.xq", None),
        (["a)|(b"], "x.a", "a)|(b"),
        (["a)|(b"], "abc", "a)|(b"),
        (["?:a"], "x.a", "?:a"),
        ([r"layers\.(?!0\.)\d+\.q"], "layers.0.q", None),
        ([r"layers\.(?!0\.)\d+\.q"], "layers.10.q", r"layers\.(?!0\.)\d+\.q"),
        ([r".*(?<=_)proj"], "a.q_proj", r".*(?<=_)proj"),
        ([r".*?(?<=_)proj"], "a.q-proj", None),
    ],
)
def test_a_key_matches_where_pefts_does(keys: list[str], path: str, expected: str | None) -> None:
    assert found(keys, path) == pefts(keys, path) == expected


@pytest.mark.parametrize(
    "key",
    [
        "(", "[", "a)", "*", "(?i)a", "(?i:a)", r"(a)\1", "(?>a)", "a*+", "(?P<n>a)(?P=n)", r"\p", "(?<=a*)b", "[z-a]",
        "\\", "(a)(?(1)b|c)", "x{99999999999999999999}", "(" * 45 + "a" + ")" * 45, "(" * 900 + ")" * 900,
        "(a)" + "a" * LONGEST_EXPRESSION,
    ],
)  # fmt: skip
def test_what_is_no_expression_or_not_supported_is_refused_by_its_key(key: str) -> None:
    with pytest.raises(AdapterFormatError, match=r"c\.json: rank_pattern: found the key .*regular expression"):
        read_scalings({"a": 4}, {"rank_pattern": {key: 4}}, Path("c.json"))


EVIL = [
    "([a-z0-9._]+)+!", "([a-z0-9._]+)+[!]", "(a|a)*!", "(.*)*[!]", "(){999999999}", "((){999}){999}", "(|a){99999}!",
    "((a?){999}){999}!", "(a?){300}a{300}!", "(?=(.*)*[!])a", "(((((a|b)?){999}){999}){999}){999}!",
    "(?<!(a|b)c)(.+)+!",
]  # fmt: skip


@pytest.mark.parametrize("key", EVIL)
def test_an_expression_that_backtracks_for_ever_is_answered_in_few_steps(key: str) -> None:
    expression = Expression(rf"(.*\.)?({key})$")
    assert not expression.matches(Text("a" * (LONGEST_PATH - 2) + ".b", Work(50_000)))


def test_expressions_that_take_too_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "LARGEST_WORK", 20_000)
    pattern = {f"(?:{EVIL[0]}|{number})": 1 for number in range(20)}
    with pytest.raises(AdapterFormatError, match="more than 20000 steps"):
        read_scalings(dict.fromkeys(PATHS, 4), {"rank_pattern": pattern}, Path("c.json"))


WORDS = "(?:b|" + "|".join("a" * length for length in range(1, 50)) + ")x"
CLASSES = "".join(f"[^{first}{second}]" for first in "bcdefghi" for second in "jklmnopqrst") + "_"
DOTS = "." * 400 + "x" * 100


@pytest.mark.parametrize(("key", "least"), [(WORDS, 15_000), (CLASSES, 1_000), (DOTS, 400)])
def test_what_a_path_is_searched_for_counts_by_what_is_looked_at(key: str, least: int) -> None:
    work = Work(10**6)
    assert ModulePatterns({key: 4}).find("a" * 500, None, work) is None
    with pytest.raises(InvalidInputError, match="steps"):
        work.spend(10**6 - least)


def test_other_threads_run_while_expressions_are_matched() -> None:
    rounds = 0
    done = threading.Event()

    def count() -> None:
        nonlocal rounds
        while not done.is_set():
            rounds += 1
            time.sleep(0)  # gives way, and asks for the interpreter's lock again

    other = threading.Thread(target=count)
    patterns = ModulePatterns({f"(?:{EVIL[0]}|{number})": 1 for number in range(100)})
    other.start()
    try:
        with pytest.raises(InvalidInputError, match="more than 500000 steps"):
            work = Work(500_000)
            for path in PATHS:
                patterns.find(path, None, work)
    finally:
        done.set()
        other.join()
    assert rounds > 10


def test_more_expressions_than_anyone_writes_are_refused() -> None:
    pattern = {f"(a|{number})": 4 for number in range(MOST_EXPRESSIONS + 1)}
    with pytest.raises(AdapterFormatError, match=f"more than {MOST_EXPRESSIONS} keys that are regular expressions"):
        read_scalings({"a": 4}, {"rank_pattern": pattern}, Path("c.json"))


@pytest.mark.parametrize("write", [re.escape, str, "^{}".format], ids=["escaped", "unescaped", "whole"])
def test_a_key_for_each_of_2000_modules_takes_steps_for_the_modules_alone(write: object) -> None:
    assert callable(write)
    patterns = ModulePatterns({write(path): number for number, path in enumerate(PATHS)})
    work = Work(60 * len(PATHS))  # with every key tried on every path it would be 4 million times some
    assert [patterns.find(path, None, work) for path in PATHS] == list(range(len(PATHS)))


def _wild(count: int) -> dict[str, int]:
    """Names of one length, with wildcards at different places each."""
    return {"".join("." if number >> at & 1 else "a" for at in range(20)): 4 for number in range(1, count + 1)}


def test_names_with_wildcards_at_many_different_places_are_refused() -> None:
    assert ModulePatterns(_wild(MOST_TABLES)).find("a" * 20, None, Work(LARGEST_WORK)) == 4
    with pytest.raises(InvalidInputError, match=f"more than {MOST_TABLES} different places; escape the dots"):
        ModulePatterns(_wild(MOST_TABLES + 1))


def test_names_with_wildcards_take_their_share_of_the_steps() -> None:
    patterns = ModulePatterns(_wild(MOST_TABLES))
    work = Work(10 * MOST_TABLES)
    with pytest.raises(InvalidInputError, match="steps; simplify"):
        for number in range(20):
            patterns.find(f"{'b' * 14}{number:06}", None, work)
