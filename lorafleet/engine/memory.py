"""How much memory the engine may take for keys and values, and for adapters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from lorafleet.kernels import GroupSpec
from lorafleet.kernels.bank import pool_page_bytes

# Of what is free once the base is loaded. On a CPU the rest of the machine lives there, too; on a GPU the rows that a
# step uses may be copied together, which takes up to the adapters' share once more.
KV_SHARE = {"cpu": 0.4, "cuda": 0.7}
# Of the working pages, on top of them: a CPU keeps prefixes as copies, a GPU in the pages themselves.
KEPT_SHARE = {"cpu": 0.25, "cuda": 0.0}
ADAPTER_SHARE = {"cpu": 0.15, "cuda": 0.1}
HOST_SHARE = 0.2


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses at this moment."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    limit = _cgroup_free_bytes()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return available if limit is None else min(available, limit)


def _cgroup_free_bytes() -> int | None:
    """What a container's limit leaves (cgroup 2); None where there is no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        most, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
    except OSError:
        return None
    return None if most == "max" else max(0, int(most) - int(used))


def kv_pages(*, page_bytes: int, most_pages: int, device: torch.device) -> int:
    """As many pages as the device's free memory allows, at most ``most_pages``; at least one."""
    return max(1, min(most_pages, int(free_bytes(device) * KV_SHARE[device.type]) // page_bytes))


def default_adapter_bytes(device: torch.device) -> int:
    """Room for adapters' rows on the device."""
    return max(1, int(free_bytes(device) * ADAPTER_SHARE[device.type]))


# More ranks of each module than a step could compute with: a small base on a large device gets no larger a pool.
_MOST_POOL_PAGES = 4096


def pool_pages(groups: Sequence[GroupSpec], *, dtype: torch.dtype, adapter_bytes: int) -> int:
    """Pages of 16 ranks for each module that so many bytes hold; at least one."""
    return max(1, min(_MOST_POOL_PAGES, adapter_bytes // pool_page_bytes(groups, dtype)))


def default_host_bytes() -> int:
    """Room for adapters' rows in host memory."""
    return int(free_bytes(torch.device("cpu")) * HOST_SHARE)
