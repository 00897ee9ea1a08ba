"""How fast this device reads and writes its memory: what floors are counted in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorafleet.bench.jobs import Device

COPIED_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Far more than any cache holds."""
TURNS = 10


def memory_bytes_per_s(device: Device, *, clock: Callable[[], float]) -> float:
    """Bytes read and written in a second by the fastest of some large copies. ``clock`` waits for the device."""
    source = torch.zeros(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(TURNS):
        began = clock()
        target.copy_(source)
        best = min(best, clock() - began)
    return 2 * COPIED_BYTES[device] / best
