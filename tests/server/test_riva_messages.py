"""The gRPC face's messages are those of the official clients and of the compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from riva.client.proto import riva_asr_pb2, riva_audio_pb2

from gateway.api import riva_schema

API = Path(riva_schema.__file__).parent
PROTOS = [f"{name}.proto" for name in ("riva/proto/riva_asr", "grpc/health/v1/health", "grpc/reflection/v1/reflection")]


def walk(message: Descriptor) -> Iterator[Descriptor]:
    yield message
    for nested in message.nested_types:
        yield from walk(nested)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("riva/proto/riva_asr.proto", riva_asr_pb2.DESCRIPTOR),
        ("grpc/health/v1/health.proto", health_pb2.DESCRIPTOR),
        ("grpc/reflection/v1/reflection.proto", reflection_pb2.DESCRIPTOR),
    ],
)
def test_messages_are_those_of_the_official_clients(ours: str, theirs: Any) -> None:
    """Each field that we have: number, name, type, repetition, presence."""
    known = {one.full_name: one for top in theirs.message_types_by_name.values() for one in walk(top)}
    file = riva_schema.POOL.FindFileByName(ours)
    for message in (one for top in file.message_types_by_name.values() for one in walk(top)):
        same = known[message.full_name.replace("reflection.v1.", "reflection.v1alpha.")]
        for field in message.fields:
            other = same.fields_by_number[field.number]
            assert (field.name, field.type, field.is_repeated, field.has_presence) == (
                other.name,
                other.type,
                other.is_repeated,
                other.has_presence,
            )
    for name, service in file.services_by_name.items():
        for method in service.methods:
            other = theirs.services_by_name[name].methods_by_name[method.name]
            assert (method.client_streaming, method.server_streaming) == (other.client_streaming, other.server_streaming)


def test_encodings_are_those_of_the_official_client() -> None:
    assert {name: number for number, name in riva_schema.ENCODINGS.items()} == dict(riva_audio_pb2.AudioEncoding.items())


def test_descriptor_set_is_compiled_from_the_files(tmp_path: Path) -> None:
    """If not: the command below, in gateway/api/protos, with --descriptor_set_out=../riva.binpb."""
    target = tmp_path / "riva.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--include_imports", f"--descriptor_set_out={target}", *PROTOS]
    subprocess.run(command, cwd=API / "protos", check=True)
    compiled, stored = (FileDescriptorSet.FromString(path.read_bytes()) for path in (target, API / "riva.binpb"))
    assert compiled == stored
