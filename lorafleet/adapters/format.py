"""PEFT's folder format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Reading folds the scaling (alpha/r, rsLoRA's alpha/√r, ``rank_pattern``, ``alpha_pattern``) into B. Writing gives every
module ``alpha = r``, so that its scaling is 1 and a reader that ignores the patterns (vLLM does) is still right about
it. What this format can say and lorafleet does not compute is refused by name, never dropped: every field of
PEFT's ``LoraConfig`` is read, without effect, or refused (docs/serving.md has the table), and so is a field that is
in none of these lists.

Gate vectors for token-level routing, which the format has no place for, lie beside its files in ``gates.safetensors``:
module path → ``[d_in]`` float32. Other readers (peft, vLLM) do not look for that file.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorafleet.adapters.expressions import Work
from lorafleet.adapters.factor_space import LoraPair
from lorafleet.adapters.lora import LoraAdapter, check_path
from lorafleet.adapters.patterns import ModulePatterns
from lorafleet.errors import AdapterFormatError, InvalidInputError, NotFoundError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
GATES_NAME = "gates.safetensors"
CARD_NAME = "README.md"
LARGEST_CONFIG = 2**20
"""Bytes of a configuration; PEFT writes a few thousand, with a pattern for every module some hundred thousand."""
LARGEST_WORK = 5_000_000
"""Steps, about 1 s, in which the configuration's patterns are matched with all modules: 1 to 3 a module where keys are
names, 15 to 20 a module and key where they are expressions."""
PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<factor>[AB])\.weight", re.DOTALL)

READ = frozenset({
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias",
    "init_lora_weights",
})  # fmt: skip
# How the factors were found, and which modules have some: the tensors say that. `unsloth_fixed` is Unsloth's mark.
WITHOUT_EFFECT = frozenset({
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type", "unsloth_fixed",
})  # fmt: skip
REFUSED = {
    "use_dora": "DoRA's magnitudes are not a sum of products",
    "modules_to_save": "whole trained modules are not low-rank",
    "lora_bias": "a bias on B is not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "target_parameters": "adapted bare parameters are not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "layer_replication": "a base with replicated layers is another base",
    "use_qalora": "QA-LoRA's inputs are pooled",
    "use_bdlora": "block-diagonal factors are not supported",
    "kasa_config": "KaSA changes the base's own weights",
    "monteclora_config": "factors that are sampled are not supported",
    "velora_config": "VeLoRA's projections are not read",
    "arrow_config": "Arrow's routing is not supported; route tokens by gate vectors",
}
# The others (pissa, olora, corda, lora_ga, loftq) take something off the base's own weights when PEFT loads them.
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def load_adapter(directory: Path) -> LoraAdapter:
    """Read and verify one adapter; raises NotFoundError or AdapterFormatError with what to do."""
    modules, base = load_modules(directory, None)
    gates_path = directory / GATES_NAME
    gates = read_gates(gates_path) if gates_path.exists() else {}
    try:
        return LoraAdapter(modules, base, gates=gates)
    except InvalidInputError as error:
        raise AdapterFormatError(f"{gates_path}: {error}") from None


def load_modules(directory: Path, paths: Collection[str] | None) -> tuple[dict[str, LoraPair], str]:
    """Those of the modules ``paths`` that an adapter has (None for all), and its base; nothing else is read.

    Raises as :func:`load_adapter` does.
    """
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    refuse_other_weights(directory)
    for path in (config_path, weights_path):
        if not path.is_file():
            raise NotFoundError(f"{path} is missing: {directory} is no adapter folder in PEFT format")
    config = read_config(config_path)
    refuse_unsupported(config, config_path)
    factors = read_factors(weights_path, paths)
    modules = fold(factors, config, config_path) if factors else {}
    return modules, str(config.get("base_model_name_or_path") or "")


def refuse_other_weights(directory: Path) -> None:
    """Raise AdapterFormatError for weights that are there in a form that is not read."""
    if (directory / WEIGHTS_NAME).is_file():
        return
    for pattern, reason in (
        ("adapter_model.bin", "a pickle, which may run code when it is read"),
        ("adapter_model*-of-*.safetensors", "one of several parts"),
    ):
        for path in sorted(directory.glob(pattern)):
            raise AdapterFormatError(f"found {path}: {reason}; save the adapter as one {WEIGHTS_NAME}")


def read_config(path: Path) -> dict[str, Any]:
    """The configuration as it is written; raises AdapterFormatError where it is no JSON object."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_CONFIG + 1)
        if len(text) > LARGEST_CONFIG:
            raise ValueError(f"it is larger than {LARGEST_CONFIG} bytes")
        config = json.loads(text.decode())
    except (OSError, ValueError, RecursionError) as error:  # also bytes that are no text, and endless digits
        raise AdapterFormatError(f"{path} is not JSON ({error}); export the adapter again") from None
    if not isinstance(config, dict):
        raise AdapterFormatError(f"{path} holds a {type(config).__name__}, expected an object; export it again")
    return config


