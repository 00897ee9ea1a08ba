"""A few hundred of the hostile names of :mod:`tests.fuzz.names`, and that what it looks for would be seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import names
from tests.registry.conftest import PostgresServer, postgres_server

__all__ = ["postgres_server"]  # a fixture


def test_no_name_leads_out_of_the_registry() -> None:
    counted = names.main(300, seed=20261122)
    assert sum(counted.values()) >= 300 and len(counted) > 30


@pytest.mark.postgres
def test_no_name_troubles_postgresql_either(postgres_server: PostgresServer) -> None:
    """Which holds no NUL, and no numbers and texts beyond its own limits."""
    assert sum(names.main(200, seed=20261123, url=postgres_server.url("hostile_names")).values()) >= 200


def test_an_escape_would_be_seen(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.txt").write_text(names.SECRET)
    with names.WATCH.on(inside), names.WATCH.trying():
        (inside / "x").write_text("")
        assert names.WATCH.escapes == []
        (inside / ".." / "outside" / "secret.txt").read_text()
        (outside / "made").mkdir()
        list(outside.iterdir())
        (inside / "x").rename(outside / "x")
    reported = [each.split(" ")[0] for each in names.WATCH.escapes]
    assert reported == ["open", "os.mkdir", "os.listdir", "os.rename"]
