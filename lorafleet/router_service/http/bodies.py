"""A request's body as one JSON object: bounded in size and time, before anything of it is believed."""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final

from pydantic_core import from_json
from starlette.requests import Request

from lorafleet.router_service.http.errors import BadRequestError

MAX_BODY_BYTES: Final = 2**20
MAX_CONTAINERS: Final = 10_000
"""Arrays and objects in a body: a conversation has one or two a turn. Each is an object that Python's garbage collector
looks at, again and again while further ones come, and everybody waits: 250,000 fit into a body, and took 1.5 s."""
_READ_S: Final = 30.0
"""A client that sends slower than that holds a connection for nothing."""
# To its end, or to that of the body: a text without an end must not be looked for once more from within it.
_TEXT: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)


async def read_json(request: Request) -> dict[str, Any]:
    """Raises BadRequestError for what is encoded, too large, too slow, or no JSON object."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise BadRequestError(
            f"found the content-encoding {encoding!r}, expected none: a body may be small and what it unpacks to not"
        )
    body = bytearray()
    try:
        async with asyncio.timeout(_READ_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise BadRequestError(f"the body has more than {MAX_BODY_BYTES} bytes; send a shorter prompt")
    except TimeoutError:
        raise BadRequestError(f"the body did not come within {_READ_S:g} s; send it at once") from None
    if containers(body) > MAX_CONTAINERS:
        raise BadRequestError(
            f"the body has more than {MAX_CONTAINERS} arrays and objects; send a prompt as a text, or as one list of "
            "token ids, and longer conversations in fewer messages"
        )
    try:
        found = from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"the body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadRequestError("the body is JSON, expected an object with fields such as 'model'")
    return found


def containers(body: bytes | bytearray) -> int:
    """Arrays and objects in a JSON text, or somewhat more where there are few: brackets in texts are looked at only
    where it matters."""
    most = body.count(b"[") + body.count(b"{")
    if most <= MAX_CONTAINERS:
        return most
    outside = _TEXT.sub(b"", body)
    return outside.count(b"[") + outside.count(b"{")
