"""Versions, aliases and what a reference means. Functions of a session; :class:`Registry` owns the transaction.

=============  =========================================================================
reference      gives
=============  =========================================================================
``t/a``        the champion, while it is usable; else the newest usable version
``t/a@x``      what the alias names, unless it is quarantined
``t/a:n``      version n, unless it is quarantined, or purged
=============  =========================================================================

Usable are staged and evaluated versions. A retired one answers only to who asks for it by alias or number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, get_args

from sqlalchemy import ColumnElement, Select, and_, func, or_, select
from sqlalchemy.orm import Session, aliased

from lorafleet.adapters import LoraAdapter, factor_space
from lorafleet.adapters.factor_space import LoraPair
from lorafleet.adapters.streaming import Contents, Shape, check_size
from lorafleet.errors import BaseMismatchError, InvalidInputError, NotFoundError
from lorafleet.registry import grants
from lorafleet.registry.database import locked
from lorafleet.registry.records import CHAMPION, Adapter, Lineage, Version, VersionState
from lorafleet.registry.references import Reference, check_digest, not_found
from lorafleet.registry.tables import AdapterRow, AliasRow, BaseRow, MemberRow, TenantRow, VersionRow

USABLE = ("staged", "evaluated")


def check_weights(weights: LoraAdapter, *, base_digest: str, what: str) -> None:
    """Refuse weights that damage or do nothing (an adapter that loads and changes nothing is a silent failure).

    Factors are finite by construction of a LoraAdapter; here the effect ``‖B A‖`` of every module has to be, and that
    of one above zero. Weights that name a base by another digest raise BaseMismatchError.
    """
    check_base(weights.base, base_digest, what)
    for path, (a, b) in weights.modules.items():
        check_size(path, Shape(rank=a.shape[0], d_in=a.shape[1], d_out=b.shape[0]))  # what could not be read again
    check_effect([effect(path, pair, what) for path, pair in weights.modules.items()], what)


def check_base(named: str, base_digest: str, what: str) -> None:
    """BaseMismatchError where weights name a base by another digest; any other name says nothing."""
    if named.startswith("sha256:") and named != base_digest:
        raise BaseMismatchError(f"{what}: the weights are for the base {named}, expected {base_digest}")


def effect(path: str, pair: LoraPair, what: str) -> float:
    """``‖B A‖`` of one module; InvalidInputError where it is too large to be anything but damage."""
    norm = float(factor_space.norm(pair))  # which makes one factor float64 at a time
    # Beyond float32's range the product that a model adds would be infinite.
    if not norm < 3.4e38:
        raise InvalidInputError(f"{what}: the update of {path} is beyond float32's range; the weights are damaged")
    return norm


def check_effect(effects: Sequence[float], what: str) -> None:
    """Refuse modules of which none changes anything."""
    if not any(effects):
        raise InvalidInputError(
            f"{what}: B A is zero in all {len(effects)} modules, so the adapter would change nothing; train it first"
        )


def contents(weights: LoraAdapter) -> Contents:
    """What a version's row says of its weights."""
    return Contents(weights.digest, weights.rank, weights.parameters, weights.base)


def add(
    session: Session,
    adapter: Adapter,
    weights: Contents,
    *,
    now: float,
    state: VersionState = "staged",
    licence: str = "",
    lineage: Lineage | None = None,
    round_id: int | None = None,
) -> Version:
    """The next number of an adapter; the row lock on the adapter makes numbers contiguous among writers."""
    tenant_id = session.scalars(
        locked(select(AdapterRow.tenant_id).where(AdapterRow.id == adapter.id), AdapterRow)
    ).one()
    row = VersionRow(
        tenant_id=tenant_id,
        adapter_id=adapter.id,
        number=newest_number(session, adapter) + 1,
        digest=weights.digest,
        rank=weights.rank,
        parameters=weights.parameters,
        state=check_state(state),
        licence=licence,
        lineage=None if lineage is None else _lineage_document(lineage),
        round_id=round_id,
        created_at=now,
        state_at=now,
    )
    session.add(row)
    session.flush()
    return _version(row, adapter.tenant, adapter.name, adapter.base_digest)


