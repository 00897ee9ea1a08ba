"""Registering a federation from its file, again and changed; and submitting it to a SuperLink, with TLS and without."""

from __future__ import annotations

import datetime
import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.flower_config import parse_superlink_connection

from lorafleet import flower_commands
from lorafleet.assets import SHIPPED_BASES
from lorafleet.coordinator import launch, server_app
from lorafleet.coordinator.launch import connection_toml, register, submit
from lorafleet.coordinator.settings import CoordinatorConfig
from lorafleet.errors import InvalidInputError, NotFoundError, UnavailableError
from lorafleet.registry import Registry
from tests.waiting import wait_until

FILE = """
[federation]
tenant = "operator"
name = "fleet"
rounds = 5
[coordinator]
registry = "sqlite:///{folder}/registry.db"
blobs = "blobs"
ray_address = "local"
superlink = "127.0.0.1:1"
[members]
acme = "acme"
globex = "globex"
"""


def write(folder: Path, find: str = "", replacement: str = "") -> Path:
    path = folder / "federation.toml"
    path.write_text(FILE.format(folder=folder).replace(find, replacement, 1))
    return path


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(f"sqlite:///{tmp_path / 'registry.db'}", tmp_path / "blobs") as opened:
        yield opened


def load(folder: Path, find: str = "", replacement: str = "") -> CoordinatorConfig:
    return CoordinatorConfig.load(write(folder, find, replacement))


def test_a_file_is_registered_once(tmp_path: Path, registry: Registry) -> None:
    first = register(load(tmp_path), registry, by="ada")
    assert register(load(tmp_path), registry, by="bob") == first
    assert [(e.by, e.action, e.subject) for e in registry.audit()] == [
        ("ada", "tenant.create", "acme"), ("ada", "tenant.create", "globex"), ("ada", "tenant.create", "operator"),
        ("ada", "federation.create", "operator/fleet"), ("ada", "member.add", "acme"), ("ada", "member.add", "globex"),
    ]  # fmt: skip
    assert [(m.key, m.tenant) for m in registry.members(first)] == [("acme", "acme"), ("globex", "globex")]


def test_other_terms_are_refused_and_nothing_of_them_is_written(tmp_path: Path, registry: Registry) -> None:
    first = register(load(tmp_path), registry)
    changed = load(tmp_path, "rounds = 5", "expert_rank = 8")
    changed = replace(changed, members={**changed.members, "initech": "initech"})
    with pytest.raises(InvalidInputError, match="expert_rank: found 8, recorded 32"):
        register(changed, registry)
    assert registry.federation("operator", "fleet") == first
    assert "initech" not in {tenant.name for tenant in registry.tenants()}


def test_a_base_that_has_changed_is_refused_and_one_that_has_moved_is_not(tmp_path: Path, registry: Registry) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(SHIPPED_BASES["tiny"] / name, here / name)
    first = register(load(tmp_path, "rounds = 5", f'base = "{here}"'), registry)
    here.rename(there)
    moved = load(tmp_path, "rounds = 5", f'base = "{there}"')
    assert register(moved, registry) == first
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    with pytest.raises(InvalidInputError, match=f"base: found 'sha256:.*', recorded '{first.base_digest}'"):
        register(moved, registry)


