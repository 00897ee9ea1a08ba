"""Orders on their way: a few members work at the same time, the next is sent as soon as one has answered."""

from __future__ import annotations

from collections.abc import Mapping

from lorafleet.coordinator.transport import Order, Reply, Transport


class Dispatch:
    """The orders of one round. ``at_once`` bounds how many are out at the same time; 0 sends them all.

    A bound helps where members share hardware, and keeps replies from arriving all at the same moment.
    """

    def __init__(self, transport: Transport, orders: Mapping[str, Order], at_once: int) -> None:
        self._transport = transport
        self._unsent = dict(orders)
        self._out: dict[str, Order] = {}
        self._at_once = at_once or max(1, len(orders))
        self._send()

    @property
    def outstanding(self) -> int:
        """Orders without a reply, sent or not."""
        return len(self._unsent) + len(self._out)

    def receive(self, timeout_s: float) -> list[tuple[Order, Reply]]:
        """New replies with the orders that they answer; a second reply, or one that nobody asked for, is dropped."""
        answered = []
        for reply in self._transport.receive(timeout_s):
            order = self._out.pop(reply.member, None)
            if order is not None:
                answered.append((order, reply))
        self._send()
        return answered

    def _send(self) -> None:
        room = self._at_once - len(self._out)
        batch = {member: self._unsent.pop(member) for member in list(self._unsent)[: max(0, room)]}
        if batch:
            self._out |= batch
            self._transport.send(batch)