def of_adapter(
    session: Session,
    adapter: Adapter,
    *,
    after: int = 0,
    limit: int | None = None,
    usable_by: int | None = None,
) -> list[Version]:
    """By number: those above ``after``, at most ``limit``; of those that a tenant may use, where one is named."""
    found = _versions().where(VersionRow.adapter_id == adapter.id, VersionRow.number > after)
    if usable_by is not None:
        found = found.where(VersionRow.state != "quarantined", _is_usable_by(session, usable_by))
    return _all(session, found.order_by(VersionRow.number).limit(limit))


def newest_number(session: Session, adapter: Adapter) -> int:
    """Of an adapter's versions, in whatever state; 0 where there is none."""
    return session.scalar(select(func.max(VersionRow.number)).where(VersionRow.adapter_id == adapter.id)) or 0


def numbered(session: Session, adapter: Adapter, number: int) -> Version:
    """In whatever state; NotFoundError where there is none of that number."""
    found = _all(session, _versions().where(VersionRow.adapter_id == adapter.id, VersionRow.number == number))
    if not found:
        raise not_found(f"version {adapter.tenant}/{adapter.name}:{number}")
    return found[0]


def of_round(session: Session, round_id: int) -> list[Version]:
    """In the order in which the commit gave them."""
    return _all(session, _versions().where(VersionRow.round_id == round_id).order_by(VersionRow.id))


def of_ids(session: Session, ids: Select[int]) -> list[Version]:
    return _all(session, _versions().where(VersionRow.id.in_(ids)))


def set_state(session: Session, version: Version, state: VersionState, now: float) -> Version:
    """NotFoundError where it is to be used again, and has lost its weights."""
    row = find(session, version)
    if check_state(state) in USABLE and row.purged_at is not None:
        raise purged(version)
    if row.state != state:
        row.state, row.state_at = state, now
    session.flush()
    return _version(row, version.tenant, version.adapter, version.base_digest)


def purged(version: Version) -> NotFoundError:
    return NotFoundError(
        f"the weights of {version.reference} were deleted after it had been out of use for long; what is left of it "
        "says what it was"
    )


def find(session: Session, version: Version, *, lock: bool = True) -> VersionRow:
    """The row behind a record, found by all that identifies it; with a lock, it is held until the transaction ends."""
    statement = (
        select(VersionRow)
        .join(AdapterRow, AdapterRow.id == VersionRow.adapter_id)
        .join(TenantRow, TenantRow.id == VersionRow.tenant_id)
        .where(VersionRow.id == version.id, VersionRow.number == version.number)
        .where(AdapterRow.name == version.adapter, TenantRow.name == version.tenant)
    )
    row = session.scalar(locked(statement, VersionRow) if lock else statement)
    if row is None:
        raise not_found(f"version {version.reference}")
    return row


def is_federations(session: Session, version: Version) -> bool:
    """Whether a federation makes its adapter's versions."""
    return _federation_id(session, version) is not None


def made_by(session: Session, version: Version) -> int:
    """The id of its federation; InvalidInputError where none made it."""
    federation_id = _federation_id(session, version)
    if federation_id is None:
        raise InvalidInputError(f"{version.reference} was made by no federation, expected one that has a lease")
    return federation_id


def _federation_id(session: Session, version: Version) -> int | None:
    row = find(session, version, lock=False)
    return session.scalar(select(AdapterRow.federation_id).where(AdapterRow.id == row.adapter_id))


def check_state(state: str) -> str:
    if state not in get_args(VersionState):
        raise InvalidInputError(f"found the state {state!r}, expected one of: {', '.join(get_args(VersionState))}")
    return state


