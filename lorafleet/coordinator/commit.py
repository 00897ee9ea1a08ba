"""The end of a round: group its updates, reduce them, truncate, and publish it all in one transaction.

Everything comes from the journal, so that a loop that starts again does the same.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorafleet.adapters import LoraAdapter
from lorafleet.adapters.privacy import SEED_BYTES, trained_norm
from lorafleet.adapters.threads import one_thread
from lorafleet.coordinator.clusters import SHARED, assign, cosines
from lorafleet.coordinator.defence import Clipping, some_of
from lorafleet.coordinator.experts import MemberUpdate, NextExpert, next_experts, seed_of
from lorafleet.coordinator.inner_products import Combination, Source, inner_products
from lorafleet.coordinator.orders import turn_of
from lorafleet.coordinator.parts import Parts
from lorafleet.coordinator.privacy import seed_for, spent_after, with_noise
from lorafleet.coordinator.reduction import Read, extents_of
from lorafleet.coordinator.residuals import Residuals, name_of
from lorafleet.coordinator.robust import Factor, shrinking
from lorafleet.coordinator.rules import get_rule
from lorafleet.coordinator.rules.rule import Modules
from lorafleet.coordinator.schedulers.scheduler import Blend, Close
from lorafleet.coordinator.settings import FederationSettings
from lorafleet.coordinator.standing import Standing, adapter_name, used_labels
from lorafleet.errors import UnavailableError
from lorafleet.registry import Federation, NewExpert, Round, UpdateKey, UpdateRecord, Version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spent:
    """What a round took so far; for its report."""

    started: float
    """by the loop's clock"""
    bytes_down: int


def close_round(
    settings: FederationSettings,
    federation: Federation,
    parts: Parts,
    standing: Standing,
    current: Round,
    close: Close,
    spent: Spent,
) -> Standing:
    """The round's experts, committed, and where the federation stands with them.

    Raises UnavailableError where another coordinator committed it meanwhile.
    """
    journal = {record.key: record for record in parts.registry.journal(federation)}
    records = [journal[key] for key in sorted(close.updates)]
    active = {member.key for member in parts.registry.members(federation) if member.revoked_at is None}
    # Where only some answer before a round closes, the others are known by their last word.
    known = records if close.blend == "mean" else [r for r in latest(journal.values()) if r.member in active]
    held = Held(parts, standing)
    read = Residuals(parts.registry, {*records, *known} if settings.clusters else records)
    updates = {
        name_of(r.key): MemberUpdate(
            r.member,
            r.digest,
            r.num_examples,
            held=held[r.expert_digest],
            shapes=read.shapes[name_of(r.key)],
            discount=close.updates[r.key],
        )
        for r in records
    }
    summed: Read = read
    release = None
    if settings.privacy.mode == "central":
        updates, summed, release = with_central_privacy(settings, parts, standing, current, updates, read, records)
    collected = parts.clock()
    assignment = group(settings, parts, standing, current.number, known, close.blend, read, held)
    before = {m: label for m, label in standing.assignment.items() if m in active}
    everybody = assignment if close.blend == "mean" else {**before, **assignment}
    experts = next_experts(
        updates,
        summed,
        everybody,
        standing.experts,
        blend=close.blend,
        population=len(active),
        rule=settings.rule,
        reducer=parts.reducer,
        rank=settings.expert_rank,
        robust=settings.robust,
        release=release,
    )
    parts.failpoint("experts made")
    made = {expert.label for expert in experts}
    # Without new updates, or enough of them, an expert stays as it is; where models are averaged, one that nobody
    # trains on ends.
    lasting = standing.versions.keys() if close.blend != "mean" else set(assignment.values())
    staying = {k: v for k, v in standing.versions.items() if k in lasting - made}
    # Members that were not heard of in this round keep the expert they had, where it still exists.
    labels = made | staying.keys()
    assignment = {m: label for m, label in before.items() if label in labels} | assignment
    assignment = {m: label if label in labels else SHARED for m, label in assignment.items()}
    now = parts.clock()
    report = round_report(settings, experts, records, assignment, close) | robust_report(settings, experts) | {
        **spent_after(settings.privacy, current.number, standing.committed + 1),
        "population": len(active),
        "seconds": now - spent.started, "reduce_s": now - collected, "bytes_down": spent.bytes_down,
    }  # fmt: skip
    versions = staying | commit(settings, parts, current, experts, staying, report, close.updates.keys())
    parts.failpoint("round committed")
    log.info(
        "round %d is committed: %s", current.number, ", ".join(f"{e.label} from {e.members}" for e in experts)
    )  # fmt: skip
    for expert in experts:
        for did, members in (("left out of", expert.left_out), ("scaled down for", expert.clipped)):
            if members:
                log.info("round %d: %s %s: %s", current.number, did, expert.label, some_of(members, 10))
    # The committed blobs, not the tensors in memory: a resumed loop goes on from the same bits.
    weights = {label: parts.registry.load(version) for label, version in versions.items()}
    return Standing(current.number, standing.committed + 1, assignment, weights, versions)


