"""The pepper of an installation: 32 random bytes in a file beside the weights, which no copy of the database has."""

from __future__ import annotations

import secrets

from lorafleet.errors import BackendError
from lorafleet.registry.blobs import BlobStore

NAME = "pepper"
SIZE = 32


def read_or_make(blobs: BlobStore) -> bytes:
    """The bytes of the file ``pepper``, made where there is none; whoever makes it first, all read the same.

    BackendError where the file cannot be read or made, or is not 32 bytes long.
    """
    try:
        found = blobs.secret(NAME, secrets.token_bytes(SIZE))
    except OSError as error:
        raise BackendError(
            f"the pepper of API keys in {blobs.name} cannot be used ({error}); let this process read and write there"
        ) from error
    if len(found) != SIZE:
        raise BackendError(
            f"the pepper of API keys in {blobs.name} has {len(found)} bytes, expected {SIZE}; restore it from a "
            "backup: without it no key that was made opens anything"
        )
    return found
