"""Joins a federation: keeps the base loaded, and runs a Flower SuperNode for as long as this process lives."""

from __future__ import annotations

import contextlib
import logging
import ssl
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lorafleet.assets import base_path
from lorafleet.clients.bundle import launchers
from lorafleet.clients.data import Split, Texts, open_texts, split_texts
from lorafleet.clients.handover import HandedOrder, Orders, Sections, listening, receiving, serve
from lorafleet.clients.introduction import check_rank, introduction
from lorafleet.clients.limits import DEFAULT_RANK, PROBE_S, LocalLimits
from lorafleet.clients.standing import is_out
from lorafleet.clients.state import MemberState, open_state
from lorafleet.clients.supernode import SuperNode, node_config, supernode
from lorafleet.errors import InvalidInputError, NotFoundError, PermissionDeniedError, UnavailableError
from lorafleet.flower_commands import environment, free_port, script
from lorafleet.stopping import interruptible

if TYPE_CHECKING:
    from lorafleet.clients.member import Member

log = logging.getLogger(__name__)

# A SuperNode connects within seconds, and a coordinator that runs asks new nodes before its next round.
QUIET_S = 30.0


def join_federation(
    superlink: str,
    *,
    data: str | Path | Texts,
    member: str,
    rank: int | None = None,
    base: str | Path = "tiny",
    limits: LocalLimits | None = None,
    probe_s: float | None = PROBE_S,
    state: str | Path | None = None,
    insecure: bool = False,
    root_certificates: str | Path | None = None,
    private_key: str | Path | None = None,
) -> None:
    """Serve a federation as ``member`` until SIGINT, SIGTERM or SIGHUP, or until the SuperNode can never work.

    ``superlink`` is HOST:PORT. ``data`` is a dataset (anything with ``__len__`` and ``__getitem__`` that gives texts,
    completions or conversations), a folder, a ``.jsonl`` file, or ``module:name`` of a dataset that Python finds from
    the current folder. The base is loaded once, and training runs in this process, within ``limits``.

    For ``probe_s`` seconds at most it is measured what training costs here: without a ``rank`` that is the one that the
    machine affords, and what does not fit (the rank now, an order later) is refused with the numbers. With None nothing
    is measured or refused, and the rank is 8 unless it is given.

    The folder ``state`` holds what a restart needs (:mod:`lorafleet.clients.state`), the last key among it. The
    connection is TLS unless ``insecure``; one that is lost is tried again. Call it from the main thread. Raises
    UnavailableError where the SuperNode fails, PermissionDeniedError where the federation takes this member no more,
    InvalidInputError or NotFoundError for arguments that cannot work.
    """
    if insecure and (root_certificates or private_key):
        raise InvalidInputError("found insecure together with certificates or a key: give one of the two")
    if rank is not None:
        check_rank(rank)
    limits = LocalLimits() if limits is None else limits
    folder = base_path(base)
    _check_device(limits.device)
    for file in (root_certificates, private_key):
        _check_file(file)
    split = split_texts(open_texts(data))
    with contextlib.ExitStack() as stack:
        kept = None
        if state is not None:
            key_file = None if private_key is None else str(Path(private_key).absolute())
            kept = stack.enter_context(open_state(state, member=member, private_key=key_file))
            if private_key is None and not insecure:
                private_key = kept.contents.private_key
        connection = _connection(superlink, insecure, root_certificates, private_key)
        owner = _Owner(member, rank, split, folder, limits, probe_s, kept)
        _serve(connection, superlink, owner, is_out=_standing(superlink, root_certificates, private_key))


def _standing(
    superlink: str, root_certificates: str | Path | None, private_key: str | Path | None
) -> Callable[[], bool]:
    """Whether the federation takes this member no more; without a key there is nobody to ask about."""
    if private_key is None:
        return lambda: False
    trusted = None if root_certificates is None else Path(root_certificates)
    return partial(is_out, superlink, Path(private_key), trusted)


def _connection(
    superlink: str, insecure: bool, root_certificates: str | Path | None, private_key: str | Path | None
) -> list[str]:
    """The SuperNode's command as far as it is the same at every start."""
    command = [script("flower-supernode"), "--superlink", superlink]
    if insecure:
        command.append("--insecure")
    for option, file in (("--root-certificates", root_certificates), ("--auth-supernode-private-key", private_key)):
        if file is not None:
            _check_file(file)
            command += [option, str(file)]
    if root_certificates is not None:
        _check_certificates(root_certificates)
    return command


@dataclass(frozen=True)
class _Owner:
    """Who joins, with what."""

    member: str
    rank: int | None
    split: Split
    base: Path
    limits: LocalLimits
    probe_s: float | None
    state: MemberState | None

    def load(self, stop_if_asked: Callable[[], None]) -> Member:
        """With the base, and what training costs here; imports torch."""
        from lorafleet.clients.orders import load_member
        from lorafleet.clients.probe import probed

        rank = self.rank or DEFAULT_RANK
        me = load_member(self.member, rank=rank, split=self.split, base=self.base, limits=self.limits)
        stop_if_asked()
        return me if self.probe_s is None else probed(me, rank=self.rank, limit_s=self.probe_s)


