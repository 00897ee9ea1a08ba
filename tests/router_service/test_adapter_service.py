"""AdapterService over a real server: what it answers, to whom, and weights in and out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from lorafleet.adapters import LoraAdapter, LoraPair
from lorafleet.errors import (
    AlreadyExistsError,
    BaseMismatchError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    PromotionRefusedError,
    QuotaExceededError,
)
from lorafleet.proto.registry.v1 import adapters_pb2
from lorafleet.registry import NewExpert, Quota
from lorafleet.router_service.adapters import service
from lorafleet.router_service.server import Server
from tests.router_service.adapter_callers import BOTH, Adapters, Raw, adapters, folder, raw, refusal
from tests.router_service.conftest import Experts, Fleet, Serve
from tests.router_service.statements import statements

__all__ = ["adapters", "folder", "raw"]

OTHER_BASE = "sha256:" + "07e7" * 16


# In and out


def test_what_goes_in_comes_out(adapters: Adapters, serve: Serve, fleet: Fleet, folder: Path, tmp_path: Path) -> None:
    client = adapters(serve())
    seen: list[tuple[int, int]] = []
    version = client.upload("acme/sql", folder, licence="MIT", progress=lambda *bytes_: seen.append(bytes_))
    stored = fleet.registry.resolve("acme/sql")
    assert (version.reference, version.digest, version.created_at) == ("acme/sql:1", stored.digest, stored.created_at)
    assert (stored.licence, fleet.registry.card(stored)) == ("MIT", (folder / "README.md").read_bytes().decode())
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)
    keys = {key.key_id for key in fleet.registry.keys("acme")}
    assert {entry.by for entry in fleet.registry.audit("acme") if entry.action == "version.add"} <= keys

    out = tmp_path / "out"
    assert client.download("acme/sql", out).reference == "acme/sql:1"
    loaded = LoraAdapter.load(out)
    assert (loaded.digest, loaded.base) == (version.digest, fleet.base_digest)
    assert (out / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in folder.iterdir())


def test_a_second_upload_is_the_next_version_and_a_repeated_one_is_not(
    adapters: Adapters, serve: Serve, folder: Path
) -> None:
    client = adapters(serve())
    assert [client.upload("acme/sql", folder).number for _ in range(2)] == [1, 2]
    assert [client.upload("acme/sql", folder, request_id="mine").number for _ in range(2)] == [3, 3]
    (folder / "README.md").write_text("another card")
    with pytest.raises(AlreadyExistsError, match="other files"):
        client.upload("acme/sql", folder, request_id="mine")


def test_an_older_folder_is_replaced_by_a_download_whole(
    adapters: Adapters, serve: Serve, fleet: Fleet, experts: Experts, folder: Path
) -> None:
    fleet.add("acme/letters", experts.letters)  # without a card
    adapters(serve()).download("acme/letters:1", folder)
    assert LoraAdapter.load(folder).digest == experts.letters.digest
    assert not (folder / "README.md").exists()


def test_an_upload_for_another_base_is_refused_before_anything_is_sent(
    adapters: Adapters, serve: Serve, fleet: Fleet, folder: Path
) -> None:
    fleet.registry.register_base("other", OTHER_BASE, architecture="L", parameters=1)
    fleet.registry.create_adapter("acme", "sql", base="other")
    client = adapters(serve())
    with pytest.raises(BaseMismatchError, match="is for the base other"):
        client.upload("acme/sql", folder, base="small")
    assert client.upload("acme/sql", folder).base_digest == OTHER_BASE


def test_the_quota_of_adapters_holds(adapters: Adapters, serve: Serve, fleet: Fleet, folder: Path) -> None:
    client = adapters(serve())
    client.upload("acme/sql", folder)
    fleet.registry.set_quota("acme", Quota(adapters=1))
    assert client.upload("acme/sql", folder).number == 2
    with pytest.raises(QuotaExceededError, match="quota is 1"):
        client.upload("acme/more", folder)


# What is used, and by what measurement


def test_versions_go_through_their_life(
    adapters: Adapters, serve: Serve, fleet: Fleet, experts: Experts, folder: Path
) -> None:
    client, registry = adapters(serve()), fleet.registry
    for _ in range(3):
        client.upload("acme/sql", folder)
    client.promote("acme/sql:1")  # nothing to be better than
    with pytest.raises(PromotionRefusedError, match="not measured"):
        client.promote("acme/sql:2")
    client.evaluate("acme/sql:1", loss=2.5, tokens=1000)
    client.evaluate("acme/sql:2", loss=2.75, tokens=1000)
    with pytest.raises(PromotionRefusedError, match=r"2\.7500.*2\.5000"):
        client.promote("acme/sql:2")
    client.evaluate("acme/sql:2", loss=2.25, tokens=1000)  # replaces it
    made = client.promote("acme/sql:2")
    assert (made.before, made.loss, made.loss_before, made.members) == (1, 2.25, 2.5, 0)
    made = client.promote("acme/sql@champion", "canary")
    assert (made.alias, made.before, made.loss, made.members) == ("canary", None, None, 0)
    assert client.promote("acme/sql:3", force=True).version.number == 3
    assert client.rollback("acme/sql") == 2 and registry.resolve("acme/sql").number == 2
    assert client.retire("acme/sql:3").state == "retired"
    assert client.restore("acme/sql:3").state == "staged"
    done = client.quarantine("acme/sql:2")
    assert (done.version.state, done.aliases) == ("quarantined", {"canary": None, "champion": 1})
    assert [(version.number, version.aliases) for version in client.versions("acme/sql")] == [
        (1, ("champion",)),
        (2, ("canary",)),
        (3, ()),
    ]
    details = client.version("acme/sql")
    assert [(e.member, e.loss, e.tokens) for e in details.evaluations] == [("", 2.5, 1000)]
    assert details.version == replace(details.version, reference="acme/sql:1", aliases=("champion",))


def test_a_federations_version_is_for_its_members_to_measure(adapters: Adapters, serve: Serve, fleet: Fleet) -> None:
    add_expert(fleet)
    with pytest.raises(InvalidInputError, match="members measure"):
        adapters(serve()).evaluate("acme/shared:1", loss=1.0, tokens=10)


def test_a_measurement_without_sense_is_refused(
    adapters: Adapters, serve: Serve, fleet: Fleet, experts: Experts
) -> None:
    client, version = adapters(serve()), fleet.add("acme/sql", experts.digits)
    for loss, tokens in ((float("nan"), 10), (float("inf"), 10), (1.0, 0), (1.0, 2**63), (1.0, -1)):
        with pytest.raises(InvalidInputError, match="expected"):
            client.evaluate("acme/sql:1", loss=loss, tokens=tokens)
    assert fleet.registry.evaluations(version) == []


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def add_versions(fleet: Fleet, *parents: int) -> None:
    """Further versions of ``acme/shared``, made of so many updates each."""
    registry = fleet.registry
    federation = registry.federation("acme", "fed")
    for number in parents:
        opened = registry.open_round(federation, 1 + registry.newest_number("acme", "shared"))
        made_of = tuple(map(digest, range(number)))
        registry.commit_round(opened, [NewExpert("shared", fleet_weights(fleet), "exact", made_of)], report={})


def add_expert(fleet: Fleet, *, member: str | None = None) -> None:
    """``acme/shared:1``, made by a federation that a tenant may have a member in."""
    registry = fleet.registry
    federation = registry.create_federation("acme", "fed", base="small", settings={})
    if member is not None:
        registry.add_member(federation, "k", tenant=member)
    opened = registry.open_round(federation, 1)
    expert = NewExpert("shared", fleet_weights(fleet), "exact", (OTHER_BASE,), members=1)
    (version,) = registry.commit_round(opened, [expert], report={})
    registry.record_evaluation(version, member="k", loss=1.0, tokens=10)


def fleet_weights(fleet: Fleet) -> LoraAdapter:
    path = "model.layers.0.self_attn.q_proj"
    return LoraAdapter({path: LoraPair(torch.ones(1, 64), torch.ones(64, 1))}, fleet.base_digest)


# Who sees what


@pytest.fixture
def shared(serve: Serve, fleet: Fleet, experts: Experts) -> Server:
    """``rival`` has a member in the federation that made ``acme/shared``, was granted ``acme/open``, and has nothing to
    do with ``acme/secret``."""
    add_expert(fleet, member="rival")
    for name in ("open", "secret"):
        version = fleet.add(f"acme/{name}", experts.letters)
        fleet.registry.evaluate(version, loss=1.0, tokens=10)
        fleet.registry.set_alias("acme", name, "champion", 1)
    fleet.registry.grant("acme", "open", to="rival")
    fleet.registry.create_adapter("rival", "empty", base="small")
    return serve()


def test_lists_show_what_may_be_used(shared: Server, adapters: Adapters) -> None:
    rival = adapters(shared, tenant="rival")
    assert [found.name for found in rival.adapters()] == ["acme/open", "acme/shared", "rival/empty"]
    assert [found.name for found in rival.adapters("rival")] == ["rival/empty"]
    assert rival.versions("rival/empty") == []
    assert [found.name for found in adapters(shared).adapters()] == ["acme/open", "acme/secret", "acme/shared"]


def test_of_anothers_version_nothing_is_told_of_third_parties(shared: Server, adapters: Adapters) -> None:
    rival, owner = adapters(shared, tenant="rival"), adapters(shared)
    seen, own = rival.version("acme/shared"), owner.version("acme/shared")
    assert seen.version.lineage is not None and own.version.lineage is not None
    assert (seen.version.lineage.federation, seen.version.lineage.parents) == ("fed", ())
    assert own.version.lineage.parents == (OTHER_BASE,)
    assert (seen.version.lineage.members, own.version.lineage.members) == (1, 1)
    assert (seen.evaluations, len(own.evaluations)) == ((), 1)
    assert rival.versions("acme/shared") == [seen.version]
    assert rival.version("acme/open@champion").evaluations == ()


def test_which_federation_made_it_is_for_tenants_with_a_member_there(
    shared: Server, adapters: Adapters, fleet: Fleet
) -> None:
    fleet.registry.create_tenant("guest")
    fleet.registry.grant("acme", "shared", to="guest")
    guest = adapters(shared, tenant="guest")
    (listed,), (version,) = guest.adapters(), guest.versions("acme/shared")
    assert listed == guest.adapter("acme/shared") and listed.federation == ""
    assert version.lineage is None and guest.version("acme/shared:1").version == version
    assert adapters(shared, tenant="rival").adapter("acme/shared").federation == "fed"


def test_a_version_out_of_use_is_shown_to_its_owner_alone(shared: Server, adapters: Adapters, fleet: Fleet) -> None:
    rival, owner = adapters(shared, tenant="rival"), adapters(shared)
    fleet.registry.quarantine(fleet.registry.version("acme", "shared", 1))
    assert [version.state for version in owner.versions("acme/shared")] == ["quarantined"]
    with pytest.raises(NotFoundError, match="is not there, or is not yours"):
        rival.versions("acme/shared")


def chunk(upload: str) -> adapters_pb2.UploadChunksRequest:
    return adapters_pb2.UploadChunksRequest(upload=upload, file="adapter_config.json", data=b"x")


BY_NAME: dict[str, Callable[[Raw, str], Any]] = {
    "CreateAdapter": lambda raw, name: raw.CreateAdapter(name=name),
    "GetAdapter": lambda raw, name: raw.GetAdapter(name=name),
    "ListVersions": lambda raw, name: raw.ListVersions(adapter=name),
    "GetVersion": lambda raw, name: raw.GetVersion(reference=name),
    "GetVersion by number": lambda raw, name: raw.GetVersion(reference=f"{name}:1"),
    "PromoteVersion": lambda raw, name: raw.PromoteVersion(reference=f"{name}:1", force=True),
    "RollbackAlias": lambda raw, name: raw.RollbackAlias(adapter=name),
    "RetireVersion": lambda raw, name: raw.RetireVersion(reference=f"{name}:1"),
    "QuarantineVersion": lambda raw, name: raw.QuarantineVersion(reference=f"{name}:1"),
    "RestoreVersion": lambda raw, name: raw.RestoreVersion(reference=f"{name}:1"),
    "RecordEvaluation": lambda raw, name: raw.RecordEvaluation(reference=f"{name}:1", loss=1.0, tokens=1),
    "StartUpload": lambda raw, name: raw.StartUpload(adapter=name),
    "DownloadVersion": lambda raw, name: list(raw.DownloadVersion(reference=f"{name}:1")),
}
BY_UPLOAD: dict[str, Callable[[Raw, str], Any]] = {
    "UploadChunks": lambda raw, upload: raw.UploadChunks(chunk(upload)),
    "GetUpload": lambda raw, upload: raw.GetUpload(upload=upload),
    "FinishUpload": lambda raw, upload: raw.FinishUpload(upload=upload),
    "CancelUpload": lambda raw, upload: raw.CancelUpload(upload=upload),
}


def test_every_method_that_takes_a_name_is_asked_below() -> None:
    (service,) = adapters_pb2.DESCRIPTOR.services_by_name.values()
    asked = {name.partition(" ")[0] for name in (*BY_NAME, *BY_UPLOAD)}
    assert {method.name for method in service.methods} == asked | {"ListAdapters"}


def test_what_is_missing_and_what_is_anothers_are_one_answer(
    shared: Server, raw: Callable[..., Raw], fleet: Fleet
) -> None:
    """The same status, words and statements, so that the time tells nothing either."""
    rival = raw(shared, "rival")
    before = fleet.registry.revision()
    with statements() as asked:
        for method, call in BY_NAME.items():
            answers = []
            for name in ("acme/secret", "acme/nothing", "nobody/nothing"):
                asked.clear()
                code, words = refusal(call, rival, name)
                answers.append((code, words.replace(name, "NAME"), tuple(asked)))
            assert len(set(answers)) == 1, method
            assert answers[0][0] == grpc.StatusCode.NOT_FOUND, method
    assert fleet.registry.revision() == before


def test_whose_member_was_revoked_does_not_see_that_there_are_later_versions(
    shared: Server, raw: Callable[..., Raw], adapters: Adapters, fleet: Fleet, experts: Experts
) -> None:
    federation = fleet.registry.federation("acme", "fed")
    fleet.registry.revoke_member(federation, "k")
    rival = raw(shared, "rival")
    with statements() as asked:

        def listed() -> tuple[Any, tuple[str, ...]]:
            asked.clear()
            found = rival.ListVersions(adapter="acme/shared")
            return found, tuple(asked)

        before = listed()
        opened = fleet.registry.open_round(federation, 2)
        fleet.registry.commit_round(opened, [NewExpert("shared", experts.letters, rule="exact")], report={})
        assert listed() == before and [version.number for version in before[0].versions] == [1]
        answers = []
        for number in (2, 9):
            asked.clear()
            code, words = refusal(lambda raw, name: raw.GetVersion(reference=name), rival, f"acme/shared:{number}")
            answers.append((code, words.replace(f":{number}", ":N"), tuple(asked)))
        assert answers[0] == answers[1] and answers[0][2]
    assert [version.number for version in adapters(shared).versions("acme/shared")] == [1, 2]


def test_what_a_tenant_may_use_is_not_its_to_change_or_to_take(
    shared: Server, raw: Callable[..., Raw], fleet: Fleet
) -> None:
    before, rival = fleet.registry.revision(), raw(shared, "rival")
    for method, call in BY_NAME.items():
        if method.partition(" ")[0] not in ("GetAdapter", "ListVersions", "GetVersion"):
            assert refusal(call, rival, "acme/open")[0] == grpc.StatusCode.NOT_FOUND, method
    assert fleet.registry.revision() == before


def test_anothers_upload_is_answered_like_one_that_is_not_there(
    shared: Server, raw: Callable[..., Raw], folder: Path
) -> None:
    owner, rival = raw(shared), raw(shared, "rival")
    owner.CreateAdapter(name="acme/sql")
    upload = owner.start(folder).id
    for method, call in BY_UPLOAD.items():
        strange = ("0" * 32, f"../acme/{upload}", "", "x" * 5000, "\0")
        answers = {refusal(call, rival, name) for name in (upload, *strange)}
        assert len(answers) == 1, method
        assert answers.pop()[0] == grpc.StatusCode.NOT_FOUND, method
    assert owner.GetUpload(upload=upload).upload.id == upload


def test_a_key_opens_what_its_scopes_say(serve: Serve, adapters: Adapters, folder: Path) -> None:
    server = serve()
    writer, reader = adapters(server, scopes=BOTH[1:]), adapters(server, scopes=BOTH[:1])
    assert writer.upload("acme/sql", folder).number == 1
    assert reader.version("acme/sql").version.number == 1
    for refused in (lambda: reader.promote("acme/sql:1"), lambda: reader.upload("acme/sql", folder)):
        with pytest.raises(PermissionDeniedError, match="adapters:write"):
            refused()
    with pytest.raises(PermissionDeniedError, match="adapters:read"):
        writer.adapters()
    assert adapters(server, scopes=("admin",)).version("acme/sql").version.number == 1


# Pages


def test_pages_add_up_to_the_list(serve: Serve, raw: Callable[..., Raw], fleet: Fleet, experts: Experts) -> None:
    for number in range(5):
        fleet.add("acme/many", experts.other)
        fleet.registry.create_adapter("acme", f"a{number}", base="small")
    one, references = raw(serve()), [f"acme/many:{n}" for n in range(1, 6)]
    for method, kind, named, fields, names in (
        (one.ListVersions, "versions", attrgetter("reference"), {"adapter": "acme/many"}, references),
        (one.ListAdapters, "adapters", attrgetter("name"), {}, [*(f"acme/a{n}" for n in range(5)), "acme/many"]),
    ):
        for size in (0, 1, 2, 5, 6, 2**31 - 1):
            found, token, pages = [], "", 0
            while token or not pages:
                page = method(page_size=size, page_token=token, **fields)
                found += [named(item) for item in getattr(page, kind)]
                token, pages = page.next_page_token, pages + 1
            assert found == names
            assert pages == (1 if size in (0, 2**31 - 1) else -(-len(names) // size))


def test_a_page_that_no_list_gave_is_refused(
    serve: Serve, raw: Callable[..., Raw], fleet: Fleet, experts: Experts
) -> None:
    fleet.add("acme/sql", experts.other)
    one = raw(serve())
    for page in (
        {"page_size": -1},
        {"page_token": "no base64"},
        {"page_token": "_w=="},
        {"page_token": "YS9i"},
        {"page_token": "OTk5" * 1700},
    ):
        code, _ = refusal(lambda page=page: one.ListVersions(adapter="acme/sql", **page))  # type: ignore[misc]
        assert code == grpc.StatusCode.INVALID_ARGUMENT, page


def pages(one: Raw, adapter: str, *, page_size: int = 0) -> list[adapters_pb2.ListVersionsResponse]:
    found = [one.ListVersions(adapter=adapter, page_size=page_size)]
    while token := found[-1].next_page_token:
        found.append(one.ListVersions(adapter=adapter, page_size=page_size, page_token=token))
    return found


def test_versions_that_were_made_of_very_many_updates_are_listed_and_shown(
    serve: Serve, adapters: Adapters, raw: Callable[..., Raw], fleet: Fleet
) -> None:
    """60,000 digests alone are more than gRPC's 4 MiB."""
    add_expert(fleet)
    add_versions(fleet, 60_000, 30_000, 30_000)
    server = serve()
    client, registry = adapters(server), fleet.registry
    lineages = [version.lineage for version in client.versions("acme/shared")]
    assert [made.parent_count for made in lineages if made is not None] == [1, 60_000, 30_000, 30_000]
    assert all(made is not None and made.parents == () for made in lineages)
    assert [made.members for made in lineages if made is not None] == [1, None, None, None]
    shown = client.version("acme/shared:2").version.lineage
    assert shown is not None and shown.parents == tuple(map(digest, range(60_000)))
    assert sum(page.ByteSize() for page in pages(raw(server), "acme/shared")) < 2000
    client.retire("acme/shared:2")  # what changes a version says of it what lists do
    assert client.restore("acme/shared:2").lineage == lineages[1]
    assert registry.resolve("acme/shared:2").lineage.parents == shown.parents  # type: ignore[union-attr]


