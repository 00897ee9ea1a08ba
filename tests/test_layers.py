"""The import rules of docs/structure.md, checked on every import statement of the package, nested ones included.

And the surface: every public name is where callers import it from, without libraries that it has no use for.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lorafleet.clients

PACKAGE = Path(__file__).resolve().parent.parent / "lorafleet"

# Which parts of lorafleet a part may import, beside itself, `errors` and `assets`.
PARTS = {
    "errors": set(),
    "assets": set(),
    "flower_commands": set(),
    "stopping": set(),
    "proto": set(),
    "native": set(),
    "kernels": {"native"},
    "adapters": {"kernels"},
    "engine": {"adapters", "kernels", "native"},
    "registry": {"adapters"},
    "clients": {"adapters", "flower_commands", "stopping"},
    "coordinator": {"adapters", "registry", "flower_commands", "stopping"},
    "router_service": {"engine", "adapters", "native", "registry", "proto"},
    "connection": set(),
    "api_client": {"connection", "proto"},
    "adapters_client": {"adapters", "connection", "proto"},
}
SEE_EVERYTHING = {"cli", "config", "bench", "demo", "__init__"}

# Libraries that only some parts may import; all others of this list may not.
FENCES = {
    "flwr": {"clients", "coordinator"},
    "ray": {"coordinator", "router_service"},
    "sqlalchemy": {"registry"},
    "alembic": {"registry"},
    "obstore": {"registry"},
    "opacus": {"clients"},
    "grpc": {"router_service", "connection", "proto"},
    "fastapi": {"router_service"},
    "starlette": {"router_service"},
    "prometheus_client": {"router_service"},
    "opentelemetry": {"router_service", "connection"},
}
# Single files that a library is kept to within its part.
ONLY_IN = {
    "ray": {"coordinator/tree.py", "router_service/deployment.py"},
    "flwr": {
        "coordinator/server_app.py",
        "coordinator/flower_grid.py",
        "coordinator/flower_control.py",
        "coordinator/fleet_proxy.py",
        "clients/app.py",
        "clients/task.py",
    },
    "obstore": {"registry/object_files.py"},
    "triton": {"kernels/triton.py", "engine/triton_attention.py"},
    "opentelemetry": {"router_service/tracing.py", "connection.py"},
    "opacus": {"clients/budget.py", "clients/per_sample.py"},
}

# All that these parts import beside the standard library: they run where nothing but torch's world is installed.
THIRD_PARTY = {
    "native": {"torch"},
    "kernels": {"torch", "triton"},
    "adapters": {"torch", "numpy", "safetensors", "transformers"},
    "engine": {"torch", "transformers", "triton"},
}

# Where callers find what; a name that moves breaks them.
SURFACE = {
    "lorafleet.adapters": ["LoraAdapter"],
    "lorafleet.engine": ["Engine", "SamplingParams"],
    "lorafleet.coordinator": ["RULES", "SCHEDULERS"],
    "lorafleet.router_service": ["ROUTERS"],
    "lorafleet.clients": lorafleet.clients.__all__,
    "lorafleet.api_client": ["RouterClient"],
    "lorafleet.adapters_client": ["AdapterClient"],
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(source: str) -> set[str]:
    """Every module that a source imports, wherever the statement stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; imports are absolute here"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def violations(part: str, file: str, source: str) -> list[str]:
    bad = []
    for name in imports_of(source):
        top, *rest = name.split(".")
        if top == "lorafleet" and rest:
            target = rest[0]
            if part not in SEE_EVERYTHING and target not in PARTS[part] | {part, "errors", "assets", "__version__"}:
                bad.append(f"{file} imports {name}")
        elif part not in SEE_EVERYTHING and top in FENCES and part not in FENCES[top]:
            bad.append(f"{file} imports {name}")
        elif part not in SEE_EVERYTHING and top in ONLY_IN and file not in ONLY_IN[top]:
            bad.append(f"{file} imports {name}, which is kept to {', '.join(sorted(ONLY_IN[top]))}")
        elif part in THIRD_PARTY and top not in THIRD_PARTY[part] | {"lorafleet"} | sys.stdlib_module_names:
            bad.append(f"{file} imports {name}; {part} may import {', '.join(sorted(THIRD_PARTY[part]))}")
    return bad


def package_files() -> list[Path]:
    # The Flower app in assets is not imported by the package: it is what Flower loads on either side.
    return [p for p in sorted(PACKAGE.rglob("*.py")) if "flower_app" not in p.parts and "proto" not in p.parts]


@pytest.mark.parametrize("path", package_files(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_file_keeps_the_import_rules(path: Path) -> None:
    part = part_of(path)
    assert part in PARTS.keys() | SEE_EVERYTHING, f"{part} is a part that docs/structure.md does not name"
    assert violations(part, path.relative_to(PACKAGE).as_posix(), path.read_text()) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("engine", "from lorafleet.registry import Registry"),
        ("kernels", "import lorafleet.adapters.lora"),
        ("clients", "def f():\n    from lorafleet.coordinator import rules"),
        ("coordinator", "from lorafleet import clients"),
        ("engine", "import sqlalchemy.orm"),
        ("adapters", "from flwr.app import Message"),
        ("coordinator", "import ray"),
        ("kernels", "import numpy as np"),
        ("adapters", "def f():\n    from scipy.linalg import svd"),
        ("engine", "import peft"),
    ],
)
def test_a_forbidden_import_is_found(part: str, source: str) -> None:
    assert violations(part, f"{part}/x.py", source) != []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("engine", "import torch.nn.functional\nfrom lorafleet.adapters import LoraAdapter\nimport collections.abc"),
        ("adapters", "from __future__ import annotations\nimport numpy as np\nfrom safetensors import safe_open"),
    ],
)
def test_an_allowed_import_passes(part: str, source: str) -> None:
    assert violations(part, f"{part}/x.py", source) == []


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in SURFACE.items() for name in names])
def test_a_public_name_is_where_callers_import_it_from(module: str, name: str) -> None:
    assert getattr(import_module(module), name) is not None


@pytest.mark.parametrize(
    ("module", "libraries"),
    [
        ("lorafleet.coordinator", {"flwr", "ray"}),
        ("lorafleet.router_service", {"torch", "grpc"}),
        ("lorafleet.clients", {"torch", "transformers", "flwr"}),
    ],
)
def test_importing_a_part_loads_nothing_that_it_can_do_without(module: str, libraries: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert module in loaded
    assert libraries & loaded == set()
