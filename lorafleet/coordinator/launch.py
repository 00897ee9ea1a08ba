"""``lorafleet coordinator run``: registers a federation and runs it on a SuperLink that is already there."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from lorafleet import flower_commands
from lorafleet.assets import describe_base, flower_app_path
from lorafleet.coordinator.settings import CoordinatorConfig
from lorafleet.errors import AlreadyExistsError, InvalidInputError, NotFoundError, UnavailableError
from lorafleet.registry import Federation, Registry

log = logging.getLogger(__name__)

_CONNECTION = "lorafleet"
STOP_TIMEOUT_S = 20.0


def run(federation_toml: Path, resume: bool = False) -> None:
    """Register what the file names and run its rounds; Flower's log goes to stderr.

    Raises InvalidInputError where rounds are there already and ``resume`` is not set, UnavailableError where the run
    failed (with Flower's last words).
    """
    config = CoordinatorConfig.load(federation_toml)
    registry = Registry.open(config.registry, config.blobs)
    try:
        federation = register(config, registry)
        done = [r.number for r in registry.rounds(federation) if r.state == "committed"]
    finally:
        registry.close()
    if done and not resume:
        raise InvalidInputError(
            f"{config.federation.tenant}/{config.federation.name} has {len(done)} committed rounds: "
            "pass --resume to go on after them, or name another federation"
        )
    submit(config.superlink, federation_toml, log_to=sys.stderr)


def register(config: CoordinatorConfig, registry: Registry) -> Federation:
    """Tenants, base, federation and members as the file names them; what is there already stays."""
    settings = config.federation
    base = describe_base(settings.base)
    record = registry.register_base(base.name, base.digest, architecture=base.architecture, parameters=base.parameters)
    for name in sorted({settings.tenant, *config.members.values()}):
        with contextlib.suppress(AlreadyExistsError):
            registry.create_tenant(name)
    try:
        federation = registry.federation(settings.tenant, settings.name)
    except NotFoundError:
        federation = registry.create_federation(
            settings.tenant, settings.name, base=record.digest, settings=settings.to_dict()
        )
    known = {member.key for member in registry.members(federation)}
    for key, tenant in sorted(config.members.items()):
        if key not in known:
            registry.add_member(federation, key, tenant=tenant)
    return federation


def submit(superlink: str, federation_toml: Path, *, log_to: IO[str]) -> None:
    """Submit the packaged app to a SuperLink and follow it to its end; raises UnavailableError where it fails."""
    with tempfile.TemporaryDirectory(prefix="lorafleet-flwr-") as folder:
        home, app = Path(folder) / "home", Path(folder) / "app"
        home.mkdir()
        shutil.copytree(flower_app_path(), app, ignore=shutil.ignore_patterns("__pycache__"))
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
            f'[superlink.{_CONNECTION}]\naddress = "{superlink}"\ninsecure = true\n'
        )
        environment = flower_commands.environment(home)
        run_id = _follow(
            [
                *_flwr("run"),
                str(app),
                _CONNECTION,
                "--stream",
                "--run-config",
                f'federation="{federation_toml.resolve()}"',
            ],
            environment,
            log_to,
        )
        status, details = _status(run_id, environment)
        if status != "finished:completed":
            raise UnavailableError(f"the Flower run {run_id} ended as {status}: {details}; its log says why")


def _flwr(command: str) -> list[str]:
    return [flower_commands.script("flwr"), command]


def _follow(command: list[str], environment: Mapping[str, str], log_to: IO[str]) -> str:
    """Run ``flwr run``, pass its output on, and return the run's id; stopped by us, the run is stopped too."""
    run_id, tail = "", [""] * 8
    # A session of its own: Ctrl-C reaches this process alone, which then stops the run in an orderly way.
    with subprocess.Popen(
        command,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log_to.write(line)
                log_to.flush()
                tail = [*tail[1:], line.rstrip()]
                if match := re.search(r"started run (\d+)", line):
                    run_id = match[1]
        except BaseException:
            process.terminate()
            if run_id:
                stop = [*_flwr("stop"), run_id, _CONNECTION]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    subprocess.run(stop, env=dict(environment), capture_output=True, timeout=STOP_TIMEOUT_S)
            raise
    if not run_id:
        raise UnavailableError("the SuperLink did not take the run: " + " ".join(line for line in tail if line))
    return run_id


def _status(run_id: str, environment: Mapping[str, str]) -> tuple[str, str]:
    listed = subprocess.run(
        [*_flwr("ls"), _CONNECTION, "--run-id", run_id, "--format", "json"],
        env=dict(environment), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    try:
        (entry,) = json.loads(listed.stdout)["runs"]
    except (ValueError, KeyError, TypeError):
        raise UnavailableError(
            f"cannot ask the SuperLink how run {run_id} ended: {listed.stdout}{listed.stderr}"
        ) from None
    return str(entry["status"]), str(entry.get("status-details", ""))
