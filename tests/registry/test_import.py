"""Folders from outside become versions whole and checked, or not at all; in memory for a few modules."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.adapters.format import LARGEST_CONFIG
from lorafleet.adapters.streaming import SafetensorsWriter, folder_digest
from lorafleet.errors import (
    AdapterFormatError,
    BaseMismatchError,
    InvalidInputError,
    LorafleetError,
    NotFoundError,
    QuotaExceededError,
    UnavailableError,
)
from lorafleet.registry import Quota, Registry
from lorafleet.registry.blobs import BlobStore, Received
from tests.registry.conftest import BASE_DIGEST, MODULES, OTHER_BASE_DIGEST, make_adapter

CONFIG, WEIGHTS, GATES = "adapter_config.json", "adapter_model.safetensors", "gates.safetensors"


@pytest.fixture
def given(folder: Path) -> Path:
    """A folder from outside."""
    (folder / "given").mkdir()
    return folder / "given"


@contextmanager
def received(blobs: BlobStore, folder: Path) -> Iterator[Received]:
    with blobs.receive(folder, headers=lambda reader: None, check=lambda path, pair: None) as found:
        yield found


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> None:
    folder.mkdir(exist_ok=True)
    named = {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(named, folder / WEIGHTS, metadata={"owner": "acme's own words"})
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config))


def edit(folder: Path, **config: object) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))


def blobs_of(folder: Path) -> list[Path]:
    return sorted((folder / "blobs" / "sha256").glob("*/*"))


# What is taken in


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_alpha": 16},
        {"lora_alpha": 3, "use_rslora": True},
        {"rank_pattern": {"b.c": 1}, "alpha_pattern": {"a": 5}},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_stored_is_what_loading_and_saving_would_give(
    folder: Path, given: Path, config: dict[str, object], dtype: torch.dtype
) -> None:
    rank = 1 if "rank_pattern" in config else 2
    torch.manual_seed(0)
    # "a" comes before "a.b" among paths, and after it among the names of tensors.
    shapes = {"a.lora_A": (2, 5), "a.lora_B": (3, 2), "a.b.lora_A": (2, 5), "a.b.lora_B": (7, 2)}
    shapes |= {"b.c.lora_A": (rank, 4), "b.c.lora_B": (1, rank)}
    write(given, {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}, **config)
    save_file({"b.c": torch.randn(4)}, given / GATES)
    loaded = LoraAdapter.load(given)
    loaded.save(folder / "saved")
    with received(BlobStore(folder / "blobs"), given) as found:
        assert found.contents == (loaded.digest, loaded.rank, loaded.parameters, "")
        names = sorted(path.name for path in found.folder.iterdir())
        assert names == sorted([CONFIG, WEIGHTS, GATES])
        for name in names:
            assert (found.folder / name).read_bytes() == (folder / "saved" / name).read_bytes(), name
    assert folder_digest(given) == loaded.digest


def test_an_imported_version_is_the_one_that_adding_its_weights_would_make(registry: Registry, given: Path) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    make_adapter(0, base=BASE_DIGEST).save(given)
    imported = registry.import_version("acme", "sql", given, licence="MIT", card="# Card", by="ada")
    added = registry.add_version("acme", "sql", make_adapter(0), licence="MIT", card="# Card", by="ada")
    assert replace(imported, id=added.id, number=added.number) == added
    assert registry.card(imported) == "# Card"
    assert [(entry.action, entry.by) for entry in registry.audit("acme")][-2:] == [("version.add", "ada")] * 2
    assert b"base_model_name" in (registry.path(imported) / CONFIG).read_bytes()
    assert BASE_DIGEST.encode() not in (registry.path(imported) / CONFIG).read_bytes()


def test_words_of_the_folder_are_not_stored(registry: Registry, given: Path) -> None:
    write(given, {"a.lora_A": torch.ones(2, 5), "a.lora_B": torch.ones(3, 2)}, base_model_name_or_path="acme's secret")
    (given / "training_args.bin").write_bytes(b"acme's")
    registry.create_adapter("rival", "sql", base="tiny")
    stored = registry.path(registry.import_version("rival", "sql", given))
    assert b"acme" not in b"".join(file.read_bytes() for file in stored.iterdir())


def test_an_adapter_is_made_together_with_its_first_version_or_not_at_all(registry: Registry, given: Path) -> None:
    make_adapter(0, base=OTHER_BASE_DIGEST).save(given)
    with pytest.raises(BaseMismatchError):
        registry.import_version("acme", "new", given, base="tiny")
    with pytest.raises(NotFoundError):
        registry.import_version("acme", "new", given)
    assert registry.adapters("acme") == []
    assert registry.import_version("acme", "new", given, base="other").number == 1
    assert [entry.action for entry in registry.audit("acme")] == ["tenant.create", "adapter.create", "version.add"]
    registry.set_quota("acme", Quota(adapters=1))
    with pytest.raises(QuotaExceededError):
        registry.import_version("acme", "another", given, base="other")
    assert registry.import_version("acme", "new", given, base="other").number == 2


def test_who_exchanges_the_files_meanwhile_changes_nothing(folder: Path, given: Path) -> None:
    make_adapter(0).save(given)
    make_adapter(1).save(folder / "other")

    def exchange(*_: object) -> None:
        for file in (folder / "other").iterdir():
            shutil.copyfile(file, given / file.name)  # over the same file, which may be mapped

    blobs = BlobStore(folder / "blobs")
    with blobs.receive(given, headers=exchange, check=exchange) as found:
        blobs.adopt(found)
    assert found.contents.digest == make_adapter(0).digest
    assert blobs.read(make_adapter(0).digest).digest == make_adapter(0).digest


def test_what_is_stored_already_is_verified_and_repaired(folder: Path, given: Path) -> None:
    blobs = BlobStore(folder / "blobs")
    make_adapter(0).save(given)
    place = blobs.path(blobs.put(make_adapter(0)))
    for damaged in (False, True):
        if damaged:
            os.truncate(place / WEIGHTS, 100)
        with received(blobs, given) as found:
            blobs.adopt(found)
        assert blobs.read(make_adapter(0).digest).digest == make_adapter(0).digest


# What is refused


def shapes_of_base(**other: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(MODULES, (6, 8)) | {path.replace("__", "."): shape for path, shape in other.items()}


def test_shapes_are_checked_against_the_base_before_values_are_read(registry: Registry, given: Path) -> None:
    digest = "sha256:" + "5a" * 32
    registry.register_base("shaped", digest, architecture="L", parameters=1, shapes=shapes_of_base())
    registry.create_adapter("acme", "sql", base="shaped")
    make_adapter(0).save(given)
    assert registry.import_version("acme", "sql", given).number == 1
    wider = {path: LoraPair(torch.full((1, 9), torch.nan), torch.ones(6, 1)) for path in MODULES}
    for tensors, words in (
        (wider, "9 → 6, this base has 8 → 6"),
        ({"lm_head": next(iter(wider.values()))}, "no linear"),
    ):
        write(given, {f"{p}.lora_{f}": t for p, pair in tensors.items() for f, t in zip("AB", pair, strict=True)}, r=1)
        with pytest.raises(BaseMismatchError, match=words):
            registry.import_version("acme", "sql", given)
    other = LoraAdapter({"lm_head": LoraPair(torch.ones(1, 8), torch.ones(6, 1))})
    with pytest.raises(BaseMismatchError, match="lm_head"):
        registry.add_version("acme", "sql", other)


def test_a_base_keeps_the_shapes_that_it_was_first_given(registry: Registry, given: Path) -> None:
    registry.register_base(
        "tiny", BASE_DIGEST, architecture="LlamaForCausalLM", parameters=1000, shapes=shapes_of_base()
    )
    registry.register_base("tiny", BASE_DIGEST, architecture="LlamaForCausalLM", parameters=1000, shapes={"a": (1, 1)})
    registry.create_adapter("acme", "sql", base="tiny")
    assert registry.add_version("acme", "sql", make_adapter(0)).number == 1


def _nan(folder: Path) -> None:
    write(folder, {"a.lora_A": torch.ones(2, 5), "a.lora_B": torch.full((3, 2), torch.nan)})


def _too_large(folder: Path) -> None:
    write(folder, {"a.lora_A": torch.full((2, 5), 1e30), "a.lora_B": torch.full((3, 2), 1e30)})


def _nothing(folder: Path) -> None:
    write(folder, {"a.lora_A": torch.ones(2, 5), "a.lora_B": torch.zeros(3, 2)})


def _half_a_pair(folder: Path) -> None:
    write(folder, {"a.lora_A": torch.ones(2, 5)})


def _integers(folder: Path) -> None:
    write(folder, {"a.lora_A": torch.ones(2, 5, dtype=torch.int32), "a.lora_B": torch.ones(3, 2)})


def _other_rank(folder: Path) -> None:
    write(folder, {"a.lora_A": torch.ones(2, 5), "a.lora_B": torch.ones(3, 2)}, r=3)


def _dora(folder: Path) -> None:
    write(folder, {"a.lora_A": torch.ones(2, 5), "a.lora_B": torch.ones(3, 2)}, use_dora=True)


def _endless_header(folder: Path) -> None:
    _nothing(folder)
    with (folder / WEIGHTS).open("r+b") as file:
        file.write((2 * 2**30).to_bytes(8, "little"))
        file.truncate(3 * 2**30)  # sparse


def _long_config(folder: Path) -> None:
    _nothing(folder)
    edit(folder, task_type="x" * LARGEST_CONFIG)


def _pipe(folder: Path) -> None:
    _nothing(folder)
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _pickle(folder: Path) -> None:
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.bin").write_bytes(b"")


def _strange_gate(folder: Path) -> None:
    _nothing(folder)
    save_file({"b": torch.ones(5)}, folder / GATES)


def _short_gate(folder: Path) -> None:
    _nothing(folder)
    save_file({"a": torch.ones(4)}, folder / GATES)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_nan, "NaN or infinity"),
        (_too_large, "beyond float32's range"),
        (_nothing, "would change nothing"),
        (_half_a_pair, "only factor A"),
        (_integers, "expected floating-point"),
        (_other_rank, "has rank 2, r or rank_pattern says 3"),
        (_dora, "use_dora is set"),
        (_endless_header, "2147483648 bytes"),
        (_long_config, "larger than"),
        (_pipe, "no regular file"),
        (_pickle, "pickle"),
        (_strange_gate, "does not change"),
        (_short_gate, "expected .5."),
    ],
)
def test_a_damaged_folder_is_refused_with_the_reason_and_leaves_nothing(
    folder: Path, given: Path, migrated: Path, damage: Callable[[Path], None], words: str
) -> None:
    shutil.copyfile(migrated, folder / "registry.db")
    with Registry.open(f"sqlite:///{folder / 'registry.db'}", folder / "blobs") as registry:
        registry.create_tenant("acme")
        registry.register_base("tiny", BASE_DIGEST, architecture="L", parameters=1)
        damage(given)
        with pytest.raises(InvalidInputError, match=words) as raised:
            registry.import_version("acme", "sql", given, base="tiny")
        assert "incoming" not in str(raised.value)  # it is about the folder that was given
        with pytest.raises(NotFoundError):
            registry.import_version("acme", "sql", folder / "nowhere", base="tiny")
        assert registry.adapters("acme") == []
        assert blobs_of(folder) == [] and list((folder / "blobs" / "incoming").iterdir()) == []


# Every truncation, every flipped bit


@pytest.mark.parametrize("damage", [_endless_header, _long_config])
def test_what_the_first_bytes_tell_is_told_before_anything_is_copied(
    folder: Path, given: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(0).save(given)
    damage(given)
    monkeypatch.setattr("lorafleet.registry.blobs._copy", None)
    with pytest.raises(AdapterFormatError), received(BlobStore(folder / "blobs"), given):
        pass


@pytest.fixture
def small(given: Path) -> Path:
    pair = LoraPair(torch.tensor([[1.5, -2.0, 0.25]]), torch.tensor([[3.0], [-0.5]]))
    LoraAdapter({"a.b": pair}, gates={"a.b": torch.tensor([0.5, 1.0, -1.0])}).save(given)
    (given / CONFIG).write_text('{"peft_type":"LORA","r":1,"lora_alpha":2,"rank_pattern":{"a":1},"bias":"none"}')
    return given


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, GATES])
def test_a_file_cut_short_anywhere_is_refused(folder: Path, small: Path, name: str) -> None:
    blobs, whole = BlobStore(folder / "blobs"), (small / name).read_bytes()
    for length in range(len(whole)):
        (small / name).write_bytes(whole[:length])
        with pytest.raises(AdapterFormatError), received(blobs, small):
            pytest.fail(f"{length} of {len(whole)} bytes were taken")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, GATES])
def test_a_flipped_bit_is_refused_or_makes_other_weights(folder: Path, small: Path, name: str) -> None:
    blobs, whole = BlobStore(folder / "blobs"), (small / name).read_bytes()
    right = folder_digest(small)
    values = 8 + int.from_bytes(whole[:8], "little") if name != CONFIG else len(whole)
    outcomes = []
    # Of a configuration every bit: few of them mean something.
    bits = [(at, bit) for at in range(len(whole)) for bit in (range(8) if name == CONFIG else [at % 8])]
    for position, bit in bits:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << bit
        (small / name).write_bytes(flipped)
        try:
            with received(blobs, small) as found:
                digest = found.contents.digest
        except LorafleetError as error:
            assert isinstance(error, AdapterFormatError)
            outcomes.append("refused")
            continue
        # What is taken is what these bytes mean to whoever loads them.
        assert digest == LoraAdapter.load(small).digest
        outcomes.append("same" if digest == right else "other")
        assert digest != right or position < values, f"byte {position} of {name}: a bit of a value was lost"
    assert outcomes.count("refused") > len(outcomes) / 3 and "other" in outcomes


# Memory


def _peak_mb(folder: Path, target: Path) -> float:
    """How much more memory than before a process takes that imports a folder."""
    spawn = multiprocessing.get_context("spawn")  # no fork: it has none of the threads that torch waits for
    reading, writing = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_import_alone, args=(folder, target, writing))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0 and reading.poll()
    return float(reading.recv())


def _import_alone(folder: Path, target: Path, writing: Connection) -> None:
    blobs = BlobStore(target)
    _clear_peak()
    before = _resident_kb("VmRSS")
    with received(blobs, folder) as found:
        blobs.adopt(found)
    writing.send((_resident_kb("VmHWM") - before) / 1000)


def _clear_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident_kb(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


def test_memory_does_not_grow_with_the_file(folder: Path, given: Path) -> None:
    rank, width, modules = 4, 32768, 100  # 1 MB a module
    torch.manual_seed(0)
    a, b = torch.randn(rank, width), torch.randn(width, rank)
    shapes = {}
    for number in range(modules):
        shapes |= {f"m{number:03}.lora_A.weight": a.shape, f"m{number:03}.lora_B.weight": b.shape}
    with (given / WEIGHTS).open("xb") as file:
        writer = SafetensorsWriter(file, shapes)
        for name in shapes:
            writer.write(name, a if "lora_A" in name else b)
    (given / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 8}))
    assert (given / WEIGHTS).stat().st_size > 100 * 2**20
    assert _peak_mb(given, folder / "blobs") < 60


# A disk without room


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system in memory; gives what changes its size."""
    folder.mkdir()

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
        except FileNotFoundError:
            return False

    if not mount(f"size={size}"):
        pytest.skip("this user may not mount a tmpfs, so that no disk is full")
    try:
        yield lambda larger: None if mount(f"remount,size={larger}") else pytest.fail("no remount")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("pages", [4, 8, 14, 20, 26, 32, 40])
