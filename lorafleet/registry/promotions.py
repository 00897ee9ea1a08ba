"""What a version is used as, by measurement; and taking one out of use. Functions of a session.

============  ===========================================================================================
promote       an alias moves to a version that its members measured to be better than the current one
rollback      an alias moves to where it pointed before (:mod:`lorafleet.registry.aliases`)
retire        refused while an alias points at the version: nothing is urgent about it, and the bare reference
              would fall to the newest version, which nobody may have looked at
quarantine    never refused, as it is urgent: aliases that point at the version move to where they pointed before;
              one that pointed at nothing usable before stays, and is answered like what is not there
restore       a retired or quarantined version may be used again
============  ===========================================================================================
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from lorafleet.errors import InvalidInputError, PromotionRefusedError
from lorafleet.registry import aliases, catalog, evaluations, versions
from lorafleet.registry.records import Adapter, Evaluation, Promotion, Quarantined, Version, VersionState
from lorafleet.registry.tables import AliasRow


class Comparison(NamedTuple):
    """Two versions' held-out losses in nats per token; None where nobody measured one."""

    candidate: float | None
    current: float | None
    members: int
    """How many members measured both, whose medians these are"""
    own: bool = False
    """Whether what the tenant itself measured of both is among these; without, and of no member: of whoever measured
    each"""

    @property
    def better(self) -> bool:
        return self.candidate is not None and self.current is not None and self.candidate < self.current


def compare(candidate: Sequence[Evaluation], current: Sequence[Evaluation]) -> Comparison:
    """Medians over the members that measured both versions; where there is none, over those that measured each.

    A median, so that one member's losses, whatever they are, do not decide alone; over the same members where that is
    possible, as their held-out texts differ. What the tenant itself measured is compared with its own measurement only:
    its text need not be of the members' kind at all.
    """
    both = {e.member for e in candidate} & {e.member for e in current}
    everybody = {e.member for e in (*candidate, *current)} - {evaluations.OWNER}
    losses = [[e.loss for e in found if e.member in (both or everybody)] for found in (candidate, current)]
    medians = [statistics.median(found) if found else None for found in losses]
    return Comparison(medians[0], medians[1], len(both - {evaluations.OWNER}), evaluations.OWNER in both)


def promote(session: Session, version: Version, alias: str, force: bool, now: float) -> Promotion:
    """Point an alias at a version; PromotionRefusedError where it is not measured to be better, unless forced.

    An alias that is new, or whose version is quarantined, has nothing to be better than.
    """
    adapter = _locked_adapter(session, version)
    candidate = versions.find(session, version)
    number = aliases.pointed_at(session, adapter, alias)
    found = Comparison(None, None, 0)
    if number is not None and number != candidate.number:
        current = versions.numbered(session, adapter, number)
        found = compare(evaluations.of_version(session, version), evaluations.of_version(session, current))
        if not (force or found.better or current.state == "quarantined"):
            over = _measured_by(found)
            raise PromotionRefusedError(
                f"the held-out loss of {version.reference} is {_loss(found.candidate)}, that of {current.reference}, "
                f"where {alias!r} points, {_loss(found.current)} ({over}); expected a lower one: evaluate both, "
                "or force it"
            )
    moved = aliases.move(session, adapter, alias, candidate.number, now)
    return Promotion(
        replace(version, state=cast(VersionState, candidate.state)),
        alias,
        moved.before,
        found.candidate,
        found.current,
        found.members,
    )


def retire(session: Session, version: Version, now: float) -> Version:
    """InvalidInputError while an alias points at it."""
    adapter = _locked_adapter(session, version)
    named = _names(session, adapter, version)
    if named:
        raise InvalidInputError(
            f"{version.reference} is what {', '.join(named)} points at; promote another version or roll back first"
        )
    return versions.set_state(session, version, "retired", now)


def quarantine(session: Session, version: Version, now: float) -> Quarantined:
    """Where its aliases went; None for those that have nowhere to go, and answer nothing now."""
    adapter = _locked_adapter(session, version)
    changed = versions.set_state(session, version, "quarantined", now)
    moved = {alias: aliases.fall_back(session, adapter, alias, now) for alias in _names(session, adapter, version)}
    return Quarantined(changed, {alias: None if move is None else move.now for alias, move in moved.items()})


def restore(session: Session, version: Version, now: float) -> Version:
    """``evaluated`` where somebody measured it, else ``staged``.

    InvalidInputError for one that is in use, NotFoundError for one that has lost its weights.
    """
    _locked_adapter(session, version)
    row = versions.find(session, version)
    if row.state in versions.USABLE:
        raise InvalidInputError(f"{version.reference} is {row.state}, expected one that is retired or quarantined")
    measured = bool(evaluations.of_version(session, version))
    return versions.set_state(session, version, "evaluated" if measured else "staged", now)


def _locked_adapter(session: Session, version: Version) -> Adapter:
    adapter = catalog.adapter(session, version.tenant, version.adapter)
    aliases.lock(session, adapter)
    return adapter


def _names(session: Session, adapter: Adapter, version: Version) -> list[str]:
    number = versions.find(session, version).number
    statement = select(AliasRow.name).where(AliasRow.adapter_id == adapter.id, AliasRow.number == number)
    return sorted(session.scalars(statement))


def _measured_by(found: Comparison) -> str:
    members = f"{found.members} member{'s' if found.members > 1 else ''}" if found.members else ""
    who = " and ".join(each for each in (members, "the tenant itself" if found.own else "") if each)
    return f"by {who} that measured both" if who else "by whoever measured each"


def _loss(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.4f}"
