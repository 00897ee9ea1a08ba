"""``lorafleet federation …``: the life of a federation, from its file to its end."""

from __future__ import annotations

import contextlib
import getpass
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from lorafleet.cli import stores
from lorafleet.cli.output import JsonFlag, print_json, print_table, time_text

if TYPE_CHECKING:
    from rich.console import Console, Group

    from lorafleet.coordinator.status import FederationStatus
    from lorafleet.registry import Federation, Registry
    from lorafleet.registry.records import FederationState, Invitation

app = typer.Typer(help="Create a federation, invite members, see how it goes, and end it.", no_args_is_help=True)

DAY_S = 86400.0
# How often a table on a terminal is drawn anew.
WATCH_S = 1.0

Named = Annotated[
    str,
    typer.Argument(metavar="TENANT/NAME|FEDERATION.toml", help="Which one; a file also says where its registry is."),
]
RegistryUrl = Annotated[
    str | None,
    typer.Option("--registry", metavar="URL", help="Of the registry. (default: what FEDERATION.toml says)"),
]
BlobFolder = Annotated[
    str | None,
    typer.Option("--blobs", metavar="DIR|URL", help="The registry's weights. (default: what FEDERATION.toml says)"),
]
Reason = Annotated[str, typer.Option(help="Why, for who looks later.")]
By = Annotated[str | None, typer.Option(metavar="NAME", help="Who does it. (default: your user's name)")]


class Opened(NamedTuple):
    store: Registry
    federation: Federation


@contextlib.contextmanager
def _opened(named: str, registry: str | None, blobs: str | Path | None) -> Iterator[Opened]:
    """The federation that an argument names, and its registry, open for the block."""
    from lorafleet.registry.store import Registry

    tenant, name = "", ""
    if named.endswith(".toml"):
        from lorafleet.coordinator.settings import CoordinatorConfig

        config = CoordinatorConfig.load(Path(named))
        tenant, name = config.federation.tenant, config.federation.name
        registry, blobs = registry or config.registry, blobs or config.blobs
    else:
        tenant, _, name = named.partition("/")
        if not tenant or not name:
            raise typer.BadParameter(f"found {named!r}, expected TENANT/NAME or a file FEDERATION.toml")
    if registry is None or blobs is None:
        raise typer.BadParameter("found TENANT/NAME without --registry and --blobs, expected both, or FEDERATION.toml")
    with Registry.open(registry, blobs) as store:
        yield Opened(store, store.federation(tenant, name))


@app.command()
def create(
    file: Annotated[
        Path, typer.Argument(metavar="FEDERATION.toml", help="What is agreed: base, rule, limits, members.")
    ],
    by: By = None,
    json: JsonFlag = False,
) -> None:
    """Register a federation as its file has it, with its tenants, base and members; what is there already stays.

    `coordinator run` does the same before it runs it.
    """
    from lorafleet.coordinator.launch import register
    from lorafleet.coordinator.settings import CoordinatorConfig
    from lorafleet.registry.store import Registry

    config = CoordinatorConfig.load(file)
    with Registry.open(config.registry, config.blobs) as store:
        federation = register(config, store, by=stores.operator(by))
        members = store.members(federation)
    if json:
        print_json(
            {
                "federation": federation.reference,
                "base_digest": federation.base_digest,
                "state": federation.state,
                "created_at": federation.created_at,
                "members": [member.key for member in members],
            }
        )
    else:
        typer.echo(f"{federation.reference}  {federation.state}, {len(members)} members")


@app.command()
def invite(
    federation: Named,
    tenant: Annotated[str, typer.Option(help="Whose member it will be; the tenant has to be there.")],
    days: Annotated[float, typer.Option(help="For how long it can be accepted.")] = 7.0,
    registry: RegistryUrl = None,
    blobs: BlobFolder = None,
    by: By = None,
    json: JsonFlag = False,
) -> None:
    """Make an invitation, and print its token: who has that can become a member, once. It is shown only now."""
    with _opened(federation, registry, blobs) as (store, found):
        invitation, token = store.invite(found, tenant=tenant, for_s=days * DAY_S, by=stores.operator(by))
    if json:
        print_json({"token": token, **_invitation_fields(invitation)})
    else:
        typer.echo(token)
        until = time_text(invitation.expires_at)
        typer.echo(f"invitation {invitation.code} for {invitation.tenant}, once, until {until}", err=True)


