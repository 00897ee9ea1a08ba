from __future__ import annotations

import pytest

from lorafleet.errors import InvalidInputError
from lorafleet.registry.references import Reference, parse_reference


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("acme/sql", Reference("acme", "sql")),
        ("acme/sql@champion", Reference("acme", "sql", alias="champion")),
        ("a.b-c_1/D.2:17", Reference("a.b-c_1", "D.2", number=17)),
    ],
)
def test_reference_is_parsed_and_written_back(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference
    assert str(reference) == text


MALFORMED = """
sql /sql acme/ a/b/c ../sql acme/../x acme/sql@ acme/sql: acme/sql:0 acme/sql:-1 acme/sql:1@x acme/sql@x:1 acme/sql:1.0
acme/sql:٣ acme/sql:1234567890
"""


@pytest.mark.parametrize("text", [*MALFORMED.split(), "", "acme/sql\n", " acme/sql"])
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="TENANT/ADAPTER"):
        parse_reference(text)
