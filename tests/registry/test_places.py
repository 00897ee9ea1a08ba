"""Weights in a folder and in an S3 bucket, over HTTP, behave alike; and what only one of them has."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from obstore.exceptions import GenericError, PermissionDeniedError

from lorafleet.adapters import LoraAdapter
from lorafleet.errors import BackendError, InvalidInputError, NotFoundError
from lorafleet.registry import Registry, object_files, pepper
from lorafleet.registry.blob_cache import BlobCache
from lorafleet.registry.blobs import BlobStore
from lorafleet.registry.object_files import parse_place
from tests.registry import s3
from tests.registry.conftest import BASE_DIGEST, FOLDER, make_adapter
from tests.registry.s3 import S3Server

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IN_S3 = pytest.mark.process


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with (
        tempfile.TemporaryDirectory(prefix="lorafleet-s3-", dir=FOLDER) as folder,
        s3.serve(Path(folder) / "s3") as server,
    ):
        yield server


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.SECRET_KEY)


@pytest.fixture
def bucket(s3_server: S3Server, folder: Path) -> Callable[..., str]:
    """The URL of this test's own place in the bucket, with options."""
    return lambda cache="cache", **options: s3_server.url(folder.name, folder / cache, **options)


@pytest.fixture(params=["folder", pytest.param("s3", marks=IN_S3)])
def place(request: pytest.FixtureRequest, folder: Path) -> str | Path:
    if request.param == "folder":
        return folder / "blobs"
    url: str = request.getfixturevalue("bucket")()
    return url


# What both do


def test_weights_come_back_by_their_digest_wherever_they_are(place: str | Path) -> None:
    blobs, plain = BlobStore(place), make_adapter(0, rank=4, base="any")
    path = next(iter(plain.modules))
    gated = LoraAdapter(plain.modules, gates={path: torch.arange(8) / 7})
    for adapter in (plain, gated):
        digest = blobs.put(adapter)
        assert blobs.put(adapter) == digest == adapter.digest
        assert BlobStore(place).read(digest).digest == digest
        assert LoraAdapter.load(blobs.path(digest)).digest == digest
        assert list(blobs.read_modules(digest, [path, "nowhere"])) == [path]
    assert {blob.digest for blob in blobs.stored()} == {plain.digest, gated.digest}
    assert all(blob.size > 500 and blob.modified_at > 1.7e9 for blob in blobs.stored())


def test_what_is_not_there_says_so(place: str | Path) -> None:
    blobs = BlobStore(place)
    with pytest.raises(BackendError, match="missing"):
        blobs.read(make_adapter(0).digest)
    with pytest.raises(InvalidInputError, match="digest"):
        blobs.read("sha256:../../etc")
    assert list(blobs.stored()) == []
    assert blobs.delete([make_adapter(0).digest]) == ([make_adapter(0).digest], [], [], None)


def test_deleted_weights_are_gone_for_all_and_can_be_stored_again(place: str | Path) -> None:
    blobs, adapters = BlobStore(place), [make_adapter(seed) for seed in range(3)]
    for adapter in adapters:
        blobs.put(adapter)
    gone = [adapter.digest for adapter in adapters[:2]]
    assert blobs.delete(gone) == (gone, [], [], None)
    assert [blob.digest for blob in blobs.stored()] == [adapters[2].digest]
    with pytest.raises(BackendError, match="missing"):
        blobs.read(adapters[0].digest)
    assert blobs.read(blobs.put(adapters[0])).digest == adapters[0].digest


