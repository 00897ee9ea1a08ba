"""Blobs are there whole or not at all, whatever happens to the process, the disk or the bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.errors import BackendError, InvalidInputError, UnavailableError
from lorafleet.registry.blobs import BlobStore
from lorafleet.registry.local_files import LocalFiles
from tests.registry.conftest import make_adapter


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; its exit status, negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(timeout=60)
    assert child.exitcode is not None, "the forked process hangs"
    return child.exitcode


def test_adapter_is_read_back_by_its_digest(folder: Path) -> None:
    adapter = make_adapter(0, rank=4, base="any")
    digest = BlobStore(folder).put(adapter)
    assert digest == adapter.digest
    assert BlobStore(folder).read(digest).digest == digest
    assert BlobStore(folder).put(adapter) == digest
    name = digest.removeprefix("sha256:")
    home = f"sha256/{name[:2]}/{name}"
    assert files(folder) == ["incoming.lock", f"{home}/adapter_config.json", f"{home}/adapter_model.safetensors"]


def test_gates_of_an_adapter_are_kept_and_checked(folder: Path) -> None:
    plain = make_adapter(0, rank=4)
    path = next(iter(plain.modules))
    adapter = LoraAdapter(plain.modules, gates={path: torch.arange(plain.modules[path].a.shape[1]) / 7})
    blobs = BlobStore(folder)
    digest = blobs.put(adapter)
    assert digest != blobs.put(plain)
    assert torch.equal(blobs.read(digest).gates[path], adapter.gates[path])


def test_some_modules_are_read_alone_with_the_bits_of_the_whole(folder: Path) -> None:
    adapter = make_adapter(0, rank=4)
    blobs = BlobStore(folder)
    digest = blobs.put(adapter)
    path = next(iter(adapter.modules))
    found = blobs.read_modules(digest, [path, "model.nowhere"])
    assert list(found) == [path]
    assert all(torch.equal(*pair) for pair in zip(found[path], blobs.read(digest).modules[path], strict=True))
    assert blobs.read_modules(digest, []) == {}
    with pytest.raises(UnavailableError, match="restore them from a backup"):
        blobs.read_modules("sha256:" + "0" * 64, [path])


def test_folders_are_private(folder: Path) -> None:
    blobs = BlobStore(folder / "blobs")
    path = blobs.path(blobs.put(make_adapter(0)))
    for part in (folder / "blobs", path.parent, path):
        assert part.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("digest", ["sha256:../../etc", "sha256:" + "A" * 64, "sha256:" + "a" * 63, "/etc/passwd", ""])
def test_digest_cannot_lead_out_of_the_folder(folder: Path, digest: str) -> None:
    with pytest.raises(InvalidInputError, match="digest"):
        BlobStore(folder).read(digest)


def test_blob_loads_with_peft_as_it_is(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    base = LlamaForCausalLM(config).eval()
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    adapter = LoraAdapter(
        {
            q: LoraPair(torch.randn(2, 16), torch.randn(16, 2)),
            down: LoraPair(torch.randn(5, 32), torch.randn(16, 5)),
        },
        base="sha256:" + "a" * 64,
    )
    blobs = BlobStore(folder)
    path = blobs.path(blobs.put(adapter))
    merged = LlamaForCausalLM(config).eval()
    merged.load_state_dict(base.state_dict())
    adapter.merge_into(merged)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        expected = merged(tokens).logits
        found = PeftModel.from_pretrained(base, str(path))(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def _truncate(path: Path) -> None:
    os.truncate(path / "adapter_model.safetensors", 100)


def _flip_a_bit(path: Path) -> None:
    data = bytearray((path / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "adapter_model.safetensors").write_bytes(data)


def _change_alpha(path: Path) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["r"]}))


def _lose_the_config(path: Path) -> None:
    (path / "adapter_config.json").unlink()


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, _change_alpha, _lose_the_config])
def test_damaged_blob_is_refused_and_put_repairs_it(folder: Path, damage: Callable[[Path], None]) -> None:
    blobs, adapter = BlobStore(folder), make_adapter(0)
    digest = blobs.put(adapter)
    before = files(folder)
    damage(blobs.path(digest))
    with pytest.raises(UnavailableError, match="damaged"):
        blobs.read(digest)
    assert blobs.put(adapter) == digest
    assert blobs.read(digest).digest == digest
    assert files(folder) == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_of_what_is_stored_a_flipped_bit_anywhere_is_refused_or_changes_nothing(folder: Path, name: str) -> None:
    """The digest is of the values: no bit of them can change unseen, as one of a file that is imported may."""
    blobs = BlobStore(folder)
    pair = LoraPair(torch.tensor([[1.5, -2.0, 0.25]]), torch.tensor([[3.0], [-0.5]]))
    digest = blobs.put(LoraAdapter({"a.b": pair}))
    file = blobs.path(digest) / name
    whole = file.read_bytes()
    values = 8 + int.from_bytes(whole[:8], "little") if name.endswith("safetensors") else len(whole)
    refused = 0
    for at in range(len(whole)):
        for bit in range(8) if at >= values else [at % 8]:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                found = blobs.read(digest)
            except UnavailableError:
                refused += 1
            else:
                assert at < values and found.digest == digest
    assert refused > len(whole) / 3


@pytest.mark.parametrize("adopted", [False, True])
def test_weights_that_cannot_be_read_now_are_not_taken_for_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, adopted: bool
) -> None:
    blobs, adapter = BlobStore(folder / "blobs"), make_adapter(0)
    digest = blobs.put(adapter)
    adapter.save(folder / "given")

    def fail(*_: object) -> None:
        raise OSError("the network is down")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "held", fail)
        with (
            blobs.receive(folder / "given", headers=lambda reader: None, check=lambda path, pair: None) as received,
            pytest.raises(BackendError, match="network is down"),
        ):
            blobs.adopt(received) if adopted else blobs.put(adapter)
    assert blobs.read(digest).digest == digest


def test_a_folder_is_held_only_once_it_is_verified(folder: Path) -> None:
    blobs = BlobStore(folder)
    digest = blobs.put(make_adapter(0))
    with pytest.raises(KeyError), blobs.held(digest) as path:
        assert LoraAdapter.load(path).digest == digest
        raise KeyError  # goes through as it is
    _flip_a_bit(blobs.path(digest))
    with pytest.raises(BackendError, match="damaged"), blobs.held(digest):
        pass


def test_missing_blob_says_so(folder: Path) -> None:
    with pytest.raises(UnavailableError, match="missing"):
        BlobStore(folder).read(make_adapter(0).digest)


def test_what_was_read_does_not_change_with_the_file(folder: Path) -> None:
    blobs, adapter = BlobStore(folder), make_adapter(0)
    digest = blobs.put(adapter)
    read = blobs.read(digest)
    weights = blobs.path(digest) / "adapter_model.safetensors"
    with weights.open("r+b") as stream:
        stream.seek(-64, os.SEEK_END)
        stream.write(b"\xff" * 64)
    assert LoraAdapter(read.modules).digest == digest


def test_writer_killed_at_any_step_leaves_the_blob_whole_or_absent(folder: Path) -> None:
    adapter = make_adapter(0)
    steps = ("fsync", "rename", "open", "mkdir", "close")
    outcomes = []
    for killed_at in range(1, 200):
        place = folder / str(killed_at)
        BlobStore(place)

        def put(killed_at: int = killed_at, place: Path = place) -> None:
            calls = 0

            def killing(step: Callable[..., Any]) -> Callable[..., Any]:
                def run(*args: Any, **kwargs: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == killed_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return step(*args, **kwargs)

                return run

            blobs = BlobStore(place)
            for name in steps:
                setattr(os, name, killing(getattr(os, name)))
            blobs.put(adapter)
            os._exit(0)

        status = in_child(put)
        after = BlobStore(place)  # sweeps
        assert list((place / "incoming").iterdir()) == [], f"killed at step {killed_at}"
        outcomes.append(after.path(adapter.digest).exists())
        if outcomes[-1]:
            assert after.read(adapter.digest).digest == adapter.digest, f"killed at step {killed_at}"
        assert after.put(adapter) == adapter.digest
        if status == 0:
            break
        assert status == -signal.SIGKILL
    else:
        pytest.fail("the writer never came to its end")
    # Some were killed before the rename and some after it, and nothing was visible before.
    assert len(outcomes) > 8 and outcomes[0] is False and outcomes[-2:] == [True, True]
    assert outcomes == sorted(outcomes)


def test_full_disk_leaves_nothing_behind(folder: Path) -> None:
    adapter = make_adapter(0)
    blobs = BlobStore(folder)
    before = files(folder)

    def put() -> None:
        # The limit on a file's size stands in for a disk without room: writing fails half-way through the weights.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        try:
            blobs.put(adapter)
        except UnavailableError as error:
            os._exit(7 if "make room" in str(error) else 8)
        os._exit(9)

    assert in_child(put) == 7
    assert files(folder) == before
    assert blobs.put(adapter) == adapter.digest


def test_failing_fsync_leaves_no_visible_blob(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs, adapter = BlobStore(folder), make_adapter(0)

    def fail(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UnavailableError, match="Input/output error"):
            blobs.put(adapter)
    assert not blobs.path(adapter.digest).exists()
    assert blobs.put(adapter) == adapter.digest


def test_start_does_not_sweep_what_another_process_is_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs, adapter = BlobStore(folder), make_adapter(0)
    save = LoraAdapter.save
    started = []

    def save_while_another_starts(self: LoraAdapter, directory: str | Path) -> None:
        save(self, directory)
        started.append(BlobStore(folder))

    monkeypatch.setattr(LoraAdapter, "save", save_while_another_starts)
    digest = blobs.put(adapter)
    assert len(started) == 1
    assert started[0].read(digest).digest == digest


def test_folder_that_cannot_be_made_is_reported(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(UnavailableError, match="blob folder"):
        BlobStore(folder / "file")