def resolve(session: Session, reference: Reference, *, usable_by: int | None = None) -> Version:
    """The version that a reference names; for a tenant only if it may use that.

    One query decides, so that what is foreign is not looked for any longer than what is missing.
    """
    statement = _versions().where(TenantRow.name == reference.tenant, AdapterRow.name == reference.adapter)
    if reference.number is not None:
        statement = statement.where(VersionRow.number == reference.number, VersionRow.state != "quarantined")
        statement = statement.where(VersionRow.purged_at.is_(None))
    elif reference.alias is not None:
        statement = statement.join(
            AliasRow, and_(AliasRow.adapter_id == VersionRow.adapter_id, AliasRow.number == VersionRow.number)
        ).where(AliasRow.name == reference.alias, VersionRow.state != "quarantined")
    else:
        statement = statement.where(_is_current())
    if usable_by is not None:
        # Where an alias or the bare name points is of today, also while that is an old version: its move would tell of
        # a newer one. What the bare name means to whoever has left, :func:`live` knows.
        may = is_shared_with if reference.number is None else _is_usable_by
        statement = statement.where(may(session, usable_by))
    row = session.execute(statement).one_or_none()
    if row is None:
        raise not_found(f"version {reference}")
    return _version(*row)


def live(session: Session, tenant_id: int | None) -> list[Version]:
    """The current version of each adapter that a tenant owns, was granted, or has a member's right to.

    Of a federation whose members of the tenant are all revoked, it is the newest usable version from before that, but
    for adapters that are granted besides. All adapters' for None. In order of tenant and adapter name. What was granted
    to a tenant without a member in its federation comes without its lineage, which names that federation.
    """
    statement = _versions().where(_is_current())
    found: list[Version] = []
    if tenant_id is not None:
        joined = _memberships(session, tenant_id)
        active = [federation_id for federation_id, until in joined.items() if until is None]
        granted = grants.granted_to(tenant_id)
        mine = (AdapterRow.tenant_id == tenant_id, AdapterRow.federation_id.in_(active), AdapterRow.id.in_(granted))
        statement = statement.where(or_(*mine))
        for federation_id, until in joined.items():
            if until is not None:
                made = _versions().where(AdapterRow.federation_id == federation_id, AdapterRow.tenant_id != tenant_id)
                made = made.where(AdapterRow.id.not_in(granted))
                found += _all(session, made.where(_is_newest_until(until)))
    found += _all(session, statement)
    if tenant_id is not None and any(version.lineage is not None for version in found):
        told = select(TenantRow.name, AdapterRow.name).join(TenantRow, TenantRow.id == AdapterRow.tenant_id)
        told = told.where(or_(AdapterRow.tenant_id == tenant_id, AdapterRow.federation_id.in_(joined)))
        origins = {(tenant, adapter) for tenant, adapter in session.execute(told)}
        found = [v if (v.tenant, v.adapter) in origins else replace(v, lineage=None) for v in found]
    return sorted(found, key=lambda version: (version.tenant, version.adapter))


def may_use(session: Session, tenant_id: int, version: Version) -> bool:
    """Whether a version is a tenant's to use.

    It is where the tenant owns it, was granted its adapter, or has a member in the federation that made it, or where it
    was made before the last of them was revoked.
    """
    row = find(session, version, lock=False)
    statement = select(VersionRow.id).join(AdapterRow, AdapterRow.id == VersionRow.adapter_id)
    return session.scalar(statement.where(VersionRow.id == row.id, _is_usable_by(session, tenant_id))) is not None


def _is_usable_by(session: Session, tenant_id: int) -> ColumnElement[bool]:
    """:func:`may_use` as a condition on versions and their adapters."""
    joined = _memberships(session, tenant_id)
    left = [
        and_(AdapterRow.federation_id == federation_id, VersionRow.created_at <= until)
        for federation_id, until in joined.items()
        if until is not None
    ]
    return or_(_is_shared(joined, tenant_id), *left)


def is_shared_with(session: Session, tenant_id: int) -> ColumnElement[bool]:
    """Whether an adapter is a tenant's as it is now, to its newest version: its own, granted, or of a federation in
    which it has a member."""
    return _is_shared(_memberships(session, tenant_id), tenant_id)