def _serve(connection: list[str], superlink: str, owner: _Owner, *, is_out: Callable[[], bool]) -> None:
    """Until asked to stop. The base loads while the SuperNode starts and is asked who it is."""
    try:
        # The folder is this user's alone: whoever reaches the socket can have this member train.
        with (
            interruptible() as stop_if_asked,
            tempfile.TemporaryDirectory(prefix="lorafleet-node-") as home,
        ):
            # Who is asked for its rank has to know it.
            me = owner.load(stop_if_asked) if owner.rank is None and owner.probe_s is not None else None
            rank = me.rank if me is not None else owner.rank or DEFAULT_RANK
            config = node_config({"member": owner.member, "rank": rank, "handover": f"{home}/orders"})

            def command() -> list[str]:
                # Tasks talk to their SuperNode over loopback; the default port would allow one SuperNode a machine.
                return [*connection, "--host", "127.0.0.1", "--port", str(free_port()), "--node-config", config]

            # What the SuperNode starts by name is ours, so that no run brings code with it.
            own_environment = {**environment(Path(home)), "PATH": launchers(Path(home) / "bin")}
            with (
                listening(Path(home) / "orders") as listener,
                _Introducing(owner, rank, superlink) as introduce,
                receiving(listener, introduce.answer) as orders,
                supernode(command, own_environment, superlink=superlink, is_out=is_out) as node,
            ):
                introduce.on_asked = node.connected
                me = me or owner.load(stop_if_asked)
                _work(me, owner, node, orders, stop_if_asked)
                if node.out:
                    raise PermissionDeniedError(
                        f"{superlink} takes this node's key no more: {owner.member} was revoked, or the federation "
                        "stopped; ask its owner"
                    )
                raise UnavailableError(f"the SuperNode ended with code {node.code}; its output above says why")
    except KeyboardInterrupt:
        log.info("asked to stop; the SuperNode has ended")


def _work(me: Member, owner: _Owner, node: SuperNode, orders: Orders, stop_if_asked: Callable[[], None]) -> None:
    """Carry out what comes until the SuperNode can never work."""
    from lorafleet.clients.memory import give_back
    from lorafleet.clients.orders import answer
    from lorafleet.clients.progress import bar

    curve = None if owner.state is None else _Curve(owner.state)

    def carry_out(order: HandedOrder) -> Sections:
        def check() -> None:
            stop_if_asked()
            order.check()

        try:
            return answer(me, order.sections, check=check, received_s=order.received_s, state=owner.state, watch=bar)
        finally:
            give_back(me.device)

    def alive() -> bool:
        stop_if_asked()
        if curve is not None:  # here, as the answer is on its way by now
            curve.draw()
        return node.alive()

    serve(orders, carry_out, alive=alive)


class _Curve:
    """The image of a state's losses, drawn again when there are new ones."""

    def __init__(self, state: MemberState) -> None:
        self._state, self._drawn, self._failed = state, len(state.history), False

    def draw(self) -> None:
        if self._failed or len(self._state.history) == self._drawn:
            return
        self._drawn = len(self._state.history)
        from lorafleet.clients.curve import FILE, draw

        try:
            draw(self._state.history, self._state.folder / FILE)
        except Exception as error:  # an image is no reason to stop working; said once
            self._failed = True
            missing = isinstance(error, ImportError)
            why = "matplotlib is not installed (pip install matplotlib)" if missing else repr(error)
            log.warning("no %s is drawn: %s", FILE, why)


def _check_file(file: str | Path | None) -> None:
    if file is not None and not Path(file).is_file():
        raise NotFoundError(f"found no file {file}; expected certificates or a key in it")


def _check_certificates(file: str | Path) -> None:
    """Raises InvalidInputError where the file holds none: a SuperNode would say so, and then hang."""
    try:
        ssl.create_default_context(cafile=file)
    except ssl.SSLError as error:
        raise InvalidInputError(f"root-certificates: found no certificate in {file}, expected PEM ({error})") from None


def _check_device(device: str) -> None:
    """Raises InvalidInputError where this machine's torch has no such device."""
    if device in ("cpu", "auto"):
        return  # nothing to ask torch, which takes seconds to import
    from lorafleet.clients.machine import as_device

    as_device(device)


class _Introducing:
    """Who the member is, for whoever asks; the log says when the first one does, or that nobody does.

    A query may bring what became of the member's last update.
    """

    def __init__(self, owner: _Owner, rank: int, superlink: str) -> None:
        self._owner, self._rank, self._superlink = owner, rank, superlink
        self._asked = False
        self.on_asked: Callable[[], None] = lambda: None
        self._quiet = threading.Timer(QUIET_S, self._warn)
        self._quiet.daemon = True

    def __enter__(self) -> Self:
        self._quiet.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._quiet.cancel()

    def _warn(self) -> None:
        log.warning(
            "no coordinator has asked for %s in %.0f s: does a federation run at %s, and is that its SuperLink's "
            "address, with the right certificates?", self._owner.member, QUIET_S, self._superlink,
        )  # fmt: skip

    def answer(self, asked: Sections) -> Sections:
        self.on_asked()
        member, split = self._owner.member, self._owner.split
        if not self._asked:
            self._asked = True
            self._quiet.cancel()
            log.info("%s is ready: %d documents to train on, rank %d", member, len(split.train), self._rank)
        if asked.configs:
            from lorafleet.clients.verdict import hear  # imports torch

            hear(asked, member, self._owner.state)
        return introduction(member, self._rank, split)
