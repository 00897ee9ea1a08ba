"""Every command of the operator's page and of the API's is run as it stands, against real servers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.adapters.base_shapes import base_shapes
from lorafleet.assets import base_path
from tests.docs.pages import ROOT, Block, Failed, Runner, blocks, page, programs, running
from tests.registry.conftest import PostgresServer, postgres_server

__all__ = ["postgres_server"]  # a fixture

PAGES = ("operating.md", "api.md")


def write_adapter(folder: Path, seed: int) -> None:
    """For the tiny base, of rank 2."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    pairs = {
        path: LoraPair(
            0.01 * torch.randn(2, shape[1], generator=generator), 0.01 * torch.randn(shape[0], 2, generator=generator)
        )
        for path, shape in base_shapes(base_path("tiny")).items()
        if path.endswith("q_proj")
    }
    LoraAdapter(pairs).save(folder)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the pages' programs are."""
    with programs(tmp_path_factory.mktemp("programs")) as folder:
        yield folder


@pytest.fixture
def runner(tmp_path: Path, ready: Path) -> Iterator[Runner]:
    """Beside whose blocks lie the adapters that the pages name."""
    with running(tmp_path, ready, {}) as made:
        for seed, name in enumerate(("sql", "cpp", "adapter")):
            write_adapter(made.folder / "path" / "to" / name, seed)
        yield made


@pytest.mark.process
@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_a_page_runs(runner: Runner, name: str) -> None:
    found = page(name)
    assert not [block for block in found if block.not_run]
    several = [block for block in found if not block.apart]
    assert len(several) > 5
    said = runner.run(several)
    if name == "api.md":  # every example of a call is answered by the adapter that it names
        assert sum("local/sql:1" in each for each in said) >= 5


@pytest.mark.process
@pytest.mark.postgres
def test_every_block_about_postgresql_runs(tmp_path: Path, ready: Path, postgres_server: PostgresServer) -> None:
    several = [block for block in page("operating.md") if block.apart == "postgres"]
    assert len(several) >= 3
    with running(tmp_path, ready, {"PGHOST": str(postgres_server.folder), "PGUSER": "postgres"}) as runner:
        runner.run(several)


@pytest.mark.process
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_clone_is_installed_as_the_page_says(tmp_path: Path, ready: Path) -> None:
    """Into an environment of its own, with what the extra `server` names and nothing else; as `make` needs, pip's
    index."""
    (block,) = [block for block in page("operating.md") if block.apart == "install"]
    with running(tmp_path, ready, {}, limit_s=800.0) as runner:
        for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, runner.folder)
        shutil.copytree(
            ROOT / "lorafleet", runner.folder / "lorafleet", ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
        runner.run([block])
        (version,) = runner.run([Block("sh", ".venv/bin/lorafleet serve --help && .venv/bin/lorafleet --version\n", 0)])
        assert "--registry" in version


# That the runner finds what is wrong

TEXT = """
```sh
export SAID='good morning'
sleep 60 &
echo $! >left.pid
```

Words.

```python
import os
assert os.environ["SAID"] == "good morning"
open("made", "w").write("x")
```

<!-- not run: it would take the machine down -->
```sh
shutdown
```

```sh
test -s made && kill -0 "$(cat left.pid)"
lorafleet --version && echo "127.0.0.1:8000" >ports && ! grep 8000 ports
```
"""


@pytest.mark.process
def test_blocks_are_run_in_order_with_what_came_before(tmp_path: Path, ready: Path) -> None:
    found = blocks(TEXT)
    assert [(block.kind, block.line, block.not_run) for block in found] == [
        ("sh", 2, ""), ("python", 10, ""), ("sh", 16, "it would take the machine down"), ("sh", 21, ""),
    ]  # fmt: skip
    with running(tmp_path, ready, {}) as runner:
        runner.run([block for block in found if not block.not_run])
        with pytest.raises(Failed, match="line 7 "):
            runner.run([Block("sh", "false | true\n", 7)])
        with pytest.raises(Failed, match=r"(?s)line 8 .*ghost.*not there"):
            runner.run([Block("sh", "lorafleet adapter list --tenant ghost --registry sqlite:///r.db --blobs b", 8)])
        with pytest.raises(Failed, match=r"(?s)line 9 .*ZeroDivisionError"):
            runner.run([Block("python", "1 / 0\n", 9)])


def test_a_comment_that_is_no_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="expected `not run: REASON`, `install` or `postgres`"):
        blocks("<!-- skip -->\n```sh\ntrue\n```\n")
    with pytest.raises(ValueError, match="line 2: found an indented block"):
        blocks("1. One\n   ```sh\n   true\n   ```\n")