def _invitation_fields(invitation: Invitation) -> dict[str, Any]:
    return {
        "code": invitation.code,
        "tenant": invitation.tenant,
        "created_at": invitation.created_at,
        "expires_at": invitation.expires_at,
        "accepted_at": invitation.accepted_at,
        "member": invitation.member,
    }


@app.command()
def invitations(
    federation: Named, registry: RegistryUrl = None, blobs: BlobFolder = None, json: JsonFlag = False
) -> None:
    """List a federation's invitations, with those that were accepted or have expired; never their tokens."""
    with _opened(federation, registry, blobs) as (store, found):
        made = store.invitations(found)
    if json:
        print_json([_invitation_fields(each) for each in made])
    else:
        print_table(
            ["code", "tenant", "made", "expires", "accepted", "member"],
            [
                (each.code, each.tenant, *map(time_text, (each.created_at, each.expires_at, each.accepted_at)),
                 each.member or "-")
                for each in made
            ],
        )  # fmt: skip


@app.command()
def withdraw(
    federation: Named,
    code: Annotated[str, typer.Argument(metavar="CODE", help="Of the invitation: what stands behind lfi_ in a token.")],
    registry: RegistryUrl = None,
    blobs: BlobFolder = None,
    by: By = None,
    json: JsonFlag = False,
) -> None:
    """Take an invitation back that nobody has accepted: its token opens nothing from now on."""
    with _opened(federation, registry, blobs) as (store, found):
        withdrawn = store.withdraw_invitation(found, code, by=stores.operator(by))
    if json:
        print_json(_invitation_fields(withdrawn))
    else:
        typer.echo(f"invitation {withdrawn.code} for {withdrawn.tenant} is withdrawn")


