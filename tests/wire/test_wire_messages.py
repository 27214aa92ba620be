"""The descriptors: true to `protos/`, to the official packages' numbers, and at peace with them in one process."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

import dl_inference_core.wire
from dl_inference_core.wire import messages

ROOT = Path(__file__).parents[2]
COMPILED = Path(dl_inference_core.wire.__file__).with_name("messages.binpb")


def python(code: Any, *, warn: Any = "error") -> Any:
    done = subprocess.run([sys.executable, "-W", warn, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compiled_messages_match_their_sources(tmp_path: Any) -> None:
    out = tmp_path / "messages.binpb"
    sources = sorted(str(path) for path in (ROOT / "protos").glob("*.proto"))
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT / 'protos'}", "--include_imports"]
    subprocess.run([*protoc, f"--descriptor_set_out={out}", *sources], check=True)
    fresh, kept = (descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()) for path in (out, COMPILED))
    assert fresh == kept, "protos/ changed: run `make protos`"


def test_the_gateway_side_stays_light() -> None:
    loaded = python("import dl_inference_core.wire.protocol, sys; print(*sys.modules)").split()
    assert not {"numpy", "torch", "tensorflow", "ml_dtypes", "grpc"} & set(loaded)
    assert "dl_inference_core.wire.seldon" not in loaded


def test_reflection_can_answer_for_every_service() -> None:
    for name, method in {
        "tensorflow.serving.PredictionService": "Predict",
        "seldon.protos.Model": "Predict",
        "seldon.protos.Seldon": "Predict",
        "inference.GRPCInferenceService": "ModelInfer",
        "com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService": "TisPredict",
        "grpc.health.v1.Health": "Watch",
        "grpc.reflection.v1alpha.ServerReflection": "ServerReflectionInfo",
        "grpc.reflection.v1.ServerReflection": "ServerReflectionInfo",
    }.items():
        service = messages.pool.FindServiceByName(name)
        assert method in [m.name for m in service.methods]
        assert service.file.package == name.rpartition(".")[0]
    v1 = messages.pool.FindMessageTypeByName("grpc.reflection.v1.ServerReflectionResponse")
    alpha = messages.pool.FindMessageTypeByName("grpc.reflection.v1alpha.ServerReflectionResponse")
    assert {f.name: f.number for f in v1.fields} == {f.name: f.number for f in alpha.fields}


def agree(ours: Any, theirs: Any, seen: Any = ()) -> Any:
    """Every field of ours is theirs: by number, name, type and repetition."""
    if ours.full_name in seen:
        return
    for field in ours.fields:
        other = theirs.fields_by_number[field.number]
        assert (field.name, field.type, field.is_repeated) == (other.name, other.type, other.is_repeated), (
            field.full_name
        )
        assert (field.containing_oneof is None) == (other.containing_oneof is None)
        if field.message_type:
            agree(field.message_type, other.message_type, (*seen, ours.full_name))
        if field.enum_type:
            numbers = field.enum_type.values_by_number
            assert {n: v.name for n, v in numbers.items()}.items() <= {
                n: v.name for n, v in other.enum_type.values_by_number.items()
            }.items()


def test_field_numbers_are_the_official_ones() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorflow_serving.apis import predict_pb2
        from tritonclient.grpc import service_pb2
    for name in ("PredictRequest", "PredictResponse"):
        agree(getattr(messages, name).DESCRIPTOR, getattr(predict_pb2, name).DESCRIPTOR)
    ours = messages.pool.FindFileByName("inference.proto").message_types_by_name
    for name, descriptor in ours.items():
        agree(descriptor, getattr(service_pb2, name).DESCRIPTOR)
    for envelope, whole in (
        (messages.PredictKey, messages.PredictRequest),
        (messages.SeldonKey, messages.SeldonMessage),
        (messages.ModelInferKey, messages.ModelInferRequest),
    ):
        agree(envelope.DESCRIPTOR, whole.DESCRIPTOR)


THEIRS = """
from tensorflow_serving.apis import predict_pb2
from tritonclient.grpc import service_pb2
"""
OURS = """
from dl_inference_core.wire import messages, openinference, seldon, tfserving
"""
USE = """
request = predict_pb2.PredictRequest()
request.model_spec.name = "m"
request.inputs["x"].dtype = 1
request.inputs["x"].float_val.append(2.5)
assert tfserving.decode_request(request.SerializeToString()).payload["x"] == 2.5
infer = service_pb2.ModelInferRequest(model_name="m")
assert openinference.decode_request(infer.SerializeToString()).model == "m"
assert messages.PredictRequest is not predict_pb2.PredictRequest
"""


@pytest.mark.parametrize("order", [OURS + THEIRS, THEIRS + OURS], ids=["ours first", "theirs first"])
def test_official_packages_live_beside_ours(order: Any) -> None:
    python(order + USE, warn="ignore")


SELDON = """
# seldon-core 1.17 needs protobuf below 4 and cannot be installed beside us. Its import does no more than this: it puts
# proto/prediction.proto, and a tensorflow/core/framework/tensor.proto of its own, into the default pool.
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

pool = descriptor_pool.Default()
kinds = descriptor_pb2.FieldDescriptorProto


def add(file, message, *fields):
    described = file.message_type.add(name=message)
    for name, number, kind, *type_name in fields:
        described.field.add(name=name, number=number, type=kind, label=1, type_name=type_name[0] if type_name else None)


tensor = descriptor_pb2.FileDescriptorProto(
    name="tensorflow/core/framework/tensor.proto", package="tensorflow", syntax="proto3"
)
add(tensor, "TensorProto", ("version_number", 3, kinds.TYPE_INT32))
prediction = descriptor_pb2.FileDescriptorProto(
    name="proto/prediction.proto", package="seldon.protos", syntax="proto3", dependency=["google/protobuf/struct.proto"]
)
add(prediction, "Meta", ("puid", 1, kinds.TYPE_STRING))
add(
    prediction,
    "SeldonMessage",
    ("meta", 2, kinds.TYPE_MESSAGE, ".seldon.protos.Meta"),
    ("strData", 5, kinds.TYPE_STRING),
)
for file in (tensor, prediction):
    pool.AddSerializedFile(file.SerializeToString())
SeldonMessage = message_factory.GetMessageClass(pool.FindMessageTypeByName("seldon.protos.SeldonMessage"))
"""
USE_SELDON = """
theirs = SeldonMessage(strData="hello")
theirs.meta.puid = "p"
request = seldon.decode_request(theirs.SerializeToString())
assert (request.payload, request.id) == ("hello", "p")
"""


@pytest.mark.parametrize("order", [OURS + SELDON, SELDON + OURS], ids=["ours first", "theirs first"])
def test_seldon_core_could_live_beside_ours(order: Any) -> None:
    python(order + USE_SELDON)
