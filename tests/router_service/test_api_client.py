from __future__ import annotations

import subprocess
import sys

import pytest

from lorafleet.api_client import RouterClient
from lorafleet.errors import UnavailableError


def test_a_server_that_is_not_there_is_named() -> None:
    with (
        RouterClient("127.0.0.1:1", key="k", timeout_s=30.0) as client,
        pytest.raises(UnavailableError, match=r"no server answers at 127\.0\.0\.1:1"),
    ):
        client.list_adapters()


@pytest.mark.parametrize("module", ["api_client", "adapters_client"])
def test_the_client_needs_neither_torch_nor_a_database(module: str) -> None:
    code = (
        f"import sys, lorafleet.{module};"
        "print([m for m in ('torch', 'transformers', 'sqlalchemy', 'flwr', 'ray') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
