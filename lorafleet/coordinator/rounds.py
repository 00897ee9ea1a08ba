"""The round loop: open, order, collect, check, journal, group, reduce, commit. One function a step.

Every accepted or rejected update is in the registry's journal before the next one is read; a round's experts, lineage
and report become visible in one transaction. A loop that starts again continues after the last committed round, and in
a round that was still open it asks only the members whose update is not in the journal yet.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lorafleet.adapters import LoraAdapter
from lorafleet.adapters.base_shapes import ModuleShapes
from lorafleet.adapters.wire import TrainOrder
from lorafleet.coordinator.clusters import SHARED, assign
from lorafleet.coordinator.dispatch import Dispatch
from lorafleet.coordinator.experts import MemberUpdate, NextExpert, full_update, next_experts
from lorafleet.coordinator.schedulers import get_scheduler
from lorafleet.coordinator.settings import FederationSettings
from lorafleet.coordinator.transport import MemberInfo, Order, Reply, Transport, one_line
from lorafleet.coordinator.tree import Reducer
from lorafleet.coordinator.validation import check_update
from lorafleet.errors import RejectedUpdateError, UnavailableError
from lorafleet.registry import Federation, NewExpert, Registry, Round, UpdateRecord, Version

log = logging.getLogger(__name__)

# A member's claim about its held-out share; more is no claim that anybody should believe or store.
MAX_HELD_OUT_TOKENS = 10**12
# The longest wait for a reply before the scheduler is asked again.
MAX_WAIT_S = 5.0


@dataclass(frozen=True)
class Parts:
    """What the loop works with; everything that touches the world is here, so that a test can replace it."""

    registry: Registry
    transport: Transport
    reducer: Reducer
    base_digest: str
    shapes: ModuleShapes
    clock: Callable[[], float] = time.monotonic
    groups: Callable[[int], Mapping[str, str]] | None = None
    """Round number → assignment, in the place of clustering: for runs that have to differ in something else only."""
    check_lease: Callable[[], None] = lambda: None
    """Raises UnavailableError where another coordinator has the federation by now; asked before whatever is written."""


@dataclass(frozen=True)
class Standing:
    """Where the federation stands between two rounds."""

    round: int = 0
    """Number of the last committed round; abandoned ones count as numbers, too."""
    committed: int = 0
    assignment: Mapping[str, str] = field(default_factory=dict)
    """Member key → label of the expert that it trains on next; empty before the first commit."""
    experts: Mapping[str, LoraAdapter] = field(default_factory=dict)
    versions: Mapping[str, Version] = field(default_factory=dict)


def run_federation(settings: FederationSettings, federation: Federation, parts: Parts) -> Standing:
    """Run or resume all rounds of a federation; returns where it stands after the last one.

    Raises UnavailableError where fewer members than the quorum are here before a round, or it had to be abandoned.
    """
    standing = resume(settings, federation, parts.registry)
    if standing.round:
        log.info("continuing after round %d", standing.round)
    members: Mapping[str, MemberInfo] = {}
    while standing.committed < settings.rounds:
        parts.check_lease()
        # Each round anew: members restart, come late, and leave.
        members = present_members(settings, federation, parts, before=members, quorum=settings.quorum)
        standing = run_round(settings, federation, parts, standing, members)
    if settings.evaluate_last:
        parts.check_lease()
        # What is committed is committed, however few are left to measure it.
        members = present_members(settings, federation, parts, before=members, quorum=0)
        evaluate(settings, parts, standing, members)
    return standing


def adapter_name(federation: str, label: str) -> str:
    """The registry's name for one expert of a federation."""
    return f"{federation}-{label}"


def resume(settings: FederationSettings, federation: Federation, registry: Registry) -> Standing:
    """The standing after the last committed round, from the registry alone."""
    done = [r for r in registry.rounds(federation) if r.state == "committed"]
    if not done:
        return Standing()
    last = max(done, key=lambda r: r.number)
    versions = {
        label: version
        for label in last.report["members"]
        for version in registry.versions(settings.tenant, adapter_name(settings.name, label))
        if version.lineage is not None and version.lineage.round == last.number
    }
    return Standing(
        last.number, len(done), last.report["assignment"], {k: registry.load(v) for k, v in versions.items()}, versions
    )


