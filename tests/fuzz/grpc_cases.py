"""Messages of whatever the protocol's descriptors allow, with wild values, unknown fields, and plain bytes.

Every call has to end with one of the documented statuses, and none of them may be a server's fault.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lorafleet.proto.registry.v1 import adapters_pb2, adapters_pb2_grpc
from lorafleet.proto.router.v1 import router_pb2
from tests.fuzz.service import NOT_OWN, OWN, Service

METHODS: tuple[MethodDescriptor, ...] = tuple(
    method
    for file in (router_pb2.DESCRIPTOR, adapters_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
    if method.name != "Watch"  # which has no end
)
ROUTER_METHODS: tuple[MethodDescriptor, ...] = tuple(
    method for method in METHODS if method.containing_service.file is router_pb2.DESCRIPTOR
)
EXPECTED = {
    "OK",
    "INVALID_ARGUMENT",
    "FAILED_PRECONDITION",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "RESOURCE_EXHAUSTED",
}
"""What docs/api.md has, without what is the server's fault."""
FURTHER = {"UploadChunks": {"DATA_LOSS"}}
"""Of single methods: a file that is not the one which was announced."""
_CALL_S = 590.0
"""Nearly the longest that the server allows: a busy machine is no fault."""
_CHECK_EVERY = 100

_TEXTS = st.text(max_size=60) | st.sampled_from((*OWN, *NOT_OWN, "", "\x00", "\ufffe", "x" * 300, "31415"))
_DOUBLES = st.floats() | st.sampled_from((0.0, 1.0, -1.0, 0.5, 2.0, 1e308, 5e-324)) | st.floats(-2, 2)
_BOUNDS = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_ENUM: (-(2**31), 2**31 - 1),
}


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    """One value of a field."""
    if field.message_type is not None:
        return messages(field.message_type, depth=depth + 1)
    if field.type == FieldDescriptor.TYPE_STRING:
        return _TEXTS
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=100)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return _DOUBLES
    least, most = _BOUNDS[field.type]
    return st.integers(max(least, -1), min(most, 40)) | st.integers(least, most)


@st.composite
def messages(draw: st.DrawFn, kind: Descriptor, depth: int = 0) -> Any:
    """A message with any of its fields."""
    message = GetMessageClass(kind)()
    # Most messages with many wild fields are refused for one of them: some have few.
    share = draw(st.sampled_from((1, 5, 9)))
    for field in kind.fields:
        if depth > 3 or draw(st.integers(0, 9)) >= share:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            keys, values = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            entries = draw(st.dictionaries(_values(keys, depth), _values(values, depth), max_size=4))
            for key, value in entries.items():
                if values.message_type is not None:
                    getattr(message, field.name)[key].CopyFrom(value)
                else:
                    getattr(message, field.name)[key] = value
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(_values(field, depth), max_size=70 if depth else 5)))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(_values(field, depth)))
        else:
            setattr(message, field.name, draw(_values(field, depth)))
    return message


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


@st.composite
def fields_on_the_wire(draw: st.DrawFn) -> bytes:
    """Any field number with any wire type: one that is not known, or a known one of another type."""
    number, kind = draw(st.integers(1, 20) | st.integers(1, 2**29 - 1)), draw(st.integers(0, 7))
    body = draw(st.binary(max_size=20))
    if kind == 0:
        value = _varint(draw(st.integers(0, 2**64 - 1)))
    elif kind in (1, 5):
        value = struct.pack("<Q" if kind == 1 else "<I", draw(st.integers(0, 2**32 - 1)))
    else:
        value = _varint(draw(st.just(len(body)) | st.integers(0, 2**40))) + body
    return _varint(number << 3 | kind) + value


def _aim(draw: st.DrawFn, message: Any, upload: str) -> None:
    """Lets a message of AdapterService name what there is, which chance alone hardly ever does.

    What others ask for text with (``acme/digits``) is looked at and never moved, lest soon nobody gets any.
    """
    looks = message.DESCRIPTOR.name.startswith(("Get", "List", "Download"))
    names = ("acme/letters", "acme/letters:1", "acme/letters@champion", *NOT_OWN, *(OWN[:3] if looks else ()))
    for field in message.DESCRIPTOR.fields:
        if field.name == "upload" and field.message_type is None:
            message.upload = draw(st.sampled_from((upload, upload, "", "0" * 32, "../x")))
        elif field.name == "file" and field.message_type is None:
            message.file = draw(st.sampled_from((*UPLOADED, "README.md", "../x")))
        elif field.name in ("adapter", "reference", "name"):
            setattr(message, field.name, draw(st.sampled_from(names)))


