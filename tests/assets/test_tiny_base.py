"""The shipped base is what its card says."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sysconfig
from pathlib import Path

import pytest
import torch

from lorafleet.assets import base_digest, base_path, describe_base
from lorafleet.errors import NotFoundError

FOLDER = base_path("tiny")


def test_it_is_a_small_llama_that_fits_into_the_package() -> None:
    found = describe_base("tiny")
    assert found.architecture == "LlamaForCausalLM"
    assert 3_000_000 <= found.parameters <= 5_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12_000_000


def test_its_card_says_what_the_training_wrote_down() -> None:
    written = json.loads((FOLDER / "training.json").read_text())
    card = (FOLDER / "README.md").read_text()
    assert written["held_out_bits_per_byte"] <= 1.4 < written["gzip_bits_per_byte"]
    assert f"**{written['held_out_bits_per_byte']:.3f} bits per byte**" in card
    assert f"{written['recipe']['steps']} of {written['recipe']['batch_sequences']}" in card


def test_it_predicts_a_held_out_file_at_less_than_1_4_bits_a_byte() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pinned = json.loads((FOLDER / "corpus.json").read_text())
    digest = pinned["files"]["cmd.py"]
    assert int(digest[:8], 16) % pinned["held_out_one_in"] == 0
    text = (Path(sysconfig.get_paths()["stdlib"]) / "cmd.py").read_text()
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        pytest.skip(f"this interpreter's cmd.py is not that of CPython {pinned['python']}")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text).input_ids])
    nats = 0.0
    for start in range(0, len(ids) - 1, 512):
        window = ids[start : start + 513]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert nats / math.log(2) / len(text.encode()) < 1.4


def test_no_pinned_file_belongs_to_one_build_of_the_interpreter() -> None:
    names = json.loads((FOLDER / "corpus.json").read_text())["files"]
    assert not [name for name in names if re.search(r"_sysconfigdata|(^|/)config-", name)]


def test_the_digest_changes_with_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = base_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert before != base_digest(tmp_path)


def test_a_folder_that_is_no_base_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="expected a folder in HF format"):
        base_path(tmp_path / "nowhere")
