"""Small random bases with a byte-level tokenizer, and the plainest references for what they generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lorafleet.engine import SamplingParams

EOS = 256
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SMALL: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    # Wide enough for the random model's choices to be far apart against rounding.
    "initializer_range": 0.2,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": None,
}

PROMPTS: list[list[int]] = [[1, 2, 3], [7, 3] * 35, [9, 8, 7, 6, 5], [100], list(range(40, 90))]


def to_length(tokens: int, **other: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, **other)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (0…255 in the order of the byte alphabet) and the end of text (256)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def save_base(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    byte_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """``[n, vocabulary]`` by plain recomputation, without any cache."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    done = list(prompt)
    for _ in range(tokens):
        done.append(int(logits_of(model, done)[-1].argmax()))
    return done[len(prompt) :]
