"""``lorafleet key``, ``grant``, ``quota``, ``audit``, and the life of a version, as the command line has them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from sqlalchemy import text

from lorafleet.adapters import LoraAdapter
from lorafleet.registry import Quota, Registry
from tests.registry.conftest import BASE_DIGEST, make_adapter
from tests.router_service.models import random_adapter, write_base
from tests.test_cli import Command, Store, lorafleet, store

__all__ = ["lorafleet", "store"]


@pytest.fixture
def filled(store: Store) -> Store:
    """With the tenants ``acme`` and ``rival`` and three versions of ``acme/sql``, measured to get better."""
    with store.open() as registry:
        registry.register_base("tiny", BASE_DIGEST, architecture="LlamaForCausalLM", parameters=1)
        for tenant in ("acme", "rival"):
            registry.create_tenant(tenant)
        registry.create_adapter("acme", "sql", base="tiny")
        for number in range(3):
            version = registry.add_version("acme", "sql", make_adapter(number))
            registry.record_evaluation(version, member="m", loss=3.0 - number, tokens=10)
        registry.set_alias("acme", "sql", "champion", 2)
    return store


def test_a_key_is_made_listed_and_revoked(lorafleet: Command, filled: Store) -> None:
    create = ("key", "create", "--tenant", "acme", "--name", "laptop", *filled.options)
    out, err = lorafleet(*create, "--scope", "infer", "--scope", "adapters:read", "--expires-in", "30d")
    token = out.strip()
    assert out == f"{token}\n" and token.startswith("lf_") and "shown only now" in err and token not in err
    made = lorafleet.json(*create)
    with filled.open() as registry:
        assert registry.authenticate(token).scopes == ("infer", "adapters:read")
        assert registry.authenticate(made["token"]).key_id == made["key"]
    listed = lorafleet.json("key", "list", "--tenant", "acme", *filled.options)
    assert [row["expires_at"] is None for row in listed] == [False, True]
    assert listed[0]["expires_at"] - listed[0]["created_at"] == pytest.approx(30 * 86400, abs=60)
    shown = lorafleet("key", "list", "--tenant", "acme", *filled.options)[0]
    assert made["key"] in shown and token not in shown + json.dumps(listed)
    assert "revoked" in lorafleet("key", "revoke", made["key"], "--tenant", "acme", *filled.options)[0]
    assert lorafleet.json("key", "list", "--tenant", "acme", *filled.options)[1]["revoked_at"] is not None
    assert "not there" in lorafleet("key", "revoke", made["key"], "--tenant", "rival", *filled.options, status=1)[1]


@pytest.mark.parametrize("time", ["30", "0d", "-1d", "1y", "1.5h", "d"])
def test_a_time_without_sense_is_a_usage_error(lorafleet: Command, store: Store, time: str) -> None:
    command = ("key", "create", "--tenant", "acme", "--expires-in", time, *store.options)
    assert "such as 30d" in " ".join(lorafleet(*command, status=2)[1].replace("│", " ").split())


def test_an_unknown_scope_is_answered_with_the_known_ones(lorafleet: Command, filled: Store) -> None:
    said = lorafleet("key", "create", "--tenant", "acme", "--scope", "root", *filled.options, status=1)[1]
    assert "unknown scope 'root'" in said and "adapters:write" in said


def test_an_adapter_is_shared_and_taken_back(lorafleet: Command, filled: Store) -> None:
    for to in (("--to", "rival"), ("--to-all",)):
        lorafleet("grant", "add", "acme/sql", *to, *filled.options)
    with filled.open() as registry:
        assert [version.reference for version in registry.live("rival")] == ["acme/sql:2"]
    listed = lorafleet.json("grant", "list", "--tenant", "acme", *filled.options)
    assert [(row["adapter"], row["to"]) for row in listed] == [("sql", None), ("sql", "rival")]
    assert "all tenants" in lorafleet("grant", "list", "--tenant", "acme", "--adapter", "sql", *filled.options)[0]
    assert lorafleet.json("grant", "remove", "acme/sql", "--to-all", *filled.options)["to"] is None
    assert "rival" in lorafleet("grant", "remove", "acme/sql", "--to", "rival", *filled.options)[0]
    with filled.open() as registry:
        assert registry.live("rival") == []
    for wrong in ((), ("--to", "rival", "--to-all")):
        lorafleet("grant", "add", "acme/sql", *wrong, *filled.options, status=2)
    lorafleet("grant", "add", "acme/sql:1", "--to-all", *filled.options, status=2)


def test_a_version_is_promoted_rolled_back_and_taken_out_of_use(lorafleet: Command, filled: Store) -> None:
    def adapter(verb: str, *arguments: str, status: int = 0) -> str:
        return "".join(lorafleet("adapter", verb, *arguments, *filled.options, status=status))

    said = adapter("promote", "acme/sql:1", status=1)
    assert "3.0000" in said and "2.0000" in said
    assert "version 3 (before: version 2)" in adapter("promote", "acme/sql:3")
    assert "version 1 (new)" in adapter("promote", "acme/sql:1", "--alias", "canary")
    done = lorafleet.json("adapter", "promote", "acme/sql@canary", "--force", *filled.options)
    assert (done["reference"], done["before"], done["loss"], done["loss_before"]) == ("acme/sql:1", 3, 3.0, 1.0)
    assert "champion  version 3" in adapter("rollback", "acme/sql")
    assert lorafleet.json("adapter", "rollback", "acme/sql@champion", *filled.options)["reference"] == "acme/sql:2"
    assert "canary points at" in adapter("retire", "acme/sql:1", status=1)
    assert "retired" in adapter("retire", "acme/sql:3")
    assert "acme/sql:3  evaluated" in adapter("restore", "acme/sql:3")
    said = adapter("quarantine", "acme/sql:1")
    assert "acme/sql:1  quarantined" in said and "@canary  nothing usable before" in said
    assert "not there" in adapter("show", "acme/sql:1", status=1)
    assert lorafleet.json("adapter", "restore", "acme/sql:1", *filled.options)["state"] == "evaluated"
    assert lorafleet.json("adapter", "quarantine", "acme/sql:2", *filled.options)["aliases"] == {"champion": None}
    for command in (("promote", "acme/sql"), ("rollback", "acme/sql:1"), ("retire", "acme/sql")):
        adapter(*command, status=2)
    assert "not there" in adapter("retire", "acme/sql:9", status=1)


def test_a_quota_is_set_limit_by_limit_and_shown_with_what_was_used(lorafleet: Command, filled: Store) -> None:
    quota = ("--tenant", "acme", *filled.options)
    lorafleet(
        "quota", "set", "--requests-per-minute", "60", "--budget-tokens", "5000", "--budget-period", "30d", *quota
    )
    changed = lorafleet.json("quota", "set", "--requests-per-minute", "none", "--adapters", "7", *quota)
    assert (changed["requests_per_minute"], changed["adapters"]) == (None, 7)
    with filled.open() as registry:
        assert registry.quota("acme") == Quota(adapters=7, budget_tokens=5000, budget_period_s=30 * 86400)
        block = registry.lease_usage("acme", requests=2, tokens=100)
        registry.settle_usage(block, requests=1, prompt_tokens=20, generated_tokens=30)
    shown = lorafleet.json("quota", "show", *quota)
    assert shown["quota"]["budget_tokens"] == 5000
    assert {row["period_s"] for row in shown["usage"]} >= {86400, 30 * 86400}
    assert {(row["requests"], row["prompt_tokens"], row["generated_tokens"]) for row in shown["usage"]} == {(1, 20, 30)}
    out = lorafleet("quota", "show", *quota)[0]
    assert "budget_tokens        5000" in out and "1 requests, 50 tokens" in out
    for wrong in ((), ("--adapters", "many"), ("--adapters", "-1"), ("--budget-period", "often")):
        lorafleet("quota", "set", *wrong, *quota, status=2)
    assert "both or neither" in lorafleet("quota", "set", "--budget-tokens", "none", *quota, status=1)[1]


def test_the_audit_lists_who_did_what(lorafleet: Command, filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ada")  # what getpass asks first
    lorafleet("adapter", "retire", "acme/sql:1", *filled.options)
    lorafleet("tenant", "create", "third", "--by", "bob", *filled.options)
    found = lorafleet.json("audit", "list", "--limit", "2", *filled.options)
    assert [(e["by"], e["tenant"], e["action"], e["subject"]) for e in found] == [
        ("ada", "acme", "version.retire", "acme/sql:1"),
        ("bob", "third", "tenant.create", "third"),
    ]
    out = lorafleet("audit", "list", "--tenant", "acme", *filled.options)[0]
    assert "version.retire" in out and "third" not in out


def test_a_card_and_licences_come_in_with_an_import_and_the_card_goes_out_again(
    lorafleet: Command, store: Store, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "small-base")
    folder = tmp_path / "adapter"
    random_adapter(base, rank=2, seed=1).save(folder)
    card = "# SQL\r\n\nGröße: 2\n".encode()
    (folder / "README.md").write_bytes(card)
    lorafleet("tenant", "create", "acme", *store.options)
    command = ("adapter", "import", "acme/sql", folder, "--base", base, *store.options)
    lorafleet(*command, "--licence", "MIT", "--base-licence", "Apache-2.0")
    shown = lorafleet.json("adapter", "show", "acme/sql", *store.options)
    assert (shown["licence"], shown["base_licence"], shown["card"]) == ("MIT", "Apache-2.0", card.decode())
    assert f"{len(card.decode())} characters" in lorafleet("adapter", "show", "acme/sql", *store.options)[0]
    out = tmp_path / "out"
    lorafleet("adapter", "export", "acme/sql", "--out", out, *store.options)
    assert (out / "README.md").read_bytes() == card and LoraAdapter.load(out).rank == 2

    for wrong, said in ((b"x" * 65537, "65537 bytes"), (b"\xff", "not UTF-8")):
        (folder / "README.md").write_bytes(wrong)
        assert said in lorafleet(*command, status=1)[1]
    (folder / "README.md").unlink()
    assert lorafleet.json(*command)["reference"] == "acme/sql:2"
    lorafleet("adapter", "export", "acme/sql", "--out", tmp_path / "bare", *store.options)
    assert not (tmp_path / "bare" / "README.md").exists()
    with Registry.open(store.url, store.blobs) as registry:
        assert registry.base("small-base").licence == "Apache-2.0"


def test_weights_that_nobody_needs_are_deleted(lorafleet: Command, filled: Store) -> None:
    lorafleet("adapter", "retire", "acme/sql:1", *filled.options)
    with filled.open() as registry:
        version = registry.version("acme", "sql", 1)
        with registry._database.write() as session:
            session.execute(text("UPDATE versions SET state_at = 0"))
    command = ("db", "gc", "--older-than", "1s", "--retired", "30d", *filled.options)
    for folder in (filled.blobs / "sha256").glob("*/*"):
        os.utime(folder, (0, 0))
    assert lorafleet.json(*command, "--dry-run")["purged"] == ["acme/sql:1"]
    assert "would purge acme/sql:1" in lorafleet(*command, "--dry-run")[0]
    said = lorafleet.json(*command, "--by", "ada")
    assert (said["purged"], said["deleted"], said["dry_run"]) == (["acme/sql:1"], [version.digest], False)
    assert said["size_bytes"] > 500
    assert "not there" in lorafleet("adapter", "show", "acme/sql:1", *filled.options, status=1)[1]
    assert len(lorafleet.json("adapter", "list", "--tenant", "acme", *filled.options)) == 3
    assert "0 weights" in lorafleet(*command)[0]
    with filled.open() as registry:
        assert [v.purged_at is not None for v in registry.versions("acme", "sql")] == [True, False, False]
        assert registry.audit("acme")[-1].by == "ada"