def present_members(
    settings: FederationSettings,
    federation: Federation,
    parts: Parts,
    *,
    before: Mapping[str, MemberInfo],
    quorum: int,
) -> dict[str, MemberInfo]:
    """The registered members that are here; others who answer are ignored, with a warning.

    ``before`` is who was here at the last look; who came and who went since is logged. Raises UnavailableError below
    the quorum.
    """
    registered = {member.key for member in parts.registry.members(federation)}
    here = dict(parts.transport.members())
    for stranger in sorted(here.keys() - registered):
        log.warning("%s is no member of %s and gets no work", one_line(stranger), settings.name)
        del here[stranger]
    if came := [f"{m.key} (rank {m.rank})" for m in here.values() if m.key not in before]:
        log.info("%d of %d members are here, new: %s", len(here), len(registered), ", ".join(came))
    if gone := sorted(before.keys() - here.keys()):
        log.warning("%d of %d members are here, gone: %s", len(here), len(registered), ", ".join(gone))
    if len(here) < quorum:
        busy = parts.transport.busy()
        advice = (
            f"{busy} nodes are here, but busy: they do not say who they are; resume when they have done what they do"
            if busy
            else "start more clients, then resume"
        )
        raise UnavailableError(f"{len(here)} of {len(registered)} members are here, the quorum is {quorum}: {advice}")
    return here


