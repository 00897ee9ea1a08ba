"""Orders on their way: a few members work at the same time, the next is sent as soon as one has answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lorafleet.coordinator.transport import Order, Reply, Transport


class Dispatch:
    """The orders of one round.

    ``at_once`` bounds how many are out at the same time, which helps where members share hardware; 0 sends them all.
    A member that is silent for longer than its part of ``deadline_s`` gives its slot to the next one, so that silent
    members cost the others no turn; its reply still counts when it comes.
    """

    def __init__(
        self,
        transport: Transport,
        orders: Mapping[str, Order],
        *,
        at_once: int,
        deadline_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._transport, self._clock = transport, clock
        self._unsent = dict(orders)
        self._out: dict[str, tuple[Order, float]] = {}
        self._at_once = at_once or max(1, len(orders))
        # Half of the deadline, shared out: even if every member were silent, the last is asked before it.
        self._slot_s = deadline_s / 2 * self._at_once / max(1, len(orders))
        self._send()

    @property
    def outstanding(self) -> int:
        """Orders without a reply, sent or not."""
        return len(self._unsent) + len(self._out)

    def receive(self, timeout_s: float) -> list[tuple[Order, Reply]]:
        """New replies with the orders that they answer; a second reply, or one that nobody asked for, is dropped."""
        answered = []
        for reply in self._transport.receive(timeout_s):
            sent = self._out.pop(reply.member, None)
            if sent is not None:
                answered.append((sent[0], reply))
        self._send()
        return answered

    def _send(self) -> None:
        now = self._clock()
        working = sum(now - since < self._slot_s for _, since in self._out.values())
        batch = {m: self._unsent.pop(m) for m in list(self._unsent)[: max(0, self._at_once - working)]}
        if batch:
            self._out |= {member: (order, now) for member, order in batch.items()}
            self._transport.send(batch)
