"""Tenants, bases, adapters, versions, aliases and references, on every database."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.errors import AlreadyExistsError, BaseMismatchError, InvalidInputError, NotFoundError
from lorafleet.registry import Lineage, Registry
from tests.registry.conftest import BASE_DIGEST, MODULES, OTHER_BASE_DIGEST, Clock, make_adapter


def test_tenants_are_listed_by_name_and_names_are_taken_once(registry: Registry) -> None:
    assert [(tenant.name, tenant.weight) for tenant in registry.tenants()] == [("acme", 1.0), ("rival", 2.0)]
    assert registry.tenant("rival").created_at == 1000.0
    with pytest.raises(AlreadyExistsError, match="acme"):
        registry.create_tenant("acme")
    assert len(registry.tenants()) == 2


@pytest.mark.parametrize("name", ["", "a/b", "a:1", "a@b", "-a", "a b", "ä", "a" * 101, "a\n"])
def test_names_that_no_reference_could_hold_are_refused(registry: Registry, name: str) -> None:
    for create in (
        lambda: registry.create_tenant(name),
        lambda: registry.create_adapter("acme", name, base="tiny"),
        lambda: registry.create_federation("acme", name, base="tiny", settings={}),
    ):
        with pytest.raises(InvalidInputError, match="letters, digits"):
            create()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_fair_share_has_to_be_a_positive_number(registry: Registry, weight: float) -> None:
    with pytest.raises(InvalidInputError, match="weight"):
        registry.create_tenant("third", weight=weight)
    with pytest.raises(InvalidInputError, match="weight"):
        registry.set_tenant_weight("rival", weight)
    assert registry.tenant("rival").weight == 2.0


def test_a_changed_weight_is_seen_by_services_and_audited(registry: Registry) -> None:
    before = registry.revision()
    assert registry.set_tenant_weight("rival", 5.0, by="ada").weight == 5.0
    assert registry.tenant("rival").weight == 5.0 and registry.revision() > before
    (entry,) = [entry for entry in registry.audit("rival") if entry.action == "tenant.weight"]
    assert (entry.by, entry.details) == ("ada", {"weight": 5.0, "before": 2.0})
    with pytest.raises(NotFoundError, match="nobody"):
        registry.set_tenant_weight("nobody", 1.0)


def test_base_is_found_by_name_and_by_digest_and_registering_again_changes_nothing(registry: Registry) -> None:
    first = registry.base("tiny")
    again = registry.register_base("tiny", BASE_DIGEST, architecture="another", parameters=7)
    assert again == first == registry.base(BASE_DIGEST)
    with pytest.raises(AlreadyExistsError, match="another base"):
        registry.register_base("tiny", OTHER_BASE_DIGEST, architecture="LlamaForCausalLM", parameters=1000)


@pytest.mark.parametrize(("name", "digest"), [("x", "md5:1"), ("", BASE_DIGEST), (BASE_DIGEST, BASE_DIGEST)])
def test_malformed_bases_are_refused(registry: Registry, name: str, digest: str) -> None:
    with pytest.raises(InvalidInputError):
        registry.register_base(name, digest, architecture="LlamaForCausalLM", parameters=1000)


def test_adapters_belong_to_their_tenant(registry: Registry) -> None:
    made = registry.create_adapter("acme", "sql", base="tiny")
    registry.create_adapter("acme", "cpp", base=OTHER_BASE_DIGEST)
    registry.create_adapter("rival", "sql", base="tiny")
    assert registry.adapter("acme", "sql") == made
    assert (made.base, made.base_digest, made.federation) == ("tiny", BASE_DIGEST, None)
    assert [adapter.name for adapter in registry.adapters("acme")] == ["cpp", "sql"]
    with pytest.raises(AlreadyExistsError):
        registry.create_adapter("acme", "sql", base="tiny")
    with pytest.raises(NotFoundError):
        registry.create_adapter("acme", "prose", base="nowhere")


def test_missing_tenant_and_missing_adapter_answer_with_the_same_words(registry: Registry) -> None:
    registry.create_adapter("rival", "sql", base="tiny")
    answers = set()
    for tenant, adapter in (("ghost", "sql"), ("acme", "sql")):
        for call in (
            lambda t=tenant, a=adapter: registry.adapter(t, a),
            lambda t=tenant, a=adapter: registry.versions(t, a),
            lambda t=tenant, a=adapter: registry.newest_number(t, a),
            lambda t=tenant, a=adapter: registry.add_version(t, a, make_adapter(0)),
            lambda t=tenant, a=adapter: registry.aliases(t, a),
        ):
            with pytest.raises(NotFoundError) as caught:
                call()
            answers.add(str(caught.value).replace(f"{tenant}/{adapter}", "X"))
    assert len(answers) == 1


def test_reference_answers_alike_for_every_reason_not_to_be_found(registry: Registry) -> None:
    registry.create_adapter("acme", "empty", base="tiny")
    registry.create_adapter("acme", "sql", base="tiny")
    registry.set_state(registry.add_version("acme", "sql", make_adapter(0)), "quarantined")
    answers = set()
    for reference in ("ghost/sql", "acme/none", "acme/empty", "acme/sql", "acme/sql:1", "acme/sql:2", "acme/sql@x"):
        with pytest.raises(NotFoundError) as caught:
            registry.resolve(reference)
        answers.add(str(caught.value).replace(reference, "X"))
    assert len(answers) == 1


def test_version_comes_back_as_it_was_given(registry: Registry, clock: Clock) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    weights = make_adapter(1, rank=5, base=BASE_DIGEST)
    lineage = Lineage("elsewhere", 4, "exact", (make_adapter(2).digest,))
    clock.now = 1234.5
    version = registry.add_version("acme", "sql", weights, lineage=lineage, licence="MIT", state="evaluated")
    assert version == registry.versions("acme", "sql")[0] == registry.resolve("acme/sql:1")
    assert registry.newest_number("acme", "sql") == 1
    assert version.reference == "acme/sql:1"
    assert (version.digest, version.base_digest, version.rank) == (weights.digest, BASE_DIGEST, 5)
    assert (version.parameters, version.state, version.licence) == (weights.parameters, "evaluated", "MIT")
    assert (version.created_at, version.lineage) == (1234.5, lineage)
    loaded = registry.load(version)
    assert (loaded.digest, loaded.base) == (weights.digest, BASE_DIGEST)
    assert LoraAdapter.load(registry.path(version)).digest == weights.digest
    assert hash(version) == hash(registry.resolve("acme/sql:1"))


def test_versions_survive_a_restart(registry: Registry, url: str, folder: Path) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    version = registry.add_version("acme", "sql", make_adapter(1))
    revision = registry.revision()
    registry.close()
    with Registry.open(url, folder / "blobs") as again:
        assert again.resolve("acme/sql") == version
        assert again.load(version).digest == version.digest
        assert again.revision() == revision


def test_weights_that_would_change_nothing_are_refused(registry: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    fresh = {path: LoraPair(torch.ones(2, 8), torch.zeros(6, 2)) for path in MODULES}
    with pytest.raises(InvalidInputError, match="change nothing"):
        registry.add_version("acme", "sql", LoraAdapter(fresh))
    fresh[MODULES[1]] = LoraPair(torch.ones(2, 8), torch.ones(6, 2))
    assert registry.add_version("acme", "sql", LoraAdapter(fresh)).number == 1


def test_weights_whose_product_overflows_are_refused(registry: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    huge = {MODULES[0]: LoraPair(torch.full((2, 8), 1e30), torch.full((6, 2), 1e30))}
    with pytest.raises(InvalidInputError, match="float32"):
        registry.add_version("acme", "sql", LoraAdapter(huge))
    assert registry.versions("acme", "sql") == [] and registry.newest_number("acme", "sql") == 0


def test_weights_of_another_base_are_refused(registry: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    with pytest.raises(BaseMismatchError):
        registry.add_version("acme", "sql", make_adapter(0, base=OTHER_BASE_DIGEST))


def test_equal_weights_of_two_tenants_share_a_blob_that_names_neither(registry: Registry) -> None:
    for tenant, base in (("acme", "tiny"), ("rival", "other")):
        registry.create_adapter(tenant, "sql", base=base)
    mine = registry.add_version("acme", "sql", make_adapter(0, base="folder-of-acme"))
    theirs = registry.add_version("rival", "sql", make_adapter(0))
    assert registry.path(mine) == registry.path(theirs)
    assert (registry.load(mine).base, registry.load(theirs).base) == (BASE_DIGEST, OTHER_BASE_DIGEST)
    assert b"acme" not in b"".join(file.read_bytes() for file in registry.path(mine).iterdir())


def test_bare_reference_follows_the_champion_and_without_one_the_newest_usable_version(registry: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    one, two, three = (registry.add_version("acme", "sql", make_adapter(seed)) for seed in range(3))

    def current() -> int:
        [live] = registry.live("acme")
        assert registry.resolve("acme/sql") == live
        return live.number

    assert current() == 3
    registry.set_state(three, "quarantined")
    assert current() == 2
    registry.set_alias("acme", "sql", "champion", 1)
    assert current() == 1
    registry.set_state(two, "retired")
    registry.set_state(one, "quarantined")
    with pytest.raises(NotFoundError):
        registry.resolve("acme/sql")
    assert registry.live("acme") == []
    registry.set_state(three, "evaluated")
    assert current() == 3
    registry.set_state(one, "staged")
    assert current() == 1


def test_aliases_move_and_only_to_usable_versions(registry: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    one, two = (registry.add_version("acme", "sql", make_adapter(seed)) for seed in range(2))
    registry.set_alias("acme", "sql", "canary", 1)
    registry.set_alias("acme", "sql", "champion", 1)
    registry.set_alias("acme", "sql", "canary", 2)
    assert registry.aliases("acme", "sql") == {"canary": 2, "champion": 1}
    assert registry.resolve("acme/sql@canary") == two
    with pytest.raises(NotFoundError):
        registry.set_alias("acme", "sql", "canary", 3)
    registry.set_state(one, "retired")
    with pytest.raises(InvalidInputError, match="retired"):
        registry.set_alias("acme", "sql", "canary", 1)
    assert registry.aliases("acme", "sql") == {"canary": 2, "champion": 1}


def test_retired_version_answers_by_number_and_quarantined_one_does_not(registry: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    version = registry.add_version("acme", "sql", make_adapter(0))
    retired = registry.set_state(version, "retired")
    assert registry.resolve("acme/sql:1") == retired
    registry.set_state(version, "quarantined")
    with pytest.raises(NotFoundError):
        registry.resolve("acme/sql:1")
    assert [found.state for found in registry.versions("acme", "sql")] == ["quarantined"]


def test_unknown_state_is_refused_before_anything_is_stored(registry: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    with pytest.raises(InvalidInputError, match="staged, evaluated, quarantined, retired"):
        registry.add_version("acme", "sql", make_adapter(0), state="live")  # type: ignore[arg-type]
    version = registry.add_version("acme", "sql", make_adapter(0))
    with pytest.raises(InvalidInputError, match="found the state 'gone'"):
        registry.set_state(version, "gone")  # type: ignore[arg-type]
    assert [found.state for found in registry.versions("acme", "sql")] == ["staged"]


def test_revision_grows_with_what_a_watcher_cares_about_and_with_nothing_else(registry: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    federation = registry.create_federation("acme", "fed", base="tiny", settings={})
    seen = [registry.revision()]
    version = registry.add_version("acme", "sql", make_adapter(0))
    seen.append(registry.revision())
    registry.set_alias("acme", "sql", "champion", 1)
    seen.append(registry.revision())
    registry.set_state(version, "evaluated")
    seen.append(registry.revision())
    registry.add_member(federation, "key", tenant="rival")
    seen.append(registry.revision())
    assert seen == sorted(set(seen))
    registry.create_tenant("third")
    registry.open_round(federation, 1)
    registry.record_evaluation(version, member="key", loss=1.0, tokens=2)
    with pytest.raises(NotFoundError):
        registry.set_alias("acme", "sql", "champion", 9)
    registry.resolve("acme/sql")
    assert registry.revision() == seen[-1]


def test_looking_a_version_up_leaves_little_to_the_garbage_collector(registry: Registry) -> None:
    registry.create_adapter("acme", "sql", base="tiny")
    registry.add_version("acme", "sql", make_adapter(1))
    for _ in range(5):  # what is made once
        registry.resolve("acme/sql")
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            registry.resolve("acme/sql")
        assert gc.collect() < 10 * 100  # an alias made for each had 360
    finally:
        gc.enable()
