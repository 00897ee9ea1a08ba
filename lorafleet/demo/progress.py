"""What the demo shows on a terminal while it runs: a line a step with its time, bars where there is a count."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

TICK_S = 3.0


class Progress:
    """A live display on a terminal; without one it shows nothing.

    ``on_tick`` is called about every three seconds from a thread of its own, for what has to be sampled meanwhile.
    """

    def __init__(self, console: Console, *, on_tick: Callable[[], None]) -> None:
        self._console, self._on_tick = console, on_tick
        self._live = RichProgress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        self._live.start()
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._ticker.join()
        self._live.stop()

    def _tick(self) -> None:
        while not self._ended.wait(TICK_S):
            self._on_tick()

    @contextlib.contextmanager
    def saying_when_stopped(self, words: str) -> Iterator[None]:
        """A line, on a terminal, where the block is interrupted: before whatever encloses it cleans up."""
        try:
            yield
        except KeyboardInterrupt:
            if self._console.is_terminal:
                self._console.print(words)
            raise

    @contextlib.contextmanager
    def step(self, name: str, *, total: int = 1) -> Iterator[Callable[[int], None]]:
        """A step of the demo; yields a function that sets how much of ``total`` is done."""
        began = time.monotonic()
        task: TaskID = self._live.add_task(name, total=total)
        try:
            yield lambda done: self._live.update(task, completed=done)
        finally:
            self._live.remove_task(task)
        if self._console.is_terminal:
            self._console.print(f"[green]✓[/] {name} [dim]{time.monotonic() - began:.1f} s[/]")
