from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc

SOURCES = Path(__file__).resolve().parents[2] / "proto" / "lorafleet"


def test_the_stubs_are_up_to_date(tmp_path: Path) -> None:
    """Compared by descriptor: the text of the stubs also depends on the version of grpcio-tools."""
    protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    out = tmp_path / "descriptors"
    file = "lorafleet/proto/router/v1/router.proto"
    assert protoc.main(["protoc", f"-Ilorafleet/proto={SOURCES}", f"--descriptor_set_out={out}", file]) == 0
    (fresh,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    shipped = descriptor_pb2.FileDescriptorProto()
    router_pb2.DESCRIPTOR.CopyToProto(shipped)
    # protoc writes default JSON names into descriptor sets, but not into stubs.
    for message in fresh.message_type:
        for field in [*message.field, *(field for nested in message.nested_type for field in nested.field)]:
            field.ClearField("json_name")
    assert shipped == fresh, "proto/ has changed: run scripts/protoc"


def test_the_grpc_stubs_have_every_method() -> None:
    for method in router_pb2.DESCRIPTOR.services_by_name["RouterService"].methods:
        assert inspect.isfunction(getattr(router_pb2_grpc.RouterServiceServicer, method.name))
        assert f"/{method.containing_service.full_name}/{method.name}" in inspect.getsource(router_pb2_grpc)
