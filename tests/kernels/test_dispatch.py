"""The cost model: what it predicts, how it is fitted and kept; and which path a call gets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorafleet.errors import InvalidInputError
from lorafleet.kernels import Bank, GroupSpec, ModuleSpec, PackedGroup, Plan, Run, TokenRoute, mixture_path
from lorafleet.kernels.cost_model import Call, Coefficients, CostModel, Measurement, Segment, effort, fit
from lorafleet.kernels.dispatch import DEFAULT_MODEL, PATHS, Dispatcher, call_of, without_measurements
from tests.kernels.cases import CASES, step_of


def call(
    *, tokens: int, rows: int, segments: tuple[tuple[int, int], ...] = (), d: int = 512, dtype: str = "float32"
) -> Call:
    return Call(d, (d,), (rows,), tokens, tuple(Segment(*pair) for pair in segments or ((tokens, rows),)), True, dtype)


CALLS = [
    call(tokens=tokens, rows=rows, segments=((tokens, rows),) * segments, d=d)
    for tokens in (1, 7, 64, 500)
    for rows in (4, 100)
    for segments in (1, 3)
    for d in (64, 3000)
]


def test_fitting_finds_the_coefficients_that_made_the_measurements() -> None:
    true = {"dense": Coefficients(4.0, 30.0, 6000.0), "segmented": Coefficients(9.0, 50.0, 5000.0)}
    measurements = [Measurement(p, c, k.predict_us(effort(p, c))) for p, k in true.items() for c in CALLS]
    model = fit(measurements, about={"processor": "imagined"})
    for path, coefficients in true.items():
        assert model.coefficients[f"{path} float32"] == pytest.approx(coefficients, rel=1e-6)


def test_no_coefficient_is_negative_even_where_least_squares_would_make_it_so() -> None:
    """Times that fall with the bytes: only calls cost anything then."""
    measurements = [Measurement("dense", c, 100.0 / (1 + effort("dense", c).megabytes)) for c in CALLS]
    found = fit(measurements).coefficients["dense float32"]
    assert min(found) >= 0.0
    assert max(found) > 0.0


def test_a_model_survives_the_disk(tmp_path: Path) -> None:
    DEFAULT_MODEL.save(tmp_path / "costs.json")
    assert CostModel.load(tmp_path / "costs.json") == DEFAULT_MODEL


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format 2, expected 1"),
        ({"microseconds": {"dense float32": {"call": -1, "megabyte": 0, "gigaflop": 0}}}, "negative or not finite"),
        ({"microseconds": {"dense float32": {"call": 1}}}, "TypeError"),
        ({"microseconds": 3}, "AttributeError"),
    ],
)
def test_a_file_that_is_no_model_is_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    DEFAULT_MODEL.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidInputError, match=words):
        CostModel.load(path)
    path.write_text("{")
    with pytest.raises(InvalidInputError, match="no cost model"):
        CostModel.load(path)


def test_a_path_that_was_not_measured_is_never_the_cheapest() -> None:
    model = CostModel({"segmented float32": Coefficients(1e6, 1e6, 1e6)})
    assert math.isinf(model.predict_us("dense", CALLS[0]))
    assert model.cheapest(CALLS[0], ["dense", "segmented"]) == "segmented"
    assert CostModel({}).cheapest(CALLS[0], ["dense", "segmented"]) == "dense"


def test_the_shipped_model_knows_when_segments_pay() -> None:
    many = tuple((64, 32) for _ in range(8))
    for dtype in ("float32", "bfloat16", "bfloat16/float32"):
        prefill = call(tokens=512, rows=8 * 32, segments=many, d=2048, dtype=dtype)
        decode = call(tokens=8, rows=8 * 8, segments=((1, 8),) * 8, d=2048, dtype=dtype)
        assert DEFAULT_MODEL.cheapest(prefill, ["dense", "segmented"]) == "segmented"
        assert DEFAULT_MODEL.cheapest(decode, ["dense", "segmented"]) == "dense"


def test_small_bfloat16_calls_are_widened_and_large_ones_are_not() -> None:
    paths = ["dense", "dense_float32"]
    assert DEFAULT_MODEL.cheapest(call(tokens=1, rows=16, d=256, dtype="bfloat16"), paths) == "dense_float32"
    assert DEFAULT_MODEL.cheapest(call(tokens=256, rows=64, d=2048, dtype="bfloat16"), paths) == "dense"


def test_the_description_of_a_call_is_read_from_plan_and_group() -> None:
    packing, plan, x, _ = step_of(CASES["routed tokens"])
    found = call_of(x, packing.groups["group"], plan)
    # a has 1 + 7 + 3 rows, b 16 + 5, c 256 + 64 + 1, d 2
    assert found == Call(
        33,
        (17, 9, 21),
        (273, 71, 11),
        15,
        (Segment(5, 353), Segment(2, 23), Segment(3, 323), Segment(2, 11), Segment(2, 355)),
        False,
        "float32",
    )


def test_effort_counts_what_each_path_multiplies() -> None:
    mixed = call(tokens=10, rows=30, segments=((4, 10), (5, 20)), d=100)
    assert effort("dense", mixed).gigaflops == pytest.approx(2 * 10 * 30 * 200 / 1e9)
    assert effort("segmented", mixed).gigaflops == pytest.approx(2 * (4 * 10 + 5 * 20) * 200 / 1e9)
    assert effort("segmented", mixed).calls == 2 * effort("dense", mixed).calls
    with pytest.raises(ValueError, match="found path 'reference'"):
        effort("reference", mixed)


class Favourite:
    """A dispatcher whose model makes one path free."""

    def __init__(self, path: str) -> None:
        names = [f"{p} {d}" for p in ("dense", "dense_float32", "segmented") for d in ("float32", "bfloat16")]
        cost = {name: Coefficients(*([0.0 if name.split()[0] == path else 1.0] * 3)) for name in names}
        self.path = Dispatcher({"cpu": CostModel(cost)})


@pytest.mark.parametrize("name", ["dense", "segmented"])
def test_a_call_goes_to_the_path_that_the_model_finds_cheapest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def spy(y: Tensor, x: Tensor, group: PackedGroup, plan: Plan) -> None:
        called.append(name)

    monkeypatch.setitem(PATHS, name, spy)
    packing, plan, x, y = step_of(CASES["odd sizes"])
    Favourite(name).path(y, x, packing.groups["group"], plan)
    assert called == [name]


def test_one_decision_serves_all_layers_of_one_shape() -> None:
    groups = [GroupSpec(f"g{i}", 8, (ModuleSpec(f"m{i}", 4 if i else 5),)) for i in range(3)]
    bank = Bank(groups)
    bank.add("a", bank.pages({f"m{i}": (torch.ones(2, 8), torch.ones(4 if i else 5, 2)) for i in range(3)}))
    packing = bank.pack(["a"])
    plan, asked = Plan([Run((("a", 1.0),), 1)], packing.keys), []
    dispatcher = Dispatcher({"cpu": DEFAULT_MODEL})
    original = dispatcher._choose
    dispatcher._choose = lambda x, group, plan: asked.append(group) or original(x, group, plan)  # type: ignore[method-assign, func-returns-value]
    for group in packing.groups.values():
        dispatcher.choose(torch.ones(1, 8), group, plan)
    assert len(asked) == 2


def test_a_device_without_a_model_runs_the_dense_path() -> None:
    packing, plan, x, _ = step_of(CASES["odd sizes"])
    assert Dispatcher({}).choose(x, packing.groups["group"], plan) == "dense"


def test_a_model_given_takes_the_shipped_ones_place() -> None:
    model = CostModel({"segmented float32": Coefficients(0.0, 0.0, 0.0), "dense float32": Coefficients(1.0, 1.0, 1.0)})
    path = mixture_path("auto", model=model)
    assert isinstance(path, Dispatcher)
    packing, plan, x, _ = step_of(CASES["odd sizes"])
    assert path.choose(x, packing.groups["group"], plan) == "segmented"
    assert mixture_path() is PATHS["auto"]


def test_routes_are_described_like_mixes() -> None:
    plan = Plan([Run(TokenRoute(("a", "b"), 1), 3), Run((("a", 1.0), ("b", 1.0)), 2)], ["a", "b"])
    assert plan.adapter_sets(frozenset({0, 1})) == {((0, 1), True): [0], ((0, 1), False): [1]}


@pytest.mark.parametrize(
    ("tokens", "adapters", "path"),
    [(1, 1, "triton"), (64, 1, "triton"), (64, 64, "triton"), (65, 16, "dense"), (1024, 17, "triton")],
)
def test_without_measurements_prompts_with_few_adapters_are_dense(tokens: int, adapters: int, path: str) -> None:
    assert without_measurements(tokens, adapters) == path
