"""What an adapter's modules may be called, and how large they may be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.adapters.format import CONFIG_NAME, GATES_NAME, WEIGHTS_NAME, parse_key, read_gates
from lorafleet.adapters.lora import LONGEST_PATH, content_digest
from lorafleet.adapters.streaming import LARGEST_MODULE, AdapterReader
from lorafleet.errors import AdapterFormatError, InvalidInputError

STRANGE = [
    "", "a b", "a\n", "\na", "a\nb", "p [1, 20]\nzzzzz", "a\r", "a\t", "a\0", "a/b", "a[0]", "é", "a\u0301", "\u0430",
    "a\u2028", "x" * (LONGEST_PATH + 1),
]  # fmt: skip


def write(folder: Path, shapes: dict[str, tuple[int, ...]], rank: int, dtype: str = "F8_E4M3", size: int = 1) -> None:
    """A folder whose weights are a hole of the right size, all zeros, which takes no room."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + size * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / WEIGHTS_NAME).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (folder / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))


def test_one_of_two_sets_of_modules_that_hash_to_the_same_is_no_adapter() -> None:
    # What is hashed of either: names, shapes and numbers, of which letters are some as well.
    hashed = b"p [1, 20]\nzzzzz [1, 20]\n" + b"z" * 66 + b"p [20, 1]\nzzzzp [1, 20]\nzzzzz [13, 1]\n" + b"z" * 52

    def factor(start: int, *shape: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(hashed), dtype=torch.float32, count=math.prod(shape), offset=start).view(
            shape
        )

    short = {"p": LoraPair(factor(10, 1, 20), factor(100, 20, 1))}
    long = {"p [1, 20]\nzzzzz": LoraPair(factor(24, 1, 20), factor(128, 13, 1))}
    assert len(hashed) == 180
    assert content_digest(short.items(), []) == content_digest(long.items(), [])
    assert LoraAdapter(short).rank == 1
    with pytest.raises(InvalidInputError, match="found the module path"):
        LoraAdapter(long)


@pytest.mark.parametrize("path", STRANGE, ids=ascii)
def test_a_strange_module_path_is_refused_wherever_it_comes_from(path: str, tmp_path: Path) -> None:
    pair = LoraPair(torch.ones(1, 3), torch.ones(2, 1))
    with pytest.raises(InvalidInputError, match="module path"):
        LoraAdapter({path: pair})
    for key in (f"base_model.model.{path}.lora_A.weight", f"{path}.lora_B.weight"):
        with pytest.raises(AdapterFormatError, match=r"module path|found tensor"):
            parse_key(key, tmp_path)
    LoraAdapter({"a": pair}).save(tmp_path)
    save_file({path: torch.ones(3)}, tmp_path / GATES_NAME)
    for read in (AdapterReader, lambda folder: read_gates(folder / GATES_NAME)):
        with pytest.raises(AdapterFormatError, match="module path"):
            read(tmp_path)


def test_a_tensors_name_ends_where_it_ends(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="found tensor"):
        parse_key("a.lora_A.weight\n", tmp_path)


@pytest.mark.parametrize("path", ["a", "model.layers.0.self_attn.q_proj", "A-b_c.9", "gate", "x" * LONGEST_PATH])
def test_usual_module_paths_are_taken(path: str, tmp_path: Path) -> None:
    adapter = LoraAdapter({path: LoraPair(torch.ones(1, 3), torch.ones(2, 1))}, gates={path: torch.ones(3)})
    adapter.save(tmp_path)
    assert LoraAdapter.load(tmp_path).digest == adapter.digest
    assert list(AdapterReader(tmp_path).shapes) == [path]


@pytest.mark.parametrize(
    ("a", "b"), [((2, 0), (3, 2)), ((2, 5), (0, 2)), ((0, 5), (3, 0)), ((2**40, 0), (0, 2**40))], ids=str
)
def test_factors_without_a_width_or_a_rank_are_refused(a: tuple[int, int], b: tuple[int, int], tmp_path: Path) -> None:
    write(tmp_path, {"m.lora_A": a, "m.lora_B": b}, rank=a[0])
    with pytest.raises(AdapterFormatError, match="none of them 0"):
        AdapterReader(tmp_path)
    if max(a) < 100:
        with pytest.raises(InvalidInputError, match="none of them 0"):
            LoraAdapter({"m": LoraPair(torch.zeros(a), torch.zeros(b))})


def test_a_module_of_the_largest_size_is_taken_and_one_beyond_is_refused(tmp_path: Path) -> None:
    rank = 64
    width = LARGEST_MODULE // 4 // rank // 2
    write(tmp_path, {"m.lora_A": (rank, width), "m.lora_B": (width, rank)}, rank)
    assert AdapterReader(tmp_path).shapes["m"].size_bytes == LARGEST_MODULE
    write(tmp_path, {"m.lora_A": (rank, width), "m.lora_B": (width + 1, rank)}, rank)
    with pytest.raises(AdapterFormatError, match=r"m has rank 64 on .* bytes in float32, expected at most 268435456"):
        AdapterReader(tmp_path)


def test_a_rank_that_only_the_files_size_bounds_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"m.lora_A": (2**27, 1), "m.lora_B": (1, 2**27)}, 2**27)
    with pytest.raises(AdapterFormatError, match="m has rank 134217728 on 1 → 1"):
        AdapterReader(tmp_path)


def test_the_largest_usual_module_is_taken(tmp_path: Path) -> None:
    write(tmp_path, {"m.lora_A": (256, 16_384), "m.lora_B": (65_536, 256)}, 256, "BF16", 2)
    assert AdapterReader(tmp_path).shapes["m"].size_bytes < LARGEST_MODULE / 3
