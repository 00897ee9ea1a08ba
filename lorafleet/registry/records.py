"""What the registry gives back and takes: frozen values, never rows of a session.

Times are seconds since the epoch, from the registry's clock. A digest is ``sha256:`` and 64 hex digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lorafleet.errors import InvalidInputError

if TYPE_CHECKING:
    from lorafleet.adapters import LoraAdapter

VersionState = Literal["staged", "evaluated", "quarantined", "retired"]
RoundState = Literal["open", "committed", "abandoned"]
FederationState = Literal["active", "paused", "stopped"]

CHAMPION = "champion"
"""The alias that a reference without a suffix follows."""

FAILED = "failed"
"""The kind of a rejection that judges no update, because none came: somebody reported an error instead."""
BUDGET = "budget"
"""The same where the member had no privacy budget left for its order."""


@dataclass(frozen=True)
class Tenant:
    """An organisation; ``weight`` is its fair share relative to other tenants."""

    id: int
    name: str
    weight: float
    created_at: float


@dataclass(frozen=True)
class Base:
    """A frozen model that adapters share; the digest identifies it, the name is for people."""

    id: int
    name: str
    digest: str
    architecture: str
    parameters: int
    licence: str
    created_at: float


@dataclass(frozen=True)
class Adapter:
    """A name under which versions are kept; ``federation`` is the name of the one that made it, or None."""

    id: int
    tenant: str
    name: str
    base: str
    base_digest: str
    federation: str | None
    created_at: float


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from: federation and round, the rule that made it, the digests that it was made of.

    ``members`` is how many members' updates of that round are in it; None where nobody wrote it down.
    """

    federation: str
    round: int
    rule: str
    parents: tuple[str, ...] = ()
    members: int | None = None

    @property
    def parent_count(self) -> int:
        return len(self.parents)


@dataclass(frozen=True)
class Version:
    """An immutable numbered state of an adapter; only ``state`` ever changes, and a new record says so.

    ``purged_at`` is when a version that is out of use lost its weights for good; None while it has them.
    """

    id: int
    tenant: str
    adapter: str
    number: int
    digest: str
    base_digest: str
    rank: int
    parameters: int
    state: VersionState
    created_at: float
    lineage: Lineage | None = None
    licence: str = ""
    purged_at: float | None = None

    @property
    def reference(self) -> str:
        """``tenant/adapter:3``: names this version whatever the aliases do."""
        return f"{self.tenant}/{self.adapter}:{self.number}"


@dataclass(frozen=True)
class Garbage:
    """What a garbage collection took away, or would have."""

    purged: tuple[str, ...]
    """References of versions that lost their weights for being out of use"""
    deleted: tuple[str, ...]
    """Digests of weights"""
    size_bytes: int
    """Of these"""


@dataclass(frozen=True)
class Federation:
    """A standing agreement owned by a tenant; ``settings`` is a JSON object that the coordinator understands.

    Only its state ever changes, and a new record says so: when, by whom and why it was put into it.
    """

    id: int
    tenant: str
    name: str
    base: str
    base_digest: str
    settings: Mapping[str, Any] = field(hash=False)
    created_at: float
    state: FederationState = "active"
    state_at: float = 0.0
    state_by: str = ""
    state_reason: str = ""

    @property
    def reference(self) -> str:
        """``tenant/name``"""
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True)
class Lease:
    """Which coordinator works for a federation, since when, and until when unless renewed.

    ``token`` grows by one with every new holder: what an earlier holder still wants to write is told by it.
    """

    federation_id: int
    owner: str
    taken_at: float
    expires_at: float
    token: int


@dataclass(frozen=True)
class Member:
    """A data owner in a federation, known by its registered key.

    ``public_key`` is what its node proves itself by; empty where its word is all there is. A revoked member stays in
    the list: its key never comes to stand for somebody else.
    """

    id: int
    federation_id: int
    key: str
    tenant: str
    joined_at: float
    public_key: str = ""
    revoked_at: float | None = None
    revoked_by: str = ""
    revoked_reason: str = ""


@dataclass(frozen=True)
class Invitation:
    """The right to become a member of a federation for a tenant, once, until it expires."""

    code: str
    """Names it, and opens nothing."""
    federation_id: int
    tenant: str
    created_at: float
    expires_at: float
    accepted_at: float | None = None
    member: str | None = None
    """The key of the member that accepted it."""


class Invited(NamedTuple):
    """A new invitation with its token: what accepts it, and is shown this once."""

    invitation: Invitation
    token: str


@dataclass(frozen=True)
class Round:
    """One cycle of a federation; ``reason`` is set where it was abandoned, ``report`` where it was committed."""

    id: int
    federation_id: int
    number: int
    state: RoundState
    opened_at: float
    closed_at: float | None
    report: Mapping[str, Any] = field(hash=False)
    reason: str = ""


class UpdateKey(NamedTuple):
    """An update in the journal of a federation."""

    member: str
    ordered_in: int
    attempt: int


