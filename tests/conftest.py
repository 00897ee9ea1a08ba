"""What holds for the whole suite: one thread of computation a process, and files with real processes first."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

# Tests run in as many processes as there are cores. More threads than that wait for each other: one small training took
# 260 s on two crowded cores, and 14 s with one thread. Set before torch is imported, and inherited by what tests start,
# unless that is told how many threads it may use.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest of those with real processes take minutes, and mostly wait."""
    slow = {item.path for item in items if item.get_closest_marker("process")}
    items.sort(key=lambda item: item.path not in slow)  # stable: else the order stays


@pytest.fixture(autouse=True)
def no_log_to_a_closed_stream() -> Iterator[None]:
    """A command that ran within a test logs to what stood for its stderr, which is closed by now."""
    yield
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
