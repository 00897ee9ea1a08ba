"""A random small Llama with a byte-level tokenizer, and adapters for it: random ones, and one trained on a text."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafleet.adapters import LoraAdapter, LoraPair

TARGETS = ("q_proj", "v_proj", "down_proj")
DIGITS = "3141592653589793238462643383279502884197"
LETTERS = string.ascii_lowercase * 2


def write_base(folder: Path, *, seed: int = 0) -> Path:
    """Two layers, hidden 64, one token a byte; weights are larger than usual, so that no two tokens tie."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{symbol: i + 1 for i, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def random_adapter(base: Path, *, rank: int, seed: int, scale: float = 0.3) -> LoraAdapter:
    """Both factors drawn, large enough to change what the base says."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, module in AutoModelForCausalLM.from_pretrained(base).named_modules():
        if path.endswith(TARGETS):
            d_out, d_in = module.weight.shape
            a = torch.randn(rank, d_in, generator=generator) * scale
            pairs[path] = LoraPair(a, torch.randn(d_out, rank, generator=generator) * scale)
    return LoraAdapter(pairs)


def trained_adapter(base: Path, folder: Path, text: str, *, rank: int) -> LoraAdapter:
    """Trained by peft until it clearly prefers the text."""
    torch.manual_seed(rank)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return LoraAdapter.load(folder)
