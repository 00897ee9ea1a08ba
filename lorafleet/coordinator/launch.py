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
from typing import IO, Any

from lorafleet import flower_commands
from lorafleet.adapters.base_shapes import base_shapes
from lorafleet.assets import describe_base, flower_app_path
from lorafleet.coordinator.privacy import check_budget
from lorafleet.coordinator.settings import CoordinatorConfig, check_terms
from lorafleet.coordinator.standing import said_why
from lorafleet.errors import AlreadyExistsError, InvalidInputError, NotFoundError, UnavailableError
from lorafleet.registry import Federation, Registry
from lorafleet.stopping import leashed

log = logging.getLogger(__name__)

_CONNECTION = "lorafleet"
STOP_TIMEOUT_S = 20.0
ASK_TIMEOUT_S = 60.0
# How Flower's commands speak, whatever this machine's locale is; a byte that is no UTF-8 stops nobody.
_WORDS: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}


def run(federation_toml: Path, resume: bool = False, by: str = "") -> None:
    """Register what the file names and run its rounds; Flower's log goes to stderr. ``by`` is for the audit.

    Raises InvalidInputError where the federation was registered with other terms, or has rounds already and ``resume``
    is not set; BudgetSpentError where its privacy leaves no further round; UnavailableError where it was stopped, or
    the run failed (with Flower's last words).
    """
    config = CoordinatorConfig.load(federation_toml)
    registry = Registry.open(config.registry, config.blobs)
    try:
        federation = register(config, registry, by=by)
        rounds = registry.rounds(federation)
        done = [r.number for r in rounds if r.state == "committed"]
    finally:
        registry.close()
    if federation.state == "stopped":
        raise UnavailableError(
            f"{federation.reference} was stopped{said_why(federation)}, which is for good: name another federation"
        )
    if done and not resume:
        raise InvalidInputError(
            f"{config.federation.tenant}/{config.federation.name} has {len(done)} committed rounds: "
            "pass --resume to go on after them, or name another federation"
        )
    if len(done) < config.federation.rounds:
        check_budget(config.federation.privacy, rounds)
    submit(
        config.superlink,
        federation_toml,
        insecure=config.insecure,
        root_certificates=config.root_certificates,
        log_to=sys.stderr,
    )


def register(config: CoordinatorConfig, registry: Registry, *, by: str = "") -> Federation:
    """Tenants, base, federation and members as the file names them; what is there already stays.

    ``by`` is who does it, for the audit.

    Raises InvalidInputError, and writes nothing, where the federation was registered with other terms.
    """
    settings = config.federation
    base = describe_base(settings.base)
    federation: Federation | None = None
    with contextlib.suppress(NotFoundError):
        federation = registry.federation(settings.tenant, settings.name)
    if federation is not None:
        _confirm(config, base.digest, federation, registry)
    for name in sorted({settings.tenant, *config.members.values()}):
        with contextlib.suppress(AlreadyExistsError):
            registry.create_tenant(name, by=by)
    if federation is None:
        record = registry.register_base(
            base.name,
            base.digest,
            architecture=base.architecture,
            parameters=base.parameters,
            shapes=base_shapes(base.path),
        )
        federation = registry.create_federation(
            settings.tenant, settings.name, base=record.digest, settings=settings.to_dict(), by=by
        )
    known = {member.key for member in registry.members(federation)}
    for key, tenant in sorted(config.members.items()):
        if key not in known:
            registry.add_member(federation, key, tenant=tenant, by=by)
    return federation


def _confirm(config: CoordinatorConfig, base_digest: str, federation: Federation, registry: Registry) -> None:
    members = registry.members(federation)
    known = {member.key: member.tenant for member in members}
    revoked = {member.key for member in members if member.revoked_at is not None}
    name = f"{federation.tenant}/{federation.name}"
    if changed := check_terms(config, base_digest, federation, known):
        listed = ", ".join(f"{d.key} {d.found} (recorded {d.recorded})" for d in changed)
        log.info("%s: this run uses %s; the registry keeps what it recorded", name, listed)
    # Who was invited is in no file.
    invited = {member.key for member in members if member.public_key}
    if absent := sorted(known.keys() - config.members.keys() - revoked - invited):
        log.warning("%s: the file does not name %s, who stay members", name, ", ".join(absent))
    if named := sorted(revoked & config.members.keys()):
        log.warning("%s: the file names %s, who were revoked and stay out", name, ", ".join(named))


