"""Every way in which an update can be bad, each with its reason code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.adapters.wire import TrainOrder, UpdateHeader, to_arrays
from lorafleet.coordinator.validation import CheckedUpdate, UpdatePolicy, check_update
from lorafleet.errors import RejectedUpdateError

SHAPES = {"model.q": (24, 32), "model.down": (32, 80)}
ORDER = TrainOrder(
    federation="fleet", round=3, attempt=1, member="acme", base_digest="sha256:b", expert_digest="", rank=8, steps=10,
    batch_size=2, sequence_length=16, learning_rate=1e-3, seed=1, init_seed=2, deadline_s=10.0,
)  # fmt: skip


def adapter(rank: int = 4, scale: float = 1.0) -> LoraAdapter:
    generator = torch.Generator().manual_seed(0)
    return LoraAdapter(
        {
            path: LoraPair(
                scale * torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
            )
            for path, (d_out, d_in) in SHAPES.items()
        }
    )


def header_for(update: LoraAdapter, **changes: Any) -> dict[str, Any]:
    header = UpdateHeader(
        federation="fleet", round=3, attempt=1, member="acme", base_digest="sha256:b", expert_digest="",
        digest=update.digest, rank=update.rank, num_examples=12,
    )  # fmt: skip
    return {**header.to_config(), **changes}


def check(
    update: LoraAdapter | None = None,
    *,
    header: dict[str, Any] | None = None,
    arrays: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    order: TrainOrder = ORDER,
    policy: UpdatePolicy | None = None,
) -> CheckedUpdate:
    update = update or adapter()
    return check_update(
        order,
        header if header is not None else header_for(update),
        arrays if arrays is not None else to_arrays(update),
        metrics if metrics is not None else {"train_loss": 2.5},
        shapes=SHAPES,
        policy=policy or UpdatePolicy(),
    )


def test_a_good_update_passes_with_factors_metrics_and_size() -> None:
    update = adapter()
    checked = check(update)
    assert checked.residual is not None
    assert checked.residual.digest == update.digest
    assert checked.metrics == {"train_loss": 2.5}
    assert checked.size_bytes == 4 * update.parameters


def test_an_update_of_some_modules_only_passes() -> None:
    partial = LoraAdapter({"model.q": adapter().modules["model.q"]})
    residual = check(partial).residual
    assert residual is not None and set(residual.modules) == {"model.q"}


def test_an_evaluation_needs_no_factors() -> None:
    assert check(arrays={}, order=replace(ORDER, steps=0)).residual is None


@pytest.mark.parametrize(
    "change",
    [{"schema": 99}, {"round": "3"}, {"num_examples": 1.5}, {"num_examples": True}, {"surprise": 1}, {"member": None}],
    ids=str,
)
def test_malformed_headers_are_rejected(change: dict[str, Any]) -> None:
    with pytest.raises(RejectedUpdateError) as caught:
        check(header=header_for(adapter(), **change))
    assert caught.value.reason == "header"


def test_a_missing_header_is_rejected() -> None:
    with pytest.raises(RejectedUpdateError) as caught:
        check(header={})
    assert caught.value.reason == "header"


@pytest.mark.parametrize(
    "change",
    [
        {"federation": "other"}, {"round": 2}, {"attempt": 2}, {"member": "globex"},
        {"base_digest": "sha256:c"}, {"expert_digest": "sha256:e"},
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_to_another_order_is_rejected(change: dict[str, Any]) -> None:
    with pytest.raises(RejectedUpdateError) as caught:
        check(header=header_for(adapter(), **change))
    assert caught.value.reason == "order"


def pair(path: str, a: tuple[int, int], b: tuple[int, int]) -> dict[str, Any]:
    return {f"{path}.lora_A": np.ones(a, np.float32), f"{path}.lora_B": np.ones(b, np.float32)}


def spoiled(**changes: Any) -> dict[str, Any]:
    return {**to_arrays(adapter()), **changes}


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({}, "factors"),
        (spoiled(**{"model.q.lora_C": np.ones((2, 2), np.float32)}), "factors"),
        (spoiled(**{"model.q.lora_A": np.full((4, 32), np.nan, np.float32)}), "factors"),
        (spoiled(**{"model.q.lora_A": np.full((4, 32), np.inf, np.float32)}), "factors"),
        (spoiled(**{"model.q.lora_A": np.ones((4, 32), np.float64)}), "factors"),
        (spoiled(**{"model.q.lora_A": np.array(["x"])}), "factors"),
        (spoiled(**{"model.q.lora_A": np.ones((5, 32), np.float32)}), "factors"),
        (spoiled(**{"model.q.lora_A": np.ones((4, 32, 1), np.float32)}), "factors"),
        (spoiled(**pair("model.q", (0, 32), (24, 0))), "factors"),
        ({"model.q.lora_A": np.ones((4, 32), np.float32)}, "factors"),
        (spoiled(**pair("model.x", (4, 32), (24, 4))), "modules"),
        # (1, r) would broadcast silently into a sum.
        (spoiled(**{"model.q.lora_A": np.ones((4, 1), np.float32)}), "modules"),
        (spoiled(**{"model.q.lora_B": np.ones((25, 4), np.float32)}), "modules"),
    ],
)  # fmt: skip
def test_bad_factors_are_rejected(arrays: dict[str, Any], reason: str) -> None:
    with pytest.raises(RejectedUpdateError) as caught:
        check(arrays=arrays)
    assert caught.value.reason == reason


def test_a_rank_above_the_ordered_one_is_rejected() -> None:
    with pytest.raises(RejectedUpdateError) as caught:
        check(adapter(rank=9))
    assert caught.value.reason == "rank"


def test_a_module_too_large_to_be_stored_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.adapters.streaming.LARGEST_MODULE", 8)
    with pytest.raises(RejectedUpdateError, match="expected at most 8") as caught:
        check()
    assert caught.value.reason == "rank"


def test_factors_other_than_announced_are_rejected() -> None:
    with pytest.raises(RejectedUpdateError) as caught:
        check(adapter(scale=2.0), header=header_for(adapter()))
    assert caught.value.reason == "digest"


@pytest.mark.parametrize("examples", [-1, 0, 10**18])
def test_absurd_sample_counts_are_rejected(examples: int) -> None:
    with pytest.raises(RejectedUpdateError) as caught:
        check(header=header_for(adapter(), num_examples=examples))
    assert caught.value.reason == "count"


def test_a_member_cannot_have_seen_more_sequences_than_it_was_asked_to() -> None:
    most = ORDER.steps * ORDER.batch_size
    check(header=header_for(adapter(), num_examples=most))
    with pytest.raises(RejectedUpdateError, match=f"see {most} at most") as caught:
        check(header=header_for(adapter(), num_examples=most + 1))
    assert caught.value.reason == "count"


def test_an_absurdly_large_update_is_rejected() -> None:
    with pytest.raises(RejectedUpdateError) as caught:
        check(adapter(scale=1e30))
    assert caught.value.reason == "norm"


@pytest.mark.parametrize("seed", range(60))
def test_a_large_update_cannot_hide_in_columns_that_nearly_cancel(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, (d_out, d_in) in SHAPES.items():
        row, column = torch.randn(1, d_in, generator=generator), torch.randn(d_out, 1, generator=generator)
        a = torch.cat([row, row + 1e-4 * torch.randn(1, d_in, generator=generator)])
        modules[path] = LoraPair(1e6 * a, 1e6 * torch.cat([column, -column], dim=1))
    update = LoraAdapter(modules)
    assert max(float(torch.linalg.matrix_norm(p.b.double() @ p.a.double())) for p in modules.values()) > 1e8
    with pytest.raises(RejectedUpdateError, match="the update's norm is"):
        check(update)


def test_factors_that_cancel_to_nearly_nothing_are_rejected() -> None:
    pair = LoraPair(1e6 * torch.ones(2, 32), 1e6 * torch.ones(24, 2) * torch.tensor([1.0, -1.0]))
    with pytest.raises(RejectedUpdateError, match=r"‖A‖ ‖B‖ is 5.54e\+13"):
        check(LoraAdapter({"model.q": pair}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "low", None, True], ids=str)
def test_metrics_that_are_no_numbers_are_rejected(value: object) -> None:
    with pytest.raises(RejectedUpdateError) as caught:
        check(metrics={"train_loss": value})
    assert caught.value.reason == "metrics"


@pytest.mark.parametrize("name", ["loss\n99", "\x1b[2J", "x" * 10_000])
def test_metrics_whose_names_are_no_names_are_rejected(name: str) -> None:
    with pytest.raises(RejectedUpdateError) as caught:
        check(metrics={name: 1.0})
    assert caught.value.reason == "metrics"
