from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2

from lorafleet.proto.registry.v1 import adapters_pb2, adapters_pb2_grpc
from lorafleet.proto.router.v1 import router_pb2, router_pb2_grpc

SOURCES = Path(__file__).resolve().parents[2] / "proto" / "lorafleet"
STUBS = {
    "router/v1/router.proto": (router_pb2, router_pb2_grpc),
    "registry/v1/adapters.proto": (adapters_pb2, adapters_pb2_grpc),
}


def test_every_source_has_stubs() -> None:
    assert {path.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.proto")} == STUBS.keys()


@pytest.mark.parametrize("source", STUBS)
def test_the_stubs_are_up_to_date(tmp_path: Path, source: str) -> None:
    """Compared by descriptor: the text of the stubs also depends on the version of grpcio-tools."""
    protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    out, known = tmp_path / "descriptors", Path(protoc.__file__).parent / "_proto"
    command = ["protoc", f"-Ilorafleet/proto={SOURCES}", f"-I{known}", f"--descriptor_set_out={out}"]
    assert protoc.main([*command, f"lorafleet/proto/{source}"]) == 0
    (fresh,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    shipped = descriptor_pb2.FileDescriptorProto()
    STUBS[source][0].DESCRIPTOR.CopyToProto(shipped)
    # protoc writes default JSON names into descriptor sets, but not into stubs.
    for message in fresh.message_type:
        clear_json_names(message)
    assert shipped == fresh, "proto/ has changed: run scripts/protoc"


def clear_json_names(message: descriptor_pb2.DescriptorProto) -> None:
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        clear_json_names(nested)


@pytest.mark.parametrize("stubs", STUBS.values(), ids=STUBS)
def test_the_grpc_stubs_have_every_method(stubs: tuple[ModuleType, ModuleType]) -> None:
    messages, services = stubs
    for service in messages.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            assert inspect.isfunction(getattr(getattr(services, f"{service.name}Servicer"), method.name))
            assert f"/{service.full_name}/{method.name}" in inspect.getsource(services)
