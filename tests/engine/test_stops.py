"""What ends a request, and where its text ends then: stop texts and stop tokens, end of text, length."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lorafleet.engine import Generation, SamplingParams, TokenChunk
from lorafleet.engine.request import Request, ResolvedMix

EOS = 256


def decode(tokens: list[int]) -> str:
    """Token ids are bytes; the end of text and what is above it have no text."""
    return bytes(token for token in tokens if token < EOS).decode("utf-8", errors="replace")


def respond(tokens: list[int], *, max_new: int | None = None, **sampling: Any) -> tuple[list[TokenChunk], Generation]:
    """What a request makes of these tokens, as far as it takes them."""
    count = len(tokens) if max_new is None else max_new
    params = SamplingParams(max_tokens=count, **sampling)
    request = Request([1], mix=ResolvedMix(), sampling=params, max_new=count, decode=decode)
    chunks = []
    for token in tokens:
        chunk, reason = request.accept(token, logprob=None, eos=frozenset([EOS]))
        chunks.append(chunk)
        if reason is not None:
            return chunks, request.generation(reason)
    raise AssertionError("the request did not end")


def pieces(chunks: list[TokenChunk]) -> list[str]:
    return [chunk.text for chunk in chunks]


@pytest.mark.parametrize("stop", ["né", "é", "éa", "€", "né€", "日本", "👩‍👩‍👧", "\n\n"])
def test_a_stop_text_may_be_split_anywhere_even_within_a_character(stop: str) -> None:
    tokens = list(f"ab{stop}cd".encode())
    chunks, result = respond(tokens, stop=[stop])
    assert pieces(chunks) == ["a", "b", *[""] * len(stop.encode())]
    assert (result.text, result.finish_reason) == ("ab", "stop")
    assert result.token_ids == tokens[: 2 + len(stop.encode())]


def test_a_beginning_of_a_stop_text_comes_late_when_it_turns_out_to_be_none() -> None:
    chunks, result = respond(list("aé€b".encode()), stop=["é€c"])
    assert pieces(chunks) == ["a", "", "", "", "", "", "é€b"]
    assert (result.text, result.finish_reason) == ("aé€b", "length")


def test_a_beginning_of_a_stop_text_at_the_end_belongs_to_the_text() -> None:
    chunks, result = respond(list(b"abEN"), stop=["END"])
    assert pieces(chunks) == ["a", "b", "", "EN"]
    assert (result.text, result.finish_reason) == ("abEN", "length")


def test_a_stop_text_that_the_last_token_completes_is_a_stop() -> None:
    _, result = respond(list(b"abEND"), stop=["END"])
    assert (result.text, result.finish_reason) == ("ab", "stop")


def test_half_a_character_at_the_end_may_complete_a_stop_text() -> None:
    """What the decoder writes for bytes that are no character is text, too."""
    chunks, result = respond([*b"a", *"é".encode()[:1]], stop=["\ufffd"])
    assert pieces(chunks) == ["a", ""]
    assert (result.text, result.finish_reason) == ("a", "stop")


@pytest.mark.parametrize("seed", range(40))
def test_text_that_streamed_is_never_taken_back(seed: int) -> None:
    """Against a plain search in the text so far, character by character."""
    draw = random.Random(seed)
    alphabet = "aé€"
    text = "".join(draw.choices(alphabet, k=40))
    stops = ["".join(draw.choices(alphabet, k=draw.randint(1, 5))) for _ in range(draw.randint(1, 3))]
    first = draw.choice([0, 0, draw.randint(1, 60)])
    tokens = list(text.encode())
    first = min(first, len(tokens))

    expected, reason, used = text, "length", len(tokens)
    for end in range(1, len(text) + 1):
        taken = len(text[:end].encode())
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts and taken > first:
            expected, reason, used = text[: min(starts)], "stop", taken
            break

    chunks, result = respond(tokens, stop=stops, min_tokens=first)
    assert (result.text, result.finish_reason, len(result.token_ids)) == (expected, reason, used)
    assert "".join(pieces(chunks)) == expected


def test_a_stop_token_ends_the_text_before_it_and_is_the_last_token() -> None:
    chunks, result = respond([*b"ab", 0x0A, *b"cd"], stop_token_ids=[7, 0x0A])
    assert pieces(chunks) == ["a", "b", ""]
    assert (result.text, result.token_ids, result.finish_reason) == ("ab", [*b"ab", 0x0A], "stop")


def test_what_a_stop_text_held_back_comes_before_a_stop_token() -> None:
    chunks, result = respond([*b"aEN", *"é".encode()[:1], 300], stop=["END"], stop_token_ids=[300])
    assert pieces(chunks) == ["a", "", "", "", "EN\ufffd"]
    assert (result.text, result.finish_reason) == ("aEN\ufffd", "stop")


@pytest.mark.parametrize(("ignore_eos", "stop_tokens", "used"), [(False, [], 2), (True, [], 4), (True, [EOS], 2)])
def test_the_end_of_text_ends_unless_it_is_ignored_and_a_stop_token_always(
    ignore_eos: bool, stop_tokens: list[int], used: int
) -> None:
    _, result = respond([*b"a", EOS, *b"bc"], ignore_eos=ignore_eos, stop_token_ids=stop_tokens)
    assert len(result.token_ids) == used
    assert result.finish_reason == ("length" if used == 4 else "stop")


@pytest.mark.parametrize(("first", "used"), [(0, 2), (1, 2), (2, 4), (3, 4), (4, 6)])
def test_nothing_ends_within_the_first_min_tokens(first: int, used: int) -> None:
    """The tokens are those that a sampler which does not know of min_tokens would give."""
    _, result = respond([*b"a", EOS, *b"b", 300, *b"cd"], min_tokens=first, stop_token_ids=[300])
    assert len(result.token_ids) == used
    _, result = respond(list(b"aXbXcd"), min_tokens=first, stop=["X"])
    assert len(result.token_ids) == used
    assert result.text == {2: "a", 4: "aXb", 6: "aXbXcd"}[used]


def test_a_stop_text_that_begins_within_the_first_tokens_and_ends_after_them_counts() -> None:
    _, result = respond(list(b"xENDyEND"), min_tokens=3, stop=["END"])
    assert (result.text, len(result.token_ids)) == ("x", 4)
    _, result = respond(list(b"xENDyEND"), min_tokens=4, stop=["END"])
    assert (result.text, len(result.token_ids)) == ("xENDy", 8)
    # The part that is held back for one stop text has another one in it that came too early.
    _, result = respond(list(b"abcxbc"), min_tokens=3, stop=["abcd", "bc"])
    assert (result.text, len(result.token_ids)) == ("abcx", 6)


def test_top_logprobs_come_with_their_tokens() -> None:
    params = SamplingParams(max_tokens=3, logprobs=True, top_logprobs=2)
    request = Request([1], mix=ResolvedMix(), sampling=params, max_new=3, decode=decode)
    each = [[(65 + step, -0.5), (70, -1.5)] for step in range(3)]
    for step in range(3):
        chunk, reason = request.accept(65 + step, logprob=-0.5, eos=frozenset(), top_logprobs=each[step])  # type: ignore[arg-type]
        assert (chunk.logprobs, chunk.top_logprobs) == ([-0.5], [each[step]])
    assert reason == "length"
    result = request.generation(reason)
    assert (result.logprobs, result.top_logprobs) == ([-0.5] * 3, each)


def test_a_request_counts_what_it_generates() -> None:
    params = SamplingParams(max_tokens=3, repetition_penalty=2.0, frequency_penalty=1.0)
    request = Request([5, 6], mix=ResolvedMix(), sampling=params, max_new=3, decode=decode)
    assert request.history is not None
    for token in (7, 6):
        request.accept(token, logprob=None, eos=frozenset())
    history = request.history
    assert history.generated == 2
    changes = {t: (f, a) for t, f, a in zip(history.tokens, history.factors, history.addends, strict=True)}
    assert changes == {5: (2.0, 0.0), 6: (2.0, -1.0), 7: (2.0, -1.0)}
