"""Blobs in an object store, by obstore: S3 and what speaks like it, Google's and Azure's.

``s3://BUCKET/PREFIX``, ``gs://BUCKET/PREFIX``, ``az://CONTAINER/PREFIX``, with options behind a question mark:

=============  ====================================================================================================
``endpoint``   of S3, where it is not Amazon's: ``https://minio.example:9000``; also ``http://``
``region``     of S3
``cache``      a folder of this machine for copies, this user's alone; default ``~/.cache/lorafleet/blobs``
``cache_mb``   how large it may become, 8192 MB unless said otherwise
=============  ====================================================================================================

Credentials are never part of a URL, which everybody sees who lists processes: obstore takes them from the environment
(``AWS_ACCESS_KEY_ID`` and its like) or from the machine's role.

A blob's objects lie under the same paths as its files in a folder. ``adapter_config.json`` is written last and deleted
first: a blob is there when that object is. Two that store one digest write the same bytes, so that it does not matter
whose object stays. Multipart uploads that a killed process left are the bucket's own to remove, by a lifecycle rule.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from lorafleet.adapters.format import CONFIG_NAME, GATES_NAME, WEIGHTS_NAME
from lorafleet.adapters.streaming import folder_digest
from lorafleet.errors import BackendError, InvalidInputError
from lorafleet.registry.blob_cache import BlobCache
from lorafleet.registry.files import Deletion, StoredBlob, blob_path, check_time

SCHEMES = ("s3", "gs", "az")
CACHE_MB = 8192
PIECE_BYTES = 8 * 2**20
"""Of a download; an upload has several of them in memory at a time."""
UPLOADED_AT_ONCE = 4
LISTED_AT_ONCE = 1000
DELETED_AT_ONCE = 10
"""Digests, in as many threads, where a request deletes one object: 100 of them in some seconds instead of half a
minute, at 0.1 s a request."""
# The object that makes a blob whole is the last one.
_NAMES = (GATES_NAME, WEIGHTS_NAME, CONFIG_NAME)


class Place(NamedTuple):
    """A URL, taken apart."""

    url: str
    """Without options"""
    options: dict[str, str]
    """Of the store"""
    cache: Path
    cache_bytes: int


def parse_place(text: str) -> Place:
    """InvalidInputError for a URL that is no object store's, has credentials in it, or options that are not known."""
    parts = urlsplit(text)
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise InvalidInputError(
            f"found {parts.scheme}://… as the place of weights, expected a folder, or s3://BUCKET/PREFIX, gs://… or "
            "az://…"
        )
    if "@" in parts.netloc:
        raise InvalidInputError(
            f"found credentials in a {parts.scheme}:// URL, which others can see; set them in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what the store has in their place)"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    cache = options.pop("cache", "")
    cache_mb = options.pop("cache_mb", str(CACHE_MB))
    known = {"endpoint", "region"} if parts.scheme == "s3" else set()
    if unknown := sorted(options.keys() - known):
        raise InvalidInputError(
            f"found the option {', '.join(unknown)} in a {parts.scheme}:// URL, expected some of: "
            f"{', '.join(sorted(known | {'cache', 'cache_mb'}))}"
        )
    if not cache_mb.isascii() or not cache_mb.isdigit():
        raise InvalidInputError(f"found cache_mb={cache_mb}, expected a number of megabytes")
    url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    return Place(url, options, Path(cache) if cache else cache_folder(), int(cache_mb) * 10**6)


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """``$XDG_CACHE_HOME/lorafleet/blobs``, or ``~/.cache/lorafleet/blobs``."""
    root = environment.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "lorafleet" / "blobs"
    except RuntimeError:
        raise InvalidInputError("this user has no home folder to keep copies of weights in; add ?cache=DIR") from None


class ObjectFiles:
    """:class:`~lorafleet.registry.files.BlobFiles` under a URL, read by way of copies that were checked once."""

    def __init__(self, url: str) -> None:
        self._place = place = parse_place(url)
        self._cache = BlobCache(place.cache, place.cache_bytes)
        try:
            self._store = _connect(place, request="1h", silence="20s", retries=5)
            # Of deletions. Without retries, so that a clean answer says that nothing is on its way any more.
            self._impatient = _connect(place, request="5s", silence="5s", retries=0)
        except (BaseError, ValueError) as error:
            raise InvalidInputError(
                f"{place.url} cannot be used as a place of weights ({_first_line(error)})"
            ) from None

    @property
    def name(self) -> str:
        return self._place.url

    @property
    def _many_at_once(self) -> bool:
        """S3 deletes a thousand objects in one request, and does not mind those that are not there; others do."""
        return self._place.url.startswith("s3:")

    def path(self, digest: str) -> Path:
        return self._cache.path(digest)

    def incoming(self) -> AbstractContextManager[Path]:
        return self._cache.incoming()

    def publish(self, digest: str, folder: Path) -> None:
        with _as_os_error():
            for name in _NAMES:
                if (folder / name).exists():
                    obstore.put(
                        self._store,
                        f"{blob_path(digest)}/{name}",
                        folder / name,
                        chunk_size=PIECE_BYTES,
                        max_concurrency=UPLOADED_AT_ONCE,
                    )
        self._cache.add(digest, folder)

    def mend(self, digest: str, folder: Path) -> None:
        self._cache.discard(digest)
        # Weights of this digest never have these, so that it does not matter how late they go.
        strange = [name for name in self._under(digest) if not (folder / name).exists()]
        self.publish(digest, folder)
        with _as_os_error(), suppress(FileNotFoundError):
            for name in strange:
                obstore.delete(self._store, f"{blob_path(digest)}/{name}")

    @contextmanager
    def held(self, digest: str) -> Iterator[Path | None]:
        for _ in range(5):
            with self._cache.held(digest) as path:
                if path is not None:
                    yield path
                    return
            if not self._fetch(digest):
                yield None
                return
        # Somebody takes each copy away before it is read.
        raise BackendError(f"the cache of weights {self._cache.folder} is too small; give it more by cache_mb")

    @contextmanager
    def original(self, digest: str) -> Iterator[Path | None]:
        # A listing would be cheaper, and says nothing of what the objects hold where a store gives no MD5 of them.
        found = self._under(digest)
        if CONFIG_NAME not in found:
            yield None
            return
        with self._cache.incoming() as folder:
            for name in found:
                with _as_os_error(), suppress(FileNotFoundError):  # it went since it was listed
                    self._download(f"{blob_path(digest)}/{name}", folder / name)
            yield folder
            self._cache.add(digest, folder)

    def fetch_again(self, digest: str) -> bool:
        if not self._cache.discard(digest):
            # Of what the store has this says nothing.
            raise BackendError(
                f"the copy of the weights {digest} in {self._cache.folder} is damaged, and somebody reads it, so that "
                "it cannot be fetched again; call again"
            )
        return True

    def delete(self, digests: Sequence[str], *, until: float) -> Deletion:
        if self._many_at_once:
            done = self._delete(digests, until)
        else:
            with ThreadPoolExecutor(DELETED_AT_ONCE) as threads:
                each = list(threads.map(lambda digest: self._delete([digest], until), digests))
            done = Deletion(
                [digest for one in each for digest in one.gone],
                [digest for one in each for digest in one.untouched],
                [digest for one in each for digest in one.unsure],
                next((one.error for one in each if one.error is not None), None),
            )
        with suppress(OSError):  # copies of what is gone go when others need their place, too
            for digest in digests:
                self._cache.discard(digest)
        return done

    def _delete(self, digests: Sequence[str], until: float) -> Deletion:
        """Several digests, together; the configurations first, so that none is there when its weights go."""
        try:
            check_time(until)
        except TimeoutError as error:
            return Deletion([], list(digests), [], error)
        try:
            for names in ((CONFIG_NAME,), (WEIGHTS_NAME, GATES_NAME)):
                paths = [f"{blob_path(digest)}/{name}" for digest in digests for name in names]
                with _as_os_error():
                    self._delete_objects(paths)
        except PermissionError as error:  # a clean answer, too
            return Deletion([], list(digests), [], error)
        except OSError as error:
            return Deletion([], [], list(digests), error)
        return Deletion(list(digests), [], [], None)

    def _delete_objects(self, paths: Sequence[str]) -> None:
        """Objects that may not be there."""
        many = 1000 if self._many_at_once else 1
        for start in range(0, len(paths), many):
            with suppress(FileNotFoundError):
                obstore.delete(self._impatient, paths[start : start + many])

    def stored(self) -> Iterator[StoredBlob]:
        # Object stores list by path, so that a digest's objects come one after the other.
        for digest, found in groupby(self._objects(), key=lambda each: each[0]):
            objects = [each for _, each in found]
            newest: float = max(each["last_modified"].timestamp() for each in objects)
            yield StoredBlob(digest, sum(each["size"] for each in objects), newest)

    def secret(self, name: str, fresh: bytes) -> bytes:
        with _as_os_error():
            with suppress(FileNotFoundError):
                return bytes(obstore.get(self._store, name).bytes())
            with suppress(AlreadyExistsError):
                obstore.put(self._store, name, fresh, mode="create", use_multipart=False)
            return bytes(obstore.get(self._store, name).bytes())

    def _fetch(self, digest: str) -> bool:
        """Copy a blob into the cache, checked; False where it is not there."""
        with self.original(digest) as folder:
            if folder is None:
                return False
            fetched = folder_digest(folder)
            if fetched != digest:
                raise InvalidInputError(f"what {self.name} holds has the digest {fetched}")
        return True

    def _download(self, path: str, target: Path) -> None:
        with target.open("xb") as file:
            for piece in obstore.get(self._store, path).stream(min_chunk_size=PIECE_BYTES):
                file.write(piece)

    def _under(self, digest: str) -> dict[str, Any]:
        """What is known of those of a blob's objects that are there, by name."""
        with _as_os_error():
            objects = obstore.list(self._store, blob_path(digest)).collect()
        found = {each["path"].rpartition("/")[2]: each for each in objects}
        return {name: found[name] for name in _NAMES if name in found}

    def _objects(self) -> Iterator[tuple[str, Any]]:
        """Digest and what is known of each object under one, a page at a time."""
        with _as_os_error():
            for page in obstore.list(self._store, "sha256", chunk_size=LISTED_AT_ONCE):
                for each in page:
                    *_, hexadecimal, _name = each["path"].split("/")
                    digest = f"sha256:{hexadecimal}"
                    if len(hexadecimal) == 64 and each["path"].endswith(f"{blob_path(digest)}/{_name}"):
                        yield digest, each


def _connect(place: Place, *, request: str, silence: str, retries: int) -> Any:
    """A store whose requests end after a while in all, and after another without a word of the server."""
    client: dict[str, Any] = {"connect_timeout": silence, "read_timeout": silence, "timeout": request}
    if place.options.get("endpoint", "").startswith("http://"):
        client["allow_http"] = True
    retry: dict[str, Any] = {"max_retries": retries, "retry_timeout": timedelta(seconds=60)}
    return from_url(place.url, client_options=client, retry_config=retry, **place.options)  # type: ignore[call-overload]


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What the store's library raises, as what a file system would."""
    try:
        yield
    except AlreadyExistsError:
        raise
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PermissionError(_first_line(error)) from error
    except BaseError as error:
        raise OSError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    """The rest is for debugging the library."""
    return str(error).partition("\n")[0]
