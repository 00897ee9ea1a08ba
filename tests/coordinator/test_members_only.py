"""The real parts as they are meant to be run: a SuperLink that knows its nodes, a proxy before it, an invited member.

Who reaches the SuperLink's own port may have any code run: by the SuperLink, and by Flower's SuperNodes. What a member
reaches, and what its node runs, is less.
"""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from lorafleet import flower_commands
from lorafleet.coordinator import launch
from lorafleet.coordinator.acceptance import accept_at
from lorafleet.coordinator.flower_control import SuperLinkControl
from lorafleet.coordinator.launch import register
from lorafleet.coordinator.node_keys import pem_of, read_public_key
from lorafleet.coordinator.settings import CoordinatorConfig
from lorafleet.registry import Federation
from lorafleet.registry.store import Registry
from tests.coordinator.test_launch import issue_certificates, running
from tests.waiting import wait_until

pytestmark = pytest.mark.process

FILE = """
[federation]
tenant = "operator"
name = "fleet"
rounds = 1
quorum = 1
evaluate_last = false
[training]
steps = 1
batch_size = 1
sequence_length = 16
[coordinator]
registry = "sqlite:///registry.db"
blobs = "blobs"
ray_address = "local"
superlink = "{superlink}"
root_certificates = "ca.crt"
"""


class Site(NamedTuple):
    """Everything of the owner's, in one folder."""

    folder: Path
    superlink: str
    proxy: str
    federation: Federation

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def options(self) -> list[str]:
        return ["--registry", f"sqlite:///{self.folder / 'registry.db'}", "--blobs", str(self.folder / "blobs")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    issue_certificates(folder)
    port = flower_commands.free_port()
    superlink = f"127.0.0.1:{port}"
    (folder / "federation.toml").write_text(FILE.format(superlink=superlink))
    config = CoordinatorConfig.load(folder / "federation.toml")
    with Registry.open(config.registry, config.blobs) as registry:
        federation = register(config, registry)
        registry.create_tenant("acme")
    pair = [str(folder / "server.crt"), str(folder / "server.key")]
    command = [
        flower_commands.script("flower-superlink"), "--host", "127.0.0.1", "--port", str(port),
        "--enable-supernode-auth", "--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", pair[0],
        "--ssl-keyfile", pair[1],
    ]  # fmt: skip
    passing = [
        "coordinator", "proxy", "--listen", "127.0.0.1:0", "--superlink", superlink, "--certificate", pair[0],
        "--private-key", pair[1], "--root-certificates", str(folder / "ca.crt"),
        "--registry", config.registry, "--blobs", str(config.blobs),
    ]  # fmt: skip
    with running(command, folder, port), lorafleet(folder / "proxy.log", *passing):
        wait_until(lambda: "listening fleet=" in (folder / "proxy.log").read_text())
        proxy = (folder / "proxy.log").read_text().partition("listening fleet=")[2].split()[0]
        yield Site(folder, superlink, proxy, federation)


@contextmanager
def lorafleet(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of ours, in a group of its own that ends with the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "lorafleet.cli", *arguments]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)


