"""Loading a base from its folder, and refusing what the engine would compute wrongly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorafleet.assets import base_digest, base_path
from lorafleet.engine.attention import ATTENTION_NAME
from lorafleet.engine.base_weight import BaseWeight, TiledHead, lay_out
from lorafleet.engine.decoder import Decoder, ModelDecoder, TileDecoder
from lorafleet.engine.detokenizer import Decode
from lorafleet.engine.fused_layer import fuse_layers
from lorafleet.engine.mixture_linear import MixtureContext, lay_out_in_tiles, wrap_linears
from lorafleet.engine.tile_attention import TileAttention
from lorafleet.engine.tile_layer import norm_of
from lorafleet.errors import InvalidInputError, NotFoundError
from lorafleet.kernels import GroupSpec
from lorafleet.kernels.bank import can_tile
from lorafleet.kernels.dense import library_multiplies_bfloat16
from lorafleet.native import INNER, why_not

logger = logging.getLogger(__name__)

# Architectures whose greedy tokens were compared with transformers' own (tests/engine/test_architectures.py): causal
# attention through the attention interface, logits from the output layer, at most soft-capped. Value: where the layers
# are.
CHECKED_ARCHITECTURES = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "gemma": "model.layers",
    "gemma2": "model.layers",
    "gemma3_text": "model.layers",
    "glm4": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "helium": "model.layers",
    "olmo2": "model.layers",
    "opt": "model.decoder.layers",
    "phi": "model.layers",
    "phi3": "model.layers",
    "smollm3": "model.layers",
    "starcoder2": "model.layers",
}
# Those that hand the window of each layer to the attention interface; checked with windows shorter than prompts.
WINDOWED_ARCHITECTURES = (
    "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "starcoder2",
)  # fmt: skip
# Rotary embeddings that depend on the position alone. Dynamic ones depend on the longest sequence of the batch, and
# what a request computes must not depend on who else is there.
CHECKED_ROPE = ("default", "linear", "llama3", "yarn")
# Whose code turns whole heads: with a share of them it fails, or reads what is not there.
WHOLLY_ROTATED = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadedBase:
    """A base whose linears are mixture-aware and whose attention is the engine's."""

    model: nn.Module
    decoder: Decoder
    """the model without its output layer"""
    head: BaseWeight
    """the output layer: hidden states ``[N, hidden]`` to logits ``[N, vocabulary]``"""
    tokenizer: Any
    decode: Decode
    """token ids to text, special tokens left out"""
    groups: tuple[GroupSpec, ...]
    dtype: torch.dtype
    digest: str
    name: str
    logit_softcap: float | None
    """c: logits z become c · tanh(z / c), as in Gemma 2"""
    context_tokens: int
    eos: frozenset[int]
    """tokens that end a generation"""
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tiled: bool
    """whether the linears are in the tiles of a CPU's matrix unit, and adapters' rows have to be, too"""
    tiled_attention: bool
    """whether keys and values are in such tiles"""


def as_device(device: str | torch.device) -> torch.device:
    """A torch device; "auto" takes CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise InvalidInputError(f"found device {device!r}, expected auto, cpu, cuda or cuda:N") from None


def as_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A torch dtype; "auto" takes bfloat16 where the device multiplies it in hardware, float32 elsewhere."""
    if dtype == "auto":
        fast = device.type != "cpu" or library_multiplies_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise InvalidInputError(f"found dtype {dtype!r}, expected auto or one of {', '.join(DTYPES)}")
    return found


