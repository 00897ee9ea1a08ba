"""Adapters in PEFT's format read, checked and written a module at a time: in memory for a few modules, however many.

What :func:`transcribe` writes is made of the very tensors that were checked and that the digest is of, in the form that
``LoraAdapter.save`` gives it, byte for byte. Names and other words of the source's header and configuration are left
behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorafleet.adapters.factor_space import LoraPair
from lorafleet.adapters.format import (
    CONFIG_NAME,
    GATES_NAME,
    WEIGHTS_NAME,
    check_shapes,
    key_of,
    parse_key,
    read_config,
    read_scalings,
    read_tensor,
    refuse_other_weights,
    refuse_unsupported,
    save_config,
    scaled,
)
from lorafleet.adapters.lora import check_gate, check_pair, check_path, content_digest
from lorafleet.errors import AdapterFormatError, InvalidInputError, NotFoundError

LARGEST_HEADER = 16 * 2**20
"""Bytes of a safetensors header; a tensor takes about 130, so that this is far beyond 100 000 modules."""
LARGEST_MODULE = 256 * 2**20
"""Bytes of a module's factors in float32; rank 256 on 16,384 → 65,536 takes 84 MB. Checking a module takes several
times as much, and a file of 2 GiB may be a single one."""
MAPPED_BYTES = 32 * 2**20
"""What is read of a file before it is mapped anew: pages that were read stay in a process's memory until then."""


class Shape(NamedTuple):
    """Of one module's factors."""

    rank: int
    d_in: int
    d_out: int

    @property
    def size_bytes(self) -> int:
        """In float32."""
        return 4 * self.rank * (self.d_in + self.d_out)


def check_size(path: str, shape: Shape) -> None:
    """InvalidInputError for a module above :data:`LARGEST_MODULE`."""
    if shape.size_bytes > LARGEST_MODULE:
        raise InvalidInputError(
            f"{path} has rank {shape.rank} on {shape.d_in} → {shape.d_out}, {shape.size_bytes} bytes in float32, "
            f"expected at most {LARGEST_MODULE}; compress the adapter to a lower rank"
        )


class Contents(NamedTuple):
    """What an adapter turned out to be."""

    digest: str
    rank: int
    """The largest of any module"""
    parameters: int
    base: str


class AdapterReader:
    """A folder in PEFT's format whose headers were read and make sense; values are read by :meth:`modules`.

    Raises what ``LoraAdapter.load`` raises, and AdapterFormatError for a module above :data:`LARGEST_MODULE`. The files
    must not change while it is used: it maps them.
    """

    def __init__(self, directory: Path) -> None:
        self._weights, self._gates = directory / WEIGHTS_NAME, directory / GATES_NAME
        self._config_path = directory / CONFIG_NAME
        refuse_other_weights(directory)
        for path in (self._config_path, self._weights):
            if not path.is_file():
                raise NotFoundError(f"{path} is missing: {directory} is no adapter folder in PEFT format")
        self._config = read_config(self._config_path)
        refuse_unsupported(self._config, self._config_path)
        self._keys: dict[str, dict[str, str]] = {}
        """Module path → factor → the tensor's name in the file."""
        self.shapes = self._read_shapes()
        ranks = {path: shape.rank for path, shape in self.shapes.items()}
        self._scalings = read_scalings(ranks, self._config, self._config_path)
        self.gate_paths = self._read_gate_paths() if self._gates.exists() else []

    @property
    def base(self) -> str:
        return str(self._config.get("base_model_name_or_path") or "")

    @property
    def rank(self) -> int:
        return max(shape.rank for shape in self.shapes.values())

    @property
    def parameters(self) -> int:
        return sum(shape.rank * (shape.d_in + shape.d_out) for shape in self.shapes.values())

    def modules(self) -> Iterator[tuple[str, LoraPair]]:
        """Each module's path and its pair in float32, scaling folded in, finite; by path."""
        for batch in self._batches():
            with _opened(self._weights) as file:
                for path in batch:
                    factors = self._keys[path]
                    a, b = (read_tensor(file, factors[name], self._weights) for name in "AB")
                    pair = scaled(LoraPair(a, b), self._scalings[path])
                    with _blaming(self._config_path):
                        check_pair(path, pair)
                    yield path, pair

    def gates(self) -> Iterator[tuple[str, Tensor]]:
        """Each gate vector ``[d_in]`` under its module's path; by path."""
        if not self.gate_paths:
            return
        with _opened(self._gates) as file:
            for path in self.gate_paths:
                gate = read_tensor(file, path, self._gates)
                with _blaming(self._gates):
                    check_gate(path, gate, self.shapes[path].d_in)
                yield path, gate

    def _read_shapes(self) -> dict[str, Shape]:
        found: dict[str, dict[str, Sequence[int]]] = {}
        for key, (_, shape) in _header(self._weights).items():
            path, factor = parse_key(key, self._weights)
            if factor in found.setdefault(path, {}):
                raise AdapterFormatError(f"{self._weights}: found factor {factor} of {path} twice")
            found[path][factor] = shape
            self._keys.setdefault(path, {})[factor] = key
        if not found:
            raise AdapterFormatError(f"{self._weights} holds no tensors, expected at least one pair")
        return {path: self._shape(path, found[path]) for path in sorted(found)}

    def _shape(self, path: str, factors: Mapping[str, Sequence[int]]) -> Shape:
        if set(factors) != {"A", "B"}:
            raise AdapterFormatError(f"{self._weights}: {path} has only factor {', '.join(factors)}, expected A and B")
        a, b = factors["A"], factors["B"]
        shape = Shape(rank=check_shapes(path, a, b, self._weights), d_in=a[1], d_out=b[0])
        with _blaming(self._weights):
            check_size(path, shape)
        return shape

    def _read_gate_paths(self) -> list[str]:
        header = _header(self._gates)
        if not header:
            raise AdapterFormatError(f"{self._gates} holds no tensors, expected at least one gate vector; delete it")
        for path, (dtype, shape) in header.items():
            with _blaming(self._gates):
                check_path(path)
            if dtype != "F32":
                raise AdapterFormatError(f"{self._gates}: {path} is {dtype}, expected F32; export it again")
            if path not in self.shapes:
                raise AdapterFormatError(
                    f"{self._gates}: found a gate vector for {path!r}, which this adapter does not change"
                )
            if tuple(shape) != (self.shapes[path].d_in,):
                raise AdapterFormatError(
                    f"{self._gates}: {path}: found a gate vector {list(shape)}, expected [{self.shapes[path].d_in}]"
                )
        return sorted(header)

    def _batches(self) -> Iterator[list[str]]:
        """The modules' paths in their order, as many at a time as :data:`MAPPED_BYTES` hold, at least one."""
        batch: list[str] = []
        size = 0
        for path, shape in self.shapes.items():
            size += shape.size_bytes
            if batch and size > MAPPED_BYTES:
                yield batch
                batch, size = [], shape.size_bytes
            batch.append(path)
        yield batch