@dataclass(frozen=True)
class UpdateRecord:
    """One member's reply to one order, as the journal keeps it.

    ``factors`` is given when recording and always None when read back: :meth:`Registry.update_factors` loads them. An
    accepted update needs them; a rejected one may have none, and then no digest ("") either.
    """

    member: str
    attempt: int
    accepted: bool
    reason: str
    digest: str
    num_examples: int
    rank: int
    size_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    factors: LoraAdapter | None = field(default=None, compare=False, repr=False)
    ordered_in: int = 0
    """Number of the round in which the order was given; 0 when recording: the one that it is written under."""
    work: int = 1
    """Which piece of work of that member and round it is; one accepted update counts for each."""
    expert_digest: str = ""
    """Of the expert that it was trained on top of; empty for the bare base."""
    steps: int = 0
    seconds: float = 0.0
    """From the order to the reply."""
    counted_in: int | None = None
    """Number of the round whose experts it is in; None until it counts. Set by the commit, as is its weight there."""
    share: float | None = None
    recorded_at: float = field(default=0.0, compare=False)
    dropped_at: float | None = None
    """When its factors were deleted; what else is said of it stays."""

    @property
    def key(self) -> UpdateKey:
        """What names it in its federation."""
        return UpdateKey(self.member, self.ordered_in, self.attempt)

    @property
    def kind(self) -> str:
        """The stable word for why it was rejected, which stands before the colon of the reason; else empty."""
        return self.reason.partition(":")[0]


@dataclass(frozen=True)
class NewExpert:
    """An adapter that a round made; ``parents`` are the digests of the updates and experts that it was made of.

    ``members`` is how many members sent these updates.
    """

    name: str
    weights: LoraAdapter = field(compare=False, repr=False)
    rule: str
    parents: tuple[str, ...] = ()
    members: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """What one member measured for a version: ``loss`` in nats per token over ``tokens`` held-out tokens."""

    member: str
    loss: float
    tokens: int
    created_at: float


@dataclass(frozen=True)
class Key:
    """An API key without its secret; ``key_id`` is public."""

    key_id: str
    tenant: str
    name: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None
    """None: never."""
    revoked_at: float | None


class IssuedKey(NamedTuple):
    """A new key with its token, which is shown this once."""

    key: Key
    token: str


class Promotion(NamedTuple):
    """What an alias points at now, where it pointed before, and what that was decided on.

    Losses are in nats per token, None where they were not measured or there was nothing to compare with; ``members``
    measured both.
    """

    version: Version
    alias: str
    before: int | None
    loss: float | None
    loss_before: float | None
    members: int


class Quarantined(NamedTuple):
    """A version out of use, and the aliases that pointed at it with where they point now; None: nowhere."""

    version: Version
    aliases: Mapping[str, int | None]


@dataclass(frozen=True)
class Grant:
    """An adapter that its tenant shares with the tenant ``to``; None: with all."""

    tenant: str
    adapter: str
    to: str | None
    granted_at: float


@dataclass(frozen=True)
class Quota:
    """What a tenant may use; None: no limit. Tokens are those of prompts and answers together.

    Of ``budget_tokens`` as many may be used in each period of ``budget_period_s`` seconds, which start at its multiples
    since the epoch: a period of 86400 s is a day of UTC.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    adapters: int | None = None
    """How many it may own, but for those that its federations make."""
    budget_tokens: int | None = None
    budget_period_s: int | None = None

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            least = 60 if limit.name == "budget_period_s" else 0
            if value is not None and not (isinstance(value, int) and least <= value < 2**63):
                raise InvalidInputError(f"{limit.name}: found {value!r}, expected a whole number of at least {least}")
        if (self.budget_tokens is None) != (self.budget_period_s is None):
            raise InvalidInputError(
                f"found budget_tokens {self.budget_tokens} and budget_period_s {self.budget_period_s}, "
                "expected both or neither"
            )


class Amount(NamedTuple):
    """Requests, and tokens of prompts and answers together."""

    requests: int
    tokens: int


class Window(NamedTuple):
    """Time from a multiple of a period on, until the next one; seconds since the epoch."""

    period_s: int
    starts_at: int

    @property
    def ends_at(self) -> int:
        return self.starts_at + self.period_s


@dataclass(frozen=True)
class UsageBlock:
    """Requests and tokens that a service took from a tenant's quotas for what it serves until ``ends_at``."""

    id: int
    tenant: str
    requests: int
    tokens: int
    ends_at: float
    """The end of the minute that it was taken from; what is served later counts there all the same."""


@dataclass(frozen=True)
class Usage:
    """What a tenant used in a window; ``taken`` is what its quotas are compared with: that, and what services hold."""

    window: Window
    taken: Amount
    requests: int
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class AuditEntry:
    """One change: who made it (``by``, a key's id or an operator's name), when, and to whose (``tenant``) what."""

    id: int
    at: float
    by: str
    tenant: str
    action: str
    subject: str
    details: Mapping[str, Any] = field(hash=False)
