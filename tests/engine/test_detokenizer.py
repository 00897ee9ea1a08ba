"""Text that streams: whole characters only, and nothing of a stop text."""

from __future__ import annotations

import random

import pytest

from lorafleet.engine import Engine, SamplingParams
from lorafleet.engine.detokenizer import Detokenizer, StopFinder
from tests.engine.bases import PROMPTS, to_length


def as_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


TEXT = "añ€😀 b\u0301日本\u200d👩‍👩‍👧 end"


def test_pieces_hold_whole_characters_and_join_to_the_text() -> None:
    detokenizer = Detokenizer(as_bytes)
    pieces = [detokenizer.push([byte]) for byte in TEXT.encode()]
    assert "".join(pieces) + detokenizer.flush() == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[:4] == ["a", "", "ñ", ""]


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_in_any_cuts_join_to_their_decoding(seed: int) -> None:
    draw = random.Random(seed)
    tokens = [draw.choice([draw.randrange(256), draw.choice(list(TEXT.encode()))]) for _ in range(60)]
    detokenizer, text, at = Detokenizer(as_bytes), "", 0
    while at < len(tokens):
        size = draw.randint(1, 5)
        text += detokenizer.push(tokens[at : at + size])
        at += size
    assert text + detokenizer.flush() == as_bytes(tokens)


def test_an_incomplete_end_comes_with_the_flush() -> None:
    detokenizer = Detokenizer(as_bytes)
    assert detokenizer.push(list("é€".encode()[:-1])) == "é"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_bytes_that_never_become_characters_are_decoded_in_short_windows() -> None:
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return as_bytes(tokens)

    detokenizer = Detokenizer(decode)
    text = "".join(detokenizer.push([0xFF]) for _ in range(500)) + detokenizer.flush()
    assert text == "\ufffd" * 500
    assert longest <= 64


def test_a_tokenizer_that_drops_the_first_space_of_a_text_keeps_those_between_pieces() -> None:
    words = {1: " one", 2: " two", 3: " three"}
    detokenizer = Detokenizer(lambda tokens: "".join(words[t] for t in tokens)[1:])
    pieces = [detokenizer.push([token]) for token in (1, 2, 3)]
    assert pieces == ["one", " two", " three"]


@pytest.mark.parametrize(
    ("pieces", "stops", "out", "found"),
    [
        (["abc"], (), "abc", False),
        (["abEN", "Dcd"], ("END",), "ab", True),
        (["abEN", "d"], ("END",), "abENd", False),
        (["EEN", "D"], ("END",), "E", True),
        (["abab", "ac"], ("abac",), "ab", True),
        (["xy", "z"], ("z", "yz"), "x", True),
        (["a", "b", "c"], ("abcd", "bc"), "a", True),
        (["stop"], ("stop",), "", True),
    ],
)
def test_text_ends_before_the_first_stop_text(pieces: list[str], stops: tuple[str, ...], out: str, found: bool) -> None:
    finder = StopFinder(stops)
    text = "".join(finder.push(piece) for piece in pieces)
    assert finder.found is found
    assert text + finder.flush() == out


def test_nothing_of_a_stop_text_streams_before_it_is_known() -> None:
    finder = StopFinder(("END",))
    assert [finder.push(piece) for piece in ("a", "E", "N", "x", "EN")] == ["a", "", "", "ENx", ""]
    assert finder.flush() == "EN"


def test_a_stop_text_across_tokens_ends_the_generation(engine: Engine) -> None:
    free = engine.generate([PROMPTS[0]], sampling=to_length(30))[0]
    stop = free.text[10:13]
    at = free.text.index(stop)
    ticket = engine.submit(PROMPTS[0], sampling=SamplingParams(max_tokens=30, ignore_eos=True, stop=[stop]))
    chunks = list(ticket.stream())
    result = ticket.result()
    assert result.finish_reason == "stop"
    assert result.text == free.text[:at] == "".join(chunk.text for chunk in chunks)
    assert result.token_ids == free.token_ids[: len(result.token_ids)]
    assert len(result.token_ids) < 30


def test_streamed_text_and_tokens_join_to_the_result(engine: Engine) -> None:
    ticket = engine.submit(PROMPTS[2], sampling=to_length(40, logprobs=True))
    chunks = list(ticket.stream())
    result = ticket.result()
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert result.text == engine.tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert [token for chunk in chunks for token in chunk.token_ids] == result.token_ids
    assert [value for chunk in chunks for value in chunk.logprobs] == result.logprobs