def with_central_privacy(
    settings: FederationSettings,
    parts: Parts,
    standing: Standing,
    current: Round,
    updates: Mapping[str, MemberUpdate],
    read: Residuals,
    records: list[UpdateRecord],
) -> tuple[dict[str, MemberUpdate], Read, Callable[[LoraAdapter], LoraAdapter]]:
    """One weight for all, the updates clipped, whoever did or did not clip them before, and what adds the noise."""
    privacy = settings.privacy
    trains, _ = turn_of(get_rule(settings.rule).trains, standing, standing.experts.get(SHARED))
    factor: Factor = "a" if trains == "a" else "b"
    sizes = {name: trained_norm(LoraAdapter(read(name, list(u.shapes))), trains) for name, u in updates.items()}
    clip = Clipping({name: shrinking(size, privacy.clip_norm) for name, size in sizes.items()}, factor)
    kept = {name: replace(update, num_examples=1) for name, update in updates.items()}
    # On the disk before it is used: whatever happens from here on, this round has one noise.
    secret = parts.registry.noise_seed(current, parts.entropy(SEED_BYTES), token=parts.token)
    seed, count = seed_for(secret, records), len(kept)
    return kept, clip.reading(read), lambda mean: with_noise(mean, privacy, trains=trains, count=count, seed=seed)


class Held:
    """Experts by digest: those that stand, and older ones that late updates were trained on, read when asked for."""

    def __init__(self, parts: Parts, standing: Standing) -> None:
        self._parts = parts
        self._known: dict[str, LoraAdapter | None] = {e.digest: e for e in standing.experts.values()} | {"": None}

    def __getitem__(self, digest: str) -> LoraAdapter | None:
        if digest not in self._known:
            self._known[digest] = replace(self._parts.registry.load_digest(digest), base=self._parts.base_digest)
        return self._known[digest]


def latest(journal: Iterable[UpdateRecord]) -> list[UpdateRecord]:
    """Each member's last update, in the order of members; ``journal`` is in the order of writing."""
    return [record for _, record in sorted({record.member: record for record in journal}.items())]


def full_update(record: UpdateRecord) -> Combination:
    """All that a member holds beyond the base, ``E_k + R_k``; what clustering compares in rounds apart."""
    return {name_of(record.key): 1.0, **({record.expert_digest: 1.0} if record.expert_digest else {})}


def own_part(record: UpdateRecord, standing: Standing) -> Combination:
    """What sets a member apart from all others, ``E_c - E_shared + R_k`` for its group's expert as it stands.

    What clustering compares where members trained on experts of unlike age: those differ more by their age than by
    whose data they saw, and all of them have the shared past in common.
    """
    own = standing.experts.get(standing.assignment.get(record.member, SHARED))
    shared = standing.experts.get(SHARED)
    if own is None or shared is None or own.digest == shared.digest:
        return {name_of(record.key): 1.0}
    return {name_of(record.key): 1.0, own.digest: 1.0, shared.digest: -1.0}


