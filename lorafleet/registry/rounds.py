"""Rounds, the journal of updates, and the commit. Functions of a session; :class:`Registry` owns the transaction."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, cast

from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session

from lorafleet.adapters.streaming import Shape, check_size
from lorafleet.errors import AlreadyExistsError, InvalidInputError, RejectedUpdateError
from lorafleet.registry import aliases, catalog, federations, versions
from lorafleet.registry.database import insert_if_absent, locked
from lorafleet.registry.records import (
    BUDGET,
    CHAMPION,
    FAILED,
    Adapter,
    Federation,
    Lineage,
    NewExpert,
    Round,
    RoundState,
    UpdateKey,
    UpdateRecord,
    Version,
)
from lorafleet.registry.references import check_digest, check_name, not_found
from lorafleet.registry.tables import (
    AdapterRow,
    FederationRow,
    MemberRow,
    RoundRow,
    TenantRow,
    UpdateRow,
)


def open_round(session: Session, federation: Federation, number: int, now: float) -> Round:
    """Round ``number``, whatever its state, where it exists; a new one where it is the next."""
    owner = federations.lock(session, federation.id)
    row = session.scalar(select(RoundRow).where(RoundRow.federation_id == owner.id, RoundRow.number == number))
    if row is None:
        newest = session.scalar(select(func.max(RoundRow.number)).where(RoundRow.federation_id == owner.id)) or 0
        if number != newest + 1:
            raise InvalidInputError(
                f"federation {federation.tenant}/{federation.name} has {newest} rounds, so the next is {newest + 1}; "
                f"found {number}"
            )
        row = RoundRow(
            tenant_id=owner.tenant_id,
            federation_id=owner.id,
            number=number,
            state="open",
            opened_at=now,
            closed_at=None,
            reason="",
            report={},
        )
        session.add(row)
        session.flush()
    return _round(row)


def rounds(session: Session, federation: Federation) -> list[Round]:
    statement = select(RoundRow).where(RoundRow.federation_id == federation.id).order_by(RoundRow.number)
    return [_round(row) for row in session.scalars(statement)]


def find(session: Session, round: Round, *, lock: Literal["none", "share", "exclusive"] = "none") -> RoundRow:
    """The row behind a record.

    A shared lock keeps the round from being closed, an exclusive one keeps others from sharing too, until the
    transaction ends.
    """
    statement = select(RoundRow).where(
        RoundRow.id == round.id, RoundRow.federation_id == round.federation_id, RoundRow.number == round.number
    )
    if lock == "share":
        statement = statement.with_for_update(read=True, of=RoundRow).execution_options(populate_existing=True)
    elif lock == "exclusive":
        statement = locked(statement, RoundRow)
    row = session.scalar(statement)
    if row is None:
        raise not_found(f"round {round.number} of federation {round.federation_id}")
    return row


def noise_seed(session: Session, round: Round, fresh: bytes) -> bytes:
    """The seed that the round has; ``fresh`` becomes it where there is none. Only an open round has one."""
    row = find(session, round, lock="exclusive")
    if row.state != "open":
        raise InvalidInputError(f"round {row.number} is {row.state}: its noise is drawn, and the seed forgotten")
    if row.noise_seed is None:
        row.noise_seed = fresh.hex()
        session.flush()
    return bytes.fromhex(row.noise_seed)


def check_update(update: UpdateRecord) -> None:
    """Refuse a record that contradicts itself; whether an update is any good is the coordinator's to say."""
    what = f"update of member {update.member!r}, attempt {update.attempt}"
    if not 0 <= update.attempt < 2**31:
        raise InvalidInputError(f"{what}: expected an attempt of at least 0 that fits 31 bits")
    # A rejected update may claim anything; what no column holds has to be left out.
    for name, value, bits in (
        ("num_examples", update.num_examples, 63),
        ("size_bytes", update.size_bytes, 63),
        ("rank", update.rank, 31),
        ("steps", update.steps, 31),
        ("ordered_in", update.ordered_in, 31),
        ("work", update.work, 31),
    ):
        if not -(2**bits) <= value < 2**bits:
            raise InvalidInputError(f"{what}: found {name} of {value}, expected a number that fits {bits + 1} bits")
    if update.accepted and update.factors is None:
        raise InvalidInputError(f"{what}: it is accepted, so the journal needs its factors")
    if update.accepted and update.num_examples < 1:
        raise InvalidInputError(f"{what}: found {update.num_examples} examples, an accepted update has at least 1")
    if not update.accepted and not update.reason:
        raise InvalidInputError(f"{what}: it is rejected, so the journal needs the reason")
    if update.factors is not None and update.digest != update.factors.digest:
        raise InvalidInputError(
            f"{what}: found the digest {update.digest!r}, its factors have {update.factors.digest}; they were damaged "
            "on the way, or belong to another update"
        )
    if update.factors is not None:
        for path, (a, b) in update.factors.modules.items():  # what could not be read again
            check_size(path, Shape(rank=a.shape[0], d_in=a.shape[1], d_out=b.shape[0]))
    if update.digest:
        check_digest(what, update.digest)


