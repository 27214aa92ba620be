"""The descriptors: true to `protos/`, to the official packages' numbers, and at peace with them in one process."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

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
        "tensorflow.serving.ModelService": "GetModelStatus",
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


# Read by their numbers only: `google.rpc`'s codes, of which TensorFlow has an enum.
NUMBERS_FOR_NAMES = {"tensorflow.serving.StatusProto.error_code"}
# Counted only: entries of a map.
BYTES_FOR_MESSAGES = {"dl_inference.ModelInferKey.parameters"}


def agree(ours: Any, theirs: Any, seen: Any = ()) -> Any:
    """Every field of ours is theirs: by number, name, type, repetition and the others that it excludes."""
    if ours.full_name in seen:
        return

    def excluded(field: Any) -> Any:
        others = field.containing_oneof.fields if field.containing_oneof is not None else [field]
        return {other.number for other in others} & set(ours.fields_by_number)

    for field in ours.fields:
        other = theirs.fields_by_number[field.number]
        type_ = other.TYPE_INT32 if field.full_name in NUMBERS_FOR_NAMES else other.type
        if field.full_name in BYTES_FOR_MESSAGES:
            assert other.message_type
            type_ = other.TYPE_BYTES
        assert (field.name, field.type, field.is_repeated) == (other.name, type_, other.is_repeated), field.full_name
        assert excluded(field) == excluded(other), field.full_name
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
        from tritonclient.grpc import service_pb2
    ours = messages.pool.FindFileByName("inference.proto").message_types_by_name
    for name, descriptor in ours.items():
        agree(descriptor, getattr(service_pb2, name).DESCRIPTOR)
    for envelope, whole in (
        *((messages.PredictKey, whole) for whole in WITH_A_MODEL_SPEC),
        (messages.MultiInferenceKey, messages.MultiInferenceRequest),
        (messages.SeldonKey, messages.SeldonMessage),
        (messages.ModelInferKey, messages.ModelInferRequest),
    ):
        agree(envelope.DESCRIPTOR, whole.DESCRIPTOR)


WITH_A_MODEL_SPEC = [
    messages.PredictRequest,
    messages.ClassificationRequest,
    messages.RegressionRequest,
    messages.GetModelMetadataRequest,
    messages.GetModelStatusRequest,
]
# Files of options, which are read in text form, by their names. No official Python package has them.
OPTIONS = {"MonitoringConfig", "MonitoringConfig.PrometheusConfig", "BatchingParameters"}


@pytest.fixture(scope="module")
def official() -> Any:
    """Every message of the official packages, by its full name: protobuf's default pool."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow  # noqa: F401
        import tensorflow_serving.apis
        import tensorflow_serving.config

        for package in (tensorflow_serving.apis, tensorflow_serving.config):
            for module in pkgutil.iter_modules(package.__path__):
                if module.name.endswith("_pb2"):
                    importlib.import_module(f"{package.__name__}.{module.name}")
    return descriptor_pool.Default()


def with_nested(message: Any) -> Any:
    yield message
    for nested in message.nested_types:
        yield from with_nested(nested)


@pytest.mark.parametrize("file", ["tensorflow.proto", "tensorflow_serving.proto"])
def test_tensorflows_messages_and_services_are_the_official_ones(official: Any, file: Any) -> None:
    described = messages.pool.FindFileByName(file)
    unknown = set()
    for message in (m for top in described.message_types_by_name.values() for m in with_nested(top)):
        try:
            theirs = official.FindMessageTypeByName(message.full_name)
        except KeyError:
            unknown.add(message.full_name.removeprefix("tensorflow.serving."))
        else:
            agree(message, theirs)
    assert unknown == (OPTIONS if file == "tensorflow_serving.proto" else set())
    for name, enum in described.enum_types_by_name.items():
        numbers = {value.name: value.number for value in enum.values}
        theirs = official.FindEnumTypeByName(enum.full_name)
        assert numbers.items() <= {value.name: value.number for value in theirs.values}.items(), name
    for service in described.services_by_name.values():
        methods = {m.name: (m.input_type.full_name, m.output_type.full_name) for m in service.methods}
        theirs = official.FindServiceByName(service.full_name)
        assert methods == {m.name: (m.input_type.full_name, m.output_type.full_name) for m in theirs.methods}


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
