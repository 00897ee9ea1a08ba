"""How much memory is taken."""

from __future__ import annotations

import pytest
import torch

from lorafleet.engine.memory import pool_pages
from lorafleet.kernels import GroupSpec, ModuleSpec
from lorafleet.kernels.bank import pool_page_bytes

GROUPS = (GroupSpec("g", 64, (ModuleSpec("m", 32), ModuleSpec("n", 16))),)
PAGE = pool_page_bytes(GROUPS, torch.bfloat16)


@pytest.mark.parametrize(
    ("adapter_bytes", "pages"), [(1, 1), (PAGE, 1), (2 * PAGE - 1, 1), (2 * PAGE, 2), (10**12, 4096)]
)
def test_a_pool_takes_what_adapters_may_take(adapter_bytes: int, pages: int) -> None:
    assert pool_pages(GROUPS, dtype=torch.bfloat16, adapter_bytes=adapter_bytes) == pages
