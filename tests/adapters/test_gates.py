"""Gate vectors of adapters: what they must be, how they are kept, and that other readers do not mind them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from lorafleet.adapters import LoraAdapter, LoraPair, weighted_sum
from lorafleet.adapters.format import GATES_NAME
from lorafleet.errors import AdapterFormatError, InvalidInputError

# Of the adapter below, as it was before adapters could have gates.
DIGEST_WITHOUT_GATES = "sha256:776988b1554347cb8bbe5cd185b5a9cae8932890770ca1a86677f9d5114efd9e"


def adapter(*, gated: bool = True) -> LoraAdapter:
    modules = {
        "layers.0.q": LoraPair(torch.arange(10.0).view(2, 5) / 8, torch.arange(6.0).view(3, 2) / 4),
        "layers.0.o": LoraPair(torch.ones(1, 3), torch.full((5, 1), 0.5)),
    }
    gates = {"layers.0.q": torch.arange(5.0) - 2, "layers.0.o": torch.tensor([0.1, 0.2, 0.3])}
    return LoraAdapter(modules, "some-base", gates=gates if gated else {})


def test_a_digest_without_gates_is_what_it_was() -> None:
    assert adapter(gated=False).digest == DIGEST_WITHOUT_GATES


def test_gates_are_part_of_the_digest() -> None:
    gated = adapter()
    other = replace(gated, gates={**gated.gates, "layers.0.o": torch.tensor([0.1, 0.2, 0.4])})
    assert len({adapter(gated=False).digest, gated.digest, other.digest}) == 3


def test_save_and_load_keep_gates_and_digest(tmp_path: Path) -> None:
    saved = adapter()
    saved.save(tmp_path)
    loaded = LoraAdapter.load(tmp_path)
    assert loaded.digest == saved.digest
    for path, gate in saved.gates.items():
        assert torch.equal(loaded.gates[path], gate)
        assert loaded.gates[path].dtype == torch.float32


def test_an_adapter_without_gates_leaves_no_others_behind(tmp_path: Path) -> None:
    adapter().save(tmp_path)
    adapter(gated=False).save(tmp_path)
    assert not (tmp_path / GATES_NAME).exists()
    assert not LoraAdapter.load(tmp_path).gates


def test_peft_reads_a_folder_with_gates(tmp_path: Path) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(5, 3, bias=False), nn.Linear(3, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.q(x))

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer()])

        def prepare_inputs_for_generation(self) -> None:
            """peft looks for it in causal language models."""

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    torch.manual_seed(0)
    base, x = Base(), torch.randn(4, 5)
    expected = adapter()
    expected.save(tmp_path)
    layer = base.layers[0]
    q = layer.q.weight + expected.delta("layers.0.q")
    o = layer.o.weight + expected.delta("layers.0.o")
    torch.testing.assert_close(PeftModel.from_pretrained(base, str(tmp_path)).base_model.model(x), x @ q.T @ o.T)


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        ({"layers.1.q": torch.ones(5)}, "which this adapter does not change"),
        ({"layers.0.q": torch.ones(4)}, r"found a gate vector \[4\], expected \[5\]"),
        ({"layers.0.q": torch.ones(1, 5)}, r"found a gate vector \[1, 5\], expected \[5\]"),
        ({"layers.0.q": torch.tensor([1.0, float("nan"), 0, 0, 0])}, "NaN or infinity"),
    ],
)
def test_gates_that_cannot_be_used_are_refused(gates: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=words):
        replace(adapter(), gates=gates)
    adapter(gated=False).save(tmp_path)
    save_file(gates, tmp_path / GATES_NAME)
    with pytest.raises(AdapterFormatError, match=words):
        LoraAdapter.load(tmp_path)


def test_a_damaged_gates_file_is_refused(tmp_path: Path) -> None:
    adapter().save(tmp_path)
    (tmp_path / GATES_NAME).write_bytes((tmp_path / GATES_NAME).read_bytes()[:-7])
    with pytest.raises(AdapterFormatError, match="damaged or truncated"):
        LoraAdapter.load(tmp_path)


def test_gates_of_another_dtype_on_disk_are_refused(tmp_path: Path) -> None:
    adapter(gated=False).save(tmp_path)
    save_file({"layers.0.q": torch.ones(5, dtype=torch.float16)}, tmp_path / GATES_NAME)
    with pytest.raises(AdapterFormatError, match=r"torch\.float16, expected torch\.float32"):
        LoraAdapter.load(tmp_path)


def test_compression_and_other_dtypes_keep_the_gates() -> None:
    small, _ = adapter().compressed(rank=1)
    assert set(small.gates) == set(adapter().gates)
    assert adapter().to(torch.bfloat16).gates["layers.0.q"].dtype == torch.float32


def test_a_weighted_sum_has_no_gates() -> None:
    assert not weighted_sum([adapter(), adapter()], [0.5, 0.5]).gates