def make_key(folder: Path, name: str) -> Path:
    """A private key as ssh-keygen writes it, beside NAME.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    (folder / name).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public + b" somebody@somewhere\n")
    return folder / name


def joining(site: Site, key: Path, member: str) -> list[str]:
    data = site.folder / "texts"
    data.mkdir(exist_ok=True)
    for number in range(12):
        (data / f"{number}.txt").write_text(f"{member} wrote text {number}. " * 20)
    return [
        "client", "join", "--superlink", site.proxy, "--root-certificates", str(site.authority), "--private-key",
        str(key), "--member", member, "--data", str(data), "--rank", "2", "--no-probe", "--state",
        str(site.folder / f"state-{member}"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def member(site: Site) -> Iterator[Path]:
    """The log of ``alder``, which was invited, has accepted through the proxy, and joined there."""
    key = make_key(site.folder, "alder")
    with Registry.open(site.options[1], site.options[3]) as registry:
        token = registry.invite(site.federation, tenant="acme", for_s=600.0).token
    public = read_public_key(site.folder / "alder.pub")
    made = accept_at(site.proxy, token, "alder", public, insecure=False, root_certificates=site.authority)
    assert made == {"member": "alder", "tenant": "acme"}
    log = site.folder / "alder.log"
    with lorafleet(log, *joining(site, key, "alder")):
        wait_until(lambda: "SuperNode ID" in log.read_text())
        yield log


@pytest.mark.long
def test_a_member_trains_through_the_proxy_and_is_known_by_its_key(site: Site, member: Path) -> None:
    log = site.folder / "coordinator.log"
    with lorafleet(log, "coordinator", "run", str(site.folder / "federation.toml")) as process:
        assert process.wait(timeout=120) == 0, log.read_text() + member.read_text()
    with Registry.open(site.options[1], site.options[3]) as registry:
        (update,) = registry.journal(site.federation)
        assert (update.member, update.counted_in) == ("alder", 1)
        assert [v.reference for v in registry.live("acme")] == ["operator/fleet-shared:1"]


def test_nothing_but_the_fleet_api_is_reached_through_the_proxy(site: Site, member: Path) -> None:
    with httpx.Client(verify=ssl.create_default_context(cafile=str(site.authority))) as client:
        for path in ("/v1/control/list-nodes", "/v1/control/start-run", "/v1/runtime/get-nodes", "/openapi.json"):
            headers = {"content-type": "application/protobuf"}
            direct = client.post(f"https://{site.superlink}{path}", headers=headers)
            through = client.post(f"https://{site.proxy}{path}", headers=headers)
            assert through.status_code == 403 and direct.status_code != 403, path
    control = SuperLinkControl(site.superlink, insecure=False, root_certificates=site.authority)
    assert pem_of(read_public_key(site.folder / "alder.pub")) in control.node_keys().values()
    control.close()


@contextmanager
def fleet_calls(site: Site, key: Path) -> Iterator[FleetHttpClient]:
    """The calls of a SuperNode with this key."""
    private = load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    interceptors = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(private, private.public_key()),
    ]
    authority = site.authority.read_bytes()
    with FleetHttpClient.from_server_address(site.proxy, False, authority, interceptors) as client:
        yield client


def test_a_member_neither_takes_nor_answers_nor_ends_what_is_anothers(site: Site, member: Path) -> None:
    control = SuperLinkControl(site.superlink, insecure=False, root_certificates=site.authority)
    known = pem_of(read_public_key(site.folder / "alder.pub"))
    (alder,) = (node for node, key in control.node_keys().items() if key == known)
    control.close()
    key = make_key(site.folder, "cedar")
    own = read_public_key(site.folder / "cedar.pub")
    with Registry.open(site.options[1], site.options[3]) as registry, fleet_calls(site, key) as cedar:
        accept_at(
            site.proxy, registry.invite(site.federation, tenant="acme", for_s=600.0).token, "cedar", own,
            insecure=False, root_certificates=site.authority,
        )  # fmt: skip
        try:
            mine = cedar.ActivateNode(ActivateNodeRequest(public_key=pem_of(own), heartbeat_interval=30)).node_id
            assert mine != alder
            cedar.PullMessages(PullMessagesRequest(node=Node(node_id=mine)))
            for call in (
                lambda: cedar.ActivateNode(ActivateNodeRequest(public_key=known, heartbeat_interval=30)),
                lambda: cedar.PullMessages(PullMessagesRequest(node=Node(node_id=alder))),
                lambda: cedar.PushMessages(PushMessagesRequest(node=Node(node_id=alder))),
                lambda: cedar.DeactivateNode(DeactivateNodeRequest(node_id=alder)),
            ):
                with pytest.raises(httpx.HTTPStatusError) as refused:
                    call()
                assert refused.value.response.status_code == 401
            cedar.DeactivateNode(DeactivateNodeRequest(node_id=mine))
        finally:
            registry.revoke_member(site.federation, "cedar")


FOREIGN_CLIENT = """
from pathlib import Path
Path({marker!r}).touch()
from flwr.clientapp import ClientApp
app = ClientApp()
"""
FOREIGN_SERVER = """
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    nodes = list(grid.get_node_ids())
    asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    for reply in grid.send_and_receive(asked, timeout=60):
        print("answered:", reply.error.code, reply.error.reason, flush=True)
"""


@pytest.mark.long
def test_a_member_refuses_a_foreign_bundle_before_any_code_of_it_runs_and_says_so(
    site: Site, member: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, marker = tmp_path / "foreign", tmp_path / "ran"
    (app / "lorafleet_app").mkdir(parents=True)
    for name in ("pyproject.toml", "lorafleet_app/__init__.py"):
        (app / name).write_bytes((launch.flower_app_path() / name).read_bytes())
    (app / "lorafleet_app" / "client.py").write_text(FOREIGN_CLIENT.format(marker=str(marker)))
    (app / "lorafleet_app" / "server.py").write_text(FOREIGN_SERVER)
    monkeypatch.setattr(launch, "flower_app_path", lambda: app)
    log = tmp_path / "run.log"
    with log.open("w") as output:
        launch.submit(site.superlink, site.folder / "federation.toml", root_certificates=site.authority, log_to=output)
    assert "answered: 7 the member runs no app bundle but that of its own lorafleet installation" in log.read_text()
    said = member.read_text()
    assert "refused the app bundle of run" in said and "no code of it was run" in said
    assert not marker.exists()


def test_a_node_without_a_members_key_is_told_so_and_does_not_come_in(site: Site) -> None:
    command = [
        flower_commands.script("flower-supernode"), "--superlink", site.proxy, "--root-certificates",
        str(site.authority), "--auth-supernode-private-key", str(make_key(site.folder, "birch")), "--port",
        str(flower_commands.free_port()),
    ]  # fmt: skip
    log = site.folder / "birch.log"
    with log.open("wb") as output:  # a pipe would stay open for as long as its SuperExec lives
        environment = flower_commands.environment(site.folder / "birch-home")
        done = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=60)
    assert done.returncode != 0 and "this node's key is no member's" in log.read_text()