def refuse_unsupported(config: dict[str, Any], where: Path) -> None:
    """Raise AdapterFormatError with the reason for what would be computed wrongly."""
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(f"{where}: found peft_type {config.get('peft_type')!r}, expected 'LORA'")
    for key, reason in REFUSED.items():
        if config.get(key):
            raise AdapterFormatError(f"{where}: {key} is set: {reason}; train or export the adapter without it")
    if config.get("bias", "none") != "none":
        raise AdapterFormatError(
            f"{where}: bias is {config['bias']!r}, expected 'none'; trained biases are not supported"
        )
    if config.get("init_lora_weights") not in _KEEPS_BASE:
        raise AdapterFormatError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base's own weights; "
            "save the adapter with PEFT's path_initial_model_for_weight_conversion, as an update of the base as it was"
        )
    known = READ | WITHOUT_EFFECT | set(REFUSED)
    if unknown := sorted(key for key, value in config.items() if value and key not in known):
        raise AdapterFormatError(
            f"{where}: found {', '.join(unknown)}, which lorafleet does not know; delete it there if it changes "
            "nothing in what the adapter computes"
        )


def read_factors(path: Path, only: Collection[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """Module path → {"A": …, "B": …}, float32, in memory of their own: a file that is overwritten changes nothing.

    ``only`` names the modules that are read, where not all are.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                module, factor = parse_key(key, path)
                if only is not None and module not in only:
                    continue
                if factor in factors.setdefault(module, {}):
                    raise AdapterFormatError(f"{path}: found factor {factor} of {module} twice")
                factors[module][factor] = read_tensor(file, key, path)
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{path} is damaged or truncated ({error}); copy or export it again") from None
    for module, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise AdapterFormatError(f"{path}: {module} has only factor {', '.join(pair)}, expected A and B")
    if not factors and only is None:
        raise AdapterFormatError(f"{path} holds no tensors, expected at least one pair")
    return factors


def parse_key(key: str, where: Path) -> tuple[str, str]:
    """The module path of a tensor's name, and which factor of it the tensor is."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise AdapterFormatError(
            f"{where}: found tensor {key!r}, expected only *.lora_A.weight and *.lora_B.weight of linear layers; "
            "embeddings, biases and whole layers are not supported: train or export without them"
        )
    path = match["path"].removeprefix(PREFIX)
    try:
        check_path(path)
    except InvalidInputError as error:
        raise AdapterFormatError(f"{where}: {error}") from None
    return path, match["factor"]


def read_tensor(file: Any, key: str, where: Path) -> Tensor:
    """A tensor of an open file in float32, in memory of its own."""
    try:
        tensor: Tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            raise AdapterFormatError(f"{where}: {key} is {tensor.dtype}, expected floating-point numbers")
        return tensor.to(torch.float32, copy=True)
    except (RuntimeError, AttributeError, TypeError) as error:  # a type that this torch does not have, or not convert
        raise AdapterFormatError(f"{where}: {key} cannot be read as floating-point numbers ({error})") from None


def read_gates(path: Path) -> dict[str, Tensor]:
    """Module path → gate vector, float32, as stored."""
    try:
        with safe_open(path, framework="pt") as file:
            gates = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{path} is damaged or truncated ({error}); copy or export it again") from None
    if not gates:
        raise AdapterFormatError(f"{path} holds no tensors, expected at least one gate vector; delete it")
    for module, gate in gates.items():
        try:
            check_path(module)
        except InvalidInputError as error:
            raise AdapterFormatError(f"{path}: {error}") from None
        if gate.dtype != torch.float32:
            raise AdapterFormatError(f"{path}: {module} is {gate.dtype}, expected torch.float32; export it again")
    return gates


def fold(factors: dict[str, dict[str, Tensor]], config: dict[str, Any], where: Path) -> dict[str, LoraPair]:
    """Multiply each B by its module's scaling; the configuration's alpha, and the tensor's rank, which it agrees to."""
    pairs = {path: LoraPair(pair["A"], pair["B"]) for path, pair in factors.items()}
    ranks = {path: check_shapes(path, pair.a.shape, pair.b.shape, where) for path, pair in pairs.items()}
    scalings = read_scalings(ranks, config, where)
    try:
        return dict(LoraAdapter({path: scaled(pair, scalings[path]) for path, pair in pairs.items()}).modules)
    except InvalidInputError as error:
        raise AdapterFormatError(f"{where}: {error}") from None


def check_shapes(path: str, a: Sequence[int], b: Sequence[int], where: Path) -> int:
    """The rank of a module whose factors have these shapes; AdapterFormatError where they do not belong together."""
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
        raise AdapterFormatError(
            f"{where}: {path} has A {list(a)} and B {list(b)}, expected [r, d_in] and [d_out, r], none of them 0; "
            "export it again"
        )
    return a[0]


def read_scalings(ranks: Mapping[str, int], config: dict[str, Any], where: Path) -> dict[str, float]:
    """Module path → what its ``B A`` is multiplied by.

    Raises AdapterFormatError where the configuration says other ranks, what is no number, or patterns that take too
    long.
    """
    rank_pattern, alpha_pattern = (_read_patterns(config, name, where) for name in ("rank_pattern", "alpha_pattern"))
    work = Work(LARGEST_WORK)
    scalings: dict[str, float] = {}
    for path, rank in ranks.items():
        try:
            stated = rank_pattern.find(path, config.get("r", rank), work)
            alpha = alpha_pattern.find(path, config.get("lora_alpha", 8), work)
        except InvalidInputError as error:
            raise AdapterFormatError(f"{where}: rank_pattern, alpha_pattern: {error}") from None
        for name, value in (("rank_pattern", stated), ("alpha_pattern", alpha)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                raise AdapterFormatError(
                    f"{where}: found {value!r} by r, lora_alpha or {name} for {path}, expected a number"
                )
        if stated != rank:
            raise AdapterFormatError(
                f"{where}: {path} has rank {rank}, r or rank_pattern says {float(stated):g}; export it again"
            )
        scalings[path] = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scalings


def _read_patterns(config: dict[str, Any], name: str, where: Path) -> ModulePatterns:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise AdapterFormatError(
            f"{where}: {name} is a {type(patterns).__name__}, expected regular expressions with a number each"
        )
    try:
        return ModulePatterns(patterns)
    except InvalidInputError as error:
        raise AdapterFormatError(f"{where}: {name}: {error}") from None


def scaled(pair: LoraPair, scaling: float) -> LoraPair:
    """The pair of ``scaling · B A``; where nothing is scaled with the stored bits, so that a digest survives."""
    return pair if scaling == 1.0 else LoraPair(pair.a, pair.b * scaling)


def save_adapter(adapter: LoraAdapter, directory: Path) -> None:
    """Write the files; tensors land under a temporary name first, so that no reader sees half of them."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in adapter.modules.items():
        tensors[key_of(path, "A")] = a.detach().to("cpu", torch.float32).contiguous()
        tensors[key_of(path, "B")] = b.detach().to("cpu", torch.float32).contiguous()
    gates = {path: gate.detach().cpu().contiguous() for path, gate in adapter.gates.items()}
    # An earlier adapter's gates go first: between the two, a reader finds one without gates, never a strange pair.
    (directory / GATES_NAME).unlink(missing_ok=True)
    _write(tensors, directory / WEIGHTS_NAME)
    if gates:
        _write(gates, directory / GATES_NAME)
    save_config({path: pair.rank for path, pair in adapter.modules.items()}, adapter.base, directory)


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(path)


def key_of(path: str, factor: str) -> str:
    """A factor's name in PEFT's files."""
    return f"{PREFIX}{path}.lora_{factor}.weight"


def save_config(ranks: Mapping[str, int], base: str, directory: Path) -> None:
    """Write the configuration of an adapter whose modules have these ranks."""
    (directory / CONFIG_NAME).write_text(json.dumps(peft_config(ranks, base), indent=2, sort_keys=True) + "\n")


def peft_config(ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    rank = max(ranks.values())
    # Keys are regular expressions to PEFT: escaped, full paths.
    other = {re.escape(path): own for path, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
