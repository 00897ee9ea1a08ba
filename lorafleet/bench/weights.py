"""Random bases and adapters, the same for the same shape, as files that we and every peer read."""

from __future__ import annotations

import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.bench.cache import adapter_folder, base_folder, folder_of
from lorafleet.bench.jobs import Device
from lorafleet.bench.prompts import FIRST_PLAIN_TOKEN
from lorafleet.bench.requests import ASKS, EIGHT, rank_of
from lorafleet.bench.shapes import SHARED_INPUT, Shape, projections

B_STD = 0.02


def prepare(work: Path, shape: Shape, *, device: Device = "cpu") -> None:
    """Make what is not there yet; a folder that was left half done is made again.

    ``device`` draws the base's numbers: 8 billion take minutes on a CPU. Another device draws others.
    """
    if folder_of(work, shape).exists():
        return
    part = work / "part"
    shutil.rmtree(part, ignore_errors=True)
    make_base(shape, base_folder(part, shape), device=device)
    used = {name for ask in ASKS["many_cold"](shape.load) for name in ask.uses}
    for name in [*EIGHT, *sorted(used)]:
        make_adapter(shape, name).save(adapter_folder(part, shape, name))
    folder_of(part, shape).rename(folder_of(work, shape))
    part.rmdir()


def make_base(shape: Shape, folder: Path, *, device: Device = "cpu") -> None:
    """A Llama in bfloat16 without an end-of-text token in its configuration, so that no peer ends a request early."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(2048, shape.load.prompt_tokens + shape.load.new_tokens),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    cuda = range(torch.cuda.device_count() if device == "cuda" else 0)
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> Any:
    """One token a byte: prompts are token ids, but the engine and vLLM want a tokenizer beside the weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|pad|>": 0, "<|end|>": 1, **{c: number for number, c in enumerate(letters, FIRST_PLAIN_TOKEN)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def make_adapter(shape: Shape, name: str) -> LoraAdapter:
    """All projections of all layers; A normal over the square root of its inputs, B normal with ``B_STD``.

    Those of the eight have gate vectors too, normal over the square root of their length.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    rank = rank_of(name)
    modules = {
        f"model.layers.{layer}.{path}": LoraPair(
            torch.randn(rank, d_in, generator=generator) / math.sqrt(d_in),
            torch.randn(d_out, rank, generator=generator) * B_STD,
        )
        for layer in range(shape.layers)
        for path, d_out, d_in in projections(shape)
    }
    firsts = [f"model.layers.{layer}.{group[0]}" for layer in range(shape.layers) for group in SHARED_INPUT]
    inputs = {path: modules[path].a.shape[1] for path in firsts if name in EIGHT}
    gates = {path: torch.randn(d_in, generator=generator) / math.sqrt(d_in) for path, d_in in inputs.items()}
    return LoraAdapter(modules, gates=gates)