@app.command()
def accept(
    token: Annotated[
        str,
        typer.Argument(
            metavar="TOKEN|-",
            help="What `federation invite` printed; -: asked for, or read from standard input, as a command line is "
            "seen by all users of a machine.",
        ),
    ],
    member: Annotated[str, typer.Option(metavar="KEY", help="The name that the federation will know you by.")],
    public_key: Annotated[
        Path, typer.Option(metavar="FILE", help="Of the key that your node will join with, as ssh-keygen writes it.")
    ],
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where you will join: the federation's proxy.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Reach it without TLS.")] = False,
    root_certificates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The certificates that it is checked against.")
    ] = None,
    registry: Annotated[
        str | None, typer.Option(metavar="URL", help="Of the registry, where you reach it yourself; with --blobs.")
    ] = None,
    blobs: Annotated[str | None, typer.Option(metavar="DIR|URL", help="The registry's weights.")] = None,
    by: By = None,
    json: JsonFlag = False,
) -> None:
    """Accept an invitation: your node's key is registered, and `client join --private-key` may follow.

    Again with the same keys it changes nothing.
    """
    from lorafleet.coordinator.node_keys import read_public_key

    if (superlink is None) == (registry is None) or (registry is None) != (blobs is None):
        raise typer.BadParameter("expected --superlink, or --registry and --blobs")
    if superlink is not None and by is not None:
        raise typer.BadParameter("--by is for --registry: through the proxy it is the member who accepts")
    key = read_public_key(public_key)
    if token == "-":
        token = (getpass.getpass("token: ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
    if superlink is not None:
        from lorafleet.coordinator.acceptance import accept_at

        made = accept_at(superlink, token, member, key, insecure=insecure, root_certificates=root_certificates)
    else:
        from lorafleet.registry.store import Registry

        assert registry is not None and blobs is not None
        with Registry.open(registry, blobs) as store:
            found = store.accept_invitation(token, key=member, public_key=key, by=stores.operator(by))
            made = {"member": found.key, "tenant": found.tenant}
    if json:
        print_json(made)
    else:
        typer.echo(f"{made['member']} is a member for {made['tenant']}")


@app.command()
def status(
    federation: Named,
    registry: RegistryUrl = None,
    blobs: BlobFolder = None,
    rounds: Annotated[int, typer.Option(min=0, help="So many of the last rounds.")] = 5,
    watch: Annotated[bool, typer.Option("--watch", help="Draw it anew on a terminal until Ctrl-C.")] = False,
    json: JsonFlag = False,
) -> None:
    """Show what was agreed, who works for it, the last rounds, and the members: all of it from the registry."""
    from rich.console import Console

    from lorafleet.coordinator.status import status_of

    console = Console()
    if watch and (json or not console.is_terminal):
        raise typer.BadParameter("--watch: expected a terminal, and no --json; without it the status is printed once")
    with _opened(federation, registry, blobs) as (store, found):

        def now() -> FederationStatus:
            return status_of(store, found, now=time.time(), last_rounds=rounds)

        if watch:
            with contextlib.suppress(KeyboardInterrupt):
                show(now, console)
            return
        current = now()
    if json:
        print_json(current)
        return
    for line in _head(current):
        typer.echo(line)
    for table in _tables(current):
        typer.echo()
        print_table(table.columns, table.rows)


def show(now: Callable[[], FederationStatus], console: Console, sleep: Callable[[float], None] = time.sleep) -> None:
    """The status as a live table, until what it calls raises."""
    from rich.live import Live

    with Live(_drawn(now()), console=console, auto_refresh=False, screen=False) as live:
        while True:
            sleep(WATCH_S)
            live.update(_drawn(now()), refresh=True)


class _Table(NamedTuple):
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def _head(current: FederationStatus) -> list[str]:
    """What is said above the tables, a line each."""
    terms = current.terms
    holder = current.holder
    why = f" by {current.state_by}" if current.state_by else ""
    why += f": {current.state_reason}" if current.state_reason else ""
    words = [f"{key} {terms[key]}" for key in ("rule", "scheduler", "rounds", "quorum", "expert_rank") if key in terms]
    kept = terms.get("keep_updates", 0)
    spent = current.privacy
    return [
        f"{current.reference} is {current.state} since {time_text(current.state_at)}{why}",
        f"base {current.base}, {', '.join(words)}, updates kept {f'for {kept} rounds' if kept else 'for good'}",
        f"a coordinator works for it since {time_text(holder.taken_at)}" if holder else "no coordinator works for it",
        *(
            [
                f"{spent['mode']} privacy: {spent['rounds']} rounds "
                + ("with at most" if spent["epsilon"] is None else f"spent epsilon {spent['epsilon']:.3f} of")
                + f" {spent['budget']:g}, at delta {spent['delta']:g}"
            ]
            if spent
            else []
        ),
        *([f"against bad members: {said}"] if (said := _against_bad_members(current)) else []),
        *([f"{current.open_invitations} invitations are open"] if current.open_invitations else []),
    ]


def _against_bad_members(current: FederationStatus) -> str:
    """What a federation does against them, in words; empty for nothing."""
    robust = current.terms.get("robust", {})
    words = [robust["wrapper"]] if robust.get("wrapper") else []
    words += [f"f {robust['byzantine']}"] if robust.get("byzantine") is not None else []
    words += [f"updates clipped at {robust['clip']:g}"] if robust.get("clip") else []
    return ", ".join(words)


def _tables(current: FederationStatus) -> Iterator[_Table]:
    from lorafleet.coordinator.defence import some_of

    bad = ["left out", "clipped"] if _against_bad_members(current) else []
    if current.rounds:
        yield _Table(
            ["round", "state", "opened", "seconds", "members", *bad, "truncation", "why"],
            [
                (str(r.number), r.state, time_text(r.opened_at), _number(r.seconds, ".1f"), str(r.members),
                 *(some_of(who, 3) or "-" for who in (r.left_out, r.clipped)[: len(bad)]),
                 _number(r.truncation_error, ".2e"), r.reason or "-")
                for r in current.rounds
            ],
        )  # fmt: skip
    if current.members:
        yield _Table(
            [
                "member", "tenant", "known by", "state", "joined", "last update", "round", "rank", "s/step", "loss",
                "why",
            ],
            [
                (m.key, m.tenant, "key" if m.proves_itself else "word", m.state, time_text(m.joined_at),
                 time_text(m.last_update_at), _number(m.last_round, "d"), _number(m.rank, "d"),
                 _number(m.step_s, ".3f"), _number(m.loss, ".4f"), m.why or "-")
                for m in current.members
            ],
        )  # fmt: skip


def _drawn(current: FederationStatus) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    drawn: list[Any] = [Text(line) for line in _head(current)]
    for table in _tables(current):
        # A member's words are text, whatever brackets they hold.
        shown = Table(*table.columns)
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))
        drawn.append(shown)
    return Group(*drawn)