def test_what_may_change_is_logged_and_the_record_stays(
    tmp_path: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    register(load(tmp_path), registry)
    with caplog.at_level(logging.INFO, "lorafleet"):
        federation = register(load(tmp_path, "rounds = 5", "rounds = 7\nquorum = 3"), registry)
    [said] = [r.getMessage() for r in caplog.records]
    assert said.startswith("operator/fleet: this run uses quorum 3 (recorded 2), rounds 7 (recorded 5)")
    assert federation.settings["rounds"] == 5


def test_a_member_that_the_file_leaves_out_stays_with_a_warning(
    tmp_path: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    register(load(tmp_path), registry)
    with caplog.at_level(logging.WARNING, "lorafleet"):
        federation = register(load(tmp_path, 'acme = "acme"', 'initech = "initech"'), registry)
    assert [m.key for m in registry.members(federation)] == ["acme", "globex", "initech"]
    assert [r.getMessage() for r in caplog.records] == ["operator/fleet: the file does not name acme, who stay members"]


@pytest.mark.parametrize("resume", [False, True])
def test_no_run_starts_on_other_terms(tmp_path: Path, registry: Registry, resume: bool) -> None:
    register(load(tmp_path), registry)
    with pytest.raises(InvalidInputError, match="name another federation"):
        launch.run(write(tmp_path, "rounds = 5", "seed = 1"), resume=resume)


def test_a_file_that_changes_after_it_was_submitted_is_refused_by_the_server_app(
    tmp_path: Path, registry: Registry
) -> None:
    register(load(tmp_path), registry)
    changed = write(tmp_path, "rounds = 5", "seed = 1")
    context: Any = SimpleNamespace(run_config={"federation": str(changed)})
    grid: Any = None  # nobody is asked
    with pytest.raises(InvalidInputError, match="seed: found 1, recorded 0"):
        server_app.main(grid, context)


@pytest.mark.parametrize("name", ["ca.crt", 'a "quoted" \\back\\slash\tand\x7f é𝔘.crt'])
def test_flower_reads_the_connection_as_it_was_meant(tmp_path: Path, name: str) -> None:
    written = connection_toml('host"\\:1', insecure=False, root_certificates=tmp_path / name)
    file = tomllib.loads(written)["superlink"]
    read = parse_superlink_connection(file[file["default"]], file["default"])
    assert (read.address, read.insecure, read.root_certificates) == ('host"\\:1', False, str(tmp_path / name))


def test_an_insecure_connection_names_no_certificates() -> None:
    read = tomllib.loads(connection_toml("127.0.0.1:1", insecure=True, root_certificates=None))
    assert read["superlink"]["lorafleet"] == {"address": "127.0.0.1:1", "insecure": True}


def test_missing_certificates_are_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no root certificates at .*absent\.crt"):
        submit("127.0.0.1:1", tmp_path / "f.toml", root_certificates=tmp_path / "absent.crt", log_to=io.StringIO())


class SuperLink(NamedTuple):
    address: str
    authority: Path


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    with superlink_with_tls(tmp_path_factory.mktemp("superlink"), isolation="subprocess") as started:
        yield started


@contextmanager
def superlink_with_tls(folder: Path, *, isolation: str) -> Iterator[SuperLink]:
    """A real one on loopback; with the isolation ``subprocess`` it starts ServerApps, with ``process`` nobody does."""
    issue_certificates(folder)
    port = flower_commands.free_port()
    command = [
        flower_commands.script("flower-superlink"),
        "--host", "127.0.0.1", "--port", str(port), "--isolation", isolation,
        "--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.crt"),
        "--ssl-keyfile", str(folder / "server.key"),
    ]  # fmt: skip
    with running(command, folder, port):
        yield SuperLink(f"127.0.0.1:{port}", folder / "ca.crt")


@contextmanager
def running(command: list[str], folder: Path, port: int, timeout_s: float = 60.0) -> Iterator[None]:
    """A Flower command from when it listens on a port of loopback; ended with its children, by their group's id."""
    home, log = folder / "home", folder / "log"
    home.mkdir()
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, env=flower_commands.environment(home), stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            deadline = time.monotonic() + timeout_s
            while not listens(port):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def issue_certificates(folder: Path) -> None:
    """``ca.crt``, and ``server.crt`` with ``server.key`` for loopback that it has signed; good for an hour."""
    authority, key = certificate("authority")
    server, server_key = certificate("superlink", issuer=authority.subject, signed_with=key)
    (folder / "ca.crt").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    (folder / "server.crt").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        server_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def certificate(
    name: str, *, issuer: x509.Name | None = None, signed_with: ec.EllipticCurvePrivateKey | None = None
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now, an_hour = datetime.datetime.now(datetime.UTC), datetime.timedelta(hours=1)
    unsigned = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - an_hour)
        .not_valid_after(now + an_hour)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
    )
    return unsigned.sign(signed_with or key, hashes.SHA256()), key


@pytest.mark.process
def test_a_run_reaches_a_superlink_with_tls_and_its_server_app_the_file(superlink: SuperLink, tmp_path: Path) -> None:
    # The ServerApp's own words come back: submission, log, ServerApp and the question how it ended all went by TLS.
    absent = tmp_path / 'no "such" \\file.toml'
    with pytest.raises(UnavailableError) as caught:
        submit(superlink.address, absent, root_certificates=superlink.authority, log_to=io.StringIO())
    assert "ended as finished:failed" in str(caught.value)
    assert f"no federation file at {absent}" in str(caught.value)


@pytest.mark.process
@pytest.mark.parametrize("trust", ["nothing", "public authorities", "another authority"])
def test_a_superlink_with_tls_takes_no_run_from_who_does_not_trust_it(
    superlink: SuperLink, tmp_path: Path, trust: str
) -> None:
    issue_certificates(tmp_path)
    certificates = tmp_path / "ca.crt" if trust == "another authority" else None
    words = {
        "nothing": "without TLS",
        "public authorities": "by TLS, trusting the public authorities",
        "another authority": f"by TLS, trusting {certificates}",
    }
    with pytest.raises(UnavailableError) as caught:
        submit(
            superlink.address,
            tmp_path / "federation.toml",
            insecure=trust == "nothing",
            root_certificates=certificates,
            log_to=io.StringIO(),
        )
    assert f"the SuperLink at {superlink.address}, asked {words[trust]}, did not take the run" in str(caught.value)
    assert "coordinator.root_certificates or coordinator.insecure" in str(caught.value)


