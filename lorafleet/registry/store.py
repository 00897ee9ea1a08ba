"""The registry: every version of every adapter, where it came from, who may use it, what points at it.

Each method is one transaction. Weights go to the blob store before the transaction that names them, under a claim that
another one wrote before (:mod:`lorafleet.registry.claims`): a crash in between leaves weights that nobody names, never
a version without weights, until :meth:`Registry.collect_garbage` takes them away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.adapters.base_shapes import ModuleShapes, check_fits, check_module_fits
from lorafleet.adapters.streaming import AdapterReader, Contents
from lorafleet.errors import BaseMismatchError, LorafleetError, NotFoundError, UnavailableError
from lorafleet.registry import (
    aliases,
    audit,
    cards,
    catalog,
    claims,
    credentials,
    evaluations,
    federations,
    garbage,
    grants,
    holds,
    invitations,
    leases,
    pepper,
    promotions,
    rounds,
    schema,
    usage,
    versions,
)
from lorafleet.registry.blobs import BlobStore
from lorafleet.registry.database import Database, bump_revision, parse_url
from lorafleet.registry.deletions import Deletions
from lorafleet.registry.records import (
    CHAMPION,
    Adapter,
    Amount,
    AuditEntry,
    Base,
    Evaluation,
    Federation,
    FederationState,
    Garbage,
    Grant,
    Invitation,
    Invited,
    IssuedKey,
    Key,
    Lease,
    Lineage,
    Member,
    NewExpert,
    Promotion,
    Quarantined,
    Quota,
    Round,
    Tenant,
    UpdateKey,
    UpdateRecord,
    Usage,
    UsageBlock,
    Version,
    VersionState,
)
from lorafleet.registry.references import not_found, parse_reference
from lorafleet.registry.tables import RevisionRow

T = TypeVar("T")


class Registry:
    """One database and one place of weights; safe to share among threads, and among processes that open the same two,
    on one machine or several.

    Names follow ``[A-Za-z0-9][A-Za-z0-9._-]{0,99}``. What is missing and what is another tenant's raise the same
    NotFoundError. A database that does not answer raises UnavailableError, and the call can be repeated.
    """

    def __init__(self, database: Database, blobs: BlobStore, clock: Callable[[], float]) -> None:
        self._database, self._blobs, self._clock = database, blobs, clock
        self._deletions = Deletions(database, blobs, clock)
        self._pepper: bytes | None = None

    @classmethod
    def open(cls, url: str, blobs: str | Path, *, clock: Callable[[], float] = time.time) -> Registry:
        """Connect to ``sqlite:///FILE`` (created where missing) or ``postgresql://…``, migrated to this version.

        ``blobs`` is a folder, or ``s3://BUCKET/PREFIX`` (:mod:`lorafleet.registry.object_files`).
        """
        store = BlobStore(blobs)
        schema.upgrade(url)
        return cls(Database(parse_url(url)), store, clock)

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # Tenants, bases, adapters

    def create_tenant(self, name: str, *, weight: float = 1.0, by: str = "") -> Tenant:
        """A new tenant; ``weight`` is its fair share. AlreadyExistsError where the name is taken.

        ``by``, here and below, is who does it, for the audit: an operator's name or a key's id.
        """
        with self._database.write() as session:
            made = catalog.create_tenant(session, name, weight, self._clock())
            self._note(session, name, "tenant.create", name, by, weight=weight)
            return made

    def set_tenant_weight(self, name: str, weight: float, *, by: str = "") -> Tenant:
        """Another fair share for a tenant; running services follow within a second."""
        with self._database.write() as session:
            before = catalog.tenant(session, name).weight
            changed = catalog.set_weight(session, name, weight)
            self._note(session, name, "tenant.weight", name, by, weight=weight, before=before)
            bump_revision(session)
            return changed

    def tenant(self, name: str) -> Tenant:
        with self._database.read() as session:
            return catalog.tenant(session, name)

    def tenants(self) -> list[Tenant]:
        """By name."""
        with self._database.read() as session:
            return catalog.tenants(session)

    def register_base(
        self,
        name: str,
        digest: str,
        *,
        architecture: str,
        parameters: int,
        licence: str = "",
        shapes: ModuleShapes | None = None,
    ) -> Base:
        """Name a base. Idempotent, but for a licence where there was none; AlreadyExistsError where the name stands for
        another digest.

        Adapters are checked against ``shapes`` when they are added; without, when an engine loads them.
        """
        with self._database.write() as session:
            made = catalog.register_base(session, name, digest, architecture, parameters, licence, self._clock())
            if shapes is not None:
                catalog.put_shapes(session, digest, shapes)
            return made

    def base(self, name_or_digest: str) -> Base:
        with self._database.read() as session:
            return catalog.base(session, name_or_digest)

    def create_adapter(self, tenant: str, name: str, *, base: str, by: str = "") -> Adapter:
        """A new adapter without versions on a registered base (name or digest).

        QuotaExceededError where the tenant owns as many as it may.
        """
        with self._database.write() as session:
            usage.check_adapters(session, tenant)
            made = catalog.create_adapter(session, tenant, name, base, self._clock())
            self._note(session, tenant, "adapter.create", f"{tenant}/{name}", by, base=made.base)
            return made

    def adapter(self, tenant: str, name: str) -> Adapter:
        with self._database.read() as session:
            return catalog.adapter(session, tenant, name)

    def adapters(self, tenant: str) -> list[Adapter]:
        """What a tenant owns, by name."""
        with self._database.read() as session:
            return catalog.adapters(session, tenant)

    # Versions and aliases

    def add_version(
        self,
        tenant: str,
        adapter: str,
        weights: LoraAdapter,
        *,
        lineage: Lineage | None = None,
        licence: str = "",
        card: str = "",
        state: VersionState = "staged",
        by: str = "",
    ) -> Version:
        """Store weights under the adapter's next number; numbers are contiguous from 1, whoever adds at once.

        ``card`` is the version's README, at most 64 kB. InvalidInputError where the weights are damaged or change
        nothing, BaseMismatchError where they name another base.
        """
        versions.check_state(state)
        card = cards.check(card)
        target, shapes = self._target(tenant, adapter, None)
        versions.check_weights(weights, base_digest=target.base_digest, what=f"adapter {tenant}/{adapter}")
        if shapes is not None:
            check_fits(weights, shapes)
        with self._storing([weights.digest]) as claim:
            self._blobs.put(weights)
            contents = versions.contents(weights)
            return self._add_version(claim, target, contents, lineage, licence, card, state, by)

    def import_version(
        self,
        tenant: str,
        adapter: str,
        folder: Path,
        *,
        base: str | None = None,
        lineage: Lineage | None = None,
        licence: str = "",
        card: str = "",
        state: VersionState = "staged",
        by: str = "",
    ) -> Version:
        """:meth:`add_version` of a folder in PEFT format, in memory for a few modules, however large it is.

        With ``base`` (name or digest) an adapter that is not there yet is made on it, together with the version;
        BaseMismatchError where it is there, on another one.

        What is stored are the very values that were checked, whatever becomes of the folder meanwhile. NotFoundError
        where it is no adapter, AdapterFormatError where it is damaged or not supported; and what add_version raises.
        """
        versions.check_state(state)
        card = cards.check(card)
        target, shapes = self._target(tenant, adapter, base)
        what = f"adapter {tenant}/{adapter}"
        effects: list[float] = []

        def check_headers(reader: AdapterReader) -> None:
            versions.check_base(reader.base, target.base_digest, what)
            if shapes is not None:
                for path, shape in reader.shapes.items():
                    check_module_fits(path, shape.d_out, shape.d_in, shapes)

        def check_module(path: str, pair: LoraPair) -> None:
            effects.append(versions.effect(path, pair, what))

        with self._blobs.receive(Path(folder), headers=check_headers, check=check_module) as received:
            versions.check_effect(effects, what)
            with self._storing([received.contents.digest]) as claim:
                self._blobs.adopt(received)
                return self._add_version(claim, target, received.contents, lineage, licence, card, state, by)

    def _target(self, tenant: str, adapter: str, base: str | None) -> tuple[Adapter, ModuleShapes | None]:
        """An adapter, or what it will be on this base (its id is 0), and the base's shapes where they are known."""
        with self._database.read() as session:
            on = None if base is None else catalog.base(session, base)
            try:
                found = catalog.adapter(session, tenant, adapter)
            except NotFoundError:
                if on is None:
                    raise
                found = Adapter(0, catalog.tenant(session, tenant).name, adapter, on.name, on.digest, None, 0.0)
            if on is not None and on.digest != found.base_digest:
                raise BaseMismatchError(
                    f"adapter {tenant}/{adapter} is for the base {found.base} ({found.base_digest}), found "
                    f"{on.name} ({on.digest}); give the adapter another name, or that base"
                )
            return found, catalog.shapes(session, found.base_digest)

    def _add_version(
        self,
        claim: claims.Claim,
        target: Adapter,
        contents: Contents,
        lineage: Lineage | None,
        licence: str,
        card: str,
        state: VersionState,
        by: str,
    ) -> Version:
        """The transaction that names weights which are stored."""
        with self._database.write() as session:
            claims.settle(session, claim)
            if not target.id:
                usage.check_adapters(session, target.tenant)
                target = catalog.create_adapter(session, target.tenant, target.name, target.base_digest, self._clock())
                name = f"{target.tenant}/{target.name}"
                self._note(session, target.tenant, "adapter.create", name, by, base=target.base)
            version = versions.add(
                session, target, contents, now=self._clock(), state=state, licence=licence, lineage=lineage
            )
            if card:
                cards.put(session, version, card)
            self._note(session, target.tenant, "version.add", version.reference, by, digest=version.digest, state=state)
            bump_revision(session)
            return version

    @contextmanager
    def _storing(self, digests: Collection[str]) -> Iterator[claims.Claim]:
        """Nobody deletes weights of these digests inside; whose transaction names them has to settle the claim."""
        if not digests:
            yield claims.NOTHING
            return
        with self._database.write() as session:
            claim = claims.take(session, digests, self._clock())
        try:
            yield claim
        except BaseException:
            # Otherwise it would end by itself.
            with suppress(LorafleetError), self._database.write() as session:
                claims.release(session, claim)
            raise

    def versions(
        self,
        tenant: str,
        adapter: str,
        *,
        after: int = 0,
        limit: int | None = None,
        usable_by: str | None = None,
    ) -> list[Version]:
        """All of an adapter's by number, in whatever state; or those above ``after``, at most ``limit``.

        With ``usable_by`` those that another tenant may use: no quarantined one, and none of after its time.
        """
        with self._database.read() as session:
            found = catalog.adapter(session, tenant, adapter)
            user = None if usable_by is None else catalog.tenant(session, usable_by).id
            return versions.of_adapter(session, found, after=after, limit=limit, usable_by=user)

    def newest_number(self, tenant: str, adapter: str) -> int:
        """Of an adapter's versions, in any state; 0 where it has none."""
        with self._database.read() as session:
            return versions.newest_number(session, catalog.adapter(session, tenant, adapter))

    def version(self, tenant: str, adapter: str, number: int) -> Version:
        """One of an adapter's versions, in whatever state; :meth:`resolve` gives none that is quarantined."""
        with self._database.read() as session:
            return versions.numbered(session, catalog.adapter(session, tenant, adapter), number)

    def card(self, version: Version) -> str:
        """A version's README; empty where it came without."""
        with self._database.read() as session:
            return cards.of_version(session, version)

    def cards(self, versions: Sequence[Version]) -> list[str]:
        """The READMEs of several versions, in their order; empty for one that came without."""
        with self._database.read() as session:
            return cards.of_versions(session, versions)

    def set_state(self, version: Version, state: VersionState, *, by: str = "") -> Version:
        """Whatever points at it: :meth:`retire`, :meth:`quarantine` and :meth:`restore` look after aliases."""
        with self._database.write() as session:
            changed = versions.set_state(session, version, state, self._clock())
            self._note(session, version.tenant, "version.state", version.reference, by, state=state)
            bump_revision(session)
            return changed

    def set_alias(self, tenant: str, adapter: str, alias: str, number: int, *, by: str = "") -> None:
        """Point an alias at a version that is staged or evaluated, whatever its loss; it is created where it is new."""
        with self._database.write() as session:
            moved = aliases.move(session, catalog.adapter(session, tenant, adapter), alias, number, self._clock())
            self._note(session, tenant, "alias.move", f"{tenant}/{adapter}@{alias}", by, **moved._asdict())
            bump_revision(session)

    def aliases(self, tenant: str, adapter: str, *, shown_to: str | None = None) -> dict[str, int]:
        """Alias → version number; with ``shown_to`` none where that tenant's last member of the federation was
        revoked, as where they point tells of later versions."""
        with self._database.read() as session:
            reader = None if shown_to is None else catalog.tenant(session, shown_to).id
            return aliases.of_adapter(session, catalog.adapter(session, tenant, adapter), shown_to=reader)

    def promote(self, version: Version, alias: str = CHAMPION, *, force: bool = False, by: str = "") -> Promotion:
        """Point an alias at a version, where it is measured to be better than what the alias points at, or forced.

        Better is a lower held-out loss: the median over the members that measured both versions, or, where nobody did,
        over those that measured each. PromotionRefusedError, with both losses, where it is not, or not measured. An
        alias that is new or points at a quarantined version moves without a comparison.
        """
        with self._database.write() as session:
            made = promotions.promote(session, version, alias, force, self._clock())
            details = {"before": made.before, "now": version.number, "loss": made.loss}
            name = f"{version.tenant}/{version.adapter}@{alias}"
            details |= {"loss_before": made.loss_before, "members": made.members, "forced": force}
            self._note(session, version.tenant, "alias.promote", name, by, **details)
            bump_revision(session)
            return made

    def rollback(self, tenant: str, adapter: str, alias: str = CHAMPION, *, by: str = "") -> int:
        """Point an alias where it pointed before, over versions that are not usable any more; gives the number.

        The next rollback goes further back. InvalidInputError where it pointed at nothing usable before.
        """
        with self._database.write() as session:
            moved = aliases.rollback(session, catalog.adapter(session, tenant, adapter), alias, self._clock())
            self._note(session, tenant, "alias.rollback", f"{tenant}/{adapter}@{alias}", by, **moved._asdict())
            bump_revision(session)
            return moved.now

    def retire(self, version: Version, *, by: str = "") -> Version:
        """From now on it answers only to its number. InvalidInputError while an alias points at it."""
        with self._database.write() as session:
            changed = promotions.retire(session, version, self._clock())
            self._note(session, version.tenant, "version.retire", version.reference, by)
            bump_revision(session)
            return changed

    def quarantine(self, version: Version, *, by: str = "") -> Quarantined:
        """From now on it answers to nothing; what pointed at it points where it pointed before, where that is usable.

        An alias that has nowhere to go stays, and is answered as what is not there.
        """
        with self._database.write() as session:
            done = promotions.quarantine(session, version, self._clock())
            self._note(session, version.tenant, "version.quarantine", version.reference, by, aliases=dict(done.aliases))
            bump_revision(session)
            return done

    def restore(self, version: Version, *, by: str = "") -> Version:
        """Make a retired or quarantined version usable again: evaluated where somebody measured it, else staged.

        NotFoundError where it has lost its weights.
        """
        with self._database.write() as session:
            changed = promotions.restore(session, version, self._clock())
            self._note(session, version.tenant, "version.restore", version.reference, by, state=changed.state)
            bump_revision(session)
            return changed

    def resolve(self, reference: str, *, usable_by: str | None = None) -> Version:
        """The version that a reference names (:mod:`lorafleet.registry.versions` has the table).

        With ``usable_by`` only if that tenant may use it: what is missing and what is foreign are looked for alike.
        Where its last member of the federation was revoked only numbers name one; :meth:`live` has its newest.
        """
        with self._database.read() as session:
            user = None if usable_by is None else catalog.tenant(session, usable_by).id
            return versions.resolve(session, parse_reference(reference), usable_by=user)

    def load(self, version: Version) -> LoraAdapter:
        """A version's weights, verified against its digest, with the base's digest as their ``base``.

        NotFoundError where they were deleted, as it had been out of use for long.
        """
        with self._explaining_absence(version):
            weights = self._blobs.read(version.digest)
        return LoraAdapter(weights.modules, version.base_digest, gates=weights.gates)

    @contextmanager
    def _explaining_absence(self, version: Version) -> Iterator[None]:
        """NotFoundError where what cannot be read was deleted for being out of use."""
        if version.purged_at is not None:
            raise versions.purged(version)
        try:
            yield
        except UnavailableError:
            with self._database.read() as session:
                if versions.find(session, version, lock=False).purged_at is not None:
                    raise versions.purged(version) from None
            raise

    def load_digest(self, digest: str) -> LoraAdapter:
        """The weights of a digest that the journal or a lineage names, verified; UnavailableError where they went."""
        return self._blobs.read(digest)

    def path(self, version: Version) -> Path:
        """The folder of a version's weights in PEFT format, verified; not to be changed, as others may share it.

        Of weights in an object store it is a copy, which goes when others that are read need its place; :meth:`folder`
        keeps it.
        """
        with self._explaining_absence(version):
            self._blobs.verify(version.digest)
        return self._blobs.path(version.digest)

    @contextmanager
    def folder(self, version: Version) -> Iterator[Path]:
        """:meth:`path`, of what stays until the block's end."""
        with ExitStack() as stack:
            with self._explaining_absence(version):
                path = stack.enter_context(self._blobs.held(version.digest))
            yield path

    def live(self, tenant: str) -> list[Version]:
        """What a tenant may use: for each adapter of its own, of a federation that it is a member of, and that it was
        granted, the version that the bare reference gives. Where its members were revoked, and nothing is granted: the
        newest usable one of before. By reference."""
        with self._database.read() as session:
            return versions.live(session, catalog.tenant(session, tenant).id)

    def may_use(self, tenant: str, version: Version) -> bool:
        """Whether a version is a tenant's to use: its own, granted to it, or made by a federation before its last
        member there was revoked."""
        with self._database.read() as session:
            return versions.may_use(session, catalog.tenant(session, tenant).id, version)

    def all_live(self) -> list[Version]:
        """What all tenants together may use: what a service keeps loaded."""
        with self._database.read() as session:
            return versions.live(session, None)

    def revision(self) -> int:
        """Grows with every change of versions, aliases, states, members, grants, quotas and keys (but for new ones that
        were made here); equal numbers mean nothing changed."""
        with self._database.read() as session:
            return session.scalars(select(RevisionRow.value)).one()

    # Grants

    def grant(self, tenant: str, adapter: str, *, to: str | None = None, by: str = "") -> Grant:
        """Share an adapter with the tenant ``to``, or with all. Idempotent.

        From now on it is live for them, whatever it becomes. InvalidInputError where it is ``to``'s own.
        """
        with self._database.write() as session:
            found = catalog.adapter(session, tenant, adapter)
            made, new = grants.add(session, found, to, self._clock())
            if new:
                self._note(session, tenant, "grant.add", f"{tenant}/{adapter}", by, to=to)
                bump_revision(session)
            return made

    def revoke_grant(self, tenant: str, adapter: str, *, to: str | None = None, by: str = "") -> Grant:
        """Take back one grant, which it gives; others that reach the same tenant stay. NotFoundError without one."""
        with self._database.write() as session:
            found = grants.remove(session, catalog.adapter(session, tenant, adapter), to)
            self._note(session, tenant, "grant.remove", f"{tenant}/{adapter}", by, to=to)
            bump_revision(session)
            return found

    def grants(self, tenant: str, adapter: str | None = None) -> list[Grant]:
        """What a tenant shares: of one adapter, or of all."""
        with self._database.read() as session:
            return grants.of_tenant(session, tenant, adapter)

    # Keys

    def create_key(
        self,
        tenant: str,
        *,
        name: str = "",
        scopes: Iterable[str] = ("infer",),
        expires_at: float | None = None,
        by: str = "",
    ) -> IssuedKey:
        """A new API key of a tenant (:mod:`lorafleet.registry.keys`); its token is given this once."""
        with self._database.write() as session:
            return credentials.create(session, tenant, name, scopes, expires_at, self._secret(), self._clock(), by)

    def add_key(
        self, tenant: str, token: str, *, name: str = "", scopes: Iterable[str] = ("infer",), by: str = ""
    ) -> Key:
        """A key of a token that an operator chose: 16 to 200 visible ASCII characters, as hard to guess as they are.

        Again for the same tenant, the key gets the name and the scopes given. AlreadyExistsError where the token is
        another tenant's, or its key was revoked.
        """
        with self._database.write() as session:
            key = credentials.add(session, tenant, token, name, scopes, self._secret(), self._clock(), by)
            bump_revision(session)
            return key

    def keys(self, tenant: str) -> list[Key]:
        """In the order in which they were made, with the expired and the revoked ones."""
        with self._database.read() as session:
            return credentials.of_tenant(session, tenant)

    def revoke_key(self, tenant: str, key_id: str, *, by: str = "") -> Key:
        """From now on the key opens nothing, for good. Idempotent; NotFoundError for one that is not the tenant's."""
        with self._database.write() as session:
            key = credentials.revoke(session, tenant, key_id, self._clock(), by)
            bump_revision(session)
            return key

    def authenticate(self, token: str) -> Key:
        """The key of a token. UnauthenticatedError, in one and the same words, for everything that opens nothing."""
        with self._database.read() as session:
            return credentials.authenticate(session, token, self._secret(), self._clock())

    def _secret(self) -> bytes:
        """The pepper, read once."""
        if self._pepper is None:
            self._pepper = pepper.read_or_make(self._blobs)
        return self._pepper

    # Quotas

    def set_quota(self, tenant: str, quota: Quota, *, by: str = "") -> None:
        """What a tenant may use from now on, in the place of what was set before; ``Quota()`` is without limits."""
        with self._database.write() as session:
            usage.set_quota(session, tenant, quota)
            self._note(session, tenant, "quota.set", tenant, by, **vars(quota))
            bump_revision(session)

    def quota(self, tenant: str) -> Quota:
        """Without limits where none were set."""
        with self._database.read() as session:
            return usage.quota(session, tenant)

    def lease_usage(
        self, tenant: str, *, requests: int, tokens: int, least_requests: int = 1, least_tokens: int = 1
    ) -> UsageBlock:
        """Take a block of a tenant's quotas: as much of what is asked for as every limit leaves.

        QuotaExceededError where that is less than the ``least`` of either, with the seconds until it may be asked
        again. Whoever took a block serves out of it until ``ends_at``, and then settles it.
        """
        wanted = Amount(requests, tokens)
        least = Amount(min(least_requests, requests), min(least_tokens, tokens))
        with self._database.write() as session:
            return usage.take(session, tenant, wanted, least, self._clock())

    def settle_usage(self, block: UsageBlock, *, requests: int, prompt_tokens: int, generated_tokens: int) -> None:
        """Put on record what was used of a block, and give the rest back; more than it held is counted all the same.

        Happens once, however often it is called. A block that is settled after more than a day is forgotten.
        """
        with self._database.write() as session:
            usage.settle(session, block, requests, prompt_tokens, generated_tokens)

    def usage(self, tenant: str, *, since: float = 0.0) -> list[Usage]:
        """What a tenant used, in windows that end after ``since``; those shorter than a day are kept for a day."""
        with self._database.read() as session:
            return usage.of_tenant(session, tenant, since)

    # Audit

    def audit(self, tenant: str | None = None, *, limit: int = 100) -> list[AuditEntry]:
        """The last ``limit`` changes to a tenant's things, or to all tenants', in the order in which they were made."""
        with self._database.read() as session:
            return audit.entries(session, tenant, limit)

    def _note(self, session: Session, tenant: str, action: str, subject: str, by: str, **details: Any) -> None:
        audit.write(session, tenant, action, subject, self._clock(), by, details)

    # Federations, rounds, the journal

    def create_federation(
        self, tenant: str, name: str, *, base: str, settings: Mapping[str, Any], by: str = ""
    ) -> Federation:
        """A new federation owned by a tenant; ``settings`` has to be a JSON object."""
        with self._database.write() as session:
            made = federations.create(session, tenant, name, base, settings, self._clock())
            self._note(session, tenant, "federation.create", made.reference, by, base=made.base)
            return made

    def federation(self, tenant: str, name: str) -> Federation:
        with self._database.read() as session:
            return federations.get(session, tenant, name)

    def set_federation_state(
        self, federation: Federation, state: FederationState, *, by: str = "", reason: str = ""
    ) -> Federation:
        """Pause a federation, let it go on, or stop it for good; gives it as it is then. Idempotent.

        InvalidInputError where it is to go on after it was stopped.
        """
        with self._database.write() as session:
            found, before = federations.set_state(session, federation, state, by, reason, self._clock())
            if before != state:
                details = {"state": state, "before": before, "reason": found.state_reason}
                self._note(session, found.tenant, "federation.state", found.reference, by, **details)
            return found

    def add_member(
        self, federation: Federation, key: str, *, tenant: str, public_key: str = "", by: str = ""
    ) -> Member:
        """Admit a data owner; from now on its tenant may use the federation's experts. Idempotent.

        ``public_key``, one line, is what its node has to prove itself by. AlreadyExistsError where one of the two keys
        is another member's. A member that was revoked stays so.
        """
        with self._database.write() as session:
            member, changed = federations.add_member(
                session, federation, key, tenant, self._clock(), public_key=public_key
            )
            if changed is not None:
                action = "member.add" if changed == "new" else "member.public_key"
                self._note_member(session, federation, action, member, by)
            bump_revision(session)
            return member

    def revoke_member(self, federation: Federation, key: str, *, by: str = "", reason: str = "") -> Member:
        """Put a member out, for good: from now on nothing that it sends is accepted. Idempotent.

        Versions that were made before stay its tenant's to use, later ones are not (:meth:`may_use`).
        """
        with self._database.write() as session:
            member, changed = federations.revoke_member(session, federation, key, by, reason, self._clock())
            if changed:
                self._note_member(session, federation, "member.revoke", member, by, reason=member.revoked_reason)
            bump_revision(session)
            return member

    def _note_member(
        self, session: Session, federation: Federation, action: str, member: Member, by: str, **details: Any
    ) -> None:
        details = {"federation": federation.reference, "whose": member.tenant, **details}
        self._note(session, federation.tenant, action, member.key, by, **details)

    def members(self, federation: Federation) -> list[Member]:
        """By key, with those who were revoked."""
        with self._database.read() as session:
            return federations.members(session, federation)

    def public_keys(self) -> list[str]:
        """By which nodes may come at all: of members that are not revoked, in federations that are not stopped."""
        with self._database.read() as session:
            return federations.public_keys(session)

    def invite(self, federation: Federation, *, tenant: str, for_s: float, by: str = "") -> Invited:
        """Invite somebody to become a member for a tenant within ``for_s``; the token is given this once.

        InvalidInputError where the federation has been stopped.
        """
        with self._database.write() as session:
            made = invitations.create(session, federation, tenant, for_s, self._clock())
            invitation = made.invitation
            details = {"federation": federation.reference, "invited": tenant, "expires_at": invitation.expires_at}
            self._note(session, federation.tenant, "invitation.create", invitation.code, by, **details)
            return made

    def accept_invitation(self, token: str, *, key: str, public_key: str = "", by: str = "") -> Member:
        """Register the member ``key`` by an invitation, which ends it; again with the same keys it gives the same.

        Without ``by``, it was the member itself.

        NotFoundError for a token that opens nothing, in one and the same words; InvalidInputError where it has expired
        or the federation has been stopped; AlreadyExistsError where it was accepted before, or a key is somebody's.
        """
        with self._database.read() as session:
            invitations.check(session, token)
        with self._database.write() as session:
            member = invitations.accept(session, token, key, public_key, self._clock(), by)
            bump_revision(session)
            return member

    def withdraw_invitation(self, federation: Federation, code: str, *, by: str = "") -> Invitation:
        """Take an invitation back, which it gives; its token opens nothing from now on, and the audit keeps its code.

        NotFoundError where the federation has none of that code, InvalidInputError where somebody has accepted it.
        """
        with self._database.write() as session:
            withdrawn = invitations.withdraw(session, federation, code)
            details = {"federation": federation.reference, "invited": withdrawn.tenant}
            self._note(session, federation.tenant, "invitation.withdraw", code, by, **details)
            return withdrawn

    def invitations(self, federation: Federation) -> list[Invitation]:
        """In the order in which they were made, the accepted and expired ones too."""
        with self._database.read() as session:
            return invitations.of_federation(session, federation)

    def lease(self, federation: Federation) -> Lease | None:
        """Whose the lease is at this moment; None where it is free."""
        with self._database.read() as session:
            return leases.holder(session, federation, self._clock())

    def take_lease(self, federation: Federation, owner: str, *, for_s: float) -> Lease:
        """Take the lease on a federation, or renew it; it ends ``for_s`` from now by the registry's clock.

        Gives the lease as it stands: another owner's, unchanged, where that one's has not expired.
        """
        with self._database.write() as session:
            return leases.take(session, federation, owner, for_s, self._clock())

    def release_lease(self, federation: Federation, owner: str) -> None:
        """Give the lease back; nothing happens where it is not the owner's (any more)."""
        with self._database.write() as session:
            leases.release(session, federation, owner)

    def open_round(self, federation: Federation, number: int, *, token: int | None = None) -> Round:
        """Open round ``number``, or give it back as it is; numbers are contiguous from 1.

        ``token``, here and below, is the writer's fencing token (:class:`Lease`): a writer that another has followed
        gets UnavailableError and writes nothing.
        """
        with self._database.write() as session:
            leases.check(session, federation.id, token)
            return rounds.open_round(session, federation, number, self._clock())

    def rounds(self, federation: Federation) -> list[Round]:
        """By number."""
        with self._database.read() as session:
            return rounds.rounds(session, federation)

    def record_update(self, round: Round, update: UpdateRecord, *, token: int | None = None) -> bool:
        """Write an update and its factors to the journal; when this returns, both survive a crash.

        False where the journal has this (member, round of the order, attempt) already, or another accepted update of
        the same work: the first one stays and counts. RejectedUpdateError with the reason ``round_closed`` where the
        round takes no more, and ``revoked`` for an accepted one of a member that is revoked.
        """
        rounds.check_update(update)
        with self._storing([] if update.factors is None else [update.digest]) as claim:
            if update.factors is not None:
                self._blobs.put(update.factors)
            with self._database.write() as session:
                claims.settle(session, claim)
                leases.check(session, round.federation_id, token)
                return rounds.record_update(session, round, update, self._clock())

    def updates(self, round: Round, *, accepted_only: bool = True) -> list[UpdateRecord]:
        """The journal of a round in the order of member keys, without factors; at most one accepted a member."""
        with self._database.read() as session:
            return rounds.updates(session, round, accepted_only=accepted_only)

    def journal(self, federation: Federation, *, uncounted_only: bool = False) -> list[UpdateRecord]:
        """All accepted updates of a federation, or those that no committed round holds, in the order of writing."""
        with self._database.read() as session:
            return rounds.journal(session, federation, uncounted_only=uncounted_only)

    def last_words(self, federation: Federation) -> list[UpdateRecord]:
        """Of each member the last update that was accepted, and the last of all; in the order of writing."""
        with self._database.read() as session:
            return rounds.last_words(session, federation)

    def judged(self, federation: Federation) -> list[UpdateRecord]:
        """Of each member the last update that was accepted, or rejected for what it was; by member.

        Where an error came in the place of an update (``failed``) nothing was judged.
        """
        with self._database.read() as session:
            return rounds.judged(session, federation)

    def update_factors(self, update: UpdateRecord) -> LoraAdapter:
        """The factors of a journalled update, verified; NotFoundError where it came without, or they were deleted."""
        what = f"factors of member {update.member!r}, round {update.ordered_in}, attempt {update.attempt},"
        if update.dropped_at is not None:
            raise NotFoundError(f"the {what} were deleted: a federation keeps updates for as long as keep_updates says")
        if not update.digest:
            raise not_found(what)
        return self._blobs.read(update.digest)

    def update_modules(self, update: UpdateRecord, paths: Collection[str]) -> dict[str, LoraPair]:
        """Those of the modules ``paths`` that a journalled update has, and nothing else of it.

        Not verified: only the whole has a digest. For who has read and verified it by :meth:`update_factors` before.
        """
        return self._blobs.read_modules(update.digest, paths)

    def commit_round(
        self,
        round: Round,
        experts: Sequence[NewExpert],
        *,
        report: Mapping[str, Any],
        counted: Mapping[UpdateKey, float] = MappingProxyType({}),
        token: int | None = None,
        by: str = "",
    ) -> list[Version]:
        """Publish a round in one transaction, and give its versions in the order of ``experts``.

        ``counted`` are the updates that the experts were made of, with their weights; none counts twice. Adapters are
        created where they are missing, versions added, champions moved, and the round closed: all of it, or nothing. A
        round that is committed already gives what it committed, whoever asks again. An adapter of that name which the
        federation did not make raises AlreadyExistsError; an abandoned round InvalidInputError.
        """
        with self._database.read() as session:
            federation = rounds.federation_of(session, round)
        rounds.check_experts(federation, experts)
        with self._storing({expert.weights.digest for expert in experts}) as claim:
            for expert in experts:
                self._blobs.put(expert.weights)
            with self._database.write() as session:
                claims.settle(session, claim)
                leases.check(session, round.federation_id, token)
                made, committed = rounds.commit(session, round, experts, report, counted, self._clock())
                if committed:
                    subject = f"{federation.reference} round {round.number}"
                    experts_made = [version.reference for version in made]
                    self._note(session, federation.tenant, "round.commit", subject, by, experts=experts_made)
                    bump_revision(session)
                return made

    def drop_factors(
        self,
        federation: Federation,
        *,
        through: int,
        uncounted: bool = False,
        keep: Collection[UpdateKey] = (),
        token: int | None = None,
    ) -> None:
        """Delete the factors of updates that counted in a round up to ``through``, or were rejected in one.

        With ``uncounted`` also those that were accepted in one, and did not count. The journal keeps all else, and
        ``keep`` is left as it is. Weights that a version or another update names, or somebody is storing, stay.

        The journal says that they are gone before they are, and the federation's lease is not waited for meanwhile: a
        crash in between leaves weights that nothing names. Those are deleted by a later call, of whatever federation,
        or by :meth:`collect_garbage`.
        """
        with self._database.read() as session:
            digests = rounds.droppable(session, federation, through, uncounted, keep)
        for some in _chunks(digests, claims.AT_ONCE) or [[]]:
            with self._database.write() as session:
                now = self._clock()
                claims.begin_deleting(session, some, now)
                leases.check(session, federation.id, token)
                rounds.drop_factors(session, federation, through, uncounted, keep, some, now)
                marked = claims.mark(session, some, now, marked_at=self._clock())
            self._deletions.delete(marked)
        self._deletions.finish()

    def noise_seed(self, round: Round, fresh: bytes, *, token: int | None = None) -> bytes:
        """The secret seed of an open round's noise: ``fresh`` where there was none, and from then on always that one.

        When this returns it survives a crash. It is in no record, and forgotten when the round is closed.
        """
        with self._database.write() as session:
            leases.check(session, round.federation_id, token)
            return rounds.noise_seed(session, round, fresh)

    def abandon_round(self, round: Round, reason: str, *, token: int | None = None) -> None:
        """Close a round without a result. Idempotent; InvalidInputError where it is committed."""
        with self._database.write() as session:
            leases.check(session, round.federation_id, token)
            rounds.abandon(session, round, reason, self._clock())

    # Weights that nobody needs, and those that engines do

    def hold(self, service: str, digests: Collection[str], *, for_s: float) -> None:
        """Say that a running engine has these, beside what it said before, so that their weights stay until then.

        A hold ends ``for_s`` from now by the registry's clock; the same call renews it.
        """
        for some in _chunks(sorted(digests), 500):
            with self._database.write() as session:
                holds.put(session, service, some, self._clock() + for_s)

    def release(self, service: str, *, keep: Collection[str] = ()) -> None:
        """The engine of a service has nothing any more but ``keep``."""
        with self._database.write() as session:
            holds.remove(session, service, keep=keep)

    def collect_garbage(
        self,
        *,
        older_than_s: float,
        retired_older_than_s: float | None = None,
        dry_run: bool = False,
        by: str = "",
    ) -> Garbage:
        """Delete weights that nothing names: of calls that died, and of updates that were dropped.

        With ``retired_older_than_s`` also those of versions that have been retired or quarantined for so long, unless
        an alias points at one, a running engine holds it, or an update that may still count was trained on it. Such a
        version stays on record, and cannot be used again.

        Weights that were stored less than ``older_than_s`` ago stay; 0 spares none. ``dry_run`` changes nothing. May
        run at any time, any number of times at once, and be killed anywhere: what is left, the next call finds.
        """
        now = self._clock()
        purged: list[Version] = []
        if retired_older_than_s is not None:
            before = now - retired_older_than_s
            with self._database.read() as session:
                purged = garbage.purgeable(session, before, now)
            if not dry_run:
                purged = [version for version in purged if self._purge(version, before, by)]
        deleted: list[str] = []
        size_bytes = 0
        old = (blob for blob in self._blobs.stored() if not older_than_s or blob.modified_at <= now - older_than_s)
        while some := {blob.digest: blob.size for blob in islice(old, claims.AT_ONCE)}:
            with self._database.read() as session:  # so that nothing is locked where all of it is needed
                # In a dry run, these are as good as purged.
                ids = [version.id for version in purged if version.digest in some] if dry_run else []
                gone = claims.unreferenced(session, sorted(some), self._clock(), without_versions=ids)
            if not dry_run:
                gone = self._deletions.delete_unneeded(gone)
            deleted += gone
            size_bytes += sum(some[digest] for digest in gone)
        if not dry_run:
            self._deletions.finish()
            with self._database.write() as session:
                now = self._clock()
                claims.forget_expired(session, now)
                holds.forget_expired(session, now)
        return Garbage(tuple(version.reference for version in purged), tuple(deleted), size_bytes)

    def _purge(self, version: Version, before: float, by: str) -> bool:
        with self._database.write() as session:
            done = garbage.purge(session, version, before, self._clock())
            if done:
                self._note(session, version.tenant, "version.purge", version.reference, by, digest=version.digest)
                bump_revision(session)
            return done

    # Evaluations

    def record_evaluation(
        self, version: Version, *, member: str, loss: float, tokens: int, token: int | None = None
    ) -> None:
        """What a member measured: nats per token over so many held-out tokens; its next one replaces it."""
        with self._database.write() as session:
            if token is not None:
                leases.check(session, versions.made_by(session, version), token)
            evaluations.record(session, version, member, loss, tokens, self._clock())

    def evaluate(self, version: Version, *, loss: float, tokens: int, by: str = "") -> None:
        """What the tenant itself measured for a version that it imported; its next measurement replaces it.

        InvalidInputError for a version that a federation made: that is for its members to measure.
        """
        with self._database.write() as session:
            evaluations.record_own(session, version, loss, tokens, self._clock())
            self._note(session, version.tenant, "version.evaluate", version.reference, by, loss=loss, tokens=tokens)

    def evaluations(self, version: Version) -> list[Evaluation]:
        """By member; the tenant's own, whose member is empty, comes first."""
        with self._database.read() as session:
            return evaluations.of_version(session, version)


def _chunks(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