def record_update(session: Session, round: Round, update: UpdateRecord, now: float) -> bool:
    """Journal an update unless it is there; the shared lock keeps a commit from passing while one is written."""
    row = find(session, round, lock="share")
    member = select(MemberRow).where(MemberRow.federation_id == row.federation_id, MemberRow.key == update.member)
    known = session.scalar(member.execution_options(populate_existing=True))
    if known is None:
        raise not_found(f"member {update.member!r} of federation {row.federation_id}")
    if update.accepted and known.revoked_at is not None:
        raise RejectedUpdateError("revoked", f"the member was revoked before its update came ({known.revoked_reason})")
    ordered_in = update.ordered_in or row.number
    if row.state != "open":
        there = select(UpdateRow.id).where(
            UpdateRow.federation_id == row.federation_id,
            UpdateRow.member_key == update.member,
            UpdateRow.ordered_in == ordered_in,
            UpdateRow.attempt == update.attempt,
        )
        if session.scalar(there) is not None:
            return False
        raise RejectedUpdateError("round_closed", f"round {row.number} is {row.state}; it takes no more updates")
    return insert_if_absent(
        session,
        UpdateRow,
        tenant_id=row.tenant_id,
        federation_id=row.federation_id,
        round_id=row.id,
        member_key=update.member,
        ordered_in=ordered_in,
        work=update.work,
        attempt=update.attempt,
        accepted=update.accepted,
        reason=federations.storable(update.reason),
        digest=update.digest,
        num_examples=update.num_examples,
        rank=update.rank,
        size_bytes=update.size_bytes,
        metrics=_metrics_document(update.metrics),
        expert_digest=update.expert_digest,
        steps=update.steps,
        seconds=update.seconds,
        recorded_at=now,
    )


def updates(session: Session, round: Round, *, accepted_only: bool) -> list[UpdateRecord]:
    """In the order of member keys, by code point on every database: the same journal is always read the same way."""
    statement = select(UpdateRow).where(UpdateRow.round_id == find(session, round).id)
    if accepted_only:
        statement = statement.where(UpdateRow.accepted)
    return sorted(
        (_update(row) for row in session.scalars(statement)), key=lambda u: (u.member, u.ordered_in, u.attempt)
    )


def journal(session: Session, federation: Federation, *, uncounted_only: bool) -> list[UpdateRecord]:
    """All accepted updates in the order in which they were written; those that no round counted where asked."""
    statement = select(UpdateRow).where(UpdateRow.federation_id == federation.id, UpdateRow.accepted)
    if uncounted_only:
        statement = statement.where(UpdateRow.counted_in.is_(None))
    return [_update(row) for row in session.scalars(statement.order_by(UpdateRow.id))]


def droppable(
    session: Session, federation: Federation, through: int, uncounted: bool, keep: Collection[UpdateKey]
) -> list[str]:
    """The digests of updates whose factors are no longer kept.

    Those that counted in a round up to ``through``, and what came in such a round and never counts: what was rejected,
    and with ``uncounted`` what was accepted.
    """
    kept = set(keep)
    rows = session.scalars(_droppable(federation, through, uncounted))
    return sorted({row.digest for row in rows if _key(row) not in kept})


