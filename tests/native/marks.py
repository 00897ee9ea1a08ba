"""What tests of the kernels for a CPU's matrix unit need."""

from __future__ import annotations

import pytest

from lorafleet.native import library, why_not

needs_tiles = pytest.mark.skipif(library() is None, reason=why_not())
