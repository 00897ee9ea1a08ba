"""What a tenant may use: every question about another tenant's adapters gets the answer for ones that do not exist."""

from __future__ import annotations

from lorafleet.errors import BaseMismatchError, NotFoundError
from lorafleet.registry import Registry
from lorafleet.registry.records import Version
from lorafleet.registry.references import not_found, parse_reference


def usable(registry: Registry, tenant: str, *, base_digest: str) -> list[Version]:
    """The tenant's live versions that were made for this base."""
    return [version for version in registry.live(tenant) if version.base_digest == base_digest]


def resolve(registry: Registry, tenant: str, reference: str, *, base_digest: str) -> Version:
    """:func:`visible` for who wants to run it: BaseMismatchError for a version of another base."""
    version = visible(registry, tenant, reference)
    if version.base_digest != base_digest:
        raise BaseMismatchError(
            f"{version.reference} was made for the base {version.base_digest}, this server runs {base_digest}; "
            "ask a server of its base"
        )
    return version


def visible(registry: Registry, tenant: str, reference: str) -> Version:
    """The version that a reference names, if the tenant may use it.

    An adapter is the tenant's to use when the tenant owns it or a version of it is live for the tenant; its older
    versions and other aliases are then, too. Where the tenant's last member was revoked, there is no version that was
    made later, and no alias. Raises NotFoundError, in the same words for a missing and a foreign one.
    """
    refusal = not_found(f"adapter {reference!r}")
    named = parse_reference(reference)
    own = named.tenant == tenant
    if not own:
        # Before anything is looked for by its name: what is missing and what is foreign take the same time.
        live = {(version.tenant, version.adapter): version for version in registry.live(tenant)}
        current = live.get((named.tenant, named.adapter))
        if current is None:
            raise refusal
        if named.alias is None and named.number is None:
            return current
    try:
        return registry.resolve(reference, usable_by=None if own else tenant)
    except NotFoundError:
        raise refusal from None
