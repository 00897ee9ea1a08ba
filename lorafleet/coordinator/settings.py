"""What a federation agrees on, as one frozen object; read from a TOML file or from the registry."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from ipaddress import ip_address
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

from lorafleet.assets import SHIPPED_BASES
from lorafleet.coordinator import defence
from lorafleet.coordinator.defence import Robust
from lorafleet.coordinator.privacy import Privacy, check_allowed
from lorafleet.coordinator.rules import get_round_rule
from lorafleet.coordinator.schedulers import get_scheduler
from lorafleet.coordinator.validation import UpdatePolicy
from lorafleet.errors import InvalidInputError, NotFoundError
from lorafleet.registry import Federation
from lorafleet.registry.database import anchored_url

T = TypeVar("T")

# How long, how often and with how many members a run works; nothing that the experts are made of.
MAY_CHANGE = frozenset({"rounds", "deadline_s", "at_once", "evaluate_last", "quorum", "keep_updates"})

# The file's tables that are a federation's terms, beside [federation] itself.
TABLES = ("training", "scheduling", "policy", "privacy", "robust")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What each member does in one round."""

    steps: int = 24
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 1e-2
    rank: int = 0
    """Rank of the residuals; 0 lets every member use its own."""
    rank_choices: tuple[int, ...] = ()
    """Where given, each member's rank is learned among these, by gain per second, up to the member's own."""

    def __post_init__(self) -> None:
        choices: Any = self.rank_choices
        if not isinstance(choices, list | tuple) or not all(_is_a(int, rank) and rank >= 1 for rank in choices):
            raise InvalidInputError(f"training.rank_choices is {choices!r}, expected a list of ranks of at least 1")
        if choices and self.rank:
            raise InvalidInputError(
                f"found training.rank {self.rank} and training.rank_choices {list(choices)}: give one of the two"
            )
        object.__setattr__(self, "rank_choices", tuple(choices))
        _check_least("training", self, steps=1, batch_size=1, sequence_length=2, rank=0)
        if not 0 < self.learning_rate < math.inf:
            raise InvalidInputError(f"training.learning_rate is {self.learning_rate}, expected a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class Scheduling:
    """When members work and rounds close; each scheduler reads what concerns it."""

    goal: int = 0
    """``sync``: updates that close a round; 0 waits for all of those chosen."""
    over_selection: float = 1.0
    """``sync``: members chosen, as a multiple of the goal."""
    buffer: int = 0
    """``buffered``: updates that close a round; 0 stands for half of the members that are here."""
    max_staleness: int = 20
    """``buffered``: updates whose order is more rounds old do not count."""
    min_steps: int = 0
    """``compass``: least steps of an order, of at most ``training.steps``; 0 stands for a fifth of those."""
    speed_momentum: float = 0.9
    """``compass``: weight of a member's last order in its speed."""
    latest_time_factor: float = 1.5
    """``compass``: how long a group waits, as a multiple of what was expected."""
    mixing: float = 1.0
    """``compass``, ``buffered``: weight of an update that is not stale."""
    staleness_exponent: float = 0.0
    """``compass``, ``buffered``: a in (1 + τ)^-a, for an update whose order is τ rounds old; 0 counts all alike."""

    def __post_init__(self) -> None:
        _check_least("scheduling", self, goal=0, buffer=0, max_staleness=0, min_steps=0, staleness_exponent=0)
        _check_least("scheduling", self, over_selection=1, latest_time_factor=1)
        for name in ("speed_momentum", "mixing"):
            if not 0 < getattr(self, name) <= 1:
                raise InvalidInputError(
                    f"scheduling.{name} is {getattr(self, name)}, expected a number above 0, at most 1"
                )
        for name in ("over_selection", "latest_time_factor", "staleness_exponent"):
            if not math.isfinite(getattr(self, name)):
                raise InvalidInputError(f"scheduling.{name} is {getattr(self, name)}, expected a finite number")


@dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """A federation: base, rounds, rule, scheduler, and the limits on updates."""

    tenant: str
    name: str
    base: str = "tiny"
    rounds: int = 3
    rule: str = "exact"
    scheduler: str = "sync"
    quorum: int = 2
    deadline_s: float = 600.0
    at_once: int = 0
    """Members that work at the same time; 0 lets all of them."""
    evaluate_last: bool = True
    """Members measure each expert when they get it to train on; this asks them for the last round's, too."""
    expert_rank: int = 32
    clusters: bool = True
    """Whether groups of members that learn alike get experts of their own, beside the shared one."""
    min_cluster_size: int = 2
    """Smaller clusters fall to the shared expert, so that no expert is one owner's data in disguise."""
    keep_updates: int = 0
    """Rounds for which the factors of a counted update are kept; 0 keeps them for good, since what is deleted cannot be
    computed with again, such as to leave a member out."""
    seed: int = 0
    training: Training = field(default_factory=Training)
    scheduling: Scheduling = field(default_factory=Scheduling)
    policy: UpdatePolicy = field(default_factory=UpdatePolicy)
    privacy: Privacy = field(default_factory=Privacy)
    robust: Robust = field(default_factory=Robust)

    def __post_init__(self) -> None:
        self._check_rule()
        check_allowed(
            self.privacy,
            rule=self.rule,
            scheduler=self.scheduler,
            clusters=self.clusters,
            evaluate_last=self.evaluate_last,
        )
        get_scheduler(self.scheduler)
        defence.check_allowed(
            self.robust,
            rule=self.rule,
            scheduler=self.scheduler,
            quorum=self.quorum,
            buffer=self.scheduling.buffer,
            clusters=self.clusters,
            min_cluster_size=self.min_cluster_size,
            privacy=self.privacy.mode,
        )
        _check_least(
            "federation", self, rounds=1, at_once=0, quorum=1, expert_rank=1, min_cluster_size=2, keep_updates=0
        )
        if not 0 < self.deadline_s < math.inf:
            raise InvalidInputError(
                f"federation.deadline_s is {self.deadline_s}, expected a finite number of seconds above 0"
            )

    def _check_rule(self) -> None:
        rule = get_round_rule(self.rule)
        if not rule.mixed_ranks and not self.training.rank:
            raise InvalidInputError(
                f"the rule {self.rule} takes one rank for all: give training.rank, and no training.rank_choices"
            )
        if rule.trains == "alternate" and (self.clusters or get_scheduler(self.scheduler).spans_rounds):
            raise InvalidInputError(
                f"the rule {self.rule} lets all members of a round go on from the same factors: give clusters = false "
                "and a scheduler whose rounds are apart (sync)"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FederationSettings:
        """Raises InvalidInputError on keys that do not exist, so that a misspelt limit is never ignored, and on values
        that can never work."""
        values = dict(values)
        training = _build(Training, _table("training", values.pop("training", {})), "training")
        scheduling = _build(Scheduling, _table("scheduling", values.pop("scheduling", {})), "scheduling")
        policy = _build(UpdatePolicy, _table("policy", values.pop("policy", {})), "policy")
        privacy = _build(Privacy, _table("privacy", values.pop("privacy", {})), "privacy")
        robust = _build(Robust, _table("robust", values.pop("robust", {})), "robust")
        built = {
            "training": training, "scheduling": scheduling, "policy": policy, "privacy": privacy, "robust": robust,
        }  # fmt: skip
        return _build(cls, {**values, **built}, "federation")


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig:
    """One coordinator process: its federation, and where registry, Ray and SuperLink are."""

    federation: FederationSettings
    registry: str
    """SQLAlchemy URL."""
    blobs: Path | str
    """A folder, or the URL of an object store, ``s3://BUCKET/PREFIX``."""
    ray_address: str
    """``HOST:PORT`` of a running cluster's head, ``auto`` to find one, or ``local`` to reduce without Ray."""
    superlink: str
    """``HOST:PORT``"""
    reduce_memory_mb: int = 1024
    """What the sum of a group's updates may hold at a time, here or in Ray's object store."""
    insecure: bool = False
    """Whether the SuperLink is reached without TLS."""
    root_certificates: Path | None = None
    """PEM file that the SuperLink's certificate is checked against; None for the public authorities."""
    members: Mapping[str, str] = field(default_factory=dict)
    """Member key → tenant, registered when the federation starts."""

    def __post_init__(self) -> None:
        _check_least("coordinator", self, reduce_memory_mb=1)
        for key, tenant in self.members.items():
            if not isinstance(tenant, str):
                raise InvalidInputError(f"[members]: {key} is {tenant!r}, expected the name of its tenant")

    @classmethod
    def load(cls, path: Path) -> CoordinatorConfig:
        """Read a file; paths in it are relative to its folder.

        Raises NotFoundError where there is none, InvalidInputError where it says what can never work.
        """
        if not path.is_file():
            raise NotFoundError(f"no federation file at {path}; docs/federation.md shows one")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInputError(f"{path} is not TOML in UTF-8: {error}") from None
        federation = _table("federation", values.get("federation", {}))
        for part in TABLES:
            if part in values:
                federation[part] = values[part]
        base = federation.get("base")
        if isinstance(base, str) and base not in SHIPPED_BASES:
            federation["base"] = str(_path(path.parent, "base", base))
        coordinator = _table("coordinator", values.get("coordinator", {}))
        members = _table("members", values.get("members", {}))
        if unknown := set(values) - {"federation", *TABLES, "coordinator", "members"}:
            raise InvalidInputError(f"{path}: unknown tables {', '.join(sorted(unknown))}")
        for key in coordinator.keys() & {"blobs", "root_certificates"}:
            if not (key == "blobs" and isinstance(coordinator[key], str) and "://" in coordinator[key]):
                coordinator[key] = _path(path.parent, key, coordinator[key])
        if isinstance(coordinator.get("registry"), str):
            # The ServerApp runs in a folder of its own, and has to find the database of whoever submitted it.
            coordinator["registry"] = anchored_url(coordinator["registry"], path.parent.resolve())
        if "superlink" in coordinator:
            coordinator["insecure"] = without_tls(
                coordinator["superlink"],
                insecure=coordinator.get("insecure"),
                root_certificates=coordinator.get("root_certificates"),
            )
        built = FederationSettings.from_dict(federation)
        return _build(cls, {**coordinator, "federation": built, "members": members}, "coordinator")


def without_tls(superlink: str, *, insecure: bool | None, root_certificates: Path | None) -> bool:
    """Whether to reach a SuperLink (``HOST:PORT``) without TLS: as the file says, and by default on loopback alone.

    Raises InvalidInputError where the file says both, neither for another machine, or something else.
    """
    if not isinstance(superlink, str):
        raise InvalidInputError(f'[coordinator]: superlink is {superlink!r}, expected "HOST:PORT"')
    if insecure is not None and not isinstance(insecure, bool):
        raise InvalidInputError(f"[coordinator]: insecure is {insecure!r}, expected true or false")
    if insecure and root_certificates is not None:
        raise InvalidInputError("[coordinator]: found insecure = true and root_certificates: give one of the two")
    if insecure is not None or root_certificates is not None:
        return bool(insecure)
    if not is_loopback(superlink):
        raise InvalidInputError(
            f"[coordinator]: superlink {superlink} may be another machine, and the file does not say how to trust it: "
            'expected root_certificates = "ca.crt" for TLS, or insecure = true'
        )
    return True


def is_loopback(address: str) -> bool:
    """Whether ``HOST:PORT`` is reached from this machine alone."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class Difference(NamedTuple):
    """A key on which a file and the registry disagree; keys of tables are written ``training.steps``."""

    key: str
    found: Any
    recorded: Any


def differences(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> list[Difference]:
    """What differs between two documents of nested tables, by key; a key that one of them lacks is None there."""
    old, new = _flat(recorded), _flat(asked)
    return [
        Difference(key, new.get(key), old.get(key))
        for key in sorted(old.keys() | new.keys())
        if new.get(key) != old.get(key)
    ]


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def check_terms(
    config: CoordinatorConfig, base_digest: str, federation: Federation, registered: Mapping[str, str]
) -> list[Difference]:
    """Compare a file with the federation that the registry holds; returns what differs and may.

    ``base_digest`` is that of the file's base, which is compared in the place of its path; ``registered`` maps member
    keys to tenants. What was not recorded counts as its default. Raises InvalidInputError where they differ in what
    the experts are made of, or in whose a member is.
    """
    agreed = FederationSettings.from_dict({"tenant": federation.tenant, "name": federation.name, **federation.settings})
    both = registered.keys() & config.members.keys()
    found = differences(
        {**agreed.to_dict(), "base": federation.base_digest, "members": {key: registered[key] for key in both}},
        {**config.federation.to_dict(), "base": base_digest, "members": {key: config.members[key] for key in both}},
    )
    if refused := [difference for difference in found if difference.key not in MAY_CHANGE]:
        listed = "; ".join(f"{d.key}: found {d.found!r}, recorded {d.recorded!r}" for d in refused)
        raise InvalidInputError(
            f"{federation.tenant}/{federation.name} was registered with other terms than the file's: {listed}. "
            "Restore the recorded values, or name another federation"
        )
    return found


def _path(folder: Path, key: str, value: object) -> Path:
    if not isinstance(value, str):
        raise InvalidInputError(f"[coordinator]: {key} is {value!r}, expected a path")
    return (folder / value).resolve()


def _table(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"{name} is {value!r}, expected a table [{name}]")
    return dict(value)


def _check_least(table: str, values: object, **least: int) -> None:
    for name, limit in least.items():
        if getattr(values, name) < limit:
            raise InvalidInputError(f"{table}.{name} is {getattr(values, name)}, expected at least {limit}")


# What a TOML file and a JSON document call the types of fields; whole numbers travel and are stored in 64 bits.
_WORDS = {str: "a string", bool: "true or false", int: "a whole number of at most 64 bits", float: "a number"}


def _is_a(kind: type, value: object) -> bool:
    """Whether a value can stand for a type: a whole number for any number, true and false for nothing else."""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and -(2**63) <= value < 2**63
    return isinstance(value, kind)


def _build(cls: type[T], values: Mapping[str, Any], table: str) -> T:
    """An instance of a settings dataclass from a table of the file."""
    assert is_dataclass(cls)
    known = {f.name for f in fields(cls)}
    if unknown := set(values) - known:
        raise InvalidInputError(
            f"[{table}]: unknown keys {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}"
        )
    hints = get_type_hints(cls)
    for name, value in values.items():
        hint = hints[name]
        if isinstance(hint, UnionType):  # with None, for a key that is left out
            if value is None:
                continue
            hint = get_args(hint)[0]
        if hint in _WORDS and not _is_a(hint, value):
            raise InvalidInputError(f"[{table}]: {name} is {value!r}, expected {_WORDS[hint]}")
    try:
        return cls(**values)
    except TypeError as error:
        raise InvalidInputError(f"[{table}]: {error}") from None
