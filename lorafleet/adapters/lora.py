"""A LoRA adapter in memory: module paths and their low-rank pairs, identified by content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lorafleet.adapters import factor_space
from lorafleet.adapters.factor_space import LoraPair
from lorafleet.errors import BaseMismatchError, InvalidInputError

LONGEST_PATH = 512
"""Characters of a module's path; the longest of usual models have about 80."""
# ASCII, as all models' are: two paths that look alike are the same, and expressions mean the same everywhere.
_PATH = re.compile(r"[\w.\-]+", re.ASCII)


def check_path(path: str) -> None:
    """Refuse what is no path of a module.

    A digest needs that too: it is over paths without their lengths, which a space ends.
    """
    if len(path) > LONGEST_PATH:
        raise InvalidInputError(
            f"found a module path of {len(path)} characters, expected at most {LONGEST_PATH}; the adapter is damaged"
        )
    if not _PATH.fullmatch(path):
        raise InvalidInputError(
            f"found the module path {path!r}, expected letters, digits, '_', '-' and dots, of ASCII; rename the module"
        )


def check_pair(path: str, pair: LoraPair) -> None:
    """Refuse factors of shapes that do not belong together, without a rank or a width, or not finite."""
    a, b = pair
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise InvalidInputError(
            f"{path}: found A {list(a.shape)}, B {list(b.shape)}; expected [r, d_in], [d_out, r], none of them 0"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise InvalidInputError(f"{path}: found NaN or infinity in its factors; the adapter is damaged")


def check_gate(path: str, gate: Tensor, d_in: int) -> None:
    """Refuse a gate vector of another length, or one that is not finite."""
    if gate.shape != (d_in,):
        raise InvalidInputError(f"{path}: found a gate vector {list(gate.shape)}, expected [{d_in}]")
    if not torch.isfinite(gate).all():
        raise InvalidInputError(f"{path}: found NaN or infinity in its gate vector; the adapter is damaged")


def content_digest(modules: Iterable[tuple[str, LoraPair]], gates: Iterable[tuple[str, Tensor]]) -> str:
    """``sha256:…`` over paths, shapes and float32 bytes of factors and of gate vectors, both in the order of paths.

    Paths are what :func:`check_path` lets pass: with spaces and lines' ends, one's name could hold another's factors.
    Each is looked at once and let go, so that a whole adapter need not be in memory.
    """
    digest = hashlib.sha256()
    factors = ((path, factor) for path, pair in modules for factor in pair)
    for name, tensor in chain(factors, ((f"gate {path}", gate) for path, gate in gates)):
        exact = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(exact.shape)}\n".encode())
        digest.update(exact.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class LoraAdapter:
    """A named set of low-rank pairs, one per adapted module; ranks may differ from module to module.

    ``modules`` maps a module path of the base (``model.layers.0.self_attn.q_proj``) to a pair with its scaling folded
    into B. ``base`` names the base that the adapter belongs to (its digest, or what PEFT's
    ``base_model_name_or_path`` said), or is empty where nobody said.

    ``gates`` holds the gate vectors ``[d_in]`` (kept in float32) of an adapter that can be routed per token: one for
    each group of modules that share an input, under the path of the first module there that the adapter changes.
    """

    modules: Mapping[str, LoraPair]
    base: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modules:
            raise InvalidInputError("an adapter needs at least one adapted module, found none")
        for path, pair in self.modules.items():
            check_path(path)
            check_pair(path, pair)
        for path, gate in self.gates.items():
            if path not in self.modules:
                raise InvalidInputError(f"found a gate vector for {path!r}, which this adapter does not change")
            check_gate(path, gate, self.modules[path].a.shape[1])
        gates = {path: gate.to(torch.float32) for path, gate in sorted(self.gates.items())}
        object.__setattr__(self, "modules", MappingProxyType(dict(sorted(self.modules.items()))))
        object.__setattr__(self, "gates", MappingProxyType(gates))

    @classmethod
    def load(cls, directory: str | Path) -> LoraAdapter:
        """Read a folder in PEFT format (:mod:`lorafleet.adapters.format` says what is refused)."""
        from lorafleet.adapters.format import load_adapter

        return load_adapter(Path(directory))

    def save(self, directory: str | Path) -> None:
        """Write a folder in PEFT format, in float32 as it is held; ``load`` gives the same digest back."""
        from lorafleet.adapters.format import save_adapter

        save_adapter(self, Path(directory))

    def delta(self, path: str) -> Tensor:
        """The dense update ``[d_out, d_in]`` of one module."""
        if path not in self.modules:
            raise InvalidInputError(f"no module {path!r} in this adapter; it adapts {', '.join(self.modules)}")
        return self.modules[path].delta

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(pair.rank for pair in self.modules.values())

    @property
    def parameters(self) -> int:
        return sum(a.numel() + b.numel() for a, b in self.modules.values())

    @cached_property
    def digest(self) -> str:
        """``sha256:…`` over paths, shapes and float32 bytes of the folded factors, and of the gate vectors if there
        are any.

        Names and metadata do not count.
        """
        return content_digest(self.modules.items(), self.gates.items())

    def to(self, dtype: torch.dtype) -> LoraAdapter:
        pairs = {path: LoraPair(a.to(dtype), b.to(dtype)) for path, (a, b) in self.modules.items()}
        return replace(self, modules=pairs)

    def compressed(self, *, rank: int | None = None, energy: float = 1.0) -> tuple[LoraAdapter, dict[str, float]]:
        """Every module truncated optimally; with the relative error of each."""
        done = {path: factor_space.compress(pair, rank=rank, energy=energy) for path, pair in self.modules.items()}
        adapter = replace(self, modules={path: c.pair for path, c in done.items()})
        return adapter, {path: c.error for path, c in done.items()}

    def targets(self, model: nn.Module) -> Iterator[tuple[LoraPair, nn.Module]]:
        """Each pair with the module of ``model`` it belongs to; raises where path or shape do not fit.

        Works on ``torch.nn.Linear``; GPT-2's Conv1D keeps its weight transposed and is told apart by its class name.
        """
        for path, pair in self.modules.items():
            try:
                module = model.get_submodule(path)
            except AttributeError:
                raise BaseMismatchError(
                    f"the adapter changes {path!r}, which this base does not have: they do not belong together"
                ) from None
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim != 2:
                raise BaseMismatchError(f"{path!r} of this base is a {type(module).__name__}, expected a linear layer")
            shape = weight.T.shape if type(module).__name__ == "Conv1D" else weight.shape
            if (pair.b.shape[0], pair.a.shape[1]) != tuple(shape):
                raise BaseMismatchError(
                    f"{path}: the adapter is for {pair.a.shape[1]} → {pair.b.shape[0]}, this base has "
                    f"{shape[1]} → {shape[0]}: they do not belong together"
                )
            yield pair, module

    @torch.no_grad()
    def merge_into(self, model: nn.Module, weight: float = 1.0) -> None:
        """Add ``weight · B A`` to the linears of ``model``, in place; checked whole before anything changes."""
        for pair, module in list(self.targets(model)):
            target = module.weight
            assert isinstance(target, Tensor)
            update = pair.delta.to(target.device, torch.float32) * weight
            if type(module).__name__ == "Conv1D":
                update = update.T
            target.copy_((target.float() + update).to(target.dtype))


def weighted_sum(adapters: Sequence[LoraAdapter], weights: Sequence[float]) -> LoraAdapter:
    """``Σ w_k adapter_k`` exactly, by stacking; a module that only some adapters change is summed over those.

    Gate vectors say when to use one adapter rather than another, so that the sum has none.
    """
    if len(adapters) != len(weights) or not adapters:
        raise InvalidInputError(
            f"found {len(adapters)} adapters and {len(weights)} weights, expected as many, at least one"
        )
    modules: dict[str, LoraPair] = {}
    for path in sorted({path for adapter in adapters for path in adapter.modules}):
        members = [(ad.modules[path], w) for ad, w in zip(adapters, weights, strict=True) if path in ad.modules]
        shapes = {(pair.b.shape[0], pair.a.shape[1]) for pair, _ in members}
        if len(shapes) > 1:
            raise BaseMismatchError(
                f"{path}: the adapters change matrices of shapes {sorted(shapes)}; expected one base"
            )
        modules[path] = factor_space.stack([pair for pair, _ in members], [w for _, w in members])
    bases = {adapter.base for adapter in adapters if adapter.base}
    return LoraAdapter(modules, bases.pop() if len(bases) == 1 else "")