def _is_shared(joined: Mapping[int, float | None], tenant_id: int) -> ColumnElement[bool]:
    active = [federation_id for federation_id, until in joined.items() if until is None]
    mine = (AdapterRow.tenant_id == tenant_id, AdapterRow.federation_id.in_(active))
    return or_(*mine, AdapterRow.id.in_(grants.granted_to(tenant_id)))


def _memberships(session: Session, tenant_id: int) -> dict[int, float | None]:
    """Federation → None where a member of the tenant is active, else when the last one was revoked."""
    rows = session.execute(
        select(MemberRow.federation_id, MemberRow.revoked_at).where(MemberRow.tenant_id == tenant_id)
    )
    joined: dict[int, float | None] = {}
    for federation_id, revoked_at in rows:
        earlier = joined.get(federation_id, 0.0)
        joined[federation_id] = None if revoked_at is None or earlier is None else max(earlier, revoked_at)
    return joined


# Made once: each one is some 360 objects in cycles, which requests would leave to the garbage collector.
_Candidate = aliased(VersionRow)


def _is_current() -> ColumnElement[bool]:
    """Whether a version is what its adapter's bare reference gives; index look-ups per adapter, no scan of versions."""
    usable = and_(_Candidate.adapter_id == AdapterRow.id, _Candidate.state.in_(USABLE))
    champion = (
        select(_Candidate.number)
        .join(AliasRow, and_(AliasRow.adapter_id == _Candidate.adapter_id, AliasRow.number == _Candidate.number))
        .where(usable, AliasRow.name == CHAMPION)
        .correlate(AdapterRow)
        .scalar_subquery()
    )
    newest = select(func.max(_Candidate.number)).where(usable).correlate(AdapterRow).scalar_subquery()
    return VersionRow.number == func.coalesce(champion, newest)


def _is_newest_until(until: float) -> ColumnElement[bool]:
    """Whether a version is its adapter's newest usable one of those made up to a time."""
    newest = (
        select(func.max(_Candidate.number))
        .where(_Candidate.adapter_id == AdapterRow.id, _Candidate.state.in_(USABLE), _Candidate.created_at <= until)
        .correlate(AdapterRow)
        .scalar_subquery()
    )
    return VersionRow.number == newest


def _versions() -> Select[VersionRow, str, str, str]:
    return (
        select(VersionRow, TenantRow.name, AdapterRow.name, BaseRow.digest)
        .join(AdapterRow, AdapterRow.id == VersionRow.adapter_id)
        .join(TenantRow, TenantRow.id == AdapterRow.tenant_id)
        .join(BaseRow, BaseRow.id == AdapterRow.base_id)
    )


def _all(session: Session, statement: Select[VersionRow, str, str, str]) -> list[Version]:
    return [_version(*row) for row in session.execute(statement)]


def _version(row: VersionRow, tenant: str, adapter: str, base_digest: str) -> Version:
    return Version(
        row.id,
        tenant,
        adapter,
        row.number,
        row.digest,
        base_digest,
        row.rank,
        row.parameters,
        cast(VersionState, row.state),
        row.created_at,
        None if row.lineage is None else _lineage(row.lineage),
        row.licence,
        row.purged_at,
    )


def _lineage_document(lineage: Lineage) -> dict[str, Any]:
    parents = [check_digest("lineage", parent) for parent in lineage.parents]
    if lineage.members is not None and not 0 < lineage.members < 2**31:
        raise InvalidInputError(f"lineage: found {lineage.members} members, expected at least 1, or none said")
    return {
        "federation": lineage.federation,
        "round": lineage.round,
        "rule": lineage.rule,
        "parents": parents,
        "members": lineage.members,
    }


def _lineage(document: dict[str, Any]) -> Lineage:
    parents, members = tuple(document["parents"]), document.get("members")  # which older documents lack
    return Lineage(document["federation"], document["round"], document["rule"], parents, members)
