"""The engine as it runs on a GPU, against the engine as it runs on a CPU, in float32.

Run by test_graphs.py in a process of its own. In Triton's interpreter the GPU's branches run on the CPU: pages and
attention by block tables, adapters in pools, captured steps, which are run again instead of replayed. On a GPU nothing
is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.engine import Engine, SamplingParams, TokenMix
from lorafleet.engine import block_attention as block_attention_module
from lorafleet.engine import engine as engine_module
from lorafleet.engine.block_attention import BlockAttention
from lorafleet.engine.block_pages import BlockPages
from lorafleet.engine.graphs import StepGraphs
from lorafleet.engine.kv_pages import KvPages
from lorafleet.engine.triton_attention import INTERPRETED, decode_in_pages
from lorafleet.kernels import mixture_path
from lorafleet.kernels.bank import pool_page_bytes
from tests.engine.bases import PROMPTS, SMALL, to_length
from tests.engine.rerun import rerun

DEVICE = "cpu" if INTERPRETED else "cuda"
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_sequences": 6, "max_batch_tokens": 48}
NEW_TOKENS = 6


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, base_folder: Path, cpu: Engine) -> Iterator[Engine]:
    """The engine of a GPU; loaded after that of the CPU, which has to stay what it is."""
    assert type(cpu._runner._cache) is KvPages
    if INTERPRETED:
        monkeypatch.setattr(BlockAttention, "supports", staticmethod(lambda device: True))
        monkeypatch.setattr(block_attention_module, "decode_of", lambda device: decode_in_pages)
        monkeypatch.setattr(engine_module, "CudaCapture", lambda device: rerun)
        monkeypatch.setattr(engine_module, "mixture_path", lambda: mixture_path("triton"))
    engine = Engine.load(base_folder, device=DEVICE, adapter_bytes=4_000_000, kv_tokens=2048, **SETTINGS)
    yield engine
    engine.stop()


@pytest.fixture
def cpu(base_folder: Path) -> Iterator[Engine]:
    engine = Engine.load(base_folder, **SETTINGS)
    yield engine
    engine.stop()


def graphs_of(engine: Engine) -> StepGraphs:
    graphs = engine._runner._graphs
    assert graphs is not None and isinstance(engine._runner._cache, BlockPages)
    return graphs


def tokens_of(
    engine: Engine, mixes: Sequence[Any], *, sampling: SamplingParams | None = None, prompts: Any = PROMPTS
) -> list[list[int]]:
    results = engine.generate(prompts, mixes=mixes, sampling=sampling or to_length(NEW_TOKENS))
    return [result.token_ids for result in results]


def gated(seed: int, engine: Engine, rank: int = 3) -> LoraAdapter:
    """An adapter of all linears with gates, as token-level routing wants them."""
    generator = torch.Generator().manual_seed(seed)
    hidden, mlp, kv = SMALL["hidden_size"], SMALL["intermediate_size"], SMALL["hidden_size"] // 2
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, mlp), "mlp.up_proj": (hidden, mlp),
        "mlp.down_proj": (mlp, hidden),
    }  # fmt: skip
    modules, gates = {}, {}
    for layer in range(SMALL["num_hidden_layers"]):
        for name, (d_in, d_out) in shapes.items():
            path = f"model.layers.{layer}.{name}"
            modules[path] = LoraPair(
                torch.randn(rank, d_in, generator=generator) * 0.3, torch.randn(d_out, rank, generator=generator) * 0.3
            )
            if name.split(".")[1] in ("q_proj", "o_proj", "gate_proj", "down_proj"):
                gates[path] = torch.randn(d_in, generator=generator)
    return LoraAdapter(modules, gates=gates)


MIXES: list[Any] = [{"a": 1.0}, {"a": 0.7, "b": 0.3}, None, {"b": -0.5, "c": 2.0}, {"c": 1.0}]


def add_all(engine: Engine, adapters: dict[str, Path]) -> None:
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)


def test_the_bare_base_answers_alike(gpu: Engine, cpu: Engine) -> None:
    nothing = [None] * len(PROMPTS)
    assert tokens_of(gpu, nothing) == tokens_of(cpu, nothing)
    assert graphs_of(gpu).replays_total > 0
    assert {kind for _, kind in graphs_of(gpu)._graphs} == {"base"}


def test_mixtures_of_different_ranks_answer_alike(gpu: Engine, cpu: Engine, adapters: dict[str, Path]) -> None:
    for engine in (gpu, cpu):
        add_all(engine, adapters)
    expected = tokens_of(cpu, MIXES)
    assert expected != tokens_of(cpu, [None] * len(PROMPTS))
    assert tokens_of(gpu, MIXES) == expected
    assert "mixed" in {kind for _, kind in graphs_of(gpu)._graphs}
    assert None not in graphs_of(gpu)._graphs.values() and not graphs_of(gpu)._refused


def test_graphs_and_single_launches_answer_alike(gpu: Engine, adapters: dict[str, Path]) -> None:
    add_all(gpu, adapters)
    replayed = tokens_of(gpu, MIXES)
    assert graphs_of(gpu).replays_total > 0
    gpu._runner._graphs = None
    assert tokens_of(gpu, MIXES) == replayed


def test_replays_follow_adapters_that_come_and_go(gpu: Engine, cpu: Engine, adapters: dict[str, Path]) -> None:
    for engine in (gpu, cpu):
        engine.add_adapter("a", adapters["a"])
    only_a = [{"a": 1.0}, None, {"a": 0.5}, None, None]
    assert tokens_of(gpu, only_a) == tokens_of(cpu, only_a)
    captured = dict(graphs_of(gpu)._graphs)
    for engine in (gpu, cpu):  # the name means something else, of another rank, in the pages of the one before
        engine.add_adapter("a", adapters["b"])
        engine.add_adapter("c", adapters["c"])
    assert tokens_of(gpu, only_a) == tokens_of(cpu, only_a)
    with_c = [{"a": 1.0, "c": 1.0}, {"c": 1.0}, None, None, {"a": -1.0}]
    assert tokens_of(gpu, with_c) == tokens_of(cpu, with_c)
    for engine in (gpu, cpu):
        engine.remove_adapter("a")
    only_c = [None, {"c": 1.0}, None, {"c": 0.25}, None]
    assert tokens_of(gpu, only_c) == tokens_of(cpu, only_c)
    assert all(graphs_of(gpu)._graphs[key] is graph for key, graph in captured.items())
    assert not graphs_of(gpu)._refused


def test_routed_tokens_answer_alike(gpu: Engine, cpu: Engine) -> None:
    for engine in (gpu, cpu):
        for index, name in enumerate(("x", "y", "z")):
            engine.add_adapter(name, gated(index, engine))
    mixes = [TokenMix(("x", "y", "z"), 2), {"x": 1.0}, TokenMix(("y", "z"), 1), None, None]
    assert tokens_of(gpu, mixes) == tokens_of(cpu, mixes)
    assert "routed" in {kind for _, kind in graphs_of(gpu)._graphs}
    assert None not in graphs_of(gpu)._graphs.values()


def test_adapters_that_differ_between_layers_answer_alike(
    gpu: Engine, cpu: Engine, make_adapter: Callable[..., Path], adapters: dict[str, Path]
) -> None:
    folder = make_adapter(9, r=5, layers_to_transform=[1])
    for engine in (gpu, cpu):
        engine.add_adapter("middle", folder)
        engine.add_adapter("a", adapters["a"])
    mixes = [{"middle": 1.0}, None, {"a": 1.0}, {"a": 0.5, "middle": -1.0}, None]
    assert tokens_of(gpu, mixes) == tokens_of(cpu, mixes)
    assert "mixed" in {kind for _, kind in graphs_of(gpu)._graphs} and not graphs_of(gpu)._refused


def test_a_step_with_more_work_than_a_graph_has_room_for_is_computed_without_it(
    gpu: Engine,
    cpu: Engine,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("lorafleet.kernels.captured.MOST_ITEMS", 2)
    for engine in (gpu, cpu):
        add_all(engine, adapters)
    assert tokens_of(gpu, MIXES) == tokens_of(cpu, MIXES)
    said = {r.getMessage() for r in caplog.records if "without a graph" in r.getMessage()}
    assert said and all("expected at most 2" in message for message in said)


@pytest.mark.skipif(INTERPRETED, reason="single launches and graphs run the same code in the interpreter")
def test_graphs_and_single_launches_answer_alike_in_bfloat16(base_folder: Path, adapters: dict[str, Path]) -> None:
    found = []
    for graphs in (True, False):
        engine = Engine.load(base_folder, device=DEVICE, adapter_bytes=4_000_000, kv_tokens=2048)
        if not graphs:
            engine._runner._graphs = None
        add_all(engine, adapters)
        found.append(tokens_of(engine, MIXES))
        engine.stop()
    assert found[0] == found[1]


def test_requests_come_and_go_in_one_batch(gpu: Engine, cpu: Engine, adapters: dict[str, Path]) -> None:
    """Buckets change while the batch empties: requests of 1 to 7 new tokens."""
    for engine in (gpu, cpu):
        add_all(engine, adapters)
    prompts = [[n, n + 1, n + 2] for n in range(7)]
    sampling = [to_length(n + 1) for n in range(7)]
    mixes = [{"a": 1.0}, None, {"b": 1.0}, {"a": 0.5, "c": 0.5}, None, {"c": 1.0}, {"b": 2.0}]
    both = [
        [r.token_ids for r in engine.generate(prompts, mixes=mixes, sampling=sampling)] for engine in (gpu, cpu)
    ]  # fmt: skip
    assert both[0] == both[1]
    assert len({bucket for bucket, _ in graphs_of(gpu)._graphs}) > 1


def test_more_adapters_than_the_pool_holds_take_turns(
    gpu: Engine, cpu: Engine, adapters: dict[str, Path], base_folder: Path
) -> None:
    """Room for two pages of each module: any two of these, never three."""
    room = 2 * pool_page_bytes(gpu._base.groups, torch.float32)
    tight = Engine.load(base_folder, device=DEVICE, adapter_bytes=room, kv_tokens=2048, **SETTINGS)
    for engine in (tight, cpu):
        add_all(engine, adapters)
    mixes = [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"a": 0.5, "b": 0.5}, None]
    assert tokens_of(tight, mixes) == tokens_of(cpu, mixes)
    assert tight.stats().adapter_evictions_total > 0
    tight.stop()
