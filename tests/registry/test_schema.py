"""Migrations and tables say the same, and a migration happens whole, once, or not at all."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from lorafleet.errors import InvalidInputError, UnavailableError
from lorafleet.registry import Lineage, Quota, Registry, schema
from lorafleet.registry.database import Database, make_engine, parse_url
from lorafleet.registry.tables import Base
from tests.registry.conftest import Clock, make_adapter


def execute(url: str, *statements: str) -> None:
    engine = make_engine(parse_url(url))
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def constraints(url: str) -> dict[str, Any]:
    """Everything that Alembic's comparison passes over, or compares on one database only."""
    engine = make_engine(parse_url(url))
    inspector = inspect(engine)
    found = {
        table: {
            "primary": inspector.get_pk_constraint(table)["constrained_columns"],
            "unique": sorted((u["name"], tuple(u["column_names"])) for u in inspector.get_unique_constraints(table)),
            "checks": sorted(str(c["name"]) for c in inspector.get_check_constraints(table)),
            "foreign": sorted(
                (f["name"], tuple(f["constrained_columns"]), f["referred_table"], tuple(f["referred_columns"]))
                for f in inspector.get_foreign_keys(table)
            ),
            "indexes": sorted(
                (i["name"], tuple(i["column_names"]), bool(i["unique"]), bool(i.get("dialect_options")))
                for i in inspector.get_indexes(table)
                if not i.get("duplicates_constraint")
            ),
        }
        for table in sorted(inspector.get_table_names())
        if table != "alembic_version"
    }
    engine.dispose()
    return found


def test_migrations_lead_to_the_tables_of_the_models(url: str) -> None:
    schema.upgrade(url)
    assert schema.check(url) == []
    migrated = constraints(url)
    engine = make_engine(parse_url(url))
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    engine.dispose()
    assert migrated == constraints(url)
    assert set(migrated) == set(Base.metadata.tables)
    assert any("ck_" in name for table in migrated.values() for name in table["checks"])


def test_upgrading_again_changes_nothing(url: str) -> None:
    head = schema.upgrade(url)
    assert schema.upgrade(url) == head
    assert head == ScriptDirectory.from_config(schema.migrations_config()).get_current_head()


def test_check_names_what_differs(url: str) -> None:
    schema.upgrade(url)
    execute(url, "ALTER TABLE tenants ADD COLUMN extra INTEGER", "UPDATE alembic_version SET version_num = '0000'")
    revision, tables = schema.check(url)
    assert "found 0000, expected 0008" in revision
    assert "extra" in tables


def test_check_of_a_database_that_is_not_there_does_not_make_one(folder: Path) -> None:
    [line] = schema.check(f"sqlite:///{folder / 'none.db'}")
    assert "no database" in line
    assert list(folder.iterdir()) == []


def test_database_of_a_newer_version_is_refused(url: str, folder: Path) -> None:
    schema.upgrade(url)
    execute(url, "UPDATE alembic_version SET version_num = 'from-the-future'")
    with pytest.raises(UnavailableError, match="newer lorafleet"):
        Registry.open(url, folder)


def test_migration_that_dies_at_its_end_leaves_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade = command.upgrade

    def upgrade_and_die(*args: Any) -> None:
        upgrade(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "upgrade", upgrade_and_die)
        with pytest.raises(KeyboardInterrupt):
            schema.upgrade(url)
    engine = make_engine(parse_url(url))
    assert inspect(engine).get_table_names() == []
    engine.dispose()
    schema.upgrade(url)
    assert schema.check(url) == []