def test_a_page_ends_by_its_bytes_and_the_next_one_begins_after_it(
    serve: Serve, raw: Callable[..., Raw], fleet: Fleet, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_READ_VERSIONS", 3)
    for _ in range(7):
        fleet.add("acme/many", experts.other)
    one = raw(serve())
    (whole,) = pages(one, "acme/many")
    largest = max(version.ByteSize() for version in whole.versions)
    for most, numbers in ((2 * largest, [[1, 2], [3, 4], [5, 6], [7]]), (1, [[n] for n in range(1, 8)])):
        monkeypatch.setattr(service, "_PAGE_BYTES", most)
        found = pages(one, "acme/many")
        assert [[version.number for version in page.versions] for page in found] == numbers
        assert [version for page in found for version in page.versions] == list(whole.versions)


def test_of_anothers_versions_those_that_are_hidden_leave_no_trace_in_a_list(
    serve: Serve, raw: Callable[..., Raw], fleet: Fleet
) -> None:
    """Quarantined ones, and those that were made after the last member was revoked."""
    add_expert(fleet, member="rival")
    add_versions(fleet, 1, 1)
    registry = fleet.registry
    rival = raw(serve(), "rival")

    def seen() -> list[list[bytes]]:
        return [
            [page.SerializeToString(deterministic=True) for page in pages(rival, "acme/shared", page_size=size)]
            for size in (1, 2, 3, 100)
        ]

    before = seen()
    assert [len(found) for found in before] == [3, 2, 1, 1]
    add_versions(fleet, 1, 1)
    for number in (4, 5):
        registry.quarantine(registry.version("acme", "shared", number))
    assert seen() == before
    registry.revoke_member(registry.federation("acme", "fed"), "k")
    left = seen()
    assert left != before  # where the champion is, is not for who has left
    add_versions(fleet, *[1] * 3)  # each of which was the champion
    assert seen() == left
    registry.quarantine(registry.version("acme", "shared", 2))
    assert [len(found) for found in seen()] == [2, 1, 1, 1]
