"""Promotion by measurement, rollback, and versions that go out of use."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from lorafleet.errors import InvalidInputError, NotFoundError, PromotionRefusedError, grpc_status
from lorafleet.registry import Evaluation, NewExpert, Registry, Version
from lorafleet.registry.aliases import steps_back
from lorafleet.registry.evaluations import OWNER
from lorafleet.registry.promotions import compare
from tests.registry.conftest import Clock, make_adapter
from tests.registry.test_concurrency import at_once


@pytest.fixture
def versions(registry: Registry) -> list[Version]:
    """Four of ``acme/sql``; the champion is the first."""
    registry.create_adapter("acme", "sql", base="tiny")
    made = [registry.add_version("acme", "sql", make_adapter(seed)) for seed in range(4)]
    registry.set_alias("acme", "sql", "champion", 1)
    return made


def measured(**losses: float) -> list[Evaluation]:
    return [Evaluation(member, loss, 100, 0.0) for member, loss in losses.items()]


def evaluate(registry: Registry, version: Version, **losses: float) -> None:
    for member, loss in losses.items():
        registry.record_evaluation(version, member=member, loss=loss, tokens=100)


def champion(registry: Registry) -> int:
    return registry.resolve("acme/sql@champion").number


# What is better


def test_versions_are_compared_over_the_members_that_measured_both() -> None:
    # Over all, the candidate would look better: the member with the easiest texts measured it alone.
    found = compare(measured(a=2.0, b=3.0, c=4.0, easy=0.1, other=0.1), measured(a=1.9, b=2.9, c=9.0, hard=50.0))
    assert found == (3.0, 2.9, 3, False) and not found.better
    assert compare(measured(a=1.0), measured(a=1.1)).better
    assert not compare(measured(a=1.0), measured(a=1.0)).better


def test_without_common_members_everybody_counts_and_without_a_measurement_nothing_is_better() -> None:
    assert compare(measured(a=1.0, b=2.0, c=9.0), measured(d=3.0, e=5.0)) == (2.0, 4.0, 0, False)
    assert compare(measured(a=1.0), measured(d=3.0)).better
    for pair in ((measured(a=1.0), []), ([], measured(a=1.0)), ([], [])):
        assert not compare(*pair).better


def test_what_the_tenant_measured_is_compared_with_its_own_measurement_alone() -> None:
    own = [Evaluation(OWNER, 1.0, 100, 0.0)]
    assert compare(own, [Evaluation(OWNER, 1.5, 100, 0.0)]) == (1.0, 1.5, 0, True)
    assert compare(own, measured(a=1.5)) == (None, 1.5, 0, False)
    assert compare([*own, *measured(a=2.0)], measured(a=1.5)) == (2.0, 1.5, 1, False)
    assert compare([*own, *measured(a=1.0)], measured(b=1.5)) == (1.0, 1.5, 0, False)


def test_one_member_does_not_decide_alone() -> None:
    assert not compare(measured(a=-1e9, b=3.0, c=3.0), measured(a=2.0, b=2.0, c=2.0)).better
    assert compare(measured(a=1e9, b=1.0, c=1.0), measured(a=2.0, b=2.0, c=2.0)).better


@pytest.mark.parametrize(
    ("numbers", "usable", "steps"),
    [([3, 2, 1], {1, 2, 3}, 1), ([3, 2, 1], {1, 3}, 2), ([3, 2, 1], {3}, None), ([3], {3}, None), ([], set(), None),
     ([3, 2, 3, 1], {1, 3}, 3), ([3, 1, 3, 1], {1, 3}, 1), ([3, 2], {2}, 1)],
)  # fmt: skip
def test_a_way_back_leads_to_another_version_that_is_usable(
    numbers: list[int], usable: set[int], steps: int | None
) -> None:
    assert steps_back(numbers, usable) == steps


# Promotion


def test_a_better_version_is_promoted(registry: Registry, versions: list[Version]) -> None:
    evaluate(registry, versions[0], a=2.0, b=3.0)
    evaluate(registry, versions[1], a=1.0, b=2.5)
    before = registry.revision()
    made = registry.promote(versions[1])
    assert made == (versions[1], "champion", 1, 1.75, 2.5, 2)
    assert champion(registry) == 2 and registry.revision() > before


def test_a_tenants_own_measurement_promotes_what_it_imported(registry: Registry, versions: list[Version]) -> None:
    for version, loss in zip(versions, (2.0, 3.0, 1.5), strict=False):
        registry.evaluate(version, loss=9.0, tokens=100, by="ada")
        registry.evaluate(version, loss=loss, tokens=100, by="ada")  # the last one counts
    assert [e.loss for e in registry.evaluations(versions[0])] == [2.0]
    with pytest.raises(PromotionRefusedError, match=r"3\.0000.*2\.0000"):
        registry.promote(versions[1])
    assert registry.promote(versions[2]).loss == 1.5
    entry = next(entry for entry in reversed(registry.audit("acme")) if entry.action == "version.evaluate")
    assert (entry.by, entry.subject, entry.details) == ("ada", "acme/sql:3", {"loss": 1.5, "tokens": 100})


def test_what_a_federation_made_is_not_the_tenants_to_measure(registry: Registry) -> None:
    federation = registry.create_federation("acme", "fed", base="tiny", settings={})
    opened = registry.open_round(federation, 1)
    (version,) = registry.commit_round(opened, [NewExpert("shared", make_adapter(1), "exact")], report={})
    with pytest.raises(InvalidInputError, match="members measure"):
        registry.evaluate(version, loss=1.0, tokens=10)
    for tokens in (0, 2**53 + 1):
        with pytest.raises(InvalidInputError, match="expected a finite loss"):
            registry.record_evaluation(version, member="m", loss=1.0, tokens=tokens)


def test_a_worse_or_unmeasured_version_is_refused_with_both_losses(registry: Registry, versions: list[Version]) -> None:
    evaluate(registry, versions[0], a=2.0)
    before = registry.revision()
    with pytest.raises(PromotionRefusedError, match=r"acme/sql:2 is not measured, .*acme/sql:1.*2\.0000"):
        registry.promote(versions[1])
    evaluate(registry, versions[1], a=2.25)
    with pytest.raises(
        PromotionRefusedError, match=r"acme/sql:2 is 2\.2500, .* 2\.0000 \(by 1 member that measured both"
    ) as caught:
        registry.promote(versions[1])
    assert grpc_status(caught.value) == "FAILED_PRECONDITION"
    assert champion(registry) == 1 and registry.revision() == before
    assert registry.promote(versions[1], force=True).loss == 2.25
    assert champion(registry) == 2


def test_a_refusal_says_who_measured_and_counts_members_alone(registry: Registry, versions: list[Version]) -> None:
    for version, loss in zip(versions, (2.0, 2.5, 3.0), strict=False):
        registry.evaluate(version, loss=loss, tokens=100)
    with pytest.raises(PromotionRefusedError, match=r"\(by the tenant itself that measured both\)"):
        registry.promote(versions[1])
    for version in versions[:2]:
        evaluate(registry, version, a=2.0, b=2.0)
    with pytest.raises(PromotionRefusedError, match=r"\(by 2 members and the tenant itself that measured both\)"):
        registry.promote(versions[1])
    assert registry.promote(versions[1], force=True).members == 2


def test_a_new_alias_and_one_of_a_quarantined_version_need_no_comparison(
    registry: Registry, versions: list[Version]
) -> None:
    assert registry.promote(versions[1], "canary") == (versions[1], "canary", None, None, None, 0)
    registry.set_state(versions[0], "quarantined")
    assert registry.promote(versions[2]).before == 1
    assert registry.aliases("acme", "sql") == {"canary": 2, "champion": 3}


def test_promoting_what_is_promoted_changes_nothing_to_go_back_over(
    registry: Registry, versions: list[Version]
) -> None:
    registry.promote(versions[1], force=True)
    assert registry.promote(versions[1]).before == 2
    assert registry.rollback("acme", "sql") == 1


def test_only_a_usable_version_that_is_there_is_promoted(registry: Registry, versions: list[Version]) -> None:
    registry.set_state(versions[3], "retired")
    with pytest.raises(InvalidInputError, match="retired"):
        registry.promote(versions[3], force=True)
    stranger = registry.create_adapter("rival", "sql", base="tiny")
    other = registry.add_version("rival", stranger.name, make_adapter(9))
    with pytest.raises(NotFoundError):
        registry.promote(replace(other, tenant="acme"), force=True)
    with pytest.raises(InvalidInputError, match="alias name"):
        registry.promote(versions[1], "a b")
    assert registry.aliases("acme", "sql") == {"champion": 1}


# Rollback


def test_rollbacks_go_back_move_by_move_and_not_to_and_fro(registry: Registry, versions: list[Version]) -> None:
    for version in versions[1:3]:
        registry.promote(version, force=True)
    before = registry.revision()
    assert registry.rollback("acme", "sql") == 2 == champion(registry)
    assert registry.revision() > before
    assert registry.rollback("acme", "sql") == 1 == champion(registry)
    with pytest.raises(InvalidInputError, match="nothing before"):
        registry.rollback("acme", "sql")
    registry.promote(versions[3], force=True)
    assert registry.rollback("acme", "sql") == 1


def test_a_rollback_passes_over_what_is_not_usable(registry: Registry, versions: list[Version]) -> None:
    for version in versions[1:]:
        registry.promote(version, force=True)
    registry.set_state(versions[2], "retired")
    registry.set_state(versions[1], "quarantined")
    assert registry.rollback("acme", "sql") == 1
    # What was passed over is behind it, also when it is usable again.
    for version in versions[1:3]:
        registry.restore(version)
    with pytest.raises(InvalidInputError, match="nothing before"):
        registry.rollback("acme", "sql")


def test_an_alias_that_is_not_there_is_not_rolled_back(registry: Registry, versions: list[Version]) -> None:
    for tenant, adapter, alias in (
        ("acme", "sql", "canary"),
        ("acme", "none", "champion"),
        ("rival", "sql", "champion"),
    ):
        with pytest.raises(NotFoundError):
            registry.rollback(tenant, adapter, alias)


def test_a_round_is_rolled_back_like_any_move(registry: Registry, clock: Clock) -> None:
    federation = registry.create_federation("acme", "fed", base="tiny", settings={})
    for number in (1, 2):
        opened = registry.open_round(federation, number)
        registry.commit_round(opened, [NewExpert("shared", make_adapter(number), "exact")], report={})
    assert registry.rollback("acme", "shared") == 1
    assert registry.resolve("acme/shared").number == 1


def test_promotions_at_once_leave_a_history_without_gaps(registry: Registry, versions: list[Version]) -> None:
    at_once(lambda index: registry.promote(versions[index % 4], force=True), threads=8)
    seen = [champion(registry)]
    while True:
        try:
            seen.append(registry.rollback("acme", "sql"))
        except InvalidInputError:
            break
    assert seen[-1] == 1 and all(now != before for before, now in pairwise(seen))


# Out of use


def test_a_version_is_retired_when_nothing_points_at_it(registry: Registry, versions: list[Version]) -> None:
    registry.promote(versions[0], "canary")
    with pytest.raises(InvalidInputError, match="acme/sql:1 is what canary, champion points at"):
        registry.retire(versions[0])
    for alias in ("champion", "canary"):
        registry.promote(versions[1], alias, force=True)
    assert registry.retire(versions[0]).state == "retired"
    with pytest.raises(InvalidInputError, match="nothing before"):
        registry.rollback("acme", "sql")


def test_a_quarantined_version_hands_its_aliases_back(registry: Registry, versions: list[Version]) -> None:
    registry.promote(versions[2], "canary")
    registry.promote(versions[2], force=True)
    before = registry.revision()
    changed, moved = registry.quarantine(versions[2])
    assert (changed.state, moved) == ("quarantined", {"canary": None, "champion": 1})
    assert registry.revision() > before
    assert registry.resolve("acme/sql").number == 1
    with pytest.raises(NotFoundError):
        registry.resolve("acme/sql@canary")
    # Where it had nowhere to go it is there again when its version is.
    assert registry.restore(versions[2]).state == "staged"
    assert registry.resolve("acme/sql@canary").number == 3 and champion(registry) == 1


def test_a_restored_version_is_what_it_was_measured_to_be(registry: Registry, versions: list[Version]) -> None:
    registry.retire(versions[1])
    assert registry.restore(versions[1]).state == "staged"
    with pytest.raises(InvalidInputError, match="is staged"):
        registry.restore(versions[1])
    evaluate(registry, versions[1], a=1.0)
    registry.quarantine(versions[1])
    assert registry.restore(versions[1]).state == "evaluated"


def test_nothing_points_at_a_version_that_is_retired_at_the_same_time(
    registry: Registry, versions: list[Version]
) -> None:
    for version in versions[1:]:

        def act(index: int, version: Version = version) -> bool:
            try:
                registry.retire(version) if index % 2 else registry.promote(version, force=True)
            except InvalidInputError:
                return False
            return True

        at_once(act, threads=6)
        (now,) = (v for v in registry.versions("acme", "sql") if v.number == version.number)
        assert (now.state == "retired") != (champion(registry) == version.number)


# Cards and the audit


def test_a_card_is_kept_beside_its_version(registry: Registry, versions: list[Version]) -> None:
    card = "# SQL\n\nTrained on ours. Größe\r\n"
    version = registry.add_version("acme", "sql", make_adapter(7), card=card)
    assert registry.card(version) == card and registry.card(versions[0]) == ""
    assert (
        registry.card(registry.add_version("acme", "sql", make_adapter(8), card="a\0b"))
        == "a\N{REPLACEMENT CHARACTER}b"
    )
    longest = "é" * (32 * 1024)
    assert registry.card(registry.add_version("acme", "sql", make_adapter(9), card=longest)) == longest
    with pytest.raises(InvalidInputError, match="65537 bytes"):
        registry.add_version("acme", "sql", make_adapter(10), card=longest + "x")
    assert len(registry.versions("acme", "sql")) == 7


def test_the_audit_says_who_changed_what_and_what_failed_is_not_in_it(
    registry: Registry, versions: list[Version], clock: Clock
) -> None:
    clock.now = 2000.0
    evaluate(registry, versions[0], a=2.0)
    evaluate(registry, versions[1], a=1.0)
    start = registry.audit()[-1].id
    registry.promote(versions[1], by="ada")
    with pytest.raises(PromotionRefusedError):
        registry.promote(versions[0], by="eve")
    registry.rollback("acme", "sql", by="bob")
    registry.retire(versions[1], by="cyd")
    registry.quarantine(versions[0], by="dan")
    registry.restore(versions[0], by="dan")
    with pytest.raises(InvalidInputError, match="who does it"):
        registry.retire(versions[2], by="two\nlines")
    found = [entry for entry in registry.audit("acme") if entry.id > start]
    assert [(e.at, e.by, e.action, e.subject, dict(e.details)) for e in found] == [
        (2000.0, "ada", "alias.promote", "acme/sql@champion",
         {"before": 1, "now": 2, "loss": 1.0, "loss_before": 2.0, "members": 1, "forced": False}),
        (2000.0, "bob", "alias.rollback", "acme/sql@champion", {"before": 2, "now": 1}),
        (2000.0, "cyd", "version.retire", "acme/sql:2", {}),
        (2000.0, "dan", "version.quarantine", "acme/sql:1", {"aliases": {"champion": None}}),
        (2000.0, "dan", "version.restore", "acme/sql:1", {"state": "evaluated"}),
    ]  # fmt: skip
    assert registry.versions("acme", "sql")[2].state == "staged"
    assert [e.action for e in registry.audit("acme", limit=2)] == ["version.quarantine", "version.restore"]
    assert [e.tenant for e in registry.audit("rival")] == ["rival"]
