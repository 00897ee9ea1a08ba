"""The transport over Flower: orders as Messages to SuperNodes, replies pulled as they come.

Flower knows members by node ids that change at every restart. Before each round, nodes that are new are asked who their
member is, by a query that loads no model code, and nodes that are gone are forgotten; from then on only keys count.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Set

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from lorafleet.adapters.wire import (
    EXPERT_SECTION,
    FACTORS_SECTION,
    HEADER_SECTION,
    METRICS_SECTION,
    ORDER_SECTION,
    to_arrays,
)
from lorafleet.coordinator.transport import MemberInfo, Order, Reply

log = logging.getLogger(__name__)

# SuperNodes themselves ask for work every 3 s; asking for replies more often than this would only load the SuperLink.
POLL_S = 0.5


class FlowerTransport:
    """A :class:`~lorafleet.coordinator.transport.Transport` over a Flower Grid.

    The first look waits for the ``expected`` members, at most ``join_timeout_s``; fewer go on without the rest. Later
    looks wait only for the answers of nodes that they see for the first time, at most ``refresh_timeout_s``.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        expected: Collection[str],
        join_timeout_s: float,
        refresh_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid, self._clock, self._sleep = grid, clock, sleep
        self._expected, self._join_timeout_s = frozenset(expected), join_timeout_s
        self._refresh_timeout_s = refresh_timeout_s
        self._looked = False
        # Nodes that are alive, and what they said of themselves, in the order of their answers.
        self._claims: dict[int, MemberInfo] = {}
        # Message id → node, of queries without an answer.
        self._queries: dict[str, int] = {}
        # Nodes that an earlier look has asked: nobody waits for them again.
        self._asked_before: set[int] = set()
        self._outstanding: dict[str, str] = {}
        self._refused: list[Reply] = []

    def members(self) -> Mapping[str, MemberInfo]:
        first, self._looked = not self._looked, True
        deadline = self._clock() + (self._join_timeout_s if first else self._refresh_timeout_s)
        asked: set[int] = set()
        while True:
            alive = set(self._grid.get_node_ids())
            self._forget_gone(alive)
            asked &= alive
            # One that answered with an error is asked again by the next look.
            new = alive - asked - self._claims.keys() - set(self._queries.values())
            asked |= new
            for node in sorted(new):
                self._ask(node)
            self._hear()
            known = {key: self._claims[node] for key, node in self._nodes().items()}
            if first:
                complete = self._expected <= known.keys()
            else:
                complete = self._asked_before.issuperset(self._queries.values())
            if complete or self._clock() >= deadline:
                self._asked_before |= asked
                return known
            self._sleep(POLL_S)

    def _forget_gone(self, alive: Set[int]) -> None:
        self._claims = {node: claim for node, claim in self._claims.items() if node in alive}
        self._queries = {sent: node for sent, node in self._queries.items() if node in alive}
        self._asked_before &= alive

    def _ask(self, node: int) -> None:
        sent = self._push(Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY))
        if sent:
            self._queries[sent] = node

    def _hear(self) -> None:
        for message in self._pull(self._queries):
            node = self._queries.pop(message.metadata.reply_to_message_id)
            info = self._member_info(node, message)
            if info is None:
                continue
            holder = self._nodes().get(info.key)
            if holder is not None:
                log.warning(
                    "nodes %d and %d both say that they are %s; work goes to %d until it is gone: stop one of them, "
                    "or give it a key of its own", holder, node, info.key, holder,
                )  # fmt: skip
            self._claims[node] = info

    def _nodes(self) -> dict[str, int]:
        """Member key → the node that claimed it first among those that are alive."""
        nodes: dict[str, int] = {}
        for node, claim in self._claims.items():
            nodes.setdefault(claim.key, node)
        return nodes

    def _pull(self, pending: Mapping[str, object]) -> list[Message]:
        return list(self._grid.pull_messages(list(pending))) if pending else []

    @staticmethod
    def _member_info(node: int, message: Message) -> MemberInfo | None:
        if message.has_error():
            log.warning("node %d does not say who it is: %s", node, message.error.reason)
            return None
        header = message.content.config_records.get(HEADER_SECTION, ConfigRecord())
        key, rank, examples = (header.get(name) for name in ("member", "rank", "num_examples"))
        if not isinstance(key, str) or not isinstance(rank, int) or not isinstance(examples, int):
            log.warning("node %d answers without member, rank and num_examples", node)
            return None
        return MemberInfo(key, rank, examples)

    def send(self, orders: Mapping[str, Order]) -> None:
        nodes = self._nodes()
        for member in sorted(orders):
            order, expert = orders[member]
            content = RecordDict({ORDER_SECTION: ConfigRecord(dict(order.to_config()))})
            if expert is not None:
                content[EXPERT_SECTION] = ArrayRecord({key: Array(array) for key, array in to_arrays(expert).items()})
            kind = MessageType.TRAIN if order.steps else MessageType.EVALUATE
            sent = self._push(Message(content, dst_node_id=nodes[member], message_type=kind, ttl=order.deadline_s))
            if sent:
                self._outstanding[sent] = member
            else:
                self._refused.append(Reply(member, error="the SuperLink did not take its order; is it too large?"))

    def _push(self, message: Message) -> str:
        """The message's id, or nothing where the SuperLink refused it; one by one, so that one costs only itself."""
        return next(iter(self._grid.push_messages([message])), "")

    def receive(self, timeout_s: float) -> list[Reply]:
        if self._refused:
            refused, self._refused = self._refused, []
            return refused
        deadline = self._clock() + timeout_s
        while True:
            messages = self._pull(self._outstanding)
            if messages or self._clock() >= deadline:
                return [self._reply(message) for message in messages]
            self._sleep(min(POLL_S, max(0.0, deadline - self._clock())))

    def _reply(self, message: Message) -> Reply:
        member = self._outstanding.pop(message.metadata.reply_to_message_id)
        if message.has_error():
            return Reply(member, error=f"Flower error {message.error.code}: {message.error.reason}")
        content = message.content
        arrays = content.array_records.get(FACTORS_SECTION, ArrayRecord())
        try:
            decoded = {key: array.numpy() for key, array in arrays.items()}
        except (
            ValueError,
            TypeError,
            OSError,
            EOFError,
        ) as error:  # a payload that NumPy cannot read, pickles included
            return Reply(member, error=f"its arrays cannot be read: {error}")
        return Reply(
            member,
            header=dict(content.config_records.get(HEADER_SECTION, ConfigRecord())),
            arrays=decoded,
            metrics=dict(content.metric_records.get(METRICS_SECTION, MetricRecord())),
        )

    def forget(self) -> None:
        self._outstanding.clear()
        self._refused.clear()