def folder_digest(directory: Path) -> str:
    """``LoraAdapter.load(directory).digest`` in memory for a few modules."""
    reader = AdapterReader(directory)
    return content_digest(reader.modules(), reader.gates())


def transcribe(
    source: Path, target: Path, *, check: Callable[[str, LoraPair], None], headers: Callable[[AdapterReader], None]
) -> Contents:
    """Write the adapter of one folder into another, empty one, as ``LoraAdapter.save`` would, without its base.

    ``headers`` sees the source before any values are read, ``check`` each module before it is written; what they raise
    ends it, with files half written. OSError where the target cannot be written.
    """
    reader = AdapterReader(source)
    headers(reader)
    shapes: dict[str, Sequence[int]] = {}
    for path, shape in reader.shapes.items():
        shapes[key_of(path, "A")] = (shape.rank, shape.d_in)
        shapes[key_of(path, "B")] = (shape.d_out, shape.rank)
    with ExitStack() as stack:
        weights = SafetensorsWriter(stack.enter_context((target / WEIGHTS_NAME).open("xb")), shapes)

        def modules() -> Iterator[tuple[str, LoraPair]]:
            for path, pair in reader.modules():
                check(path, pair)
                weights.write(key_of(path, "A"), pair.a)
                weights.write(key_of(path, "B"), pair.b)
                yield path, pair

        def gates() -> Iterator[tuple[str, Tensor]]:
            if not reader.gate_paths:
                return
            vectors = {path: (reader.shapes[path].d_in,) for path in reader.gate_paths}
            written = SafetensorsWriter(stack.enter_context((target / GATES_NAME).open("xb")), vectors)
            for path, gate in reader.gates():
                written.write(path, gate)
                yield path, gate

        digest = content_digest(modules(), gates())
    save_config({path: shape.rank for path, shape in reader.shapes.items()}, "", target)
    return Contents(digest, reader.rank, reader.parameters, reader.base)


class SafetensorsWriter:
    """A file of float32 tensors whose shapes are known before their values: the bytes that safetensors would write."""

    def __init__(self, file: BinaryIO, shapes: Mapping[str, Sequence[int]]) -> None:
        self._file = file
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in sorted(shapes):
            size = 4 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._starts = {name: file.tell() + header[name]["data_offsets"][0] for name in shapes}

    def write(self, name: str, tensor: Tensor) -> None:
        self._file.seek(self._starts[name])
        self._file.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)


def check_header_size(path: Path) -> None:
    """AdapterFormatError for a safetensors file that says that its header is larger than any adapter's."""
    try:
        with path.open("rb") as stream:
            claimed = int.from_bytes(stream.read(8), "little")
    except OSError as error:
        raise AdapterFormatError(f"{path} cannot be read ({error}); expected a file of an adapter") from None
    if claimed > LARGEST_HEADER:
        raise AdapterFormatError(
            f"{path} says that its header has {claimed} bytes, expected at most {LARGEST_HEADER}; it is damaged, or no "
            "adapter's"
        )


def _header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor's name → type and shape, as safetensors checked them against the file's size."""
    check_header_size(path)
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        return {key: (str(found.get_dtype()), list(found.get_shape())) for key, found in slices.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{path} is damaged or truncated ({error}); copy or export it again") from None


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """What is wrong with values is wrong with the file that they come from."""
    try:
        yield
    except InvalidInputError as error:
        raise AdapterFormatError(f"{path}: {error}") from None