def stable_seed(*parts: object) -> int:
    """A 31-bit seed from anything printable; the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def train_order(
    settings: FederationSettings, standing: Standing, number: int, member: str, base_digest: str, *, steps: int
) -> Order:
    """What one member is asked in one round, with the expert that it trains on."""
    label = standing.assignment.get(member, SHARED)
    expert = standing.experts.get(label)
    training = settings.training
    order = TrainOrder(
        federation=settings.name,
        round=number,
        attempt=1,
        member=member,
        base_digest=base_digest,
        expert_digest=expert.digest if expert else "",
        rank=training.rank,
        steps=steps,
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        learning_rate=training.learning_rate,
        seed=stable_seed(settings.seed, number, member),
        init_seed=stable_seed(settings.seed, number),
        deadline_s=settings.deadline_s,
    )
    return Order(order, expert)


def run_round(
    settings: FederationSettings,
    federation: Federation,
    parts: Parts,
    standing: Standing,
    members: Mapping[str, MemberInfo],
) -> Standing:
    """One round to its commit; raises UnavailableError where it had to be abandoned."""
    started = parts.clock()
    earlier = parts.registry.rounds(federation)
    number = 1 if not earlier else earlier[-1].number + (earlier[-1].state != "open")
    scheduler = get_scheduler(settings.scheduler)(quorum=settings.quorum, deadline_s=settings.deadline_s)
    current = parts.registry.open_round(federation, number)
    chosen = scheduler.select(sorted(members), number)
    orders = {
        m: train_order(settings, standing, number, m, parts.base_digest, steps=settings.training.steps) for m in chosen
    }
    journal = parts.registry.updates(current, accepted_only=False)
    journaled = {update.member for update in journal if update.accepted}
    for update in journal:
        if not update.accepted and update.member in orders:  # asked once more by a loop that starts again
            asked, expert = orders[update.member]
            orders[update.member] = Order(replace(asked, attempt=max(asked.attempt, update.attempt + 1)), expert)
    log.info("round %d: %d members, %d already in the journal", number, len(chosen), len(journaled & orders.keys()))
    dispatch = start_dispatch(settings, parts, {m: orders[m] for m in chosen if m not in journaled})
    while True:
        accepted = len(parts.registry.updates(current))
        elapsed = parts.clock() - started
        verdict = scheduler.verdict(accepted=accepted, outstanding=dispatch.outstanding, elapsed_s=elapsed)
        if verdict != "wait":
            break
        replies = dispatch.receive(timeout_s=min(MAX_WAIT_S, settings.deadline_s - elapsed))
        parts.check_lease()
        for order, reply in replies:
            journal_reply(settings, parts, standing, current, order, reply)
    parts.transport.forget()
    if verdict == "abandon":
        reason = f"{accepted} accepted updates at the deadline, the quorum is {settings.quorum}"
        parts.registry.abandon_round(current, reason)
        raise UnavailableError(
            f"round {number} was abandoned: {reason}; see the journal for what was rejected, then resume"
        )
    return close_round(settings, parts, standing, current, orders, started)


def start_dispatch(settings: FederationSettings, parts: Parts, orders: Mapping[str, Order]) -> Dispatch:
    return Dispatch(
        parts.transport, orders, at_once=settings.at_once, deadline_s=settings.deadline_s, clock=parts.clock
    )


def journal_reply(
    settings: FederationSettings, parts: Parts, standing: Standing, current: Round, order: Order, reply: Reply
) -> None:
    """Check one reply and write it down, accepted or rejected with its reason; and the evaluation that came with it."""
    asked = order.order
    try:
        if reply.error:
            raise RejectedUpdateError("failed", reply.error)
        checked = check_update(
            asked, reply.header, reply.arrays, reply.metrics, shapes=parts.shapes, policy=settings.policy
        )
        assert checked.residual is not None
    except RejectedUpdateError as error:
        reason = one_line(str(error))
        log.warning("round %d: the update of %s is rejected: %s", asked.round, asked.member, reason)
        rejected = UpdateRecord(
            member=asked.member, attempt=asked.attempt, accepted=False, reason=reason, digest="", num_examples=0,
            rank=0, size_bytes=0, metrics={}, factors=None,
        )  # fmt: skip
        parts.registry.record_update(current, rejected)
        return
    parts.registry.record_update(
        current,
        UpdateRecord(
            member=asked.member,
            attempt=asked.attempt,
            accepted=True,
            reason="",
            digest=checked.header.digest,
            num_examples=checked.header.num_examples,
            rank=checked.residual.rank,
            size_bytes=checked.size_bytes,
            metrics=checked.metrics,
            factors=checked.residual,
        ),
    )
    record_held_out(parts, standing, asked, checked.metrics)
    loss = checked.metrics.get("train_loss", float("nan"))
    log.info("round %d: %s, rank %d, loss %.3f", asked.round, asked.member, checked.residual.rank, loss)


def record_held_out(parts: Parts, standing: Standing, asked: TrainOrder, metrics: Mapping[str, float]) -> None:
    """The loss of the expert that the member was given, on the member's held-out share."""
    version = standing.versions.get(standing.assignment.get(asked.member, SHARED))
    tokens = int(metrics.get("held_out_tokens", 0))
    if version is not None and "held_out_loss" in metrics and 1 <= tokens <= MAX_HELD_OUT_TOKENS:
        parts.registry.record_evaluation(version, member=asked.member, loss=metrics["held_out_loss"], tokens=tokens)


def close_round(
    settings: FederationSettings,
    parts: Parts,
    standing: Standing,
    current: Round,
    orders: Mapping[str, Order],
    started: float,
) -> Standing:
    """Group, reduce, truncate and commit; everything comes from the journal, so that a resumed loop does the same."""
    records = parts.registry.updates(current)
    updates = {
        record.member: MemberUpdate(
            residual=replace(parts.registry.update_factors(record), base=parts.base_digest),
            num_examples=record.num_examples,
            held=standing.assignment.get(record.member, SHARED) if standing.experts else "",
        )
        for record in records
    }
    if parts.groups is not None:
        assignment = {m: label for m, label in parts.groups(current.number).items() if m in updates}
    else:
        assignment = assign(
            {member: full_update(update, standing.experts) for member, update in updates.items()},
            previous=standing.assignment,
            min_size=settings.min_cluster_size,
            used=used_labels(settings, parts.registry),
        )
    collected = parts.clock()
    experts = next_experts(
        updates, assignment, standing.experts, rule=settings.rule, reducer=parts.reducer, rank=settings.expert_rank
    )
    # Members that were not heard of in this round keep the expert they had, where it still exists.
    labels = {expert.label for expert in experts}
    assignment = {m: label for m, label in standing.assignment.items() if label in labels} | assignment
    now = parts.clock()
    times = {"seconds": now - started, "reduce_s": now - collected}
    report = round_report(settings, experts, records, orders, assignment) | times
    versions = commit(settings, parts, current, experts, report)
    log.info(
        "round %d is committed: %s",
        current.number,
        ", ".join(f"{k} from {e.members}" for k, e in zip(versions, experts, strict=True)),
    )
    # The committed blobs, not the tensors in memory: a resumed loop goes on from the same bits.
    weights = {label: parts.registry.load(version) for label, version in versions.items()}
    return Standing(current.number, standing.committed + 1, assignment, weights, versions)