def test_a_full_disk_leaves_nothing_half_visible_and_all_works_when_there_is_room(
    folder: Path, given: Path, migrated: Path, pages: int
) -> None:
    large = LoraAdapter({"m": LoraPair(torch.randn(4, 1500), torch.randn(1500, 4))})  # 48 kB
    large.save(given)
    shutil.copyfile(migrated, folder / "registry.db")
    with (
        tmpfs(folder / "blobs", 4096 * pages) as resize,
        Registry.open(f"sqlite:///{folder / 'registry.db'}", folder / "blobs") as registry,
    ):
        registry.create_tenant("acme")
        registry.register_base("tiny", BASE_DIGEST, architecture="L", parameters=1)
        registry.create_adapter("acme", "sql", base="tiny")
        for add in (
            lambda: registry.import_version("acme", "sql", given),
            lambda: registry.add_version("acme", "sql", large),
        ):
            before = registry.versions("acme", "sql")
            try:
                version = add()
            except UnavailableError as error:
                assert "make room" in str(error)
                assert registry.versions("acme", "sql") == before
                assert bool(blobs_of(folder)) == bool(before)
            else:
                assert registry.load(version).digest == large.digest
            assert list((folder / "blobs" / "incoming").iterdir()) == []
        resize(2**20)
        assert registry.load(registry.import_version("acme", "sql", given)).digest == large.digest