class Full(io.StringIO):
    """A log that takes nothing after the word of the run's start."""

    def write(self, text: str) -> int:
        if "started run" in text:
            raise BrokenPipeError
        return super().write(text)


@pytest.mark.process
def test_a_run_that_nobody_follows_is_stopped_by_tls_too(tmp_path: Path) -> None:
    with superlink_with_tls(tmp_path, isolation="process") as superlink:
        with pytest.raises(BrokenPipeError):
            submit(superlink.address, tmp_path / "f.toml", root_certificates=superlink.authority, log_to=Full())
        (tmp_path / "config.toml").write_text(
            connection_toml(superlink.address, insecure=False, root_certificates=superlink.authority)
        )
        listed = subprocess.run(
            [flower_commands.script("flwr"), "ls", "lorafleet", "--format", "json"],
            env=flower_commands.environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert [run["status"] for run in json.loads(listed.stdout)["runs"]] == ["finished:stopped"]


def follow(code: str, log_to: io.StringIO | None = None) -> tuple[str, str]:
    """What is made of the output of a ``flwr run`` that is this code."""
    return launch._follow([sys.executable, "-c", code], os.environ, log_to or io.StringIO())


def test_only_flowers_own_word_says_which_run_it_is() -> None:
    code = "print('Successfully started run 7'); print('the update of alder is rejected: started run 99')"
    assert follow(code)[0] == "7"


def test_output_that_is_no_utf_8_is_passed_on() -> None:
    log = io.StringIO()
    follow("import sys; sys.stdout.buffer.write(b'Gr\\xf6\\xdfe \\xe2\\x80\\xa6\\n')", log)
    assert log.getvalue() == "Gr\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}e …\n"


def fake_flwr(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Commands of ``flwr`` as pieces of Python."""
    script = folder / "flwr"
    script.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\nfrom pathlib import Path\nfolder = Path({str(folder)!r})\n"
        f"exec({commands!r}[sys.argv[1]])\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(flower_commands, "script", lambda name: str(folder / name))


STARTS = "print('Successfully started run 7', flush=True)"


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (
            'print(\'{"runs": [{"status": "running"}]}\')',
            r"run 7 is still running: follow it with 'flwr log 7 .*stop it with 'flwr stop 7",
        ),
        ('print(\'{"runs": [{"status": "finished:failed", "status-details": "oom"}]}\')', "ended as .*failed: oom"),
        ("print('no connection')", "cannot ask the SuperLink how run 7 ended: no connection"),
        ("print('[]')", "cannot ask the SuperLink how run 7 ended"),
        ("time.sleep(600)", "no answer within 1 s"),
    ],
)
def test_how_a_run_ended_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, words: str) -> None:
    fake_flwr(tmp_path, monkeypatch, run=STARTS, ls=listed)
    monkeypatch.setattr(launch, "ASK_TIMEOUT_S", 1.0 if "sleep" in listed else 60.0)
    with pytest.raises(UnavailableError, match=words):
        submit("127.0.0.1:1", tmp_path / "f.toml", insecure=True, log_to=io.StringIO())


RUNS = """
import sys
from pathlib import Path
from lorafleet import flower_commands
from lorafleet.coordinator.launch import submit
from lorafleet.stopping import interruptible
flower_commands.script = lambda name: str(Path(sys.argv[1]) / name)
with interruptible():
    submit("127.0.0.1:1", Path(sys.argv[1]) / "f.toml", insecure=True, log_to=sys.stdout)
"""


@contextmanager
def submitting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """A coordinator in a group of its own, whose ``flwr run`` runs until it is ended."""
    fake_flwr(
        folder,
        monkeypatch,
        run=f"(folder / 'run').write_text(str(os.getpid())); {STARTS}; time.sleep(600)",
        stop="(folder / 'begun').touch(); time.sleep(1); (folder / 'stopped').write_text(sys.argv[2])",
    )
    command = [sys.executable, "-c", RUNS, str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            assert "started run 7" in process.stdout.readline()
            yield process
        finally:
            process.kill()


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_asks_twice_to_stop_still_has_the_run_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    with submitting(tmp_path, monkeypatch) as process:
        os.killpg(process.pid, number)
        wait_until((tmp_path / "begun").exists)
        os.killpg(process.pid, number)
        process.wait(timeout=60)
    assert (tmp_path / "stopped").read_text() == "7"
    wait_until(lambda: not psutil.pid_exists(int((tmp_path / "run").read_text())))


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_coordinator_that_is_killed_leaves_no_flwr_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with submitting(tmp_path, monkeypatch) as process:
        process.kill()
    wait_until(lambda: not psutil.pid_exists(int((tmp_path / "run").read_text())))