def test_a_deletion_that_takes_too_long_begins_nothing_more(place: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = BlobStore(place)
    digest = blobs.put(make_adapter(0))
    monkeypatch.setattr("lorafleet.registry.blobs.DELETING_S", -1.0)
    done = blobs.delete([digest])
    assert (done.gone, done.untouched, done.unsure) == ([], [digest], []) and isinstance(done.error, TimeoutError)
    assert blobs.read(digest).digest == digest


def test_the_pepper_is_made_once(place: str | Path) -> None:
    assert pepper.read_or_make(BlobStore(place)) == pepper.read_or_make(BlobStore(place)) != bytes(32)


def test_a_registry_works_on_it(place: str | Path, folder: Path, migrated: Path) -> None:
    (folder / "registry.db").write_bytes(migrated.read_bytes())
    make_adapter(1).save(folder / "given")
    with Registry.open(f"sqlite:///{folder / 'registry.db'}", place) as registry:
        registry.create_tenant("acme")
        registry.register_base("tiny", BASE_DIGEST, architecture="L", parameters=1)
        version = registry.import_version("acme", "sql", folder / "given", base="tiny")
        registry.add_version("acme", "sql", make_adapter(2))
        assert registry.load(version).digest == make_adapter(1).digest
        assert LoraAdapter.load(registry.path(version)).digest == version.digest
        with registry.folder(version) as held:
            assert LoraAdapter.load(held).digest == version.digest
        assert registry.authenticate(registry.create_key("acme").token).tenant == "acme"
        registry.retire(version)
        found = registry.collect_garbage(older_than_s=0.0, retired_older_than_s=0.0)
        assert (found.purged, found.deleted) == (("acme/sql:1",), (version.digest,))
        with pytest.raises(NotFoundError):
            registry.load(version)
        assert registry.load(registry.resolve("acme/sql")).digest == make_adapter(2).digest


# An object store


@IN_S3
def test_objects_lie_under_the_paths_of_files(s3_server: S3Server, bucket: Callable[..., str], folder: Path) -> None:
    adapter = make_adapter(0)
    BlobStore(bucket()).put(adapter)
    BlobStore(folder / "blobs").put(adapter)
    local = sorted(str(p.relative_to(folder / "blobs")) for p in (folder / "blobs" / "sha256").rglob("*.*"))
    assert s3_server.objects(folder.name) == local
    for path in local:
        assert (s3_server.folder / s3.BUCKET / folder.name / path).read_bytes() == (
            folder / "blobs" / path
        ).read_bytes()


@IN_S3
@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_an_upload_that_was_cut_off_is_not_there_and_is_made_good(
    s3_server: S3Server, bucket: Callable[..., str], folder: Path, missing: str
) -> None:
    adapter = make_adapter(0)
    writer = BlobStore(bucket())
    writer.put(adapter)
    [lost] = (s3_server.folder / s3.BUCKET / folder.name).rglob(missing)
    lost.unlink()
    with pytest.raises(BackendError, match="missing" if missing == CONFIG else "damaged"):
        BlobStore(bucket("elsewhere")).read(adapter.digest)
    assert [blob.digest for blob in writer.stored()] == [adapter.digest]  # for who collects garbage
    assert BlobStore(bucket("elsewhere")).put(adapter) == adapter.digest
    assert BlobStore(bucket("a third")).read(adapter.digest).digest == adapter.digest


@IN_S3
def test_a_writer_killed_between_any_two_objects_leaves_nothing_visible(
    bucket: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put, adapter, uploaded = object_files.obstore.put, make_adapter(0), 0

    def killing(*args: object, **named: object) -> object:
        nonlocal uploaded
        if uploaded == killed_at:
            raise KeyboardInterrupt
        uploaded += 1
        return put(*args, **named)  # type: ignore[call-overload]

    for killed_at in (0, 1, 2):
        uploaded = 0
        with monkeypatch.context() as patch:
            patch.setattr(object_files.obstore, "put", killing)
            with suppress(KeyboardInterrupt):
                BlobStore(bucket()).put(adapter)
        there = BlobStore(bucket(f"other {killed_at}"))
        if killed_at < 2:
            with pytest.raises(BackendError, match="missing"):
                there.read(adapter.digest)
        else:
            assert there.read(adapter.digest).digest == adapter.digest


@IN_S3
def test_a_listing_is_read_page_by_page(bucket: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_files, "LISTED_AT_ONCE", 3)  # of 14 objects
    blobs = BlobStore(bucket())
    digests = {blobs.put(make_adapter(seed, rank=1)) for seed in range(7)}
    found = list(blobs.stored())
    assert len(found) == 7 and {blob.digest for blob in found} == digests


@IN_S3
def test_a_copy_that_was_damaged_is_fetched_again_and_a_damaged_object_is_not_taken(
    s3_server: S3Server, bucket: Callable[..., str], folder: Path
) -> None:
    blobs, adapter = BlobStore(bucket()), make_adapter(0)
    path = blobs.path(blobs.put(adapter))
    os.truncate(path / WEIGHTS, 100)
    assert blobs.read(adapter.digest).digest == adapter.digest
    [there] = (s3_server.folder / s3.BUCKET / folder.name).rglob(WEIGHTS)
    there.write_bytes(there.read_bytes()[:-1] + b"\xff")
    assert blobs.read(adapter.digest).digest == adapter.digest  # of the copy
    other = BlobStore(bucket("elsewhere"))
    with pytest.raises(BackendError, match="damaged"):
        other.read(adapter.digest)
    assert not other.path(adapter.digest).exists()
    other.put(adapter)
    assert BlobStore(bucket("a third")).read(adapter.digest).digest == adapter.digest


def sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.iterdir()}


def _lose(weights: Path) -> None:
    weights.unlink()


def _cut(weights: Path) -> None:
    os.truncate(weights, 100)


def _change(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")


def _add_gates(weights: Path) -> None:
    (weights.parent / "gates.safetensors").write_bytes(weights.read_bytes())


@IN_S3
@pytest.mark.parametrize("damage", [_lose, _cut, _change, _add_gates])
@pytest.mark.parametrize("adopted", [False, True])
def test_damage_in_the_bucket_is_mended_also_from_where_there_is_a_sound_copy(
    s3_server: S3Server, bucket: Callable[..., str], folder: Path, damage: Callable[[Path], None], adopted: bool
) -> None:
    blobs, adapter = BlobStore(bucket()), make_adapter(0)
    digest = blobs.put(adapter)
    before = s3_server.objects(folder.name)
    [there] = (s3_server.folder / s3.BUCKET / folder.name).rglob(WEIGHTS)
    damage(there)
    files: Any = blobs._files
    until = time.monotonic() + 30
    # The server looks at its folder every few milliseconds.
    while {name: of["size"] for name, of in files._under(digest).items()} != sizes(there.parent):
        assert time.monotonic() < until
    assert blobs.read(digest).digest == digest  # of the copy
    adapter.save(folder / "given")
    if adopted:
        with blobs.receive(folder / "given", headers=lambda reader: None, check=lambda path, pair: None) as received:
            blobs.adopt(received)
    else:
        blobs.put(adapter)
    assert BlobStore(bucket("another")).read(digest).digest == blobs.read(digest).digest == digest
    assert s3_server.objects(folder.name) == before


@IN_S3
def test_damage_is_written_over_and_nothing_is_deleted_for_it(
    s3_server: S3Server, bucket: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, adapter = BlobStore(bucket()), make_adapter(0)
    blobs.put(adapter)
    [there] = (s3_server.folder / s3.BUCKET / folder.name).rglob(WEIGHTS)
    _change(there)
    monkeypatch.setattr(object_files.obstore, "delete", None)
    blobs.put(adapter)
    assert BlobStore(bucket("another")).read(adapter.digest).digest == adapter.digest


@IN_S3
def test_a_damaged_copy_that_somebody_reads_is_no_reason_to_store_the_objects_again(
    bucket: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, adapter = BlobStore(bucket()), make_adapter(0)
    digest = blobs.put(adapter)
    os.truncate(blobs.path(digest) / WEIGHTS, 100)
    with monkeypatch.context() as patch, blobs._files.held(digest):
        patch.setattr(object_files.obstore, "delete", None)
        patch.setattr(object_files.obstore, "put", None)
        assert blobs.put(adapter) == digest
        with pytest.raises(BackendError, match="somebody reads it"):
            blobs.read(digest)
    assert blobs.read(digest).digest == digest


@IN_S3
def test_a_damaged_copy_is_no_reason_to_delete_the_objects(
    bucket: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, adapter = BlobStore(bucket()), make_adapter(0)
    os.truncate(blobs.path(blobs.put(adapter)) / WEIGHTS, 100)
    adapter.save(folder / "given")
    monkeypatch.setattr(object_files.obstore, "delete", None)
    monkeypatch.setattr(object_files.obstore, "put", None)
    with blobs.receive(folder / "given", headers=lambda reader: None, check=lambda path, pair: None) as received:
        blobs.adopt(received)
    with blobs.held(adapter.digest) as path:
        assert LoraAdapter.load(path).digest == adapter.digest


@IN_S3
def test_copies_are_bounded_and_the_least_recently_used_goes_first(bucket: Callable[..., str]) -> None:
    adapters = [make_adapter(seed, rank=400) for seed in range(4)]  # 48 kB each
    BlobStore(bucket()).put(adapters[0])
    for adapter in adapters:
        BlobStore(bucket()).put(adapter)
    blobs = BlobStore(bucket("small", cache_mb=0))
    for adapter in adapters:
        assert blobs.read(adapter.digest).digest == adapter.digest
        assert [a.digest for a in adapters if blobs.path(a.digest).exists()] == [adapter.digest]


def test_a_copy_that_is_being_read_stays_and_the_oldest_of_the_others_goes(folder: Path) -> None:
    cache = BlobCache(folder / "cache", 25_000)
    digests = [make_adapter(seed).digest for seed in range(3)]

    def add(digest: str) -> None:
        with cache.incoming() as made:
            (made / "file").write_bytes(bytes(10_000))
            cache.add(digest, made)

    add(digests[0])
    add(digests[1])
    for digest, used in zip(digests, (1.0, 2.0), strict=False):
        os.utime(cache.path(digest), (used, used))
    with cache.held(digests[0]) as path:
        assert path is not None
        os.utime(path, (1.0, 1.0))
        add(digests[2])
        assert path.is_dir() and not cache.path(digests[1]).exists() and not cache.discard(digests[0])
    add(digests[1])
    assert [cache.path(digest).exists() for digest in digests] == [False, True, True]
    assert cache.discard(digests[1]) and cache.discard(digests[1])


def test_a_cache_that_is_open_to_others_is_refused(folder: Path) -> None:
    (folder / "cache").mkdir(mode=0o700)
    (folder / "cache").chmod(0o755)
    with pytest.raises(BackendError, match="mode 755"):
        BlobCache(folder / "cache", 1)


def test_a_folder_that_others_may_write_to_is_not_swept(folder: Path) -> None:
    kept = folder / "cache" / "incoming" / "somebody's"
    kept.mkdir(parents=True, mode=0o700)
    (folder / "cache").chmod(0o777)
    (folder / "link").symlink_to(folder / "cache")
    for cache, words in ((folder / "cache", "mode 777"), (folder / "link", "symbolic link")):
        with pytest.raises(BackendError, match=words):
            BlobCache(cache, 1)
    (folder / "cache").chmod(0o700)
    with pytest.raises(BackendError, match="symbolic link"):
        BlobCache(folder / "link", 1)
    (folder / "file").touch()
    with pytest.raises(BackendError, match="cannot be used"):
        BlobCache(folder / "file", 1)
    assert kept.is_dir()


@pytest.mark.parametrize("make", [lambda cache: BlobCache(cache, 1), BlobStore], ids=["cache", "blobs"])
def test_what_a_link_in_the_place_of_incoming_leads_to_is_not_swept(
    folder: Path, make: Callable[[Path], object]
) -> None:
    (folder / "theirs" / "work").mkdir(parents=True)
    (folder / "theirs" / "file").write_text("dear")
    (folder / "made").mkdir(mode=0o700)
    (folder / "made" / "incoming").symlink_to(folder / "theirs")
    make(folder / "made")
    assert sorted(path.name for path in (folder / "theirs").iterdir()) == ["file", "work"]


@pytest.fixture
def one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> BlobStore:
    """Where a request deletes one object; nothing is sent."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    return BlobStore(f"az://container/prefix?cache={folder / 'cache'}")


def test_where_a_request_deletes_one_object_several_are_sent_at_a_time(
    one_by_one: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [make_adapter(seed, rank=1).digest for seed in range(2 * object_files.DELETED_AT_ONCE)]
    together, sent = threading.Barrier(object_files.DELETED_AT_ONCE, timeout=30), list[str]()

    def delete(_store: object, paths: Sequence[str]) -> None:
        together.wait()
        sent.extend(paths)
        if len(sent) % 2:
            raise FileNotFoundError  # as these stores do

    monkeypatch.setattr(object_files.obstore, "delete", delete)
    assert one_by_one.delete(digests) == (digests, [], [], None)
    assert len(sent) == len(set(sent)) == 3 * len(digests)


def test_a_request_without_an_answer_leaves_its_weights_in_doubt_and_no_others(
    one_by_one: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, silent, refused = (make_adapter(seed).digest for seed in range(3))

    def delete(_store: object, paths: Sequence[str]) -> None:
        for digest, error in ((silent, GenericError("timed out")), (refused, PermissionDeniedError("403"))):
            if digest.removeprefix("sha256:") in paths[0] and paths[0].endswith(WEIGHTS):
                raise error

    monkeypatch.setattr(object_files.obstore, "delete", delete)
    done = one_by_one.delete([clean, silent, refused])
    assert done[:3] == ([clean], [refused], [silent]) and "timed out" in str(done.error)


def test_a_deletion_is_one_request(folder: Path) -> None:
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    caller, _ = server.accept()
                    with caller:
                        requests.append(caller.recv(65536))

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        asked = f"endpoint=http://127.0.0.1:{server.getsockname()[1]}&region=us-east-1&cache={folder / 'cache'}"
        digest = make_adapter(0).digest
        done = BlobStore(f"s3://bucket/prefix?{asked}").delete([digest])
        server.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=30)
    assert (done.gone, done.untouched, done.unsure) == ([], [], [digest])
    assert len(requests) == 1 and requests[0].startswith(b"POST")


@IN_S3
def test_wrong_keys_and_a_server_that_is_not_there_are_errors_of_ours(
    bucket: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        refused = BlobStore(bucket())
    for call in (
        lambda: refused.read(make_adapter(0).digest),
        lambda: refused.put(make_adapter(0)),
        lambda: list(refused.stored()),
        lambda: pepper.read_or_make(refused),
    ):
        with pytest.raises(BackendError, match="403") as raised:
            call()
        assert s3.SECRET_KEY not in str(raised.value)
    assert "403" in str(refused.delete([make_adapter(0).digest]).error)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://host/path", "s3://BUCKET/PREFIX"),
        ("file:///etc", "s3://BUCKET/PREFIX"),
        ("s3:///prefix", "s3://BUCKET/PREFIX"),
        ("s3://key:secret@bucket/prefix", "credentials"),
        ("s3://bucket/p?secret_access_key=x", "secret_access_key"),
        ("gs://bucket/p?endpoint=x", "endpoint"),
        ("s3://bucket/p?cache_mb=-1", "megabytes"),
    ],
)
def test_urls_that_cannot_work_are_refused_without_repeating_secrets(url: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words) as raised:
        BlobStore(url)
    assert "key:secret" not in str(raised.value)


def test_a_url_says_where_the_store_is_and_where_copies_go(folder: Path) -> None:
    found = parse_place(f"s3://bucket/a/b/?endpoint=https://minio:9000&cache={folder}&cache_mb=5")
    assert found == ("s3://bucket/a/b", {"endpoint": "https://minio:9000"}, folder, 5_000_000)
    assert object_files.cache_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/lorafleet/blobs")


def test_gs_and_az_are_made_without_a_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert BlobStore(f"az://container/prefix?cache={folder}").name == "az://container/prefix"