def drop_factors(
    session: Session,
    federation: Federation,
    through: int,
    uncounted: bool,
    keep: Collection[UpdateKey],
    digests: Collection[str],
    now: float,
) -> None:
    """Mark those of them that have one of some digests as without factors."""
    kept = set(keep)
    statement = _droppable(federation, through, uncounted).where(UpdateRow.digest.in_(digests))
    for row in session.scalars(locked(statement, UpdateRow)):
        if _key(row) not in kept:
            row.dropped_at = now
    session.flush()


def _droppable(federation: Federation, through: int, uncounted: bool) -> Select[UpdateRow]:
    never = UpdateRow.counted_in.is_(None) & (RoundRow.number <= through)
    if not uncounted:
        never &= ~UpdateRow.accepted
    return (
        select(UpdateRow)
        .join(RoundRow, RoundRow.id == UpdateRow.round_id)
        .where(UpdateRow.federation_id == federation.id, UpdateRow.digest != "", UpdateRow.dropped_at.is_(None))
        .where((UpdateRow.counted_in <= through) | never)
        .order_by(UpdateRow.id)
    )


def _key(row: UpdateRow) -> UpdateKey:
    return UpdateKey(row.member_key, row.ordered_in, row.attempt)


def last_words(session: Session, federation: Federation) -> list[UpdateRecord]:
    """Of each member the last update that was accepted, and the last of all; in the order of writing."""
    newest = (
        select(func.max(UpdateRow.id))
        .where(UpdateRow.federation_id == federation.id)
        .group_by(UpdateRow.member_key, UpdateRow.accepted)
    )
    return [
        _update(row)
        for row in session.scalars(select(UpdateRow).where(UpdateRow.id.in_(newest)).order_by(UpdateRow.id))
    ]


def judged(session: Session, federation: Federation) -> list[UpdateRecord]:
    """Of each member the last update that was accepted, or rejected for what it was; by member."""
    newest = (
        select(func.max(UpdateRow.id))
        .where(UpdateRow.federation_id == federation.id)
        .where(UpdateRow.accepted | ~or_(*(UpdateRow.reason.startswith(f"{kind}:") for kind in (FAILED, BUDGET))))
        .group_by(UpdateRow.member_key)
    )
    found = session.scalars(select(UpdateRow).where(UpdateRow.id.in_(newest)))
    return sorted((_update(row) for row in found), key=lambda update: update.member)


def federation_of(session: Session, round: Round) -> Federation:
    statement = (
        select(TenantRow.name, FederationRow.name)
        .join(FederationRow, FederationRow.tenant_id == TenantRow.id)
        .where(FederationRow.id == find(session, round).federation_id)
    )
    tenant, name = session.execute(statement).one()
    return federations.get(session, tenant, name)


def check_experts(federation: Federation, experts: Sequence[NewExpert]) -> None:
    for expert in experts:
        check_name("expert", expert.name)
        versions.check_weights(expert.weights, base_digest=federation.base_digest, what=f"expert {expert.name}")
    names = [expert.name for expert in experts]
    if len(set(names)) != len(names):
        raise InvalidInputError(f"found the experts {', '.join(names)}, expected every name once")