def test_the_journal_of_revision_2_is_kept_and_says_what_counted(url: str, folder: Path) -> None:
    with schema._exclusive(parse_url(url)) as connection:
        command.upgrade(schema.migrations_config(connection), "0002")
    execute(
        url,
        "INSERT INTO tenants (id, name, weight, created_at) VALUES (1, 'acme', 1, 0)",
        "INSERT INTO bases (id, name, digest, architecture, parameters, licence, created_at)"
        " VALUES (1, 'tiny', 'sha256:b', 'L', 1, '', 0)",
        "INSERT INTO federations (id, tenant_id, name, base_id, settings, created_at) VALUES (1, 1, 'f', 1, '{}', 0)",
        "INSERT INTO leases (federation_id, tenant_id, owner, taken_at, expires_at) VALUES (1, 1, 'me', 0, 1)",
        "INSERT INTO members (id, federation_id, tenant_id, key, joined_at) VALUES (1, 1, 1, 'k', 0)",
        "INSERT INTO rounds (id, tenant_id, federation_id, number, state, opened_at, closed_at, reason, report)"
        " VALUES (1, 1, 1, 1, 'committed', 0, 1, '', '{}'), (2, 1, 1, 2, 'open', 0, NULL, '', '{}')",
        *(
            "INSERT INTO updates (id, tenant_id, federation_id, round_id, member_key, attempt, accepted, reason,"
            f" digest, num_examples, rank, size_bytes, metrics, recorded_at) VALUES ({row})"
            for row in (
                "1, 1, 1, 1, 'k', 1, FALSE, 'norm', '', 0, 0, 0, '{}', 0",
                "2, 1, 1, 1, 'k', 2, TRUE, '', 'sha256:a', 9, 4, 5, '{}', 0",
                "3, 1, 1, 2, 'k', 1, TRUE, '', 'sha256:c', 9, 4, 5, '{}', 0",
            )
        ),
    )
    with Registry.open(url, folder / "blobs", clock=lambda: 0.5) as registry:
        assert schema.check(url) == []
        federation = registry.federation("acme", "f")
        journal = [(u.ordered_in, u.work, u.attempt, u.counted_in) for u in registry.journal(federation)]
        assert journal == [(1, 1, 2, 1), (2, 1, 1, None)]
        assert [r.state for r in registry.rounds(federation)] == ["committed", "abandoned"]
        assert registry.take_lease(federation, "me", for_s=1.0).token == 1


def test_federations_and_members_of_revision_3_are_active_and_known_by_their_word(url: str, folder: Path) -> None:
    with schema._exclusive(parse_url(url)) as connection:
        command.upgrade(schema.migrations_config(connection), "0003")
    execute(
        url,
        "INSERT INTO tenants (id, name, weight, created_at) VALUES (1, 'acme', 1, 0)",
        "INSERT INTO bases (id, name, digest, architecture, parameters, licence, created_at)"
        " VALUES (1, 'tiny', 'sha256:b', 'L', 1, '', 0)",
        "INSERT INTO federations (id, tenant_id, name, base_id, settings, created_at) VALUES (1, 1, 'f', 1, '{}', 7)",
        "INSERT INTO members (id, federation_id, tenant_id, key, joined_at)"
        " VALUES (101, 1, 1, 'k', 0), (102, 1, 1, 'l', 0)",
        "INSERT INTO rounds (id, tenant_id, federation_id, number, state, opened_at, closed_at, reason, report)"
        " VALUES (1, 1, 1, 1, 'committed', 0, 1, '', '{}')",
        "INSERT INTO updates (id, tenant_id, federation_id, round_id, member_key, attempt, accepted, reason, digest,"
        " num_examples, rank, size_bytes, metrics, recorded_at, ordered_in, work, expert_digest, steps, seconds,"
        " counted_in, share) VALUES (1, 1, 1, 1, 'k', 1, TRUE, '', 'sha256:a', 9, 4, 5, '{}', 3, 1, 1, '', 2, 5, 1, 1)",
    )
    with Registry.open(url, folder / "blobs") as registry:
        assert schema.check(url) == []
        federation = registry.federation("acme", "f")
        assert (federation.state, federation.state_at, federation.state_by) == ("active", 7.0, "")
        members = [(m.key, m.public_key, m.revoked_at) for m in registry.members(federation)]
        assert members == [("k", "", None), ("l", "", None)]
        [update] = registry.journal(federation)
        assert (update.counted_in, update.share, update.recorded_at, update.dropped_at) == (1, 1.0, 3.0, None)
        token = registry.invite(federation, tenant="acme", for_s=60.0).token
        assert registry.accept_invitation(token, key="m").key == "m"