def used_labels(settings: FederationSettings, registry: Registry) -> set[str]:
    """Labels that ever had an expert: a label never comes to stand for other members' data."""
    prefix = adapter_name(settings.name, "")
    names = (adapter.name for adapter in registry.adapters(settings.tenant))
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def commit(
    settings: FederationSettings,
    parts: Parts,
    current: Round,
    experts: list[NextExpert],
    report: Mapping[str, Any],
) -> dict[str, Version]:
    new = [
        NewExpert(
            name=adapter_name(settings.name, expert.label),
            weights=replace(expert.weights, base=parts.base_digest),
            rule=settings.rule,
            parents=expert.parents,
        )
        for expert in experts
    ]
    parts.check_lease()
    versions = parts.registry.commit_round(current, new, report=report)
    ours = [(expert.name, expert.weights.digest) for expert in new]
    # A round that is committed already stays as it is, and gives what was committed then.
    if [(version.adapter, version.digest) for version in versions] != ours:
        raise UnavailableError(
            f"another coordinator committed round {current.number} of {settings.tenant}/{settings.name} meanwhile: "
            "stop one of the two, then resume"
        )
    return {expert.label: version for expert, version in zip(experts, versions, strict=True)}


def round_report(
    settings: FederationSettings,
    experts: list[NextExpert],
    records: list[UpdateRecord],
    orders: Mapping[str, Order],
    assignment: Mapping[str, str],
) -> dict[str, Any]:
    """What the registry keeps of a round beside its experts and times; sizes in bytes."""
    errors = [e for expert in experts for e in expert.truncation_error.values()]
    return {
        "assignment": dict(sorted(assignment.items())),
        "rule": settings.rule,
        "bytes_up": sum(record.size_bytes for record in records),
        "bytes_down": sum(4 * order.expert.parameters for order in orders.values() if order.expert),
        "updates": {record.member: {"rank": record.rank, "num_examples": record.num_examples} for record in records},
        "members": {expert.label: expert.members for expert in experts},
        "truncation_error": {"mean": statistics.fmean(errors), "max": max(errors)},
    }


def evaluate(
    settings: FederationSettings, parts: Parts, standing: Standing, members: Mapping[str, MemberInfo]
) -> dict[str, float]:
    """Ask every member for the loss of its final expert on its held-out share; returns it by member."""
    orders = {
        m: train_order(settings, standing, standing.round + 1, m, parts.base_digest, steps=0) for m in sorted(members)
    }
    dispatch, losses, started = start_dispatch(settings, parts, orders), dict[str, float](), parts.clock()
    while dispatch.outstanding and (left := settings.deadline_s - (parts.clock() - started)) > 0:
        for order, reply in dispatch.receive(timeout_s=min(MAX_WAIT_S, left)):
            try:
                if reply.error:
                    raise RejectedUpdateError("failed", reply.error)
                checked = check_update(
                    order.order, reply.header, reply.arrays, reply.metrics, shapes=parts.shapes, policy=settings.policy
                )
            except RejectedUpdateError as error:
                log.warning("the evaluation of %s is rejected: %s", reply.member, one_line(str(error)))
                continue
            record_held_out(parts, standing, order.order, checked.metrics)
            losses[reply.member] = checked.metrics.get("held_out_loss", float("nan"))
    parts.transport.forget()
    if losses:
        log.info("held-out loss, median over members: %.3f", statistics.median(losses.values()))
    return losses
