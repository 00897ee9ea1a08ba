"""Lists in pages (AIP-158): a token says after which name the next page begins, and is nobody's to read."""

from __future__ import annotations

import base64
import binascii
from typing import Final

from lorafleet.errors import InvalidInputError

DEFAULT_SIZE: Final = 100
LARGEST: Final = 1000


def page_size(asked: int) -> int:
    """0 is the default, more than the largest the largest; InvalidInputError below 0."""
    if asked < 0:
        raise InvalidInputError(f"found a page_size of {asked}, expected 0 or more")
    return min(asked or DEFAULT_SIZE, LARGEST)


def token_after(last: str) -> str:
    return base64.urlsafe_b64encode(last.encode()).decode()


def last_before(token: str) -> str:
    """What the page before ended with; empty for the first page. InvalidInputError for what is no token."""
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        raise InvalidInputError(
            "found a page_token that no list gave; send the next_page_token of the page before, or none"
        ) from None
