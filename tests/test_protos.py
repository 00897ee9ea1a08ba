"""proto/ keeps buf's rules STANDARD, which run here without buf; each rule finds what breaks it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")

ROOT = Path(__file__).resolve().parent.parent / "proto"
KNOWN = Path(protoc.__file__).parent / "_proto"
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.proto"))

PASCAL = re.compile(r"[A-Z][a-z0-9]*([A-Z][a-z0-9]*)*")
SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
UPPER = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")

File = descriptor_pb2.FileDescriptorProto


def compiled(root: Path, *sources: str) -> list[File]:
    """The files, with their comments."""
    out = root / ".descriptors"
    try:
        options = [f"-I{root}", f"-I{KNOWN}", "--include_source_info", f"--descriptor_set_out={out}"]
        assert protoc.main(["protoc", *options, *sources]) == 0
        return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)
    finally:
        out.unlink(missing_ok=True)


def messages(file: File) -> Iterator[descriptor_pb2.DescriptorProto]:
    """All of them, the nested ones too, but not the entries of maps."""
    waiting = list(file.message_type)
    while waiting:
        message = waiting.pop()
        if not message.options.map_entry:
            yield message
            waiting += message.nested_type


def enums(file: File) -> Iterator[descriptor_pb2.EnumDescriptorProto]:
    yield from file.enum_type
    for message in messages(file):
        yield from message.enum_type


def upper_snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()


def broken(file: File) -> Iterator[str]:
    """The rules that a file breaks, by buf's names, with what breaks them."""
    if file.package.split(".") != file.name.split("/")[:-1]:
        yield f"PACKAGE_DIRECTORY_MATCH {file.package}"
    if not all(SNAKE.fullmatch(part) for part in file.package.split(".")):
        yield f"PACKAGE_LOWER_SNAKE_CASE {file.package}"
    if not re.search(r"\.v[1-9]\d*((alpha|beta)[1-9]\d*)?$", file.package):
        yield f"PACKAGE_VERSION_SUFFIX {file.package}"
    if not SNAKE.fullmatch(Path(file.name).stem):
        yield f"FILE_LOWER_SNAKE_CASE {file.name}"
    if file.public_dependency or file.weak_dependency:
        yield f"IMPORT_NO_PUBLIC IMPORT_NO_WEAK {file.name}"
    for message in messages(file):
        if not PASCAL.fullmatch(message.name):
            yield f"MESSAGE_PASCAL_CASE {message.name}"
        yield from (
            f"FIELD_LOWER_SNAKE_CASE {field.name}" for field in message.field if not SNAKE.fullmatch(field.name)
        )
        for one in message.oneof_decl:
            if not SNAKE.fullmatch(one.name.removeprefix("_")):  # of an optional field
                yield f"ONEOF_LOWER_SNAKE_CASE {one.name}"
    for enum in enums(file):
        if not PASCAL.fullmatch(enum.name):
            yield f"ENUM_PASCAL_CASE {enum.name}"
        if enum.options.allow_alias:
            yield f"ENUM_NO_ALLOW_ALIAS {enum.name}"
        prefix = f"{upper_snake(enum.name)}_"
        for value in enum.value:
            if not UPPER.fullmatch(value.name):
                yield f"ENUM_VALUE_UPPER_SNAKE_CASE {value.name}"
            if not value.name.startswith(prefix):
                yield f"ENUM_VALUE_PREFIX {value.name}"
            if (value.name == f"{prefix}UNSPECIFIED") != (value.number == 0):
                yield f"ENUM_ZERO_VALUE_SUFFIX ENUM_FIRST_VALUE_ZERO {value.name}"
    yield from broken_by_services(file)


