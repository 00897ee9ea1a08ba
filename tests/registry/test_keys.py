"""API keys: tokens, scopes, and what opens nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlalchemy import text

from lorafleet.errors import (
    AlreadyExistsError,
    BackendError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnknownNameError,
    grpc_status,
)
from lorafleet.registry import Registry, keys, pepper
from lorafleet.registry.blobs import BlobStore
from lorafleet.registry.database import make_engine, parse_url
from tests.registry.conftest import Clock
from tests.registry.test_concurrency import at_once

GIVEN = "a-token-of-an-operator"


# Tokens and scopes


def test_a_token_names_its_key_and_holds_256_random_bits() -> None:
    made = [keys.make_token() for _ in range(20)]
    for key_id, token in made:
        assert re.fullmatch(rf"lf_{key_id}_[A-Za-z0-9_-]{{43}}", token) and re.fullmatch("[a-z0-9]{12}", key_id)
        assert keys.key_id_of(token) == key_id
    assert len({token for _, token in made}) == len({key_id for key_id, _ in made}) == 20


def test_a_token_of_an_operator_is_named_by_its_hash() -> None:
    assert keys.key_id_of("sixteen-letters!") == "e178cfa9fada"  # of sha256
    assert re.fullmatch("[0-9a-f]{12}", keys.check_token("x" * 200))


@pytest.mark.parametrize(
    "token", ["", "x" * 15, "x" * 201, "with a space in it", "ä" * 20, "line\n" * 5, "\ud800" * 20]
)
def test_what_is_no_token_is_refused_without_being_repeated(token: str) -> None:
    assert keys.key_id_of(token) is None
    with pytest.raises(InvalidInputError, match="16 to 200 visible ASCII") as caught:
        keys.check_token(token)
    assert not token or token not in str(caught.value)


def test_a_mac_depends_on_the_pepper_and_on_every_character() -> None:
    token = keys.make_token().token
    macs = {keys.mac(b"a" * 32, token), keys.mac(b"b" * 32, token), keys.mac(b"a" * 32, token[:-1] + "!")}
    assert len(macs) == 3 and all(re.fullmatch("[0-9a-f]{64}", mac) for mac in macs)
    assert keys.mac(b"a" * 32, "x" * 10**6) == keys.mac(b"a" * 32, "x" * 201) != keys.mac(b"a" * 32, "x" * 200)


def test_admin_stands_for_every_scope_but_the_operators_own() -> None:
    assert [scope for scope in keys.SCOPES if keys.permits(("admin",), scope)] == [
        "infer", "adapters:read", "adapters:write", "admin",
    ]  # fmt: skip
    assert [scope for scope in keys.SCOPES if keys.permits(("adapters:read", "metrics"), scope)] == [
        "adapters:read", "metrics",
    ]  # fmt: skip


def test_scopes_are_kept_in_order_and_each_once() -> None:
    assert keys.check_scopes(["admin", "infer", "admin"]) == ("infer", "admin")
    with pytest.raises(UnknownNameError, match="unknown scope 'root'; known are: adapters:read"):
        keys.check_scopes(["infer", "root"])
    with pytest.raises(InvalidInputError, match="no scope"):
        keys.check_scopes([])


# The pepper


def test_a_pepper_is_made_once_and_is_its_users_alone(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    read = at_once(lambda _: pepper.read_or_make(blobs))
    assert len(set(read)) == 1 and len(read[0]) == 32
    (file,) = set(tmp_path.iterdir()) - {tmp_path / name for name in ("sha256", "incoming", "incoming.lock")}
    assert list((tmp_path / "incoming").iterdir()) == []
    assert file.name == "pepper" and file.stat().st_mode & 0o777 == 0o600 and file.read_bytes() == read[0]


def test_a_damaged_pepper_is_an_error_and_stays_as_it_is(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    (tmp_path / "pepper").write_bytes(b"short")
    with pytest.raises(BackendError, match="has 5 bytes, expected 32"):
        pepper.read_or_make(blobs)
    assert (tmp_path / "pepper").read_bytes() == b"short"
    (tmp_path / "pepper").unlink()
    (tmp_path / "pepper").mkdir()
    with pytest.raises(BackendError, match="cannot be used"):
        pepper.read_or_make(blobs)


# Keys of a registry


def test_a_key_opens_what_it_is_for_until_it_is_revoked(registry: Registry, clock: Clock) -> None:
    key, token = registry.create_key("acme", name="laptop", scopes=["adapters:read", "infer"])
    assert (key.tenant, key.name, key.scopes, key.created_at) == ("acme", "laptop", ("infer", "adapters:read"), 1000.0)
    assert (key.expires_at, key.revoked_at) == (None, None)
    clock.now = 1e9
    assert registry.authenticate(token) == key == registry.keys("acme")[0]
    keys.require_scope(key, "infer")
    with pytest.raises(PermissionDeniedError, match="needs 'metrics'") as caught:
        keys.require_scope(key, "metrics")
    assert grpc_status(caught.value) == "PERMISSION_DENIED"
    before = registry.revision()
    revoked = registry.revoke_key("acme", key.key_id)
    assert revoked.revoked_at == 1e9 and registry.revision() > before
    clock.now += 1
    assert registry.revoke_key("acme", key.key_id) == revoked == registry.keys("acme")[0]


def test_everything_that_opens_nothing_is_answered_alike(registry: Registry, clock: Clock) -> None:
    key, token = registry.create_key("acme")
    revoked = registry.create_key("acme")
    registry.revoke_key("acme", revoked.key.key_id)
    expired = registry.create_key("acme", expires_at=clock.now + 60).token
    registry.authenticate(expired)
    clock.now += 60
    other = registry.create_key("rival").token.split("_", 2)[2]
    said = set()
    bad_tokens = [
        *("", "x", "lf_", GIVEN, "\0" * 20, "\ud800" * 20, "x" * 10**6),
        *(token[:-1], token + "x", token.upper(), token[:16] + other, f"lf_{'0' * 12}_{'A' * 43}"),
        *(key.key_id, revoked.token, expired),
    ]
    for bad in bad_tokens:
        with pytest.raises(UnauthenticatedError) as caught:
            registry.authenticate(bad)
        said.add(str(caught.value))
    assert len(said) == 1
    assert registry.authenticate(token) == key


def test_an_unknown_key_costs_the_work_of_a_known_one(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    token = registry.create_key("acme").token
    unknown = [token.replace(token[3:15], "0" * 12), token[:-1] + "!", "", "x" * 300]
    work: list[str] = []
    make_mac, compare = keys.mac, keys.hmac.compare_digest

    def counted_mac(*arguments: object) -> str:
        work.append("mac")
        return make_mac(*arguments)  # type: ignore[arg-type]

    def counted_compare(left: str, right: str) -> bool:
        work.append(f"compare {len(left)} {len(right)}")
        return compare(left, right)

    monkeypatch.setattr(keys, "mac", counted_mac)
    monkeypatch.setattr("hmac.compare_digest", counted_compare)
    registry.authenticate(token)
    known, work[:] = list(work), []
    for bad in unknown:
        with pytest.raises(UnauthenticatedError):
            registry.authenticate(bad)
        assert work == known == ["mac", "compare 64 64"]
        work.clear()


def test_the_database_holds_neither_secrets_nor_the_pepper(registry: Registry, url: str, folder: Path) -> None:
    token = registry.create_key("acme").token
    registry.add_key("acme", GIVEN)
    engine = make_engine(parse_url(url))
    with engine.begin() as connection:
        rows = repr(connection.execute(text("SELECT * FROM keys")).all())
        rows += repr(connection.execute(text("SELECT * FROM audit")).all())
    engine.dispose()
    assert token.split("_", 2)[2] not in rows and GIVEN not in rows
    secret = (folder / "blobs" / "pepper").read_bytes()
    assert secret.hex() not in rows
    # And without it the rows open nothing.
    (folder / "blobs" / "pepper").write_bytes(bytes(32))
    with Registry.open(url, folder / "blobs") as other, pytest.raises(UnauthenticatedError):
        other.authenticate(token)


def test_a_key_of_another_tenant_is_not_there_to_revoke(registry: Registry) -> None:
    key_id = registry.create_key("acme").key.key_id
    said = set()
    for wrong in (key_id, "0" * 12, "", "é", "\0"):
        with pytest.raises(NotFoundError) as caught:
            registry.revoke_key("rival", wrong)
        said.add(str(caught.value).replace(repr(wrong), "X"))
    assert len(said) == 1
    assert registry.keys("acme")[0].revoked_at is None and registry.keys("rival") == []


def test_a_token_that_an_operator_gives_opens_and_can_be_given_again(registry: Registry) -> None:
    first = registry.add_key("acme", GIVEN, name="a", scopes=["admin"])
    assert registry.authenticate(GIVEN) == first and first.key_id == keys.key_id_of(GIVEN)
    again = registry.add_key("acme", GIVEN, name="b", scopes=["infer"])
    assert (again.key_id, again.name, again.scopes) == (first.key_id, "b", ("infer",))
    assert registry.keys("acme") == [again]
    with pytest.raises(AlreadyExistsError, match="another one"):
        registry.add_key("rival", GIVEN)
    registry.revoke_key("acme", first.key_id)
    with pytest.raises(AlreadyExistsError, match="revoked"):
        registry.add_key("acme", GIVEN)
    made = keys.make_token()
    assert registry.add_key("rival", made.token).key_id == made.key_id
    assert registry.authenticate(made.token).tenant == "rival"


@pytest.mark.parametrize("expires_at", [999.0, 1000.0, float("inf"), float("nan")])
def test_a_key_expires_at_a_time_to_come(registry: Registry, expires_at: float) -> None:
    with pytest.raises(InvalidInputError, match="expires"):
        registry.create_key("acme", expires_at=expires_at)
    assert registry.keys("acme") == []


def test_a_key_needs_a_tenant_and_a_printable_name(registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="ghost"):
        registry.create_key("ghost")
    for name in ("x" * 101, "a\nb"):
        with pytest.raises(InvalidInputError, match="key's name"):
            registry.create_key("acme", name=name)
        with pytest.raises(InvalidInputError, match="key's name"):
            registry.add_key("acme", GIVEN, name=name)
    assert registry.keys("acme") == []


def test_the_audit_says_who_made_and_revoked_a_key(registry: Registry, clock: Clock) -> None:
    key = registry.create_key("acme", name="laptop", by="ada").key
    registry.create_key("rival")
    clock.now = 1010.0
    for by in ("bob", "eve"):  # the second changes nothing
        registry.revoke_key("acme", key.key_id, by=by)
    found = [entry for entry in registry.audit("acme") if entry.action.startswith("key.")]
    assert [(entry.at, entry.by, entry.tenant, entry.action, entry.subject) for entry in found] == [
        (1000.0, "ada", "acme", "key.create", key.key_id),
        (1010.0, "bob", "acme", "key.revoke", key.key_id),
    ]
    assert found[0].details == {"name": "laptop", "scopes": ["infer"], "expires_at": None}
