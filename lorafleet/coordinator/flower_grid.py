"""The transport over Flower: orders as Messages to SuperNodes, replies pulled as they come.

Flower knows members by node ids that change at every restart; each node is asked once who its member is, by a query
that loads no model code, and from then on only keys count.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

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

    ``expected`` is the number of members to wait for, at most ``join_timeout_s``; fewer go on without the rest.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        expected: int,
        join_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid, self._clock, self._sleep = grid, clock, sleep
        self._expected, self._join_timeout_s = expected, join_timeout_s
        self._nodes: dict[str, int] = {}
        self._outstanding: dict[str, str] = {}
        self._refused: list[Reply] = []

    def members(self) -> Mapping[str, MemberInfo]:
        deadline = self._clock() + self._join_timeout_s
        asked: set[int] = set()
        pending: dict[str, int] = {}
        known: dict[str, MemberInfo] = {}
        while len(known) < self._expected and self._clock() < deadline:
            new = [node for node in self._grid.get_node_ids() if node not in asked]
            asked.update(new)
            for node in new:
                sent = self._push(Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY))
                if sent:
                    pending[sent] = node
            for message in self._pull(pending):
                node = pending.pop(message.metadata.reply_to_message_id)
                info = self._member_info(message)
                if info is not None:
                    known[info.key] = info
                    self._nodes[info.key] = node
            if len(known) < self._expected:
                self._sleep(POLL_S)
        return known

    def _pull(self, pending: Mapping[str, object]) -> list[Message]:
        return list(self._grid.pull_messages(list(pending))) if pending else []

    @staticmethod
    def _member_info(message: Message) -> MemberInfo | None:
        if message.has_error():
            log.warning("node %d does not say who it is: %s", message.metadata.src_node_id, message.error.reason)
            return None
        header = message.content.config_records.get(HEADER_SECTION, ConfigRecord())
        key, rank, examples = (header.get(name) for name in ("member", "rank", "num_examples"))
        if not isinstance(key, str) or not isinstance(rank, int) or not isinstance(examples, int):
            log.warning("node %d answers without member, rank and num_examples", message.metadata.src_node_id)
            return None
        return MemberInfo(key, rank, examples)

    def send(self, orders: Mapping[str, Order]) -> None:
        members = sorted(orders)
        for member in members:
            order, expert = orders[member]
            content = RecordDict({ORDER_SECTION: ConfigRecord(dict(order.to_config()))})
            if expert is not None:
                content[EXPERT_SECTION] = ArrayRecord({key: Array(array) for key, array in to_arrays(expert).items()})
            kind = MessageType.TRAIN if order.steps else MessageType.EVALUATE
            sent = self._push(
                Message(content, dst_node_id=self._nodes[member], message_type=kind, ttl=order.deadline_s)
            )
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
