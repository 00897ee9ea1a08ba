"""Between the registry's records and the messages of lorafleet.registry.v1."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from lorafleet.proto.registry.v1 import adapters_pb2
from lorafleet.registry.records import Adapter, Evaluation, Promotion, Quarantined, Version
from lorafleet.router_service.adapters.uploads import AnnouncedFile, Upload

_STATES: Final[Mapping[str, adapters_pb2.VersionState]] = {
    "staged": adapters_pb2.VERSION_STATE_STAGED,
    "evaluated": adapters_pb2.VERSION_STATE_EVALUATED,
    "quarantined": adapters_pb2.VERSION_STATE_QUARANTINED,
    "retired": adapters_pb2.VERSION_STATE_RETIRED,
}


def timestamp(seconds: float) -> Timestamp:
    """Of seconds since the epoch; to within a nanosecond, so that the same float comes back."""
    whole = math.floor(seconds)
    return Timestamp(seconds=whole, nanos=min(round((seconds - whole) * 1e9), 999_999_999))


def adapter(found: Adapter, *, reader: str, origins: Collection[tuple[str, str]] = ()) -> adapters_pb2.Adapter:
    """As the tenant ``reader`` may see it; of others' adapters ``origins`` are those whose federation it may know."""
    told = found.tenant == reader or (found.tenant, found.name) in origins
    return adapters_pb2.Adapter(
        name=f"{found.tenant}/{found.name}",
        base=found.base,
        base_digest=found.base_digest,
        federation=(found.federation or "") if told else "",
        create_time=timestamp(found.created_at),
    )


def version(
    found: Version,
    *,
    reader: str,
    aliases: Mapping[str, int] | None = None,
    origins: Collection[tuple[str, str]] = (),
    with_parents: bool = False,
) -> adapters_pb2.Version:
    """As the tenant ``reader`` may see it; ``aliases`` are its adapter's, ``origins`` as above.

    ``with_parents`` is for one version alone: after a round of 10,000 members they are 730 kB.
    """
    lineage = None
    if found.lineage is not None and (found.tenant == reader or (found.tenant, found.adapter) in origins):
        # What it was made of is of other members of its federation; how many they are names none of them.
        parents = found.lineage.parents if found.tenant == reader else ()
        lineage = adapters_pb2.Lineage(
            federation=found.lineage.federation,
            round=found.lineage.round,
            rule=found.lineage.rule,
            parents=parents if with_parents else (),
            parent_count=len(parents),
            members=found.lineage.members,
        )
    return adapters_pb2.Version(
        reference=found.reference,
        number=found.number,
        digest=found.digest,
        base_digest=found.base_digest,
        rank=found.rank,
        parameters=found.parameters,
        state=_STATES[found.state],
        create_time=timestamp(found.created_at),
        licence=found.licence,
        lineage=lineage,
        aliases=[alias for alias, number in (aliases or {}).items() if number == found.number],
    )


def evaluation(found: Evaluation) -> adapters_pb2.Evaluation:
    return adapters_pb2.Evaluation(
        member=found.member, loss=found.loss, tokens=found.tokens, create_time=timestamp(found.created_at)
    )


def promotion(made: Promotion, *, reader: str) -> adapters_pb2.PromoteVersionResponse:
    return adapters_pb2.PromoteVersionResponse(
        version=version(made.version, reader=reader),
        alias=made.alias,
        before=made.before,
        loss=made.loss,
        loss_before=made.loss_before,
        members=made.members,
    )


def quarantined(done: Quarantined, *, reader: str) -> adapters_pb2.QuarantineVersionResponse:
    return adapters_pb2.QuarantineVersionResponse(
        version=version(done.version, reader=reader),
        aliases={alias: number or 0 for alias, number in done.aliases.items()},
    )


def announced(files: Sequence[adapters_pb2.UploadFile]) -> list[AnnouncedFile]:
    return [AnnouncedFile(file.name, file.size, file.sha256) for file in files]


def upload(found: Upload) -> adapters_pb2.Upload:
    return adapters_pb2.Upload(
        id=found.id,
        adapter=f"{found.tenant}/{found.adapter}",
        files=[
            adapters_pb2.UploadFile(name=file.name, size=file.size, sha256=file.sha256, durable_size=durable)
            for file, durable in zip(found.files, found.durable, strict=True)
        ],
        expire_time=timestamp(found.expires_at),
        version="" if found.version is None else f"{found.tenant}/{found.adapter}:{found.version}",
    )
