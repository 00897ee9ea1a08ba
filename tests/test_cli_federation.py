"""``lorafleet federation``: what its commands say of a federation, and do to it."""

from __future__ import annotations

import io
import json
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rich.console import Console

from lorafleet.adapters import LoraAdapter
from lorafleet.cli.federation import show
from lorafleet.coordinator.status import status_of
from lorafleet.registry.store import Registry
from tests.coordinator.scripted import Reply
from tests.coordinator.test_life import SYNC, Place, members
from tests.registry.conftest import FOLDER
from tests.test_cli import Command, lorafleet

__all__ = ["lorafleet"]

FILE = """
[federation]
tenant = "operator"
name = "fleet"
keep_updates = 3
[coordinator]
registry = "sqlite:///registry.db"
blobs = "blobs"
ray_address = "local"
superlink = "127.0.0.1:1"
[members]
acme = "acme"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def trained() -> Iterator[tuple[Place, list[str]]]:
    """A federation of three rounds, of whose members one was revoked and one sends what is rejected; and its options.

    Beside them is one that was never heard of, and an invitation.
    """
    with tempfile.TemporaryDirectory(prefix="lorafleet-status-", dir=FOLDER) as folder:
        place = Place(Path(folder), replace(SYNC, rounds=3), members())
        place.transport.answers["b2"] = lambda order: Reply(order.order.member, error="[red]no [/disk]")
        place.then("b1", place.revoke("b1"), at=3)
        place.run()
        place.registry.add_member(place.federation, "c1", tenant="a1", public_key="ecdsa-sha2-nistp384 AAAA")
        place.registry.invite(place.federation, tenant="a1", for_s=1e6)
        place.registry.invite(place.federation, tenant="a1", for_s=1e-9)
        yield place, ["--registry", f"sqlite:///{folder}/registry.db", "--blobs", f"{folder}/blobs"]
        place.registry.close()


def test_a_federation_is_created_from_its_file_and_found_by_it(lorafleet: Command, file: Path) -> None:
    made = lorafleet.json("federation", "create", file)
    assert (made["federation"], made["state"], made["members"]) == ("operator/fleet", "active", ["acme"])
    assert lorafleet("federation", "create", file)[0] == "operator/fleet  active, 1 members\n"
    named = ["operator/fleet", "--registry", f"sqlite:///{file.parent}/registry.db", "--blobs", file.parent / "blobs"]
    by_name, by_file = lorafleet("federation", "status", *named)[0], lorafleet("federation", "status", file)[0]
    assert by_name == by_file
    first, second, third, *_ = by_file.splitlines()
    assert first.startswith("operator/fleet is active since 20")
    assert second.endswith("rule exact, scheduler sync, rounds 3, quorum 2, expert_rank 32, updates kept for 3 rounds")
    assert third == "no coordinator works for it"


def test_a_federation_is_paused_resumed_and_stopped_for_good(lorafleet: Command, file: Path) -> None:
    lorafleet("federation", "create", file)
    paused = lorafleet.json("federation", "pause", file, "--reason", "a look", "--by", "ada")
    assert (paused["state"], paused["state_by"], paused["state_reason"]) == ("paused", "ada", "a look")
    assert "is paused since" in (said := lorafleet("federation", "status", file)[0]) and "by ada: a look" in said
    assert "operator/fleet is active since" in lorafleet("federation", "resume", file)[0]
    assert lorafleet.json("federation", "stop", file)["state"] == "stopped"
    assert "stopped, which is for good" in lorafleet("federation", "resume", file, status=1)[1]
    assert "was stopped at" in lorafleet("coordinator", "run", file, status=1)[1]


def test_an_invitation_is_shown_once_and_a_member_is_revoked(lorafleet: Command, file: Path) -> None:
    lorafleet("federation", "create", file)
    token, said = lorafleet("federation", "invite", file, "--tenant", "acme", "--days", "2")
    assert token.startswith("lfi_") and len(token.splitlines()) == 1 and "for acme, once, until 20" in said
    made = lorafleet.json("federation", "invite", file, "--tenant", "acme")
    assert made["token"] != token.strip()
    listed = lorafleet.json("federation", "invitations", file)
    assert [each["code"] for each in listed] == [each.split("_")[1] for each in (token, made["token"])]
    shown = lorafleet("federation", "status", file, "--json")[0] + lorafleet("federation", "status", file)[0]
    shown += lorafleet("federation", "invitations", file)[0]
    assert "2 invitations are open" in shown and token.strip()[-20:] not in shown
    assert "tenant 'nobody'" in lorafleet("federation", "invite", file, "--tenant", "nobody", status=1)[1]
    assert lorafleet.json("federation", "withdraw", file, made["code"])["code"] == made["code"]
    assert "is not there" in lorafleet("federation", "withdraw", file, made["code"], status=1)[1]
    assert lorafleet("federation", "withdraw", file, listed[0]["code"])[0].endswith("is withdrawn\n")
    assert lorafleet.json("federation", "revoke", file, "acme", "--reason", "left")["revoked_reason"] == "left"
    assert lorafleet("federation", "revoke", file, "acme")[0].startswith("acme is revoked since ")
    assert "'ghost'" in lorafleet("federation", "revoke", file, "ghost", status=1)[1]


def test_the_audit_has_whoever_ran_a_command_or_was_named(
    lorafleet: Command, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ada")  # what getpass asks first
    here = ["--registry", f"sqlite:///{file.parent}/registry.db", "--blobs", file.parent / "blobs"]
    accept = ["federation", "accept", "--public-key", key_file(file.parent), *here]
    lorafleet("federation", "create", file)
    first, second = (
        lorafleet.json("federation", "invite", file, "--tenant", "acme", *by)["token"] for by in ([], ["--by", "bob"])
    )
    lorafleet(*accept, first, "--member", "alder", "--by", "bob")
    lorafleet("federation", "pause", file, "--by", "bob")
    lorafleet("federation", "revoke", file, "acme")
    lorafleet("federation", "withdraw", file, second.split("_")[1])
    found = lorafleet.json("audit", "list", "--tenant", "operator", *here)
    assert [(e["by"], e["action"], e["subject"]) for e in found] == [
        ("ada", "tenant.create", "operator"),
        ("ada", "federation.create", "operator/fleet"),
        ("ada", "member.add", "acme"),
        ("ada", "invitation.create", first.split("_")[1]),
        ("bob", "invitation.create", second.split("_")[1]),
        ("bob", "invitation.accept", first.split("_")[1]),
        ("bob", "federation.state", "operator/fleet"),
        ("ada", "member.revoke", "acme"),
        ("ada", "invitation.withdraw", second.split("_")[1]),
    ]


def test_status_tells_rounds_and_members_from_the_registry(
    lorafleet: Command, trained: tuple[Place, list[str]]
) -> None:
    _, options = trained
    found = lorafleet.json("federation", "status", "operator/fleet", *options)
    assert [(r["number"], r["state"], r["members"]) for r in found["rounds"]] == [
        (1, "committed", 3), (2, "committed", 3), (3, "committed", 2),
    ]  # fmt: skip
    assert all(r["seconds"] >= 0 and 0 <= r["truncation_error"] < 1 for r in found["rounds"])
    by_key: dict[str, Any] = {m["key"]: m for m in found["members"]}
    assert {key: m["state"] for key, m in by_key.items()} == {
        "a1": "idle", "a2": "idle", "b1": "revoked", "b2": "rejected", "c1": "idle",
    }  # fmt: skip
    a2 = by_key["a2"]
    assert (a2["last_round"], a2["rank"], a2["step_s"], a2["loss"], a2["proves_itself"]) == (3, 8, 2.0, 1.0, False)
    assert by_key["b1"]["why"] == "left" and by_key["b2"]["why"].startswith("failed: [red]no")
    c1 = by_key["c1"]
    assert c1["proves_itself"] and c1["rank"] is c1["loss"] is c1["last_update_at"] is None
    assert found["open_invitations"] == 1 and found["holder"] is None and found["terms"]["rule"] == "exact"
    shown = lorafleet("federation", "status", "operator/fleet", *options, "--rounds", "1")[0]
    assert "\n3      committed" in shown and "\n2      committed" not in shown and "[red]no [/disk]" in shown


def test_who_works_in_an_open_round_is_told_from_who_has_answered(trained: tuple[Place, list[str]]) -> None:
    place, _ = trained
    here = Place(place.folder / "open", replace(SYNC, rounds=1), members())
    states: list[dict[str, str]] = []

    def look(name: str) -> None:
        if name == "update written":
            states.append({m.key: m.state for m in status_of(here.registry, here.federation, now=0.0).members})

    here.run(failpoint=look)
    assert states[0] == {"a1": "answered", "a2": "awaited", "b1": "awaited", "b2": "awaited"}
    assert set(states[-1].values()) == {"answered"}
    lease = here.registry.take_lease(here.federation, "me", for_s=60.0)
    assert status_of(here.registry, here.federation, now=0.0).holder == lease
    here.registry.close()


def test_a_watched_status_is_drawn_again_and_its_words_are_text(trained: tuple[Place, list[str]]) -> None:
    place, _ = trained
    console = Console(file=io.StringIO(), force_terminal=True, width=250, height=60)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show(lambda: status_of(place.registry, place.federation, now=0.0), console, sleep)
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert drawn.count("operator/fleet is active") >= 3 and "failed: [red]no [/disk]" in drawn and "s/step" in drawn


def test_what_is_no_terminal_is_not_watched(lorafleet: Command, trained: tuple[Place, list[str]]) -> None:
    _, options = trained
    assert "expected a terminal" in lorafleet("federation", "status", "a/b", "--watch", *options, status=2)[1]
    assert "expected TENANT/NAME" in lorafleet("federation", "pause", "fleet", *options, status=2)[1]
    assert "--registry" in lorafleet("federation", "pause", "operator/fleet", status=2)[1]


def test_experts_are_computed_again_into_folders(
    lorafleet: Command, trained: tuple[Place, list[str]], tmp_path: Path
) -> None:
    place, options = trained
    command = ["federation", "recompute", "operator/fleet", *options]
    rows = lorafleet.json(*command, "--out", tmp_path / "all")
    assert rows and all(row["digest"] == row["committed_digest"] for row in rows)
    for row in rows:
        assert LoraAdapter.load(Path(row["folder"])).digest == row["digest"]
    out = lorafleet(*command, "--out", tmp_path / "without", "--without", "a1", "--round", "2")[0]
    assert "operator/fleet-shared:2" in out and (tmp_path / "without" / "shared").is_dir()
    assert "name a folder" in lorafleet(*command, "--out", tmp_path / "all", status=1)[1]
    assert "no member ghost" in lorafleet(*command, "--out", tmp_path / "x", "--without", "ghost", status=1)[1]
    with Registry.open(options[1], options[3]) as registry:
        assert len(registry.rounds(place.federation)) == 3


def test_a_journal_that_does_not_give_what_was_committed_is_an_error(
    lorafleet: Command, trained: tuple[Place, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, options = trained
    monkeypatch.setattr(
        "lorafleet.coordinator.settings.FederationSettings.from_dict",
        classmethod(lambda cls, values: replace(SYNC, expert_rank=2)),
    )
    command = ["federation", "recompute", "operator/fleet", *options, "--out", tmp_path / "other"]
    assert "does not give what was committed" in lorafleet(*command, status=1)[1]


def key_file(folder: Path) -> Path:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    (folder / "alder.pub").write_bytes(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b" me@here")
    return folder / "alder.pub"


def test_an_invitation_is_accepted_where_the_registry_is(lorafleet: Command, file: Path) -> None:
    lorafleet("federation", "create", file)
    token = lorafleet.json("federation", "invite", file, "--tenant", "acme")["token"]
    here = ["--registry", f"sqlite:///{file.parent}/registry.db", "--blobs", file.parent / "blobs"]
    command = ["federation", "accept", token, "--member", "alder", "--public-key", key_file(file.parent)]
    assert lorafleet.json(*command, *here) == {"member": "alder", "tenant": "acme"}
    assert lorafleet(*command, *here)[0] == "alder is a member for acme\n"
    members = {m["key"]: m["proves_itself"] for m in lorafleet.json("federation", "status", file)["members"]}
    assert members == {"acme": False, "alder": True}
    assert "expected --superlink, or" in lorafleet(*command, status=2)[1]
    assert "--by is for --registry" in lorafleet(*command, "--superlink", "x:1", "--by", "ada", status=2)[1]
    assert "ssh-keygen" in lorafleet(*command[:-1], file, *here, status=1)[1]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, {"member": "alder", "tenant": "acme"}, "alder is a member for acme"),
        (404, {"code": 404, "detail": "the invitation is not there"}, "refused: the invitation is not there"),
        (409, {"code": 409, "detail": "accepted already"}, "refused: accepted already"),
        (418, ["tea"], "refused: 418"),
        (409, {"detail": "\x1b[2J"}, "refused: 409"),
        (200, {"welcome": "to another server"}, "does not answer as the federation's proxy"),
        (200, None, "does not answer"),
    ],
)
def test_an_invitation_is_accepted_from_afar_and_a_refusal_is_told(
    lorafleet: Command, tmp_path: Path, status: int, body: Any, said: str
) -> None:
    asked: list[Any] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>" if body is None else json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    file = key_file(tmp_path)
    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        command = ["federation", "accept", "lfi_a_b", "--member", "alder", "--public-key", file, "--insecure",
                   "--superlink", f"127.0.0.1:{server.server_port}"]  # fmt: skip
        out, err = lorafleet(*command, status=0 if "is a member" in said else 1)
    assert said in out + err
    public_key = " ".join(file.read_text().split()[:2])
    sent = {"token": "lfi_a_b", "member": "alder", "public_key": public_key}
    assert asked == [("/v1/lorafleet/accept-invitation", sent)]


def test_a_token_is_read_from_standard_input(lorafleet: Command, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lorafleet("federation", "create", file)
    token = lorafleet.json("federation", "invite", file, "--tenant", "acme")["token"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{token}\n"))
    here = ["--registry", f"sqlite:///{file.parent}/registry.db", "--blobs", file.parent / "blobs"]
    command = ["federation", "accept", "-", "--member", "alder", "--public-key", key_file(file.parent)]
    assert lorafleet.json(*command, *here) == {"member": "alder", "tenant": "acme"}


@pytest.mark.parametrize("written", [False, True])
def test_certificates_that_are_none_are_said_before_a_token_is_sent(
    lorafleet: Command, tmp_path: Path, written: bool
) -> None:
    authority = tmp_path / "ca.crt"
    if written:
        authority.write_text("no certificate\n")
    command = ["federation", "accept", "lfi_a_b", "--member", "alder", "--public-key", key_file(tmp_path),
               "--superlink", "127.0.0.1:1", "--root-certificates", authority]  # fmt: skip
    assert "ca.crt, expected PEM" in lorafleet(*command, status=1)[1]


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--listen", "0.0.0.0:0"], 2, "--insecure"),
        (["--listen", "127.0.0.1:0", "--certificate", "a", "--insecure"], 2, "together with"),
        (["--listen", "127.0.0.1:0", "--registry", "sqlite:///x"], 2, "--blobs"),
        (["--listen", "127.0.0.1:0", "--certificate", "absent.crt", "--private-key", "a"], 1, "absent.crt"),
        (["--listen", "127.0.0.1:0", "--certificate", "{file}"], 1, "expected both"),
        (["--listen", "127.0.0.1:0", "--certificate", "{file}", "--private-key", "{file}"], 1, "cannot be used"),
        (["--listen", "127.0.0.1:99999"], 1, "cannot listen at"),
        (["--listen", "nowhere"], 1, "cannot listen at"),
    ],
)
def test_a_proxy_that_cannot_work_is_refused_before_it_listens(
    lorafleet: Command, file: Path, options: list[str], status: int, said: str
) -> None:
    told = [option.format(file=file) for option in options]
    if told[1] == "nowhere":
        told.append("--insecure")
    assert said in lorafleet("coordinator", "proxy", "--superlink", "127.0.0.1:1", *told, status=status)[1]
