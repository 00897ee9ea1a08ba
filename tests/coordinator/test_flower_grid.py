"""Who is a member's node: looked up before every round, on a Grid whose nodes come, go and answer as a test says."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import cast

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from lorafleet.adapters.wire import HEADER_SECTION, TrainOrder
from lorafleet.coordinator.flower_grid import POLL_S, FlowerTransport
from lorafleet.coordinator.transport import Order
from tests.coordinator.scripted import BASE

JOIN_S, REFRESH_S = 90.0, 10.0


@pytest.fixture(autouse=True)
def flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower sets in a task's process before it calls the app."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@dataclass
class Node:
    """A node that says who it is ``after_s`` after it was asked; without a member it only has an error to say."""

    member: str
    after_s: float = 3.0


class ScriptedGrid:
    """The part of Flower's Grid that the transport uses. ``nodes`` are those that are alive, by id."""

    def __init__(self, **members: int) -> None:
        self.nodes = {node: Node(member) for member, node in members.items()}
        self.now = 0.0
        self.looks = 0
        self.queried: list[int] = []
        self.worked: list[int] = []
        self._ids = count(1)
        self._waiting: dict[str, tuple[Message, float]] = {}

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = []
        for message in messages:
            node = message.metadata.dst_node_id
            query = message.metadata.message_type == MessageType.QUERY
            (self.queried if query else self.worked).append(node)
            message.metadata.__dict__["_message_id"] = str(next(self._ids))
            self._waiting[message.metadata.message_id] = (message, self.now)
            sent.append(message.metadata.message_id)
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = []
        for sent in message_ids:
            message, asked = self._waiting[sent]
            node = self.nodes.get(message.metadata.dst_node_id)
            if node is not None and self.now >= asked + node.after_s:
                del self._waiting[sent]
                ready.append(self._answer(node, message))
        return ready

    @staticmethod
    def _answer(node: Node, message: Message) -> Message:
        if not node.member:
            return Message(Error(code=1, reason="no data"), reply_to=message)
        said = ConfigRecord({"member": node.member, "rank": 4, "num_examples": 10})
        return Message(RecordDict({HEADER_SECTION: said}), reply_to=message)


def transport(grid: ScriptedGrid, *expected: str) -> FlowerTransport:
    return FlowerTransport(
        cast(Grid, grid),
        expected=expected,
        join_timeout_s=JOIN_S,
        refresh_timeout_s=REFRESH_S,
        clock=grid.clock,
        sleep=grid.sleep,
    )


def order(member: str) -> Order:
    asked = TrainOrder(
        federation="fleet", round=1, attempt=1, member=member, base_digest=BASE, expert_digest="", rank=4, steps=1,
        batch_size=1, sequence_length=8, learning_rate=0.1, seed=1, init_seed=1, deadline_s=30.0,
    )  # fmt: skip
    return Order(asked, None)


def working_node(grid: ScriptedGrid, members: FlowerTransport, key: str) -> int:
    members.send({key: order(key)})
    return grid.worked[-1]


def test_the_first_look_ends_once_the_expected_members_have_answered() -> None:
    grid = ScriptedGrid(alder=1, birch=2, stranger=3)
    grid.nodes[2].after_s = 5.0
    members = transport(grid, "alder", "birch")
    assert members.members().keys() == {"alder", "birch", "stranger"}
    assert 5.0 <= grid.now <= 5.0 + POLL_S


def test_the_first_look_goes_on_without_those_who_stay_away() -> None:
    grid = ScriptedGrid(alder=1)
    assert transport(grid, "alder", "birch").members().keys() == {"alder"}
    assert JOIN_S <= grid.now <= JOIN_S + POLL_S


def test_a_look_where_nothing_changed_costs_one_call_and_no_time() -> None:
    grid = ScriptedGrid(alder=1)
    members = transport(grid, "alder", "birch")
    members.members()
    before, looks = grid.now, grid.looks
    assert members.members().keys() == {"alder"}
    assert (grid.now, grid.looks, grid.queried) == (before, looks + 1, [1])


