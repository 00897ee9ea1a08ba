"""Pages: who owns them, which prefixes are shared, and what happens when they run out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lorafleet.engine import Engine
from lorafleet.engine.kv_pages import PAGE_TOKENS
from lorafleet.engine.page_allocator import PageAllocator
from lorafleet.engine.prefix import CopiedPrefixes, next_key, root_key
from lorafleet.errors import InvalidInputError
from tests.engine.bases import to_length

LONG = [(7 * n) % 251 for n in range(3 * PAGE_TOKENS + 5)]


def test_lowest_free_page_comes_first_and_none_when_all_are_used() -> None:
    pages = PageAllocator(3)
    assert [pages.take() for _ in range(4)] == [0, 1, 2, None]
    pages.release(2)
    pages.release(0)
    assert (pages.take(), pages.available) == (0, 1)


def test_published_page_is_shared_and_outlives_its_users() -> None:
    pages = PageAllocator(2)
    first = pages.take()
    assert first == 0
    pages.publish(first, b"x")
    assert pages.find(b"x") == first
    pages.release(first)
    pages.release(first)
    assert pages.available == 2
    assert pages.find(b"x") == first
    assert pages.available == 1


def test_room_comes_from_the_published_page_that_was_unused_longest() -> None:
    pages = PageAllocator(2)
    for key in (b"x", b"y"):
        page = pages.take()
        assert page is not None
        pages.publish(page, key)
        pages.release(page)
    assert pages.find(b"x") == 0
    pages.release(0)
    assert pages.take() == 1
    assert pages.find(b"y") is None
    assert pages.find(b"x") == 0


def test_pages_are_never_lost_nor_given_twice() -> None:
    rng, pages, held = random.Random(0), PageAllocator(20), list[int]()
    for turn in range(4000):
        if held and rng.random() < 0.5:
            pages.release(held.pop(rng.randrange(len(held))))
        elif rng.random() < 0.3:
            found = pages.find(b"%d" % rng.randrange(30))
            held += [] if found is None else [found]
        else:
            page = pages.take()
            if page is not None:
                assert page not in held
                held.append(page)
                if rng.random() < 0.7:
                    pages.publish(page, b"%d" % rng.randrange(30))
        assert pages.in_use == len(set(held)), f"turn {turn}"


def test_copied_prefix_is_found_again_in_a_page_of_ones_own() -> None:
    pages, copies = PageAllocator(2), list[tuple[int, int]]()
    prefixes = CopiedPrefixes(pages, kept=2, copy=lambda source, destination: copies.append((source, destination)))
    first = pages.take()
    assert first == 0
    prefixes.publish(first, b"x")
    prefixes.publish(first, b"x")
    assert copies == [(0, 2)]
    assert prefixes.find(b"x") == 1
    assert copies == [(0, 2), (2, 1)]
    assert prefixes.find(b"x") is None  # no page is left to copy it to
    pages.release(0)
    assert prefixes.find(b"x") == 0
    assert prefixes.find(b"y") is None


def test_copies_make_room_for_later_ones() -> None:
    pages = PageAllocator(4)
    prefixes = CopiedPrefixes(pages, kept=2, copy=lambda source, destination: None)
    for key in (b"x", b"y", b"z"):
        prefixes.publish(0, key)
    assert prefixes.find(b"x") is None
    assert [prefixes.find(key) for key in (b"y", b"z")] == [0, 1]


def test_key_of_a_prefix_tells_mixes_weights_salts_and_tokens_apart() -> None:
    keys = {
        next_key(root_key(mix, salt), tokens)
        for mix in ((), (("d", 1.0),), (("d", 0.5),), (("e", 1.0),), (("d", 0.5), ("e", 0.5)))
        for salt in ("", "acme", "d=")
        for tokens in ([1, 2], [2, 1], [1, 2, 3])
    }
    assert len(keys) == 5 * 3 * 3
    assert next_key(next_key(root_key((), ""), [1]), [2]) != next_key(root_key((), ""), [1, 2])


def test_shared_prefix_is_computed_once_and_changes_no_token(engine: Engine, adapters: dict[str, Path]) -> None:
    engine.add_adapter("a", adapters["a"])
    mixes = [{"a": 0.5}] * 2
    prompts = [[*LONG, 1], [*LONG, 2]]
    first = engine.generate(prompts, mixes=mixes, sampling=to_length(12))
    before = engine.stats()
    again = engine.generate(prompts, mixes=mixes, sampling=to_length(12))
    after = engine.stats()
    assert [g.token_ids for g in again] == [g.token_ids for g in first]
    assert after.prefix_tokens_total - before.prefix_tokens_total == 2 * 3 * PAGE_TOKENS
    assert after.prompt_tokens_total - before.prompt_tokens_total == 2 * (len(prompts[0]) - 3 * PAGE_TOKENS)


def test_a_prompt_that_one_token_answers_is_found_again(engine: Engine) -> None:
    first = engine.generate([LONG], sampling=to_length(1))
    assert engine.generate([LONG], sampling=to_length(1))[0].token_ids == first[0].token_ids
    assert engine.stats().prefix_tokens_total == 3 * PAGE_TOKENS


@pytest.mark.parametrize("other", ["mix", "weight", "salt", "version"])
def test_prefix_of_another_mix_weight_salt_or_version_is_not_used(
    engine: Engine, adapters: dict[str, Path], other: str
) -> None:
    engine.add_adapter("a", adapters["a"])
    engine.add_adapter("b", adapters["b"])
    engine.submit(LONG, mix={"a": 0.5}, sampling=to_length(4), salt="acme").result()
    mix = {"mix": {"b": 0.5}, "weight": {"a": 0.25}}.get(other, {"a": 0.5})
    if other == "version":
        engine.add_adapter("a", adapters["c"])
    ticket = engine.submit(LONG, mix=mix, sampling=to_length(4), salt="other" if other == "salt" else "acme")
    ticket.result()
    assert engine.stats().prefix_tokens_total == 0


def test_scoring_a_prompt_computes_all_of_it(engine: Engine) -> None:
    def scores() -> list[float] | None:
        return engine.generate([LONG], sampling=to_length(0, prompt_logprobs=True))[0].prompt_logprobs

    first = scores()
    engine.generate([LONG], sampling=to_length(2))
    assert scores() == first
    assert first is not None
    assert len(first) == len(LONG) - 1


def test_more_load_than_memory_waits_and_every_request_gets_its_tokens(
    base_folder: Path, adapters: dict[str, Path]
) -> None:
    prompts = [[n + 1] * (10 + 9 * n) for n in range(8)]
    mixes = [{"a": 1.0} if n % 2 else {} for n in range(8)]
    roomy = Engine.load(base_folder, dtype="float32")
    tight = Engine.load(base_folder, dtype="float32", kv_tokens=5 * PAGE_TOKENS, max_sequences=6, max_batch_tokens=32)
    for engine in (roomy, tight):
        engine.add_adapter("a", adapters["a"])
    expected = roomy.generate(prompts, mixes=mixes, sampling=to_length(50, logprobs=True))
    found = tight.generate(prompts, mixes=mixes, sampling=to_length(50, logprobs=True))
    assert [g.token_ids for g in found] == [g.token_ids for g in expected]
    assert all(len(g.logprobs) == 50 for g in found)
    assert tight.stats().preemptions_total > 0
    assert tight.stats().kv_pages_in_use == 0
    assert roomy.stats().preemptions_total == 0


def test_scores_of_a_prompt_survive_giving_up_its_memory(base_folder: Path) -> None:
    tight = Engine.load(base_folder, dtype="float32", kv_tokens=4 * PAGE_TOKENS, max_sequences=3, max_batch_tokens=16)
    roomy = Engine.load(base_folder, dtype="float32")
    prompts = [[3, 1, 4] * 10, [2, 7] * 14, [5] * 28]
    sampling = to_length(60, prompt_logprobs=True)
    found = tight.generate(prompts, sampling=sampling)
    assert tight.stats().preemptions_total > 0
    for one, other in zip(found, roomy.generate(prompts, sampling=sampling), strict=True):
        assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=1e-4)
        assert one.token_ids == other.token_ids


def test_request_that_memory_can_never_hold_is_refused(base_folder: Path) -> None:
    engine = Engine.load(base_folder, dtype="float32", kv_tokens=PAGE_TOKENS)
    assert engine.context_tokens == PAGE_TOKENS
    with pytest.raises(InvalidInputError, match=f"context holds {PAGE_TOKENS}"):
        engine.submit(LONG)
    assert len(engine.generate([[1, 2, 3]], sampling=to_length(500))[0].token_ids) == PAGE_TOKENS - 2


def test_memory_for_no_token_is_refused(base_folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="kv_tokens"):
        Engine.load(base_folder, dtype="float32", kv_tokens=0)


def test_default_memory_holds_every_sequence_where_there_is_room(base_folder: Path) -> None:
    engine = Engine.load(base_folder, dtype="float32", max_sequences=4)
    assert engine.stats().kv_pages == 4 * engine.context_tokens // PAGE_TOKENS