def group(
    settings: FederationSettings,
    parts: Parts,
    standing: Standing,
    number: int,
    known: Sequence[UpdateRecord],
    blend: Blend,
    read: Residuals,
    held: Held,
) -> dict[str, str]:
    """Member → label of its expert, for the members whose updates are ``known``, one of each."""
    members = sorted(record.member for record in known)
    if not settings.clusters:
        return dict.fromkeys(members, SHARED)
    if parts.groups is not None:
        given = parts.groups(number)
        return {member: given[member] for member in members if member in given}
    compared = {r.member: full_update(r) if blend == "mean" else own_part(r, standing) for r in known}
    experts = {d: e for terms in compared.values() for d in terms if d not in read.shapes and (e := held[d])}
    with one_thread():
        products = inner_products(
            [compared[member] for member in members],
            with_experts(read, experts),
            seed=seed_of(record.digest for record in known),
            memory_bytes=parts.reducer.memory_bytes,
        )
    return assign(
        members,
        cosines(products.numpy()),
        previous=standing.assignment,
        min_size=settings.min_cluster_size,
        used=used_labels(settings, parts.registry),
    )


def with_experts(read: Residuals, experts: Mapping[str, LoraAdapter]) -> Source:
    """Residuals by name, and experts by digest."""

    def either(name: str, paths: Sequence[str]) -> Modules:
        if name not in experts:
            return read(name, paths)
        modules = experts[name].modules
        return {path: modules[path] for path in paths if path in modules}

    return Source(either, {**read.shapes, **{digest: extents_of([e]) for digest, e in experts.items()}})


def commit(
    settings: FederationSettings,
    parts: Parts,
    current: Round,
    experts: list[NextExpert],
    staying: Mapping[str, Version],
    report: Mapping[str, Any],
    counted: Iterable[UpdateKey],
) -> dict[str, Version]:
    """Publish the round; label → the version that it made."""
    new = [
        NewExpert(
            name=adapter_name(settings.name, expert.label),
            weights=replace(expert.weights, base=parts.base_digest),
            rule=settings.rule,
            parents=expert.parents,
            members=expert.members,  # also of a private federation, whose reports say the same
        )
        for expert in experts
    ]
    parts.check_lease()
    shared = next(expert.shares for expert in experts if expert.label == SHARED)
    versions = parts.registry.commit_round(
        current,
        new,
        report={**report, "staying": {label: version.number for label, version in staying.items()}},
        counted={key: shared[name_of(key)] for key in counted},
        token=parts.token,
        by=parts.owner,
    )
    ours = [(expert.name, expert.weights.digest) for expert in new]
    # A round that is committed already stays as it is, and gives what was committed then.
    if [(version.adapter, version.digest) for version in versions] != ours:
        raise UnavailableError(
            f"another coordinator committed round {current.number} of {settings.tenant}/{settings.name} meanwhile: "
            "stop one of the two, then resume"
        )
    return {expert.label: version for expert, version in zip(experts, versions, strict=True)}


def robust_report(settings: FederationSettings, experts: list[NextExpert]) -> dict[str, Any]:
    """Members that were left out of an expert, or scaled down for one; where the federation does such things."""
    if not settings.robust.on:
        return {}
    return {
        "robust": {
            "left_out": sorted({member for expert in experts for member in expert.left_out}),
            "clipped": sorted({member for expert in experts for member in expert.clipped}),
        }
    }


def round_report(
    settings: FederationSettings,
    experts: list[NextExpert],
    records: list[UpdateRecord],
    assignment: Mapping[str, str],
    close: Close,
) -> dict[str, Any]:
    """What the registry keeps of a round beside its experts and times; sizes in bytes."""
    errors = [e for expert in experts for e in expert.truncation_error.values()]
    return {
        "assignment": dict(sorted(assignment.items())),
        "rule": settings.rule,
        "blend": close.blend,
        # With the factors in the journal this is all that it takes to compute the experts again.
        "counted": [
            {"member": key.member, "ordered_in": key.ordered_in, "attempt": key.attempt, "discount": discount}
            for key, discount in sorted(close.updates.items())
        ],
        "bytes_up": sum(record.size_bytes for record in records),
        "updates": {
            record.member: {
                "rank": record.rank, "num_examples": record.num_examples, "steps": record.steps,
                "seconds": record.seconds, "ordered_in": record.ordered_in,
            }
            for record in records
        },
        "members": {expert.label: expert.members for expert in experts},
        "truncation_error": {"mean": statistics.fmean(errors), "max": max(errors)},
    }  # fmt: skip