@st.composite
def encoded(draw: st.DrawFn, kind: Descriptor, upload: str) -> bytes:
    """A message as it is sent: whole, with further fields, cut off, changed in a byte, or no message at all."""
    how = draw(st.sampled_from((*("whole",) * 4, "further", "cut", "changed", "bytes")))
    if how == "bytes":
        return draw(st.binary(max_size=200))
    message = draw(messages(kind))
    if kind is router_pb2.GenerateRequest.DESCRIPTOR and draw(st.booleans()):
        # Chance alone hardly ever comes to a request that is generated for.
        message.prompt, message.model = message.prompt or "31415", draw(st.sampled_from(OWN))
        message.mix.clear()
        if draw(st.booleans()):
            message.ClearField("sampling")
        else:
            message.sampling.ClearField(draw(st.sampled_from(("temperature", "top_p", "min_p", "max_tokens"))))
    if kind.file is adapters_pb2.DESCRIPTOR:
        _aim(draw, message, upload)
    body: bytes = message.SerializeToString()
    if how == "further":
        return body + b"".join(draw(st.lists(fields_on_the_wire(), max_size=3)))
    if how == "cut":
        return body[: draw(st.integers(0, len(body)))]
    if how == "changed" and body:
        place = draw(st.integers(0, len(body) - 1))
        return body[:place] + bytes([draw(st.integers(0, 255))]) + body[place + 1 :]
    return body


@st.composite
def calls(draw: st.DrawFn, upload: str) -> tuple[MethodDescriptor, list[bytes]]:
    """``upload``: the id of one that is under way."""
    # Most of them to the service that computes.
    method = draw(st.sampled_from(METHODS if draw(st.integers(0, 9)) < 3 else ROUTER_METHODS))
    number = draw(st.integers(0, 3)) if method.client_streaming else draw(st.sampled_from((1, 1, 1, 1, 1, 0, 2)))
    return method, [draw(encoded(method.input_type, upload)) for _ in range(number)]


_METADATA = st.lists(
    st.tuples(
        st.sampled_from(("x-request-id", "traceparent", "tracestate", "x-bin", "grpc-encoding-x", "user-agent-x")),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    ),
    max_size=3,
).map(lambda found: [(name, value.encode() if name.endswith("-bin") else value) for name, value in found])


UPLOADED = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(100)}
"""What the upload announces; no case sends all of it."""


def _started(channel: grpc.Channel, service: Service) -> str:
    """The id of an upload that is under way; of the last run's, where there was one."""
    files = [
        adapters_pb2.UploadFile(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in UPLOADED.items()
    ]
    asked = adapters_pb2.StartUploadRequest(adapter="acme/letters", files=files, request_id="fuzz")
    stub = adapters_pb2_grpc.AdapterServiceStub(channel)
    answered = stub.StartUpload(asked, metadata=[("authorization", f"Bearer {service.token}")], timeout=_CALL_S)
    found: str = answered.upload.id
    return found


def run(
    service: Service, cases: int, *, seed_number: int, progress: Callable[[int], None], shrink: bool = True
) -> Counter[str]:
    """So many calls; how many ended with which status. An assertion fails with the smallest call that is wrong."""
    counted: Counter[str] = Counter()
    authorization = st.just(f"Bearer {service.token}")
    wrong = st.sampled_from(("", "Bearer", "Bearer x", f"Basic {service.token}", f"Bearer {service.token}x"))
    keys = st.integers(0, 9).flatmap(lambda number: wrong if number == 0 else authorization)
    with grpc.insecure_channel(service.server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        upload = _started(channel, service)

        @seed(seed_number)
        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(call=calls(upload), key=keys, further=_METADATA)
        def one(call: tuple[MethodDescriptor, list[bytes]], key: str, further: list[tuple[str, Any]]) -> None:
            method, bodies = call
            path = f"/{method.containing_service.full_name}/{method.name}"
            metadata = [("authorization", key), *further]
            status = "OK"
            try:
                for answer in channel.stream_stream(path)(iter(bodies), metadata=metadata, timeout=_CALL_S):
                    GetMessageClass(method.output_type).FromString(answer)
            except grpc.RpcError as error:
                status = error.code().name
                assert status in EXPECTED | FURTHER.get(method.name, set()), f"{path}: {status} {error.details()}"
            if "health" not in path and key != f"Bearer {service.token}":
                assert status == "UNAUTHENTICATED", f"{path} without a key: {status}"
            counted[f"{method.name} {status}"] += 1
            progress(1)
            if counted.total() % _CHECK_EVERY == 0:
                answered = health.Check(health_pb2.HealthCheckRequest(), timeout=_CALL_S)
                assert answered.status == health_pb2.HealthCheckResponse.SERVING

        one()
    return counted