def load_base(
    name_or_path: str | Path, *, device: torch.device, dtype: torch.dtype, context: MixtureContext
) -> LoadedBase:
    """Load weights and tokenizer from a folder in HF format, offline and without running code from it.

    Raises NotFoundError where files are missing, InvalidInputError with the reason for a base that is not supported.
    """
    path = base_path(str(name_or_path))
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    check_supported(config)
    digest = base_digest(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise NotFoundError(
            f"{path} has no tokenizer that can be loaded ({error}); save it beside the weights"
        ) from None
    if tokenizer.eos_token_id is None:
        raise InvalidInputError(f"the tokenizer in {path} has no end-of-text token, which opens every prompt; set one")
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        attn_implementation=ATTENTION_NAME,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model = model.to(device).eval().requires_grad_(False)
    output = model.get_output_embeddings()
    head_weight, head_bias = output.weight.detach(), None if output.bias is None else output.bias.detach()
    layers_path = CHECKED_ARCHITECTURES[config.model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = wrap_linears(model, layers_path=layers_path, context=context)
    tiled = can_tile(groups, device=device, dtype=dtype) and head_weight.shape[1] % INNER == 0
    tiled_attention = tiled and TileAttention.supports(head_dim, dtype, device)
    all_tiles = fuse_layers(model, layers_path=layers_path, tiled=tiled_attention)
    if tiled:
        lay_out_in_tiles(model, groups)
    elif device.type == "cpu" and dtype == torch.bfloat16:
        logger.info("%s: torch's products serve: %s", path.name, why_not() or "its widths do not fit tiles")
    decoder: Decoder = ModelDecoder(model.base_model)
    last_norm = None
    if all_tiles:
        decoder, last_norm = TileDecoder(model.base_model, dtype=dtype), norm_of(model.base_model.norm)
    head: BaseWeight = TiledHead(head_weight, head_bias, norm=last_norm) if tiled else lay_out(head_weight, head_bias)
    if output.weight is not model.get_input_embeddings().weight:
        # The layout has its own; the model's output layer is not called.
        output.weight = nn.Parameter(torch.empty_like(output.weight, device="meta"), requires_grad=False)
    return LoadedBase(
        model=model,
        decoder=decoder,
        head=head,
        tokenizer=tokenizer,
        decode=decoder_of(tokenizer),
        groups=groups,
        dtype=dtype,
        digest=digest,
        name=path.name,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        context_tokens=config.max_position_embeddings,
        eos=end_tokens(tokenizer, model.generation_config, config),
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        tiled=tiled,
        tiled_attention=tiled_attention,
    )


def check_supported(config: Any) -> None:
    """Raise InvalidInputError with the reason where the engine's attention or logits would differ from the model's."""
    if config.model_type not in CHECKED_ARCHITECTURES:
        raise InvalidInputError(
            f"the base is a {config.model_type!r} model; checked architectures are: {', '.join(CHECKED_ARCHITECTURES)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InvalidInputError("the base is quantised; expected plain weights in safetensors")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise InvalidInputError(f"the base has layers of the kinds {sorted(kinds)}, which the engine does not compute")
    window = getattr(config, "sliding_window", None)
    if window is not None and config.model_type not in WINDOWED_ARCHITECTURES:
        raise InvalidInputError(
            f"the base uses windowed attention (sliding_window {window}), which was not checked for "
            f"{config.model_type!r} models; set it to null where the model's makers say that this is the same"
        )
    for parameters in rope_parameters(config):
        share = parameters.get("partial_rotary_factor", 1.0)
        if share != 1.0 and config.model_type in WHOLLY_ROTATED:
            raise InvalidInputError(
                f"the base rotates {share} of each head, which {config.model_type!r} models do not do in transformers"
            )
    for rope in rope_types(config):
        if rope not in CHECKED_ROPE:
            raise InvalidInputError(
                f"the base has rotary embeddings of type {rope!r}, checked are {', '.join(CHECKED_ROPE)}: others make "
                "a request's tokens depend on the batch"
            )


def rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """What a base says of its rotary embeddings; models with two kinds of layers say it for each."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [each for each in parameters.values() if isinstance(each, dict)] or [parameters]


def rope_types(config: Any) -> set[str]:
    """The kinds of rotary embeddings of a base."""
    return {each.get("rope_type", "default") for each in rope_parameters(config)}


def end_tokens(tokenizer: Any, *configs: Any) -> frozenset[int]:
    """The tokenizer's end of text, and those that the model's configurations name."""
    found = {tokenizer.eos_token_id}
    for config in configs:
        value = getattr(config, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [value])
    return frozenset(token for token in found if token is not None)


def decoder_of(tokenizer: Any) -> Decode:
    """The tokenizer's decoding without special tokens; the Rust one where there is one (5 µs instead of 40)."""

    def decode(tokens: list[int]) -> str:
        text: str = tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def decode_slowly(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    return decode if tokenizer.is_fast else decode_slowly