# A row or two for every table there ever was; a revision gets those of its tables, in those columns that it has. Ids
# are high, as PostgreSQL's sequences do not know of rows that were given theirs.
HISTORY: list[tuple[str, dict[str, Any]]] = [
    ("tenants", {"id": 101, "name": "acme", "weight": 1, "created_at": 1}),
    ("tenants", {"id": 102, "name": "rival", "weight": 2, "created_at": 1}),
    ("bases", {"id": 101, "name": "tiny", "digest": "sha256:" + "b" * 64, "architecture": "L", "parameters": 1,
               "licence": "MIT", "created_at": 1}),
    ("federations", {"id": 101, "tenant_id": 101, "name": "f", "base_id": 101, "settings": '{"rule": "exact"}',
                     "created_at": 2, "state": "paused", "state_at": 3, "state_by": "ada", "state_reason": "why"}),
    ("leases", {"federation_id": 101, "tenant_id": 101, "owner": "me", "taken_at": 2, "expires_at": 3, "token": 4}),
    ("members", {"id": 101, "federation_id": 101, "tenant_id": 102, "key": "k", "joined_at": 2, "public_key": "",
                 "revoked_at": None, "revoked_by": "", "revoked_reason": ""}),
    ("invitations", {"id": 101, "federation_id": 101, "tenant_id": 102, "code": "c", "mac": "m", "created_at": 2,
                     "expires_at": 3, "accepted_at": 2.5, "member_key": "k"}),
    ("adapters", {"id": 101, "tenant_id": 101, "name": "sql", "base_id": 101, "federation_id": None, "created_at": 2}),
    ("adapters", {"id": 102, "tenant_id": 101, "name": "shared", "base_id": 101, "federation_id": 101,
                  "created_at": 2}),
    ("rounds", {"id": 101, "tenant_id": 101, "federation_id": 101, "number": 1, "state": "committed", "opened_at": 2,
                "closed_at": 3, "reason": "", "report": "{}", "noise_seed": None}),
    ("rounds", {"id": 102, "tenant_id": 101, "federation_id": 101, "number": 2, "state": "open", "opened_at": 4,
                "closed_at": None, "reason": "", "report": "{}", "noise_seed": "ab"}),
    ("updates", {"id": 101, "tenant_id": 101, "federation_id": 101, "round_id": 101, "member_key": "k", "attempt": 1,
                 "accepted": True, "reason": "", "digest": "sha256:" + "a" * 64, "num_examples": 9, "rank": 4,
                 "size_bytes": 5, "metrics": '{"loss": 2.5}', "recorded_at": 3, "ordered_in": 1, "work": 1,
                 "expert_digest": "", "steps": 0, "seconds": 0, "counted_in": 1, "share": None, "dropped_at": None}),
    *(
        ("versions", {"id": 100 + number, "tenant_id": 101, "adapter_id": 101, "number": number,
                      "digest": "sha256:" + str(number) * 64, "rank": 2, "parameters": 10, "state": state,
                      "licence": "", "lineage": None, "round_id": None, "created_at": 2, "state_at": 2,
                      "purged_at": None})
        for number, state in enumerate(("staged", "staged", "staged", "retired"), start=1)
    ),
    ("versions", {"id": 109, "tenant_id": 101, "adapter_id": 102, "number": 1, "digest": "sha256:" + "9" * 64,
                  "rank": 2, "parameters": 10, "state": "evaluated", "licence": "MIT", "round_id": 101, "created_at": 3,
                  "state_at": 3, "purged_at": None,
                  "lineage": '{"federation": "f", "round": 1, "rule": "exact", "parents": []}'}),
    ("aliases", {"adapter_id": 101, "name": "champion", "tenant_id": 101, "number": 2, "moved_at": 3}),
    ("aliases", {"adapter_id": 102, "name": "champion", "tenant_id": 101, "number": 1, "moved_at": 3}),
    ("evaluations", {"id": 101, "tenant_id": 101, "version_id": 102, "member": "k", "loss": 1.5, "tokens": 7,
                     "created_at": 3}),
    # Of revision 6. Moves are read in the order of their ids.
    ("alias_moves", {"id": -1, "tenant_id": 101, "adapter_id": 101, "alias": "champion", "number": 2, "moved_at": 3,
                     "undone_at": None}),
    ("alias_moves", {"id": -2, "tenant_id": 101, "adapter_id": 102, "alias": "champion", "number": 1, "moved_at": 3,
                     "undone_at": None}),
    ("cards", {"version_id": 102, "tenant_id": 101, "text": "# SQL"}),
    ("keys", {"id": 101, "tenant_id": 102, "key_id": "a" * 12, "name": "n", "scopes": "infer", "mac": "b" * 64,
              "created_at": 3, "expires_at": None, "revoked_at": 4}),
    ("grants", {"id": 101, "tenant_id": 101, "adapter_id": 102, "to_tenant_id": None, "granted_at": 3}),
    ("quotas", {"tenant_id": 101, "requests_per_minute": 5, "tokens_per_minute": None, "concurrent_requests": None,
                "adapters": 9, "budget_tokens": 1, "budget_period_s": 60}),
    ("usage", {"tenant_id": 101, "period_s": 60, "starts_at": 0, "taken_requests": 1, "taken_tokens": 2, "requests": 1,
               "prompt_tokens": 1, "generated_tokens": 1}),
    ("usage_blocks", {"id": 101, "tenant_id": 101, "requests": 1, "tokens": 2, "windows": "{}", "taken_at": 1}),
    ("audit", {"id": 101, "tenant_id": 101, "at": 3, "by": "ada", "action": "version.add", "subject": "acme/sql:1",
               "details": "{}"}),
    # Of revision 7.
    ("base_shapes", {"digest": "sha256:" + "b" * 64, "shapes": '{"m": [2, 3]}'}),
    ("blob_claims", {"token": "t", "digest": "sha256:" + "1" * 64, "expires_at": 4}),
    ("engine_holds", {"service": "s", "digest": "sha256:" + "4" * 64, "expires_at": 4}),
]  # fmt: skip


def literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "NULL", True: "TRUE", False: "FALSE"}[value]
    # A colon would be a parameter's.
    return "'" + value.replace(":", "\\:") + "'" if isinstance(value, str) else repr(value)


def rows(url: str) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, but for the revisions."""
    engine = make_engine(parse_url(url))
    with engine.connect() as connection:
        found = {
            table: sorted(
                (dict(row) for row in connection.execute(text(f"SELECT * FROM {table}")).mappings()), key=repr
            )
            for table in inspect(engine).get_table_names()
            if table not in ("alembic_version", "revision")
        }
    engine.dispose()
    return found


@pytest.mark.parametrize("revision", ["0001", "0002", "0003", "0004", "0005", "0006", "0007"])
def test_every_past_revision_is_upgraded_with_what_is_in_it(url: str, folder: Path, revision: str) -> None:
    with schema._exclusive(parse_url(url)) as connection:
        command.upgrade(schema.migrations_config(connection), revision)
        inspector = inspect(connection)
        columns = {name: {c["name"] for c in inspector.get_columns(name)} for name in inspector.get_table_names()}
    written = [
        (table, {name: value for name, value in row.items() if name in columns[table]})
        for table, row in HISTORY
        if table in columns
    ]
    execute(
        url,
        *(
            f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(map(literal, row.values()))})"
            for table, row in written
        ),
    )
    before = rows(url)
    assert {table for table, found in before.items() if found} == {table for table, _ in written}
    clock = Clock()
    clock.now = 5.0
    with Registry.open(url, folder / "blobs", clock=clock) as registry:
        assert schema.check(url) == []
        after = rows(url)
        for table, old in before.items():
            # Revision 3 gives up rounds that were open: nobody knew what their updates were trained on.
            changed = {"state", "closed_at", "reason"} if table == "rounds" and revision < "0003" else set()
            kept = [{name: row[name] for name in row.keys() & columns[table] - changed} for row in after[table]]
            old = [{name: value for name, value in row.items() if name not in changed} for row in old]
            assert sorted(kept, key=sort_key) == sorted(old, key=sort_key), table
        new = {name for name in after if name not in before} - {"leases", "invitations"}
        sixth = {"alias_moves", "audit", "cards", "grants", "keys", "quotas", "usage", "usage_blocks"}
        seventh = {"base_shapes", "blob_claims", "engine_holds"}
        expected = {"blob_deletions"} | (sixth if revision < "0006" else set())
        assert new == expected | (seventh if revision < "0007" else set())
        assert [(row["adapter_id"], row["alias"], row["number"]) for row in after["alias_moves"]] == [
            (101, "champion", 2), (102, "champion", 1),
        ]  # fmt: skip
        assert not any(after[table] for table in new - {"alias_moves"})
        # And all of it is used.
        first, second, third, fourth = registry.versions("acme", "sql")
        (shared,) = registry.live("rival")
        # Nobody wrote down then how many members' updates a version is made of.
        assert (shared.reference, shared.lineage) == ("acme/shared:1", Lineage("f", 1, "exact", (), members=None))
        registry.record_evaluation(third, member="k", loss=1.25, tokens=7)
        assert registry.promote(third).loss_before == 1.5
        assert registry.rollback("acme", "sql") == second.number
        registry.retire(first)
        registry.grant("acme", "sql", to="rival")
        registry.set_quota("rival", Quota(requests_per_minute=1))
        registry.settle_usage(registry.lease_usage("rival", requests=9, tokens=9), requests=1, prompt_tokens=1,
                              generated_tokens=1)  # fmt: skip
        assert registry.authenticate(registry.create_key("rival").token).tenant == "rival"
        assert registry.journal(registry.federation("acme", "f"))[0].counted_in == 1
        # A version that was retired before is so from the upgrade on.
        assert registry.collect_garbage(older_than_s=0.0, retired_older_than_s=60.0).purged == ()
        clock.now = time.time() + 100.0
        found = registry.collect_garbage(older_than_s=0.0, retired_older_than_s=60.0, dry_run=True)
        assert fourth.reference in found.purged


def sort_key(row: dict[str, Any]) -> str:
    return repr(sorted(row.items()))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE versions SET tenant_id = (SELECT id FROM tenants WHERE name = 'rival')",
        "UPDATE aliases SET number = 2",
        "UPDATE versions SET state = 'live'",
        "UPDATE versions SET number = 0",
        "DELETE FROM tenants WHERE name = 'acme'",
        "UPDATE revision SET id = 2",
        "UPDATE alias_moves SET number = 2",
        "UPDATE keys SET key_id = 'same'",
        "UPDATE grants SET tenant_id = (SELECT id FROM tenants WHERE name = 'rival')",
        "UPDATE grants SET to_tenant_id = tenant_id",
        "UPDATE quotas SET budget_tokens = 5",
        "UPDATE versions SET purged_at = 5",
    ],
)
def test_database_itself_refuses_rows_that_break_the_model(registry: Registry, url: str, statement: str) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    registry.add_version("acme", "sql", make_adapter(0))
    registry.set_alias("acme", "sql", "champion", 1)
    for _ in range(2):
        registry.create_key("acme")
    registry.grant("acme", "sql")
    registry.set_quota("acme", Quota(adapters=9))
    with pytest.raises(IntegrityError):
        execute(url, statement)
    assert registry.resolve("acme/sql@champion").number == 1


def test_sqlite_is_durable_and_checks_foreign_keys(folder: Path) -> None:
    database = Database(parse_url(f"sqlite:///{folder / 'registry.db'}"))
    with database.read() as session:
        found = {
            name: session.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    database.close()
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///:memory:", "mysql://u@h/d", "registry.db", "", "sqlite:///file:x?mode=memory&uri=true"],
)
def test_urls_that_cannot_keep_a_registry_are_refused(url: str, folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="sqlite:///"):
        Registry.open(url, folder)


def test_a_new_sqlite_file_is_its_users_alone_and_one_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "registry.db"
    for mode in (0o600, 0o640):
        Registry.open(f"sqlite:///{file}", tmp_path / "blobs").close()
        assert file.stat().st_mode & 0o777 == mode
        file.chmod(0o640)