@app.command()
def pause(
    federation: Named, registry: RegistryUrl = None, blobs: BlobFolder = None, reason: Reason = "", by: By = None,
    json: JsonFlag = False,
) -> None:  # fmt: skip
    """Open no new round until it is resumed; a round that is open is finished, and the coordinator waits."""
    _set_state("paused", federation, registry, blobs, reason, by, json)


@app.command()
def resume(
    federation: Named, registry: RegistryUrl = None, blobs: BlobFolder = None, reason: Reason = "", by: By = None,
    json: JsonFlag = False,
) -> None:  # fmt: skip
    """Let a paused federation go on."""
    _set_state("active", federation, registry, blobs, reason, by, json)


@app.command()
def stop(
    federation: Named, registry: RegistryUrl = None, blobs: BlobFolder = None, reason: Reason = "", by: By = None,
    json: JsonFlag = False,
) -> None:  # fmt: skip
    """End a federation for good: a round that is open is finished, no other one is opened. Its experts stay."""
    _set_state("stopped", federation, registry, blobs, reason, by, json)


def _set_state(
    state: FederationState, named: str, registry: str | None, blobs: str | None, reason: str, by: str | None,
    json: bool,
) -> None:  # fmt: skip
    with _opened(named, registry, blobs) as (store, found):
        now = store.set_federation_state(found, state, by=stores.operator(by), reason=reason)
    if json:
        print_json(
            {
                "federation": now.reference, "state": now.state, "state_at": now.state_at, "state_by": now.state_by,
                "state_reason": now.state_reason,
            }
        )  # fmt: skip
    else:
        typer.echo(f"{now.reference} is {now.state} since {time_text(now.state_at)}")


@app.command()
def revoke(
    federation: Named,
    member: Annotated[str, typer.Argument(metavar="MEMBER", help="The key of the member to put out, for good.")],
    registry: RegistryUrl = None,
    blobs: BlobFolder = None,
    reason: Reason = "",
    by: By = None,
    json: JsonFlag = False,
) -> None:
    """Put a member out: no more orders, nothing that it sends counts, and no later expert is its tenant's to use."""
    with _opened(federation, registry, blobs) as (store, found):
        now = store.revoke_member(found, member, by=stores.operator(by), reason=reason)
    if json:
        print_json(
            {
                "member": now.key, "tenant": now.tenant, "revoked_at": now.revoked_at, "revoked_by": now.revoked_by,
                "revoked_reason": now.revoked_reason,
            }
        )  # fmt: skip
    else:
        typer.echo(f"{now.key} is revoked since {time_text(now.revoked_at)}")


@app.command()
def recompute(
    federation: Named,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the experts go, in PEFT format, one folder for each.")
    ],
    without: Annotated[
        list[str], typer.Option(metavar="MEMBER", help="Leave this member's updates out; repeatable.")
    ] = [],  # noqa: B006 (Typer never changes a default)
    through: Annotated[
        int | None, typer.Option("--round", min=1, help="As they are after this round. (default: the last one)")
    ] = None,
    registry: RegistryUrl = None,
    blobs: BlobFolder = None,
    json: JsonFlag = False,
) -> None:
    """Compute the experts again from the journal, without some members' updates; the registry stays as it is.

    Without --without, what comes of it has to be what was committed, bit for bit: exits with 1 where it is not.
    """
    from lorafleet.coordinator.recompute import recompute as again
    from lorafleet.errors import InvalidInputError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInputError(f"found something at {out}; name a folder that is new or empty")
    with _opened(federation, registry, blobs) as (store, found), _progress() as watch:
        experts = again(store, found, without=without, through=through, watch=watch)
        rows = []
        for expert in experts:
            folder = out / expert.label
            expert.weights.save(folder)
            rows.append(
                {
                    "expert": expert.label,
                    "folder": str(folder),
                    "digest": expert.weights.digest,
                    "rank": expert.weights.rank,
                    "committed": expert.committed.reference,
                    "committed_digest": expert.committed.digest,
                }
            )
    if json:
        print_json(rows)
    else:
        columns = ["expert", "committed", "rank", "digest", "committed_digest"]
        print_table(columns, [[row[column] for column in columns] for row in rows])
    if not without and any(row["digest"] != row["committed_digest"] for row in rows):
        typer.echo("error: the journal does not give what was committed", err=True)
        raise typer.Exit(1)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Sequence[Any]], Iterable[Any]]]:
    """Hands rounds through, with a bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        yield lambda rounds: bar.track(rounds, description="rounds")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