def test_a_restarted_member_gets_its_work_at_the_new_node() -> None:
    grid = ScriptedGrid(alder=1, birch=2)
    members = transport(grid, "alder", "birch")
    members.members()
    grid.nodes[7] = grid.nodes.pop(1)
    before = grid.now
    assert members.members().keys() == {"alder", "birch"}
    assert grid.now - before <= 3.0 + POLL_S
    assert working_node(grid, members, "alder") == 7
    assert working_node(grid, members, "birch") == 2
    assert grid.queried == [1, 2, 7]


def test_a_member_that_comes_late_is_there_at_the_next_look() -> None:
    grid = ScriptedGrid(alder=1)
    members = transport(grid, "alder", "birch")
    members.members()
    grid.nodes[2] = Node("birch")
    assert members.members().keys() == {"alder", "birch"}
    assert working_node(grid, members, "birch") == 2


def test_a_member_that_is_gone_is_not_there_and_is_asked_anew_when_it_is_back() -> None:
    grid = ScriptedGrid(alder=1, birch=2)
    members = transport(grid, "alder", "birch")
    members.members()
    away = grid.nodes.pop(2)
    assert members.members().keys() == {"alder"}
    grid.nodes[2] = away
    assert members.members().keys() == {"alder", "birch"}
    assert grid.queried == [1, 2, 2]


def test_a_second_node_never_takes_a_members_work_while_the_first_is_alive(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grid = ScriptedGrid(alder=5)
    members = transport(grid, "alder")
    members.members()
    grid.nodes |= {3: Node("alder", after_s=1.0), 9: Node("alder", after_s=2.0)}
    with caplog.at_level(logging.WARNING):
        assert members.members().keys() == {"alder"}
    assert working_node(grid, members, "alder") == 5
    assert [r.args for r in caplog.records] == [(5, 3, "alder", 5), (5, 9, "alder", 5)]
    caplog.clear()
    members.members()
    assert not caplog.records
    del grid.nodes[5]
    before = grid.now
    assert members.members().keys() == {"alder"}
    # It was heard already: the work moves on without another query.
    assert working_node(grid, members, "alder") == 3
    assert (grid.now, grid.queried) == (before, [5, 3, 9])


def test_a_new_node_that_says_nothing_costs_a_bounded_time_once() -> None:
    grid = ScriptedGrid(alder=1)
    members = transport(grid, "alder", "birch")
    members.members()
    grid.nodes[2] = Node("birch", after_s=300.0)
    before = grid.now
    assert members.members().keys() == {"alder"}
    assert REFRESH_S <= grid.now - before <= REFRESH_S + POLL_S
    before = grid.now
    assert members.members().keys() == {"alder"}
    assert grid.now == before
    grid.now += 300.0
    assert members.members().keys() == {"alder", "birch"}
    assert grid.queried == [1, 2]


def test_a_node_that_fails_is_asked_again_by_each_look_and_nobody_waits_for_it() -> None:
    grid = ScriptedGrid(alder=1)
    grid.nodes[2] = Node("")
    members = transport(grid, "alder", "birch")
    members.members()
    before = grid.now
    members.members()
    assert (grid.now, grid.queried) == (before, [1, 2, 2])
    grid.nodes[2].member = "birch"
    grid.now += 3.0
    assert members.members().keys() == {"alder", "birch"}


def test_a_query_that_a_node_took_with_it_is_asked_of_the_next(caplog: pytest.LogCaptureFixture) -> None:
    grid = ScriptedGrid(alder=1)
    grid.nodes[2] = Node("birch", after_s=300.0)
    members = transport(grid, "alder")
    members.members()
    del grid.nodes[2]
    grid.nodes[4] = Node("birch")
    assert members.members().keys() == {"alder", "birch"}
    assert working_node(grid, members, "birch") == 4
    assert not caplog.records
