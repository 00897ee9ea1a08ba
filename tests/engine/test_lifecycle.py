"""Threads, cancelling, stopping, and requests that fail."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.engine import Engine, Generation, Ticket
from lorafleet.engine.runner import ModelRunner
from lorafleet.errors import InvalidInputError, NotFoundError
from lorafleet.kernels import CostModel
from lorafleet.kernels.cost_model import Coefficients
from lorafleet.kernels.dispatch import Dispatcher
from tests.engine.bases import PROMPTS, to_length


def test_the_background_thread_gives_the_same_tokens(engine: Engine) -> None:
    inline = engine.generate(PROMPTS, sampling=to_length(10))
    with engine:
        assert [g.token_ids for g in engine.generate(PROMPTS, sampling=to_length(10))] == [g.token_ids for g in inline]
    assert [g.token_ids for g in engine.generate(PROMPTS, sampling=to_length(10))] == [g.token_ids for g in inline]


@pytest.mark.parametrize("background", [True, False])
def test_many_threads_may_submit_at_once(engine: Engine, adapters: dict[str, Path], background: bool) -> None:
    engine.add_adapter("a", adapters["a"])
    expected = engine.generate(
        [[n, n + 1] for n in range(12)], mixes=[{"a": n % 2} for n in range(12)], sampling=to_length(8)
    )
    got: dict[int, Generation] = {}

    def ask(number: int) -> None:
        ticket = engine.submit([number, number + 1], mix={"a": number % 2}, sampling=to_length(8))
        got[number] = ticket.result(timeout_s=60)

    if background:
        engine.start()
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[n].token_ids for n in range(12)] == [g.token_ids for g in expected]


def test_a_listener_hears_of_every_chunk_and_of_the_end(engine: Engine) -> None:
    heard: list[tuple[int, bool]] = []
    ended = threading.Event()
    with engine:
        ticket = engine.submit(PROMPTS[0], sampling=to_length(8))

        def listen() -> None:
            heard.append((len(ticket.chunks()), ticket.done))
            if ticket.done:
                ended.set()

        ticket.subscribe(listen)
        assert ended.wait(60.0)
    counts = [count for count, _ in heard]
    assert counts == sorted(counts) and set(range(counts[0], 9)) <= set(counts)
    assert heard[-1] == (8, True) and [done for _, done in heard].count(True) == 1
    ticket.subscribe(listen)
    assert heard[-1] == (8, True) and len(heard) == len(counts) + 1
    assert [token for chunk in ticket.chunks(5) for token in chunk.token_ids] == ticket.result().token_ids[5:]


def test_nothing_of_a_request_that_is_over_waits_for_the_garbage_collector(engine: Engine) -> None:
    def heard() -> weakref.ref[Ticket]:
        ticket = engine.submit(PROMPTS[0], sampling=to_length(4))
        ticket.subscribe(lambda: ticket.done and None)
        ticket.result(timeout_s=60)
        ticket.subscribe(lambda: ticket.done and None)  # of one that is over already
        return weakref.ref(ticket)

    gc.disable()
    try:
        assert heard()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("background", [True, False])
def test_a_cancelled_request_keeps_what_it_has_and_frees_its_place(engine: Engine, background: bool) -> None:
    if background:
        engine.start()
    tickets = [engine.submit([n], sampling=to_length(150)) for n in range(6)]
    first = next(tickets[0].stream())
    for ticket in tickets:
        ticket.cancel()
    results = [ticket.result(timeout_s=60) for ticket in tickets]
    assert {result.finish_reason for result in results} == {"cancelled"}
    assert results[0].token_ids[:1] == first.token_ids
    assert results[5].token_ids == []  # it was still waiting: four run at a time
    assert engine.generate([[1]], sampling=to_length(1))[0].finish_reason == "length"
    stats = engine.stats()
    assert (stats.requests_running, stats.requests_waiting, stats.requests_finished_total) == (0, 0, 7)


def test_cancelling_a_finished_request_changes_nothing(engine: Engine) -> None:
    ticket = engine.submit([1], sampling=to_length(2))
    result = ticket.result()
    ticket.cancel()
    assert ticket.result() is result
    assert result.finish_reason == "length"


def test_a_stream_of_a_cancelled_request_ends(engine: Engine) -> None:
    ticket = engine.submit([1], sampling=to_length(150))
    stream = ticket.stream()
    chunks = [next(stream)]
    ticket.cancel()
    chunks += list(stream)
    assert [t for chunk in chunks for t in chunk.token_ids] == ticket.result().token_ids


def test_stop_cancels_what_is_not_done_and_the_engine_can_go_on(engine: Engine) -> None:
    engine.start()
    engine.start()
    tickets = [engine.submit([n], sampling=to_length(150)) for n in range(6)]
    next(tickets[0].stream())
    engine.stop()
    assert {ticket.result(timeout_s=0).finish_reason for ticket in tickets} <= {"cancelled", "length"}
    assert tickets[5].result().finish_reason == "cancelled"
    engine.stop()
    engine.start()
    assert engine.submit([1], sampling=to_length(3)).result(timeout_s=60).finish_reason == "length"


def test_a_timeout_leaves_the_request_running(engine: Engine) -> None:
    ticket = engine.submit([1], sampling=to_length(20))
    with pytest.raises(TimeoutError, match="not done after 0 s"):
        ticket.result(timeout_s=0)
    assert len(ticket.result().token_ids) == 20


def failing_on(token: int, real: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: ModelRunner, runs: Any) -> Any:
        if any(token in run.request.tokens[: run.request.prompt_tokens] for run in runs):
            raise RuntimeError("injected")
        return real(self, runs)

    return run


@pytest.mark.parametrize("background", [True, False])
def test_a_request_that_fails_takes_no_other_with_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    prompts = [[1], [66, 2], [3]]
    expected = engine.generate(prompts, sampling=to_length(8))
    monkeypatch.setattr(ModelRunner, "run", failing_on(66, ModelRunner.run))
    if background:
        engine.start()
    tickets = [engine.submit(prompt, sampling=to_length(8)) for prompt in prompts]
    with pytest.raises(RuntimeError, match="injected"):
        tickets[1].result(timeout_s=60)
    with pytest.raises(RuntimeError, match="injected"):
        list(tickets[1].stream())
    for number in (0, 2):
        assert tickets[number].result(timeout_s=60).token_ids == expected[number].token_ids
    assert engine.stats().requests_failed_total == 1


def test_a_fault_of_a_whole_step_fails_its_requests_and_not_the_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def broken() -> None:
            raise RuntimeError("no schedule")

        patch.setattr(engine._scheduler, "schedule", broken)
        engine.start()
        with pytest.raises(RuntimeError, match="no schedule"):
            engine.submit([1], sampling=to_length(3)).result(timeout_s=60)
    assert engine.submit([1], sampling=to_length(3)).result(timeout_s=60).finish_reason == "length"


def test_generate_raises_the_error_of_a_failed_request_and_cancels_the_rest(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRunner, "run", failing_on(66, ModelRunner.run))
    with pytest.raises(RuntimeError, match="injected"):
        engine.generate([[66], [1]], sampling=to_length(150))
    assert engine.generate([[1]], sampling=to_length(1))[0].finish_reason == "length"
    assert engine.stats().requests_running == 0


def test_stats_count_tokens_requests_and_steps(engine: Engine, adapters: dict[str, Path]) -> None:
    engine.add_adapter("a", adapters["a"])
    engine.generate([[1, 2, 3], [4] * 20], mixes=[{"a": 1.0}, {}], sampling=to_length(5))
    stats = engine.stats()
    assert stats.prompt_tokens_total == 23
    assert stats.generated_tokens_total == 10
    assert stats.requests_finished_total == 2
    assert stats.adapters_loaded == 1
    assert stats.adapter_packings_total == 1
    assert 6 <= stats.steps_total <= 7  # the budget of 16 tokens cuts the second prompt


def test_streaming_reads_do_not_need_autograd(engine: Engine) -> None:
    with torch.enable_grad():
        assert engine.generate([[1]], sampling=to_length(2))[0].token_ids


def test_a_fitted_cost_model_chooses_the_paths(base_folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    prices = {"dense float32": Coefficients(9.0, 9.0, 9.0), "segmented float32": Coefficients(1.0, 1.0, 1.0)}
    CostModel(prices).save(tmp_path / "fitted.json")
    engine = Engine.load(base_folder, dtype="float32", cost_model=tmp_path / "fitted.json")
    engine.add_adapter("a", adapters["a"])
    assert engine.generate([[1, 2, 3]], mixes=[{"a": 1.0}], sampling=to_length(3))[0].finish_reason == "length"
    dispatcher = engine._runner._context.path
    assert isinstance(dispatcher, Dispatcher)
    assert dispatcher.models["cpu"].coefficients == prices


def test_a_cost_model_of_another_device_or_none_at_all_is_refused(base_folder: Path, tmp_path: Path) -> None:
    CostModel({}, "cuda").save(tmp_path / "gpu.json")
    with pytest.raises(InvalidInputError, match="fitted on cuda"):
        Engine.load(base_folder, dtype="float32", cost_model=tmp_path / "gpu.json")
    with pytest.raises(NotFoundError, match="bench kernels --fit"):
        Engine.load(base_folder, dtype="float32", cost_model=tmp_path / "none.json")