def broken_by_services(file: File) -> Iterator[str]:
    used: Counter[str] = Counter()
    for service in file.service:
        if not (PASCAL.fullmatch(service.name) and service.name.endswith("Service")):
            yield f"SERVICE_PASCAL_CASE SERVICE_SUFFIX {service.name}"
        for method in service.method:
            if not PASCAL.fullmatch(method.name):
                yield f"RPC_PASCAL_CASE {method.name}"
            for rule, kind, suffix in (
                ("REQUEST", method.input_type, "Request"),
                ("RESPONSE", method.output_type, "Response"),
            ):
                name = kind.rpartition(".")[2]
                used[kind] += 1
                if name not in (f"{method.name}{suffix}", f"{service.name}{method.name}{suffix}"):
                    yield f"RPC_{rule}_STANDARD_NAME {name}"
    yield from (f"RPC_REQUEST_RESPONSE_UNIQUE {kind}" for kind, times in used.items() if times > 1)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_keeps_the_rules(source: str) -> None:
    (file,) = compiled(ROOT, source)
    assert list(broken(file)) == []


@pytest.mark.parametrize("source", SOURCES)
def test_a_service_says_what_it_is(source: str) -> None:
    (file,) = compiled(ROOT, source)
    said = {tuple(at.path) for at in file.source_code_info.location if at.leading_comments.strip()}
    assert all((6, number) in said for number in range(len(file.service)))


GOOD = """syntax = "proto3";
package a.b.v1;
message DoRequest { optional int32 page_size = 1; oneof part { string x = 2; } map<string, int32> y = 3; }
message DoResponse { enum Kind { KIND_UNSPECIFIED = 0; KIND_ONE = 1; } Kind kind = 1; }
service AnyService { rpc Do(DoRequest) returns (stream DoResponse); }
"""


def lint(root: Path, text: str, name: str = "a/b/v1/some_file.proto") -> list[str]:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (file,) = compiled(root, name)
    return list(broken(file))


def test_a_good_file_breaks_no_rule(tmp_path: Path) -> None:
    assert lint(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("a.b.v1", "a.c.v1", "PACKAGE_DIRECTORY_MATCH"),
        ("page_size", "pageSize", "FIELD_LOWER_SNAKE_CASE"),
        ("oneof part", "oneof Part", "ONEOF_LOWER_SNAKE_CASE"),
        ("enum Kind", "enum kind_of", "ENUM_PASCAL_CASE"),
        ("KIND_ONE", "ONE", "ENUM_VALUE_PREFIX"),
        ("KIND_ONE", "KIND_one", "ENUM_VALUE_UPPER_SNAKE_CASE"),
        ("KIND_UNSPECIFIED", "KIND_NONE", "ENUM_ZERO_VALUE_SUFFIX"),
        ("KIND_ONE = 1", "KIND_ONE = 1; option allow_alias = true; KIND_TWO = 1", "ENUM_NO_ALLOW_ALIAS"),
        ("AnyService", "Anything", "SERVICE_SUFFIX"),
        ("rpc Do(", "rpc do(", "RPC_PASCAL_CASE"),
        ("rpc Do(", "rpc Did(", "RPC_REQUEST_STANDARD_NAME"),
        ("(DoRequest)", "(DoResponse)", "RPC_REQUEST_RESPONSE_UNIQUE"),
        ("message DoRequest", "message odd_one {} message DoRequest", "MESSAGE_PASCAL_CASE"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isupper() else "",
)
def test_what_breaks_a_rule_is_found(tmp_path: Path, old: str, new: str, rule: str) -> None:
    text = GOOD.replace(old, new)
    if old == "enum Kind":
        text = text.replace("Kind kind", "kind_of kind")
    assert any(rule in found for found in lint(tmp_path, text))


def test_a_package_without_a_version_and_a_file_in_capitals_are_found(tmp_path: Path) -> None:
    found = lint(tmp_path, GOOD.replace("a.b.v1", "a.b"), "a/b/SomeFile.proto")
    assert [rule.split()[0] for rule in found] == ["PACKAGE_VERSION_SUFFIX", "FILE_LOWER_SNAKE_CASE"]
