"""Messages of the gRPC face.

``riva.binpb`` is the descriptor set of the files in ``protos``. The classes are made from it at import, in a descriptor pool of
their own: generated code would be bound to versions of protobuf, and would collide with other code for the same protocols.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

SPEECH_RECOGNITION = "nvidia.riva.asr.RivaSpeechRecognition"
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1.ServerReflection"


def _load() -> DescriptorPool:
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(files("gateway.api").joinpath("riva.binpb").read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _load()
"""All messages, enums and services."""


def message(name: str) -> Any:
    """Return the class of a message by its full name."""
    return GetMessageClass(POOL.FindMessageTypeByName(name))


ENCODINGS: dict[int, str] = {value.number: value.name for value in POOL.FindEnumTypeByName("nvidia.riva.AudioEncoding").values}
"""Names of audio encodings by number."""

RecognizeRequest = message("nvidia.riva.asr.RecognizeRequest")
RecognizeResponse = message("nvidia.riva.asr.RecognizeResponse")
StreamingRecognizeRequest = message("nvidia.riva.asr.StreamingRecognizeRequest")
StreamingRecognizeResponse = message("nvidia.riva.asr.StreamingRecognizeResponse")
ConfigRequest = message("nvidia.riva.asr.RivaSpeechRecognitionConfigRequest")
ConfigResponse = message("nvidia.riva.asr.RivaSpeechRecognitionConfigResponse")
HealthCheckRequest = message("grpc.health.v1.HealthCheckRequest")
HealthCheckResponse = message("grpc.health.v1.HealthCheckResponse")
ReflectionRequest = message("grpc.reflection.v1.ServerReflectionRequest")
ReflectionResponse = message("grpc.reflection.v1.ServerReflectionResponse")