def commit(
    session: Session,
    round: Round,
    experts: Sequence[NewExpert],
    report: Mapping[str, Any],
    counted: Mapping[UpdateKey, float],
    now: float,
) -> tuple[list[Version], bool]:
    """The round's versions in the order of ``experts``, and whether this call committed them.

    A round that is committed already stays as it is, whoever commits it again with whatever.
    """
    federation = federation_of(session, round)
    federations.lock(session, federation.id)
    row = find(session, round, lock="exclusive")
    if row.state == "committed":
        return versions.of_round(session, row.id), False
    if row.state != "open":
        raise InvalidInputError(
            f"round {row.number} is {row.state} ({row.reason}), expected an open one; open the next"
        )
    # Adapters are locked in the order of their names, as everywhere; numbers are per adapter, so the order of the
    # experts does not matter to them.
    targets = {name: _expert_adapter(session, federation, name, now) for name in sorted(e.name for e in experts)}
    made = []
    for expert in experts:
        adapter = targets[expert.name]
        lineage = Lineage(federation.name, row.number, expert.rule, tuple(expert.parents), expert.members)
        contents = versions.contents(expert.weights)
        version = versions.add(session, adapter, contents, now=now, lineage=lineage, round_id=row.id)
        aliases.move(session, adapter, CHAMPION, version.number, now)
        made.append(version)
    row.state, row.closed_at, row.noise_seed = "committed", now, None
    row.report = federations.json_object(f"report of round {row.number}", report)
    for key, share in counted.items():
        _count(session, row, key, share)
    session.flush()
    return made, True


def _count(session: Session, round: RoundRow, key: UpdateKey, share: float) -> None:
    """Mark an update as counted in a round; one that counted before, or is not accepted, is refused."""
    update = session.scalar(
        select(UpdateRow).where(
            UpdateRow.federation_id == round.federation_id,
            UpdateRow.member_key == key.member,
            UpdateRow.ordered_in == key.ordered_in,
            UpdateRow.attempt == key.attempt,
            UpdateRow.accepted,
        )
    )
    if update is None:
        raise not_found(f"accepted update of member {key.member!r}, round {key.ordered_in}, attempt {key.attempt}")
    if update.counted_in is not None:
        raise InvalidInputError(
            f"the update of member {key.member!r}, round {key.ordered_in}, attempt {key.attempt} counted in round "
            f"{update.counted_in} already"
        )
    update.counted_in, update.share = round.number, share


def _expert_adapter(session: Session, federation: Federation, name: str, now: float) -> Adapter:
    """The federation's adapter of that name, created where it is missing, its row locked.

    One that the federation did not make is refused: a commit would move its champion and grant it to the members.
    """
    try:
        adapter = catalog.create_adapter(
            session, federation.tenant, name, federation.base, now, federation_id=federation.id
        )
    except AlreadyExistsError:
        adapter = catalog.adapter(session, federation.tenant, name)
    session.execute(locked(select(AdapterRow.id).where(AdapterRow.id == adapter.id), AdapterRow))
    if adapter.federation != federation.name:
        raise AlreadyExistsError(
            f"the adapter {federation.tenant}/{name} was not made by federation {federation.name}; give the expert "
            "another name"
        )
    return adapter


def abandon(session: Session, round: Round, reason: str, now: float) -> None:
    """An abandoned round stays abandoned for its first reason; a committed one is never lost."""
    row = find(session, round, lock="exclusive")
    if row.state == "committed":
        raise InvalidInputError(f"round {row.number} is committed; it cannot be abandoned any more")
    if row.state == "open":
        row.state, row.closed_at, row.reason = "abandoned", now, federations.storable(reason)
        row.noise_seed = None


def _update(row: UpdateRow) -> UpdateRecord:
    return UpdateRecord(
        member=row.member_key,
        attempt=row.attempt,
        accepted=row.accepted,
        reason=row.reason,
        digest=row.digest,
        num_examples=row.num_examples,
        rank=row.rank,
        size_bytes=row.size_bytes,
        metrics={name: float(value) for name, value in sorted(row.metrics.items())},
        ordered_in=row.ordered_in,
        work=row.work,
        expert_digest=row.expert_digest,
        steps=row.steps,
        seconds=row.seconds,
        counted_in=row.counted_in,
        share=row.share,
        recorded_at=row.recorded_at,
        dropped_at=row.dropped_at,
    )


def _metrics_document(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinity, and a rejected update may well report one: they are kept as words."""
    return {
        federations.storable(name): float(value) if math.isfinite(value) else repr(float(value))
        for name, value in metrics.items()
    }


def _round(row: RoundRow) -> Round:
    state = cast(RoundState, row.state)
    return Round(row.id, row.federation_id, row.number, state, row.opened_at, row.closed_at, row.report, row.reason)
