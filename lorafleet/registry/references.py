"""``TENANT/ADAPTER[@ALIAS|:VERSION]``: how requests name a version, and what a name may look like."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorafleet.errors import InvalidInputError, NotFoundError

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_NAME_ONLY = re.compile(_NAME)
# Nine digits: a number that fits every database's integer.
_REFERENCE = re.compile(
    rf"(?P<tenant>{_NAME})/(?P<adapter>{_NAME})(?:@(?P<alias>{_NAME})|:(?P<number>[1-9][0-9]{{0,8}}))?"
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """A parsed reference; at most one of ``alias`` and ``number`` is set."""

    tenant: str
    adapter: str
    alias: str | None = None
    number: int | None = None

    def __str__(self) -> str:
        suffix = f"@{self.alias}" if self.alias else f":{self.number}" if self.number else ""
        return f"{self.tenant}/{self.adapter}{suffix}"


def parse_reference(text: str) -> Reference:
    """Parse ``TENANT/ADAPTER[@ALIAS|:VERSION]``; InvalidInputError where the text is no reference."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise InvalidInputError(
            f"found {text!r}, expected a reference TENANT/ADAPTER, TENANT/ADAPTER@ALIAS or TENANT/ADAPTER:VERSION "
            "with names of letters, digits, '.', '_' and '-', and a version from 1"
        )
    number = match["number"]
    return Reference(match["tenant"], match["adapter"], match["alias"], int(number) if number else None)


def check_name(kind: str, name: str) -> str:
    """The name itself where it can be part of a reference; InvalidInputError otherwise."""
    if not _NAME_ONLY.fullmatch(name):
        raise InvalidInputError(
            f"found the {kind} name {name!r}, expected 1 to 100 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        )
    return name


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def check_digest(what: str, digest: str) -> str:
    """The digest itself where it is well-formed; InvalidInputError otherwise."""
    if not is_digest(digest):
        raise InvalidInputError(f"{what}: found the digest {digest!r}, expected 'sha256:' and 64 lower-case hex digits")
    return digest


def not_found(what: str) -> NotFoundError:
    """The one answer for what is missing and for what is another's, so that the two cannot be told apart."""
    return NotFoundError(f"{what} is not there, or is not yours; check the name, and that you were given access")
