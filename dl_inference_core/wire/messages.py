"""The protobuf messages, in a pool of our own.

They carry the official names. In protobuf's default pool that would clash with tensorflow, tensorflow_serving,
tritonclient or seldon_core, whichever is imported second; in a private one nothing is shared. `messages.binpb` is
what `make protos` compiles from `protos/`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from dl_inference_core.errors import BadRequest
from dl_inference_core.wire import limits

_MOST_FIELDS = 32


def _build_pool() -> Any:
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("messages.binpb").read_bytes())
    for file in files.file:
        pool.Add(file)
    for described in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        pool.AddSerializedFile(described.serialized_pb)
    pool.Add(_reflection_v1())
    return pool


def _reflection_v1() -> Any:
    """grpc.reflection.v1, which grpcio-reflection lacks: v1alpha, field by field, under its later name."""
    file = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    alpha, final = ".grpc.reflection.v1alpha.", ".grpc.reflection.v1."
    file.name, file.package = "grpc/reflection/v1/reflection.proto", "grpc.reflection.v1"
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(alpha, final)
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(alpha, final)
            method.output_type = method.output_type.replace(alpha, final)
    return file


pool = _build_pool()
"""All of `protos/`, and gRPC health and reflection (v1alpha, v1): what reflection answers from."""


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


Value = _message("google.protobuf.Value")
TensorProto = _message("tensorflow.TensorProto")
PredictRequest = _message("tensorflow.serving.PredictRequest")
PredictResponse = _message("tensorflow.serving.PredictResponse")
Input = _message("tensorflow.serving.Input")
Example = _message("tensorflow.Example")
ClassificationRequest = _message("tensorflow.serving.ClassificationRequest")
ClassificationResponse = _message("tensorflow.serving.ClassificationResponse")
RegressionRequest = _message("tensorflow.serving.RegressionRequest")
RegressionResponse = _message("tensorflow.serving.RegressionResponse")
MultiInferenceRequest = _message("tensorflow.serving.MultiInferenceRequest")
MultiInferenceResponse = _message("tensorflow.serving.MultiInferenceResponse")
PredictionLog = _message("tensorflow.serving.PredictionLog")
SignatureDefMap = _message("tensorflow.serving.SignatureDefMap")
GetModelMetadataRequest = _message("tensorflow.serving.GetModelMetadataRequest")
GetModelMetadataResponse = _message("tensorflow.serving.GetModelMetadataResponse")
GetModelStatusRequest = _message("tensorflow.serving.GetModelStatusRequest")
GetModelStatusResponse = _message("tensorflow.serving.GetModelStatusResponse")
ReloadConfigRequest = _message("tensorflow.serving.ReloadConfigRequest")
ReloadConfigResponse = _message("tensorflow.serving.ReloadConfigResponse")
ModelServerConfig = _message("tensorflow.serving.ModelServerConfig")
MonitoringConfig = _message("tensorflow.serving.MonitoringConfig")
BatchingParameters = _message("tensorflow.serving.BatchingParameters")
SeldonMessage = _message("seldon.protos.SeldonMessage")
DefaultData = _message("seldon.protos.DefaultData")
Status = _message("seldon.protos.Status")
ModelInferRequest = _message("inference.ModelInferRequest")
ModelInferResponse = _message("inference.ModelInferResponse")
InferTensorContents = _message("inference.InferTensorContents")
ServerLiveRequest = _message("inference.ServerLiveRequest")
ServerLiveResponse = _message("inference.ServerLiveResponse")
ServerReadyRequest = _message("inference.ServerReadyRequest")
ServerReadyResponse = _message("inference.ServerReadyResponse")
ModelReadyRequest = _message("inference.ModelReadyRequest")
ModelReadyResponse = _message("inference.ModelReadyResponse")
ServerMetadataRequest = _message("inference.ServerMetadataRequest")
ServerMetadataResponse = _message("inference.ServerMetadataResponse")
ModelMetadataRequest = _message("inference.ModelMetadataRequest")
ModelMetadataResponse = _message("inference.ModelMetadataResponse")
OrcaLoadReport = _message("xds.data.orca.v3.OrcaLoadReport")
RegisterRequest = _message("dl_inference.registry.v1.RegisterRequest")
RegisterResponse = _message("dl_inference.registry.v1.RegisterResponse")
DeregisterRequest = _message("dl_inference.registry.v1.DeregisterRequest")
DeregisterResponse = _message("dl_inference.registry.v1.DeregisterResponse")
REGISTRY = "/dl_inference.registry.v1.Registry"

# Each request with nothing but its routing key declared, and a message with nothing declared at all.
PredictKey = _message("dl_inference.PredictKey")
MultiInferenceKey = _message("dl_inference.MultiInferenceKey")
SeldonKey = _message("dl_inference.SeldonKey")
ModelInferKey = _message("dl_inference.ModelInferKey")
Nothing = _message("inference.ServerLiveRequest")


def parse(message: Any, body: bytes | memoryview, whole: Any = None) -> Any:
    """`body`, which a client sent, as a message of the class `message`.

    Args:
        whole: the class that the client means, where `message` declares only a part of it.

    Raises:
        BadRequest: the bytes are malformed, or cost too much to decode (`limits.check`).
    """
    whole = whole or message
    body = bytes(body)  # protobuf takes four times as long for a view as for a copy
    try:
        if len(body) > limits.SMALL:
            limits.check(whole.DESCRIPTOR, body)
        return message.FromString(body)
    except (DecodeError, limits.Malformed) as error:
        raise _malformed(whole) from error


def parse_answer(message: Any, body: bytes | memoryview) -> Any:
    """`body`, which a node or this process wrote, as a message of the class `message`, whatever it costs to decode.

    Raises:
        BadRequest: the bytes are malformed.
    """
    try:
        return message.FromString(bytes(body))
    except DecodeError as error:
        raise _malformed(message) from error


def _malformed(message: Any) -> BadRequest:
    return BadRequest(f"the bytes are malformed; expected a {message.DESCRIPTOR.full_name}")


def fields(body: bytes | memoryview, *numbers: int) -> bytes | None:
    """The top-level fields of these numbers, tags included, in order; other fields are passed over. None as `spans`."""
    found = spans(body, 0, len(body))
    return None if found is None else joined(body, found, *numbers)


def joined(body: bytes | memoryview, found: Iterable[tuple[int, int, int, int]], *numbers: int) -> bytes:
    """As `fields`, of what `spans` has found."""
    return b"".join([body[first:end] for number, first, _, end in found if number in numbers])


def spans(
    body: bytes | memoryview, start: int, end: int, most: int = _MOST_FIELDS
) -> list[tuple[int, int, int, int]] | None:
    """Of each field of the message in `body[start:end]`: its number, where it begins, where its payload begins if that
    has a length, and where it ends.

    None where there are more than `most` fields, or anything that protobuf libraries rarely write: protobuf is to judge
    that.
    """
    position = start
    found: list[tuple[int, int, int, int]] = []
    try:
        for _ in range(most):
            if position >= end:
                return found if position == end else None
            first = position
            tag = body[position]
            position += 1
            if tag > 127:
                tag = tag & 127 | body[position] << 7
                position += 1
            if not 8 <= tag < 1 << 14:
                return None
            kind = tag & 7
            payload = position
            if kind == 2:
                size = body[position]
                position += 1
                shift = 7
                while size >> shift:  # the byte before had its continuation bit set
                    if shift > 21:
                        return None
                    size = size & (1 << shift) - 1 | body[position] << shift
                    shift += 7
                    position += 1
                payload = position
                position += size
            elif kind == 0:
                last = position + 8
                while body[position] > 127:
                    if position == last:
                        return None
                    position += 1
                position += 1
            elif kind == 5:
                position += 4
            elif kind == 1:
                position += 8
            else:
                return None
            found.append((tag >> 3, first, payload, position))
    except IndexError:
        pass
    return None
