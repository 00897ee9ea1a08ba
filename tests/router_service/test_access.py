"""What a tenant may use of a federation that it was put out of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafleet.errors import NotFoundError
from lorafleet.registry import NewExpert
from lorafleet.registry.store import Registry
from lorafleet.router_service import access
from tests.registry.conftest import BASE_DIGEST, Clock, make_adapter
from tests.router_service.statements import statements


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """``rival`` had a member in a federation of ``acme`` while the first two of its three versions were made."""
    clock = Clock()
    with Registry.open(f"sqlite:///{tmp_path / 'registry.db'}", tmp_path / "blobs", clock=clock) as opened:
        opened.register_base("tiny", BASE_DIGEST, architecture="L", parameters=1)
        for tenant in ("acme", "rival"):
            opened.create_tenant(tenant)
        federation = opened.create_federation("acme", "fed", base="tiny", settings={})
        opened.add_member(federation, "k", tenant="rival")
        for number in (1, 2, 3):
            clock.now += 10.0
            if number == 3:
                opened.revoke_member(federation, "k")
                clock.now += 10.0
            opened.commit_round(
                opened.open_round(federation, number), [NewExpert("shared", make_adapter(number), "exact")], report={}
            )
        yield opened


def test_the_bare_reference_means_the_newest_version_of_before(registry: Registry) -> None:
    def number(tenant: str, reference: str) -> int:
        return access.resolve(registry, tenant, reference, base_digest=BASE_DIGEST).number

    assert (number("acme", "acme/shared"), number("rival", "acme/shared")) == (3, 2)
    assert number("rival", "acme/shared:1") == 1
    assert [version.number for version in access.usable(registry, "rival", base_digest=BASE_DIGEST)] == [2]


@pytest.mark.parametrize("later", ["acme/shared:3", "acme/shared@champion", "acme/shared@first"])
def test_a_later_version_is_not_there_nor_an_alias_which_may_have_moved(registry: Registry, later: str) -> None:
    registry.promote(registry.version("acme", "shared", 1), "first")
    assert registry.aliases("acme", "shared", shown_to="acme") == {"champion": 3, "first": 1}
    assert registry.aliases("acme", "shared", shown_to="rival") == {}
    with pytest.raises(NotFoundError, match="is not there, or is not yours"):
        access.resolve(registry, "rival", later, base_digest=BASE_DIGEST)


def test_what_is_missing_and_what_is_foreign_are_looked_for_alike(registry: Registry) -> None:
    registry.create_adapter("acme", "secret", base="tiny")
    registry.add_version("acme", "secret", make_adapter(4))
    with statements() as asked:

        def of(reference: str) -> list[str]:
            asked.clear()
            with pytest.raises(NotFoundError, match="is not there, or is not yours"):
                access.resolve(registry, "rival", reference, base_digest=BASE_DIGEST)
            return list(asked)

        for suffix in ("", ":1", "@champion"):
            foreign = of(f"acme/secret{suffix}")
            assert foreign and foreign == of(f"acme/nothing{suffix}") == of(f"nobody/nothing{suffix}")
        for later, missing in ((":3", ":9"), ("@champion", "@nothing")):
            assert of(f"acme/shared{later}") == of(f"acme/shared{missing}") != []
