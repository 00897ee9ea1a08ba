"""A SuperNode that comes back when its connection was lost, and one that never can; without Flower, without waiting."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from lorafleet.clients import supernode
from lorafleet.clients.supernode import LONGEST_PAUSE_S, SETTLED_S, SuperNode, pause_s


class Child:
    """Runs until a code is set."""

    def __init__(self) -> None:
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode


class World:
    """Children that end when they are told to, and a clock that goes when it is moved."""

    def __init__(self) -> None:
        self.now, self.children, self.ended = 0.0, list[Child](), list[Child]()

    def start(self) -> Any:
        self.children.append(Child())
        return self.children[-1]

    def node(self, *, out: bool = False) -> SuperNode:
        return SuperNode(self.start, superlink="link:1", is_out=lambda: out, clock=lambda: self.now, draw=lambda: 0.0)

    def end(self, code: int) -> None:
        self.children[-1].returncode = code


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    monkeypatch.setattr(supernode, "_end", made.ended.append)
    yield made


def test_node_that_ends_with_an_error_before_it_was_connected_is_not_started_again(world: World) -> None:
    node = world.node()
    assert node.alive()
    world.end(1)
    assert not node.alive()
    assert node.code == 1
    assert len(world.children) == 1


@pytest.mark.parametrize("code", [0, -9])
def test_node_whose_connection_is_lost_is_started_again_after_a_pause(
    world: World, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    node = world.node()
    world.end(code)
    assert node.alive()
    assert world.ended == world.children  # its tasks, too
    assert "the connection to link:1 is lost" in caplog.text
    assert "trying again in 1.0 s" in caplog.text
    world.now = 0.9
    assert node.alive()
    assert len(world.children) == 1
    world.now = 1.0
    assert node.alive()
    assert len(world.children) == 2
    assert node.code is None


def test_node_that_was_spoken_through_comes_back_whatever_its_code(world: World) -> None:
    node = world.node()
    node.connected()
    world.end(1)
    assert node.alive()


@pytest.mark.parametrize("code", [0, 1])
def test_node_of_a_member_that_was_put_out_is_not_started_again(world: World, code: int) -> None:
    node = world.node(out=True)
    node.connected()
    assert node.alive() and not node.out
    world.end(code)
    assert not node.alive() and node.out
    assert len(world.children) == 1 and world.ended == world.children


def test_pauses_grow_while_it_fails_and_are_short_again_once_it_lived(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    node = world.node()
    waits = []
    for lived_s in (2.0, 2.0, 2.0, SETTLED_S, 2.0):
        world.now += lived_s
        # Only the first ends as one that was connected; those after it may fail as they like.
        world.end(0 if not waits else 1)
        began = world.now
        while len(world.children) == len(waits) + 1:
            assert node.alive()
            world.now += 0.25
        waits.append(round(world.now - began))
    assert waits == [1, 2, 4, 1, 2]


def test_pause_doubles_to_a_longest_and_is_halved_at_most_by_chance() -> None:
    assert [pause_s(n, draw=0.0) for n in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 8.0]
    assert pause_s(10_000, draw=0.0) == LONGEST_PAUSE_S
    assert pause_s(3, draw=1.0) == 2.0
