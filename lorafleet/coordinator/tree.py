"""The reduction: a fixed tree over members in key order, sharded by module, here or as Ray tasks over the object store.

:mod:`lorafleet.coordinator.reduction` says how. Partial results stay in the object store, and only references travel;
whichever workers compute, with or without Ray, the bits are the same.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lorafleet.adapters import LoraAdapter
from lorafleet.coordinator.reduction import (
    MEMORY_BYTES,
    RETRIES,
    Done,
    Extent,
    PartsLostError,
    Read,
    Reduction,
    Workers,
    extents_of,
)
from lorafleet.coordinator.rules import get_rule
from lorafleet.coordinator.rules.rule import Modules, admit, common_base
from lorafleet.errors import InvalidInputError, UnavailableError


class Weighted(NamedTuple):
    adapter: LoraAdapter
    weight: float


class Reducer(Protocol):
    """Aggregates the updates of one group of members by a rule."""

    memory_bytes: int
    """What one sum may hold at a time."""

    def start(
        self,
        rule: str,
        keys: Sequence[str],
        read: Read,
        extents: Mapping[str, Extent],
        *,
        rank: int | None = None,
        base: str = "",
    ) -> Reduction:
        """A sum over members whose updates come one by one; truncated to ``rank`` where that is given."""
        ...

    def reduce(self, rule: str, updates: Mapping[str, Weighted]) -> LoraAdapter:
        """Member key → update, to the untruncated aggregate in float64; the rule weighs, from the weights given."""
        ...


def reduce_all(reducer: Reducer, rule: str, updates: Mapping[str, Weighted]) -> LoraAdapter:
    """The aggregate of updates that are all at hand."""
    if not updates:
        raise InvalidInputError("nothing to aggregate: found no updates, expected at least one")
    keys = sorted(updates)
    adapters = [updates[key].adapter for key in keys]
    # What the rule cannot combine, and a rule that is not known, fail here with their message, not in a worker.
    shares = admit(get_rule(rule), adapters, [updates[key].weight for key in keys])

    def read(key: str, paths: Sequence[str]) -> Modules:
        modules = updates[key].adapter.modules
        return {path: modules[path] for path in paths if path in modules}

    reduction = reducer.start(rule, keys, read, extents_of(adapters), base=common_base(adapters))
    for key, share in zip(keys, shares, strict=True):
        reduction.add(key, share)
    return reduction.result().adapter


class Here:
    """Workers in the place of Ray's: this process computes at once; a handle is the thing itself."""

    def put(self, value: Any) -> Any:
        return value

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Any:
        return task(*arguments)

    def submit_sized(self, task: Callable[..., tuple[Any, int]], *arguments: Any) -> Done:
        return Done(*task(*arguments))

    def ended(self, sizes: Sequence[Any], *, wait: bool) -> dict[int, int | None]:
        return dict(enumerate(sizes))

    def get(self, handle: Any) -> Any:
        return handle


class LocalReducer:
    """The tree in this process, for tests and offline use."""

    def __init__(self, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self.memory_bytes = memory_bytes
        self._workers: Workers = Here()

    def start(
        self,
        rule: str,
        keys: Sequence[str],
        read: Read,
        extents: Mapping[str, Extent],
        *,
        rank: int | None = None,
        base: str = "",
    ) -> Reduction:
        return Reduction(rule, keys, read, extents, self._workers, rank=rank, base=base, memory_bytes=self.memory_bytes)

    def reduce(self, rule: str, updates: Mapping[str, Weighted]) -> LoraAdapter:
        return reduce_all(self, rule, updates)


class OnRay:
    """Ray's workers, by the connection that this process has.

    Ray runs none of the parts' tasks again: for that it would keep all updates until the last part has gone, in memory
    first and then on the disk (what ``ray.put`` stored cannot be computed again, so that each task that may be pins
    it). The reduction keeps what a task that still runs was given, and no more.
    """

    def __init__(self) -> None:
        import ray

        self._ray = ray
        self._tasks: dict[Callable[..., Any], Any] = {}

    def put(self, value: Any) -> Any:
        return self._ray.put(value)

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Any:
        return self._remote(task, num_returns=1, max_retries=RETRIES).remote(*arguments)

    def submit_sized(self, task: Callable[..., tuple[Any, int]], *arguments: Any) -> Done:
        return Done(*self._remote(task, num_returns=2, max_retries=0).remote(*arguments))

    def ended(self, sizes: Sequence[Any], *, wait: bool) -> dict[int, int | None]:
        handles = list(sizes)
        count, timeout = (1, None) if wait else (len(handles), 0)
        # fetch_local: ready means here; a handle that cannot be had any more is ready, and raises when it is read.
        ready, _ = self._ray.wait(handles, num_returns=count, timeout=timeout)
        position = {handle: place for place, handle in enumerate(handles)}
        return {position[handle]: self._size(handle) for handle in ready}

    def get(self, handle: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(handle)
        except errors.ObjectLostError as error:
            raise PartsLostError(_first_line(error)) from None
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError) as error:
            raise UnavailableError(
                f"the Ray cluster lost the same task {RETRIES + 1} times ({_first_line(error)}): give its workers more "
                "memory, or the reduction less"
            ) from None

    def _size(self, handle: Any) -> int | None:
        errors = self._ray.exceptions
        try:
            return int(self._ray.get(handle))
        except errors.ObjectLostError as error:
            raise PartsLostError(_first_line(error)) from None
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError):
            return None

    def _remote(self, task: Callable[..., Any], **options: int) -> Any:
        if task not in self._tasks:
            self._tasks[task] = self._ray.remote(**options)(task)
        return self._tasks[task]


class RayReducer:
    """The tree on a Ray cluster that somebody else started: this attaches and detaches, and never stops it.

    ``address`` is ``HOST:PORT`` of the cluster's head or ``auto``; None uses the connection that this process has, to
    a cluster or to a Ray that was started within this process.
    """

    def __init__(self, address: str | None = None, *, memory_bytes: int = MEMORY_BYTES) -> None:
        import ray

        self._ray = ray
        self._attached = address is not None
        self.memory_bytes = memory_bytes
        if address is not None:
            check_reachable(address)
            try:
                ray.init(address=address, log_to_driver=False, logging_level="warning")
            except (ConnectionError, RuntimeError) as error:
                raise UnavailableError(
                    f"the Ray cluster at {address!r} takes no work ({_first_line(error)}): see 'ray status', start it "
                    "anew where it has lost its nodes, then resume"
                ) from error
        self._workers: Workers = OnRay()

    def start(
        self,
        rule: str,
        keys: Sequence[str],
        read: Read,
        extents: Mapping[str, Extent],
        *,
        rank: int | None = None,
        base: str = "",
    ) -> Reduction:
        return Reduction(rule, keys, read, extents, self._workers, rank=rank, base=base, memory_bytes=self.memory_bytes)

    def reduce(self, rule: str, updates: Mapping[str, Weighted]) -> LoraAdapter:
        return reduce_all(self, rule, updates)

    def close(self) -> None:
        """Detach, where this attached; the cluster runs on."""
        if self._attached:
            self._ray.shutdown()


def check_reachable(address: str) -> None:
    """Raises UnavailableError where nothing listens at ``HOST:PORT``; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon:
        return  # "auto": Ray finds the cluster of this machine, or says at once that there is none
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except (OSError, ValueError) as error:
        raise UnavailableError(
            f"no Ray cluster at {address!r} ({error}): start one with 'ray start --head', or set ray_address to local"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
