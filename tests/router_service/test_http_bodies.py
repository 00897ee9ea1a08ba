from __future__ import annotations

import json
import time

import pytest

from lorafleet.router_service.http.bodies import MAX_BODY_BYTES, MAX_CONTAINERS, containers


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"a": [[], {}]}', 4),
        (json.dumps({"a": "[" * (2 * MAX_CONTAINERS)}).encode(), 1),
        (json.dumps({"a": '\\"[' * (2 * MAX_CONTAINERS), "b": [1]}).encode(), 2),
        (json.dumps({"a": "[" * MAX_CONTAINERS, "b": [[]] * MAX_CONTAINERS}).encode(), MAX_CONTAINERS + 2),
        (b'{"a": "' + b"[" * (2 * MAX_CONTAINERS), 1),  # no end of the text
        (b'{"a": "' + b"[" * (2 * MAX_CONTAINERS) + b"\\", 1),
    ],
)
def test_arrays_and_objects_are_counted_outside_of_texts(body: bytes, expected: int) -> None:
    assert containers(body) == expected


@pytest.mark.parametrize(
    "part", [b'"",', b'\\"', b'"[\\\\', b'["]', b'"\\""[', b"[", b'"\xff[\\'], ids=lambda part: part.decode("latin-1")
)
def test_no_body_takes_long_to_count(part: bytes) -> None:
    body = b'["' + b"[" * (MAX_CONTAINERS + 1) + b'",' + part * (MAX_BODY_BYTES // len(part))
    began = time.process_time()
    containers(body[:MAX_BODY_BYTES])
    assert time.process_time() - began < 0.5  # mostly under 0.05 s; what is not linear takes minutes
