"""What a federation agrees on, as one frozen object; read from a TOML file or from the registry."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorafleet.coordinator.rules import get_rule
from lorafleet.coordinator.schedulers import get_scheduler
from lorafleet.coordinator.validation import UpdatePolicy
from lorafleet.errors import InvalidInputError, NotFoundError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What each member does in one round."""

    steps: int = 24
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 1e-2
    rank: int = 0
    """Rank of the residuals; 0 lets every member use its own."""


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
    min_cluster_size: int = 2
    """Smaller clusters fall to the shared expert, so that no expert is one owner's data in disguise."""
    seed: int = 0
    training: Training = field(default_factory=Training)
    policy: UpdatePolicy = field(default_factory=UpdatePolicy)

    def __post_init__(self) -> None:
        get_rule(self.rule)
        get_scheduler(self.scheduler)
        for name, least in (("rounds", 1), ("at_once", 0), ("quorum", 1), ("expert_rank", 1), ("min_cluster_size", 2)):
            if getattr(self, name) < least:
                raise InvalidInputError(f"federation.{name} is {getattr(self, name)}, expected at least {least}")
        if not self.deadline_s > 0:
            raise InvalidInputError(f"federation.deadline_s is {self.deadline_s}, expected a number of seconds above 0")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FederationSettings:
        """Raises InvalidInputError on keys that do not exist, so that a misspelt limit is never ignored."""
        values = dict(values)
        training = _build(Training, values.pop("training", {}), "training")
        policy = _build(UpdatePolicy, values.pop("policy", {}), "policy")
        return _build(cls, {**values, "training": training, "policy": policy}, "federation")


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig:
    """One coordinator process: its federation, and where registry, Ray and SuperLink are."""

    federation: FederationSettings
    registry: str
    """SQLAlchemy URL."""
    blobs: Path
    ray_address: str
    """``HOST:PORT`` of a running cluster's head, ``auto`` to find one, or ``local`` to reduce without Ray."""
    superlink: str
    """``HOST:PORT``"""
    members: Mapping[str, str] = field(default_factory=dict)
    """Member key → tenant, registered when the federation starts."""

    @classmethod
    def load(cls, path: Path) -> CoordinatorConfig:
        if not path.is_file():
            raise NotFoundError(f"no federation file at {path}; docs/federation.md shows one")
        try:
            values = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise InvalidInputError(f"{path} is not TOML: {error}") from None
        federation = dict(values.get("federation", {}))
        for part in ("training", "policy"):
            if part in values:
                federation[part] = values[part]
        coordinator = dict(values.get("coordinator", {}))
        if unknown := set(values) - {"federation", "training", "policy", "coordinator", "members"}:
            raise InvalidInputError(f"{path}: unknown tables {', '.join(sorted(unknown))}")
        if "blobs" in coordinator:
            coordinator["blobs"] = (path.parent / coordinator["blobs"]).resolve()
        built = FederationSettings.from_dict(federation)
        return _build(cls, {**coordinator, "federation": built, "members": values.get("members", {})}, "coordinator")


def _build(cls: type[T], values: Mapping[str, Any], table: str) -> T:
    """An instance of a settings dataclass from a table of the file."""
    assert is_dataclass(cls)
    known = {f.name for f in fields(cls)}
    if unknown := set(values) - known:
        raise InvalidInputError(
            f"[{table}]: unknown keys {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}"
        )
    try:
        return cls(**values)
    except TypeError as error:
        raise InvalidInputError(f"[{table}]: {error}") from None
