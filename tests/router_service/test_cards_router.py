"""The routers that read model cards: which of four small domains they pick, and what they make of nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lorafleet.errors import InvalidInputError
from lorafleet.native import lexical as lexical_native
from lorafleet.router_service.routers import BASE, ROUTERS, Candidate, Pool
from lorafleet.router_service.routers.cards import LEAST, SHOWN, WINDOW, by_cards
from lorafleet.router_service.routers.lexical import K1, B, Document, Index, Match, pieces, saturated, words
from lorafleet.router_service.routers.shortlist import FAR, SHORT

needs_compiler = pytest.mark.skipif(not lexical_native.available(), reason="no C++ compiler is here")

CARDS = {
    "sql": "# SQL\n\nWrites SQLite queries: SELECT with JOIN and GROUP BY, INSERT and CREATE TABLE statements, over "
    "schemas of shops, libraries and members.",
    "cpp": "# C++ headers\n\nTrained on C++ headers: templates, namespaces, #include, const references, struct and "
    "class declarations in the style of the standard library (std::vector).",
    "python": "# Python\n\nContinues Python source of symbolic mathematics: def, return, class, self, doctests.",
    "prose": "# English prose\n\nNovels and essays of the nineteenth century: dialogue, he said, she said, Mr. and "
    "Mrs., the old house and the sea.",
}
TEXTS = [
    ("sql", "SELECT name, count(*) FROM orders JOIN members ON members.id = orders.member GROUP BY name"),
    ("cpp", "template <typename T>\nstruct Node {\n    const std::vector<T>& values;\n    Node* next;\n};\n"),
    ("python", "class Total:\n    def add(self, value):\n        self.total += value\n        return self.total\n"),
    ("prose", '"I do not know," said Mr. Bennet, and the old man looked at the sea. She had never been so '),
]


def candidate(name: str, card: str) -> Candidate:
    return Candidate(f"sha256:{name}", f"acme/{name}:1", card)


DOMAINS = Pool.of(candidate(name, card) for name, card in CARDS.items())


@dataclass(frozen=True)
class Asked:
    text: str
    tokens: Sequence[int] = (0, 1, 2, 3)


def no_model(_prompt: Sequence[int], _mixes: Sequence[Mapping[str, float]]) -> list[list[float]]:
    raise AssertionError("this router runs no model")


# The maths


def letters(keys: NDArray[np.uint64]) -> list[str]:
    return [int(key).to_bytes(8, "little").decode("utf-16-le") for key in keys]


def scores_of(match: Match, documents: int) -> list[float]:
    """Of every document."""
    found = dict(match.best)
    return [found.get(number, 0.0) for number in range(documents)]


def test_the_score_is_that_of_the_formula() -> None:
    """By hand, for a word that one of two documents has twice; the texts have no letters for pieces."""
    index = Index([Document("", "a b a"), Document("", "b c d e f")])
    match = index.match("a x", most=2)
    weight = math.log(1 + 1.5 / 1.5)
    assert match.best == [(0, pytest.approx(weight * 2 / (2 + K1 * (1 - B + B * 3 / 4))))]
    assert match.most == pytest.approx(weight + math.log(1 + 2.5 / 0.5))


def test_pieces_cross_the_borders_of_a_word_and_not_those_of_another() -> None:
    assert words("Größe::MAX_2") == ["grösse", "max", "2"]
    assert letters(pieces(["joins", "by", "sea"])) == [" joi", "join", "oins", "ins ", " sea", "sea "]
    assert letters(pieces(["by", ""])) == letters(pieces([])) == []
    index = Index([Document("", "joined"), Document("", "deleted")])
    assert [number for number, _ in index.match("joins", most=2).best] == [0]


def test_a_name_counts_more_than_what_is_said_once() -> None:
    index = Index([Document("words", "orders"), Document("orders", "words"), Document("x", "y")])
    (first, more), (second, less) = index.match("orders", most=3).best
    assert (first, second) == (1, 0) and more > less


def test_what_most_documents_say_tells_nothing_apart() -> None:
    same = [Document("", f"the adapter of topic{number}") for number in range(4)]
    match = Index(same).match("the adapter", most=4)
    assert match.best == [] and match.most == 0.0
    assert len(Index(same[:3]).match("the adapter", most=4).best) == 3


@given(st.lists(st.text(max_size=60), max_size=6), st.text(max_size=60))
def test_no_document_scores_more_than_there_is_to_be_known(cards: list[str], text: str) -> None:
    match = Index([Document("", card) for card in cards]).match(text, most=6)
    assert all(0 < score <= match.most + 1e-9 for _, score in match.best)
    assert match.best == sorted(match.best, key=lambda one: (-one[1], one[0]))


LETTERS = st.characters(codec="utf-16", categories=["L", "N", "P", "Z"], max_codepoint=0xFFFF)
SENTENCES = st.lists(st.sampled_from(["join", "joins", "joint", "ab", "a", "Größe", "x9", "sea", "seas", "the"])).map(
    " ".join
)


@given(st.lists(SENTENCES | st.text(LETTERS, max_size=40), max_size=7), SENTENCES | st.text(LETTERS, max_size=40))
def test_scores_are_those_of_the_formula_term_by_term(cards: list[str], text: str) -> None:
    """As it is written, over words and pieces that are strings."""

    def terms(text: str) -> list[tuple[str, float]]:
        said = words(text)
        bordered = [f" {word} " for word in said if len(word) >= 3]
        return [(word, 1.0) for word in said] + [
            (one[start : start + 4] + "…", 0.25) for one in bordered for start in range(len(one) - 3)
        ]

    documents = [terms(f"the name {number}") * 3 + terms(card) for number, card in enumerate(cards)]
    mean = sum(map(len, documents)) / max(1, len(cards))
    scores, most = [0.0] * len(cards), 0.0
    for term in sorted(set(terms(text))):
        counts = [document.count(term) for document in documents]
        having = sum(count > 0 for count in counts)
        if len(cards) >= 4 and having > len(cards) / 2:
            continue
        weight = term[1] * math.log(1 + (len(cards) - having + 0.5) / (having + 0.5))
        most += weight
        for number, (count, document) in enumerate(zip(counts, documents, strict=True)):
            scores[number] += weight * count / (count + K1 * (1 - B + B * len(document) / mean))
    match = Index([Document(f"the name {number}", card) for number, card in enumerate(cards)]).match(text, most=7)
    assert scores_of(match, len(cards)) == pytest.approx(scores) and match.most == pytest.approx(most)


ANY = st.characters(codec="utf-16") | st.characters(categories=["Cs"])


@needs_compiler
@given(
    st.lists(SENTENCES | st.text(ANY, max_size=40), max_size=9),
    SENTENCES | st.text(ANY, max_size=40),
    st.integers(0, 4),
)
def test_compiled_and_numpy_find_the_same_to_the_bit(cards: list[str], text: str, most: int) -> None:
    documents = [Document("", card) for card in cards]
    compiled, by_numpy = Index(documents), Index(documents, compiled=False)
    assert compiled.match(text, most=most) == by_numpy.match(text, most=most)
    assert compiled.match(" ".join([text, *cards]), most=most) == by_numpy.match(" ".join([text, *cards]), most=most)


def test_without_a_compiler_numpy_matches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lexical_native, "cache_folder", lambda: tmp_path)
    monkeypatch.setenv("PATH", "")
    lexical_native._function.cache_clear()
    try:
        index = Index([Document("", "orders"), Document("", "poems")])
        assert not lexical_native.available()
        assert [number for number, _ in index.match("poems", most=2).best] == [1]
    finally:
        lexical_native._function.cache_clear()


@given(st.integers(1, 100), st.integers(1, 100))
def test_a_word_that_is_said_more_often_counts_more_and_never_more_than_once_its_weight(few: int, more: int) -> None:
    lengths = np.array([100.0, 100.0])
    low, high = saturated(np.array([few, few + more], float), lengths, 80.0)
    assert 0 < low < high < 1


# The router of cards alone


@pytest.mark.parametrize(("domain", "text"), TEXTS)
def test_the_card_of_the_domain_wins_and_the_reason_quotes_its_words(domain: str, text: str) -> None:
    route = ROUTERS["cards"](Asked(text), DOMAINS, no_model)
    assert max(route.mix, key=lambda digest: route.mix[digest]) == f"sha256:{domain}"
    assert route.mix[f"sha256:{domain}"] >= 0.75
    assert route.scores[0].digest == f"sha256:{domain}" and route.scores[0].score > LEAST
    assert f"acme/{domain}:1" in route.reason and "'" in route.reason


@pytest.mark.parametrize("text", ["xyzzy plugh", "!!! ???", "\N{HIRAGANA LETTER A}" * 40])
def test_a_text_that_no_card_knows_is_the_bases(text: str) -> None:
    route = by_cards(text, DOMAINS)
    assert route.mix == {} and route.scores[0].digest == BASE and route.scores[0].weight == 1.0
    assert "none of 4 model cards" in route.reason


def test_weights_are_steps_of_a_sixty_fourth_over_two_and_the_base_has_what_is_left() -> None:
    twins = Pool.of([candidate("one", "select join group"), candidate("two", "select join group")])
    route = by_cards("select join group", twins)
    assert route.mix == {"sha256:one": 0.5, "sha256:two": 0.5}
    for _, text in TEXTS:
        weights = [scored.weight for scored in by_cards(text, DOMAINS).scores]
        assert sum(weights) == 1.0 and all((64 * weight).is_integer() for weight in weights)
        assert sum(weight > 0 for weight in weights) <= 2


def test_the_order_of_the_candidates_does_not_matter() -> None:
    turned = Pool.of(reversed(DOMAINS.candidates))
    assert [by_cards(text, turned) for _, text in TEXTS] == [by_cards(text, DOMAINS) for _, text in TEXTS]


def test_an_adapter_without_a_card_is_found_by_its_name() -> None:
    pool = Pool.of([candidate("legal-contracts", ""), candidate("poems", "")])
    mix = by_cards("Which contracts are void?", pool).mix
    assert list(mix) == ["sha256:legal-contracts"] and mix["sha256:legal-contracts"] > 0.5


def test_the_end_of_a_long_text_decides() -> None:
    sql, prose = TEXTS[0][1], TEXTS[3][1]
    assert by_cards(prose * 20 + sql * WINDOW, DOMAINS).scores[0].digest == "sha256:sql"


def test_a_hundred_cards_that_know_the_text_are_not_all_told() -> None:
    many = Pool.of(candidate(f"a{n:03}", f"orders number{n}" if n % 3 == 0 else "poems") for n in range(100))
    assert len(by_cards("orders", many).scores) == SHOWN + 1


def test_an_empty_text_is_refused_and_no_candidates_mean_the_base() -> None:
    with pytest.raises(InvalidInputError, match="empty"):
        by_cards("", DOMAINS)
    assert by_cards("SELECT", Pool.of([])).mix == {}


# The router of two stages


class Table:
    """Scores the same for whatever is asked, but for one digest; remembers what it was asked about."""

    def __init__(self, best: str) -> None:
        self.best = best
        self.asked: list[str] = []

    def __call__(self, prompt: Sequence[int], mixes: Sequence[Mapping[str, float]]) -> list[list[float]]:
        self.asked += [next(iter(mix), BASE) for mix in mixes]
        return [[-1.0 if self.best in mix else -9.0] * (len(prompt) - 1) for mix in mixes]


def many_domains() -> Pool:
    others = [candidate(f"other{number:02}", f"knitting pattern{number}") for number in range(40)]
    return Pool.of([*DOMAINS.candidates, *others])


@pytest.mark.parametrize(("domain", "text"), TEXTS)
def test_the_model_decides_among_the_nearest_cards_alone(domain: str, text: str) -> None:
    table = Table(f"sha256:{domain}")
    route = ROUTERS["cards+likelihood"](Asked(text), many_domains(), table)
    assert route.mix == {f"sha256:{domain}": 1.0}
    assert BASE in table.asked and f"sha256:{domain}" in table.asked and len(table.asked) <= SHORT + 1
    assert "of 44 model cards" in route.reason


def test_a_card_that_is_far_behind_the_best_costs_no_prefill_and_twins_are_both_asked() -> None:
    words = " ".join(f"gusset{number}" for number in range(12))
    pool = Pool.of([*many_domains().candidates, candidate("one", words), candidate("two", words)])
    _, (_, second), (_, third) = pool.index.match(f"pattern7 {words}", most=3).best
    assert second - third > FAR
    table = Table("sha256:two")
    route = ROUTERS["cards+likelihood"](Asked(f"pattern7 {words}"), pool, table)
    assert set(table.asked) == {BASE, "sha256:one", "sha256:two"} and route.mix == {"sha256:two": 1.0}
    assert "of 46 model cards 2 are near the text" in route.reason


def test_as_few_candidates_as_fit_are_all_scored_whatever_their_cards_say() -> None:
    table = Table("sha256:sql")
    assert ROUTERS["cards+likelihood"](Asked("xyzzy"), DOMAINS, table).mix == {"sha256:sql": 1.0}
    assert len(table.asked) == 5


def test_where_no_card_has_a_word_of_the_text_the_base_answers_without_the_model() -> None:
    route = ROUTERS["cards+likelihood"](Asked("!!!"), many_domains(), no_model)
    assert route.mix == {} and "shares a word" in route.reason


def test_routers_say_what_they_need() -> None:
    needs = {name: (router.runs_model, router.reads_cards) for name, router in ROUTERS.items()}
    assert needs == {"likelihood": (True, False), "cards": (False, True), "cards+likelihood": (True, True)}