# A base that is named for an adapter that is there


def test_a_base_that_is_not_the_adapters_is_refused_and_no_version_is_made(registry: Registry, given: Path) -> None:
    make_adapter(0).save(given)
    registry.import_version("acme", "sql", given, base="tiny")
    expected = f"acme/sql is for the base tiny .{BASE_DIGEST}., found other .{OTHER_BASE_DIGEST}.; give the adapter an"
    for base in ("other", OTHER_BASE_DIGEST):
        with pytest.raises(BaseMismatchError, match=expected):
            registry.import_version("acme", "sql", given, base=base)
    with pytest.raises(NotFoundError):
        registry.import_version("acme", "sql", given, base="unknown")
    assert len(registry.versions("acme", "sql")) == 1
    for right in ("tiny", BASE_DIGEST, None):
        registry.import_version("acme", "sql", given, base=right)
    assert len(registry.versions("acme", "sql")) == 4


def test_weights_that_could_not_be_read_again_are_not_stored(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    monkeypatch.setattr("lorafleet.adapters.streaming.LARGEST_MODULE", 8)
    with pytest.raises(InvalidInputError, match="expected at most 8; compress"):
        registry.add_version("acme", "sql", make_adapter(0))
    assert registry.versions("acme", "sql") == []


def test_a_module_of_another_size_than_any_is_refused_before_its_values_are_read(
    registry: Registry, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    make_adapter(0).save(given)
    monkeypatch.setattr("lorafleet.adapters.streaming.LARGEST_MODULE", 8)
    monkeypatch.setattr("lorafleet.adapters.streaming.read_tensor", None)
    with pytest.raises(AdapterFormatError, match="expected at most 8; compress"):
        registry.import_version("acme", "sql", given)