def submit(
    superlink: str,
    federation_toml: Path,
    *,
    insecure: bool = False,
    root_certificates: Path | None = None,
    log_to: IO[str],
) -> None:
    """Submit the packaged app to a SuperLink and follow it to its end.

    The connection is TLS unless ``insecure``, checked against ``root_certificates`` (PEM) or the public authorities.
    Raises NotFoundError where that file is missing, UnavailableError where the SuperLink cannot be reached or the run
    fails.
    """
    if root_certificates is not None and not root_certificates.is_file():
        raise NotFoundError(f"no root certificates at {root_certificates}; expected a PEM file")
    with tempfile.TemporaryDirectory(prefix="lorafleet-flwr-") as folder:
        home, app = Path(folder) / "home", Path(folder) / "app"
        home.mkdir()
        shutil.copytree(flower_app_path(), app, ignore=shutil.ignore_patterns("__pycache__"))
        connection = connection_toml(superlink, insecure=insecure, root_certificates=root_certificates)
        (home / "config.toml").write_text(connection, encoding="utf-8")
        # A file: what Flower takes on the command line cannot hold every path.
        run_config = home / "run.toml"
        run_config.write_text(f"federation = {toml_string(str(federation_toml.resolve()))}\n", encoding="utf-8")
        environment = flower_commands.environment(home)
        command = [*_flwr("run"), str(app), _CONNECTION, "--stream", "--run-config", str(run_config)]
        run_id, last_words = _follow(command, environment, log_to)
        if not run_id:
            trust = "without TLS" if insecure else f"by TLS, trusting {root_certificates or 'the public authorities'}"
            raise UnavailableError(
                f"the SuperLink at {superlink}, asked {trust}, did not take the run: {last_words.rstrip('.')}. "
                "Start it there, or let coordinator.root_certificates or coordinator.insecure say how it was started"
            )
        status, details = _status(run_id, environment)
        if not status.startswith("finished"):
            raise UnavailableError(
                f"lost the SuperLink at {superlink}, where the Flower run {run_id} is still {status}: follow it with "
                f"'flwr log {run_id} CONNECTION', or stop it with 'flwr stop {run_id} CONNECTION', where CONNECTION is "
                "that SuperLink's in Flower's own config file; until it ends, another run is refused"
            )
        if status != "finished:completed":
            raise UnavailableError(f"the Flower run {run_id} ended as {status}: {details}; its log says why")


def connection_toml(superlink: str, *, insecure: bool, root_certificates: Path | None) -> str:
    """Flower's own config file with one connection: the SuperLink, and how it is trusted."""
    lines = [
        "[superlink]",
        f"default = {toml_string(_CONNECTION)}",
        f"[superlink.{_CONNECTION}]",
        f"address = {toml_string(superlink)}",
        f"insecure = {str(insecure).lower()}",
    ]
    if root_certificates is not None:
        lines.append(f"root-certificates = {toml_string(str(root_certificates.resolve()))}")
    return "\n".join(lines) + "\n"


def toml_string(text: str) -> str:
    """A TOML basic string. JSON escapes all that TOML does but DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _flwr(command: str) -> list[str]:
    return [flower_commands.script("flwr"), command]


def _started_run(words: str) -> str:
    """The id in Flower's word of a run's start, or nothing."""
    match = re.search(r"started run (\d+)", words)
    return match[1] if match else ""


def _follow(command: list[str], environment: Mapping[str, str], log_to: IO[str]) -> tuple[str, str]:
    """Run ``flwr run`` and pass its output on; returns the run's id, or "" where there is none, and its last words.

    Stopped by us, the run is stopped too.
    """
    run_id, tail = "", [""] * 8
    # A session of its own: Ctrl-C reaches this process alone, which then stops the run in an orderly way.
    with subprocess.Popen(
        leashed(command),
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **_WORDS,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                tail = [*tail[1:], line.rstrip()]
                # The first word of it is Flower's own; what follows is the run's log, which quotes its members.
                run_id = run_id or _started_run(line)
                log_to.write(line)
                log_to.flush()
        except BaseException:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
            # It may have started just before it was told to end.
            run_id = run_id or _started_run(process.stdout.read())
            if run_id:
                log.info("stopping the Flower run %s", run_id)
                stop = [*_flwr("stop"), run_id, _CONNECTION]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    subprocess.run(
                        stop,
                        env=dict(environment),
                        capture_output=True,
                        timeout=STOP_TIMEOUT_S,
                        # A second Ctrl-C is for this process, which does not heed it.
                        start_new_session=True,
                    )
            raise
    # Without the frames that Flower draws around its errors.
    return run_id, " ".join(re.sub("[\u2500-\u257f]+", " ", " ".join(tail)).split())


def _status(run_id: str, environment: Mapping[str, str]) -> tuple[str, str]:
    try:
        listed = subprocess.run(
            [*_flwr("ls"), _CONNECTION, "--run-id", run_id, "--format", "json"],
            env=dict(environment), capture_output=True, timeout=ASK_TIMEOUT_S, **_WORDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UnavailableError(
            f"cannot ask the SuperLink how run {run_id} ended: no answer within {ASK_TIMEOUT_S:.0f} s; it may be "
            "running still"
        ) from None
    try:
        (entry,) = json.loads(listed.stdout)["runs"]
        return str(entry["status"]), str(entry.get("status-details", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        words = " ".join(f"{listed.stdout} {listed.stderr}".replace("\\n", " ").split())
        raise UnavailableError(
            f"cannot ask the SuperLink how run {run_id} ended: {words or 'no answer'}; where the SuperLink has ended, "
            "start it again and go on with 'lorafleet coordinator run --resume': what is in the journal stays"
        ) from None
