"""TensorFlow Serving's own client against a node, and against a gateway in front of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest

from dl_inference_core.client import Client

WPAI = "/com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService/Predict"
X = np.array([[1, 2, 3], [4, 5, 6.5]], np.float32)


@pytest.fixture(scope="module")
def tf() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow
        from tensorflow_serving.apis import prediction_service_pb2_grpc  # noqa: F401 - imported here without warnings
    return tensorflow


@pytest.fixture(scope="module")
def request_for(tf: Any) -> Callable[..., Any]:
    from tensorflow.core.framework.tensor_pb2 import TensorProto
    from tensorflow_serving.apis.predict_pb2 import PredictRequest

    def request_for(model: str, version: int | None = None, filter: Any = (), **inputs: Any) -> Any:  # noqa: A002
        request = PredictRequest(output_filter=filter)
        request.model_spec.name = model
        if version is not None:
            request.model_spec.version.value = version
        for name, value in inputs.items():
            proto = value if isinstance(value, TensorProto) else tf.make_tensor_proto(value)
            request.inputs[name].CopyFrom(proto)
        return request

    return request_for


@pytest.fixture(params=["official", "wpai"])
def predict(request: pytest.FixtureRequest, peer: Any, tf: Any) -> Callable[[Any], Any]:
    """A stub of the method, at TensorFlow Serving's path or at the access service's."""
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    if request.param == "official":
        stub = prediction_service_pb2_grpc.PredictionServiceStub(peer.channel).Predict
    else:
        stub = peer.channel.unary_unary(
            WPAI,
            request_serializer=predict_pb2.PredictRequest.SerializeToString,
            response_deserializer=predict_pb2.PredictResponse.FromString,
        )
    return lambda message: stub(message, timeout=20)


def refusal(predict: Callable[[Any], Any], message: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        predict(message)
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize("name", ["linear", "linear-7", "anything-7", "7"])
def test_bytes_in_typed_values_out(predict: Any, request_for: Any, tf: Any, make: Any, name: str) -> None:
    message = request_for(name, x=X)
    assert message.inputs["x"].tensor_content
    answer = predict(message)
    assert list(answer.outputs) == ["y"]
    assert len(answer.outputs["y"].float_val) == 4
    np.testing.assert_array_equal(tf.make_ndarray(answer.outputs["y"]), make.answer(X, 10))
    assert answer.model_spec.name == "linear"
    assert answer.model_spec.version.value == 2
    assert answer.model_spec.signature_name == "serving_default"


def test_typed_values_in(predict: Any, request_for: Any, tf: Any, make: Any) -> None:
    from tensorflow.core.framework.tensor_pb2 import TensorProto

    proto = TensorProto(dtype=1, float_val=[1, 2, 3, 4, 5])
    for size in (3, 3):
        proto.tensor_shape.dim.add(size=size)
    repeated = np.array([[1, 2, 3], [4, 5, 5], [5, 5, 5]])
    answer = predict(request_for("linear", x=proto))
    np.testing.assert_array_equal(tf.make_ndarray(answer.outputs["y"]), make.answer(repeated, 10))


def test_an_empty_batch(predict: Any, request_for: Any, tf: Any) -> None:
    answer = predict(request_for("linear", x=np.zeros((0, 3), np.float32)))
    assert tf.make_ndarray(answer.outputs["y"]).shape == (0, 2)


@pytest.mark.parametrize("wanted", [["sum"], ["difference"], ["sum", "difference"], []])
def test_output_filter(predict: Any, request_for: Any, tf: Any, wanted: list[str]) -> None:
    a, b = np.full((1, 2), 3, np.float32), np.full((1, 2), 5, np.float32)
    answer = predict(request_for("branches", filter=wanted, a=a, b=b))
    results = {"sum": a + b, "difference": a - b}
    assert answer.outputs.keys() == set(wanted or results)
    for name in answer.outputs:
        np.testing.assert_array_equal(tf.make_ndarray(answer.outputs[name]), results[name])


def test_an_output_that_is_none(predict: Any, request_for: Any) -> None:
    code, message = refusal(predict, request_for("linear", filter=["z"], x=X))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message == "output tensor alias not found in signature: z Outputs expected to be in the set {y}."


def test_an_output_that_is_asked_for_twice(predict: Any, request_for: Any) -> None:
    refused = refusal(predict, request_for("linear", filter=["y", "y"], x=X))
    assert refused == (grpc.StatusCode.INVALID_ARGUMENT, "duplicate output tensor alias: y")


@pytest.mark.parametrize(("version", "factor"), [(1, 1), (2, 10), (None, 10)])
def test_version(predict: Any, request_for: Any, tf: Any, make: Any, version: int | None, factor: int) -> None:
    answer = predict(request_for("linear", version, x=X))
    np.testing.assert_array_equal(tf.make_ndarray(answer.outputs["y"]), make.answer(X, factor))
    assert answer.model_spec.version.value == (version or 2)


@pytest.mark.parametrize("version", [3, 0, -1, 2**63 - 1])
def test_a_version_that_is_not_there(predict: Any, request_for: Any, version: int) -> None:
    code, message = refusal(predict, request_for("linear", version, x=X))
    assert code is grpc.StatusCode.NOT_FOUND
    assert str(version) in message
    assert "it has 1, 2" in message


@pytest.mark.parametrize(("label", "version", "factor"), [("stable", 1, 1), ("canary", 2, 10)])
def test_a_version_label(
    predict: Any, request_for: Any, tf: Any, make: Any, label: str, version: int, factor: int
) -> None:
    message = request_for("linear", x=X)
    message.model_spec.version_label = label
    answer = predict(message)
    np.testing.assert_array_equal(tf.make_ndarray(answer.outputs["y"]), make.answer(X, factor))
    assert answer.model_spec.version.value == version


@pytest.mark.parametrize(
    ("label", "code", "said"),
    [
        ("old", grpc.StatusCode.INVALID_ARGUMENT, "Unrecognized servable version label: old"),
        ("gone", grpc.StatusCode.NOT_FOUND, "Servable not found for request: Specific(linear, 9)"),
    ],
)
def test_a_version_label_that_leads_nowhere(
    predict: Any, request_for: Any, label: str, code: grpc.StatusCode, said: str
) -> None:
    message = request_for("linear", x=X)
    message.model_spec.version_label = label
    assert refusal(predict, message)[0] is code
    assert said in refusal(predict, message)[1]


def test_an_unknown_signature(predict: Any, request_for: Any) -> None:
    message = request_for("linear", x=X)
    message.model_spec.signature_name = "serving_default"
    assert predict(message).model_spec.signature_name == "serving_default"
    message.model_spec.signature_name = "x"
    code, why = refusal(predict, message)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert why.startswith('Serving signature key "x" not found.')


def test_a_model_outside_the_folder_of_models(predict: Any, request_for: Any, tf: Any, make: Any) -> None:
    for version, label, factor in ((None, "", 100), (1, "", 1), (None, "old", 1)):
        message = request_for("elsewhere", version, x=X)
        if label:
            message.model_spec.version_label = label
        answer = predict(message)
        np.testing.assert_array_equal(tf.make_ndarray(answer.outputs["y"]), make.answer(X, factor))
    assert predict(request_for("any-17", x=X)).model_spec.name == "elsewhere"
    assert refusal(predict, request_for("elsewhere", 2, x=X))[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"z": X}, ['"x" (float32, [?, 3])', '"z"']),
        ({"x": X, "z": X}, ['"x" (float32, [?, 3])', '"z"']),
        ({}, ['"x" (float32, [?, 3])']),
        ({"x": X.astype(np.float64)}, ['"x" (float32, [?, 3])', "float64"]),
        ({"x": X.astype(np.int32)}, ['"x" (float32, [?, 3])', "int32"]),
        ({"x": [b"text"]}, ['"x" (float32, [?, 3])']),
        ({"x": X[0]}, ['"x" (float32, [?, 3])', "[3]"]),
        ({"x": X[:, :2]}, ['"x" (float32, [?, 3])', "[2, 2]"]),
        ({"x": np.zeros((4097, 3), np.float32)}, ['"x"', "4097", "4096"]),
    ],
    ids=["name", "one too many", "none", "float64", "int32", "text", "rank", "size", "batch"],
)
def test_what_does_not_fit(predict: Any, request_for: Any, inputs: Any, said: list[str]) -> None:
    code, message = refusal(predict, request_for("linear", **inputs))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    for words in said:
        assert words in message


def test_values_that_do_not_fill_their_shape(predict: Any, request_for: Any, tf: Any) -> None:
    proto = tf.make_tensor_proto(X)
    proto.tensor_content = proto.tensor_content[:-1]
    code, message = refusal(predict, request_for("linear", x=proto))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "24" in message
    assert "23" in message


@pytest.mark.parametrize("name", ["unknown", "unknown-12345", "linear-", "-7", "linear-7.0", "linear-+7"])
def test_an_unknown_model(predict: Any, request_for: Any, name: str) -> None:
    code, message = refusal(predict, request_for(name, x=X))
    assert code is grpc.StatusCode.NOT_FOUND
    assert name in message


def test_every_dtype(predict: Any, request_for: Any, tf: Any) -> None:
    values = {
        "bool_": np.array([[True, False]]),
        "uint8": np.array([[0, 255]], np.uint8),
        "int8": np.array([[-128, 127]], np.int8),
        "int16": np.array([[-(2**15), 2**15 - 1]], np.int16),
        "int32": np.array([[-(2**31), 2**31 - 1]], np.int32),
        "int64": np.array([[-(2**63), 2**63 - 1]]),
        "float16": np.array([[0.1, -65504]], np.float16),
        "bfloat16": np.array([[0.1, 3e38]], ml_dtypes.bfloat16),
        "float32": np.array([[0.1, np.inf]], np.float32),
        "float64": np.array([[0.1, np.nan]]),
    }
    answer = predict(request_for("dtypes", **values))
    assert answer.outputs.keys() == values.keys()
    for name, value in values.items():
        given = tf.make_ndarray(answer.outputs[name])
        assert given.dtype == value.dtype
        assert given.tobytes() == value.tobytes(), name


def test_strings(predict: Any, request_for: Any, tf: Any) -> None:
    words = np.array([[b"one", "zwölf".encode()]], dtype=object)
    answer = predict(request_for("words", filter=["capitals", "lengths"], words=words))
    assert tf.make_ndarray(answer.outputs["capitals"]).tolist() == [[b"ONE", "zwölf".encode().upper()]]
    assert tf.make_ndarray(answer.outputs["lengths"]).tolist() == [[3.0], [6.0]]


def test_the_originals_model(predict: Any, request_for: Any, tf: Any) -> None:
    answer = predict(request_for("legacy-69", x=np.array([1.5, 2.5])))
    assert tf.make_ndarray(answer.outputs["output"]).tolist() == [3.0, 5.0]


def test_no_name(predict: Any, request_for: Any) -> None:
    code, message = refusal(predict, request_for("", x=X))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "model_spec.name" in message


@pytest.mark.parametrize(
    ("model", "version", "inputs", "wanted", "code", "said"),
    [
        ("nobody", None, {"x": X}, [], "NOT_FOUND", "Servable not found for request: Latest(nobody)"),
        ("linear", 3, {"x": X}, [], "NOT_FOUND", "Servable not found for request: Specific(linear, 3)"),
        ("linear", None, {"z": X}, [], "INVALID_ARGUMENT", "input size does not match signature: "),
        ("linear", None, {}, [], "INVALID_ARGUMENT", "input size does not match signature: "),
        ("linear", None, {"x": X}, ["z"], "INVALID_ARGUMENT", "output tensor alias not found in signature: "),
    ],
)
def test_errors_have_words_that_tensorflow_servings_clients_know(
    predict: Any, request_for: Any, model: str, version: int | None, inputs: Any, wanted: Any, code: str, said: str
) -> None:
    given, message = refusal(predict, request_for(model, version, filter=wanted, **inputs))
    assert given is grpc.StatusCode[code]
    assert message.startswith(said)


# The other methods, by the official stubs


@pytest.fixture(scope="module")
def apis(tf: Any) -> Any:
    """The official messages, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorflow_serving.apis import (
            classification_pb2,
            get_model_metadata_pb2,
            get_model_status_pb2,
            inference_pb2,
            regression_pb2,
        )
    modules = (classification_pb2, get_model_metadata_pb2, get_model_status_pb2, inference_pb2, regression_pb2)
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


@pytest.fixture
def stub(peer: Any, tf: Any) -> Any:
    from tensorflow_serving.apis import prediction_service_pb2_grpc

    return prediction_service_pb2_grpc.PredictionServiceStub(peer.channel)


@pytest.fixture
def models_stub(peer: Any, tf: Any) -> Any:
    from tensorflow_serving.apis import model_service_pb2_grpc

    return model_service_pb2_grpc.ModelServiceStub(peer.channel)


def examples(tf: Any, *rows: Any, context: Any = None) -> Any:
    """An Input of TensorFlow's own examples, each with the feature "x"; a row that is None has none."""
    from tensorflow_serving.apis.input_pb2 import Input

    def example(row: Any) -> Any:
        made = tf.train.Example()
        if row is not None:
            made.features.feature["x"].float_list.value.extend(row)
        return made

    made = Input()
    listed = made.example_list if context is None else made.example_list_with_context
    listed.examples.extend(example(row) for row in rows)
    if context is not None:
        made.example_list_with_context.context.CopyFrom(example(context))
    return made


def refused(method: Any, message: Any) -> tuple[grpc.StatusCode, str]:
    return refusal(lambda message: method(message, timeout=20), message)


@pytest.mark.parametrize("model", ["scores", "any-15"])
def test_classify(stub: Any, apis: Any, tf: Any, make: Any, model: str) -> None:
    request = apis.ClassificationRequest(model_spec={"name": model}, input=examples(tf, *X))
    answer = stub.Classify(request, timeout=20)
    found = [[each.score for each in row.classes] for row in answer.result.classifications]
    np.testing.assert_array_equal(np.array(found, np.float32), make.answer(X))
    assert {tuple(each.label for each in row.classes) for row in answer.result.classifications} == {
        ("first", "zweitens")
    }
    spec = answer.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("scores", 1, "serving_default")


def test_regress_with_a_context(stub: Any, apis: Any, tf: Any, make: Any) -> None:
    request = apis.RegressionRequest(model_spec={"name": "scores"}, input=examples(tf, X[0], None, context=X[1]))
    answer = stub.Regress(request, timeout=20)
    found = [each.value for each in answer.result.regressions]
    np.testing.assert_array_equal(np.array(found, np.float32), make.answer(X).sum(axis=1))
    assert (answer.model_spec.name, answer.model_spec.version.value) == ("scores", 1)


@pytest.mark.parametrize("method", ["Classify", "Regress"])
def test_classify_and_regress_that_cannot_be_answered(stub: Any, apis: Any, tf: Any, method: str) -> None:
    message = apis.ClassificationRequest if method == "Classify" else apis.RegressionRequest
    call, given = getattr(stub, method), examples(tf, *X)
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for spec, input_, code, said in (
        ({"name": "scores"}, None, invalid, "Input is empty."),
        ({"name": "scores"}, examples(tf), invalid, "Input is empty."),
        ({"name": "linear"}, given, invalid, " inputs found in SignatureDef: its input is x; expected inputs"),
        ({"name": "linear", "signature_name": "x"}, given, invalid, "No signature was found with the name: x;"),
        ({"name": "echo"}, given, grpc.StatusCode.INTERNAL, "expected the output"),
        ({"name": "scores", "version": {"value": 4}}, given, grpc.StatusCode.NOT_FOUND, "Specific(scores, 4)"),
        ({"name": "scores", "version_label": "a"}, given, invalid, "Unrecognized servable version label: a"),
        ({"name": "nobody"}, given, grpc.StatusCode.NOT_FOUND, "Servable not found for request: Latest(nobody)"),
        ({}, given, invalid, "model_spec.name"),
    ):
        found, why = refused(call, message(model_spec=spec, input=input_))
        assert found is code, why
        assert said in why


def test_multi_inference(stub: Any, apis: Any, tf: Any, make: Any) -> None:
    request = apis.MultiInferenceRequest(input=examples(tf, *X))
    for signature, method in (("r", "regress"), ("c", "classify")):
        spec = {"name": "scores", "signature_name": signature}
        request.tasks.add(model_spec=spec, method_name=f"tensorflow/serving/{method}")
    first, second = stub.MultiInference(request, timeout=20).results
    y = make.answer(X)
    np.testing.assert_array_equal(
        np.array([each.value for each in first.regression_result.regressions], np.float32), y.sum(axis=1)
    )
    scores = [[each.score for each in row.classes] for row in second.classification_result.classifications]
    np.testing.assert_array_equal(np.array(scores, np.float32), y)
    assert [(each.model_spec.name, each.model_spec.signature_name) for each in (first, second)] == [
        ("scores", "r"),
        ("scores", "c"),
    ]
    request.tasks.add().CopyFrom(request.tasks[0])
    assert refused(stub.MultiInference, request) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "Duplicate evaluation of signature: r",
    )
    request.tasks[2].method_name = "tensorflow/serving/predict"
    assert refused(stub.MultiInference, request) == (
        grpc.StatusCode.UNIMPLEMENTED,
        "Unsupported signature method_name: tensorflow/serving/predict",
    )
    request.tasks[2].model_spec.name = "linear"
    assert refused(stub.MultiInference, request) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "All ModelSpecs in a MultiInferenceRequest must access the same model name.",
    )
    del request.tasks[:]
    assert refused(stub.MultiInference, request)[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_signatures_of_torch_models(stub: Any, apis: Any, tf: Any) -> None:
    def ask(model: str, **spec: Any) -> Any:
        request = apis.GetModelMetadataRequest(model_spec={"name": model, **spec}, metadata_field=["signature_def"])
        answer = stub.GetModelMetadata(request, timeout=20)
        found = apis.SignatureDefMap()
        assert answer.metadata["signature_def"].Unpack(found)
        assert list(found.signature_def) == ["serving_default"]
        return answer.model_spec, found.signature_def["serving_default"]

    def described(tensors: Any) -> Any:
        return {
            name: (tf.as_dtype(info.dtype), tf.TensorShape(info.tensor_shape).as_list())
            for name, info in tensors.items()
        }

    for spec, version in (({}, 2), ({"version": {"value": 1}}, 1), ({"version_label": "stable"}, 1)):
        answered, signature = ask("linear", **spec)
        assert (answered.name, answered.version.value) == ("linear", version)
        assert signature.method_name == "tensorflow/serving/predict"
        assert described(signature.inputs) == {"x": (tf.float32, [None, 3])}
        assert described(signature.outputs) == {"y": (tf.float32, [None, 2])}
        assert signature.inputs["x"].name == "x"
    _, signature = ask("any-9")
    types = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
    assert {name.rstrip("_"): dtype.name for name, (dtype, _) in described(signature.inputs).items()} == dict(
        zip(types, types, strict=True)
    )
    # Its `forward(x, scale=2.0, **more)` names one argument that clients may give, and no dtypes.
    _, signature = ask("tags")
    assert {name: info.dtype for name, info in signature.inputs.items()} == {"x": 0}  # DT_INVALID
    assert signature.inputs["x"].tensor_shape.unknown_rank
    assert len(signature.outputs) == 0


@pytest.mark.parametrize(
    ("spec", "fields", "code", "said"),
    [
        (
            {"name": "linear"},
            [],
            "INVALID_ARGUMENT",
            "GetModelMetadataRequest must specify at least one metadata_field",
        ),
        ({"name": "linear"}, ["x"], "INVALID_ARGUMENT", "Metadata field x is not supported"),
        ({"name": "linear", "version": {"value": 3}}, ["signature_def"], "NOT_FOUND", "Specific(linear, 3)"),
        ({"name": "linear", "version_label": "x"}, ["signature_def"], "INVALID_ARGUMENT", "version label: x"),
        ({"name": "nobody"}, ["signature_def"], "NOT_FOUND", "Servable not found for request: Latest(nobody)"),
        ({"name": "ghost"}, ["signature_def"], "NOT_FOUND", "Servable not found for request: Latest(ghost)"),
        ({}, ["signature_def"], "INVALID_ARGUMENT", "model_spec.name"),
    ],
)
def test_signatures_that_cannot_be_told(
    stub: Any, apis: Any, spec: Any, fields: list[str], code: str, said: str
) -> None:
    request = apis.GetModelMetadataRequest(model_spec=spec, metadata_field=fields)
    found, why = refused(stub.GetModelMetadata, request)
    assert found is grpc.StatusCode[code]
    assert said in why


def test_status_of_versions(models_stub: Any, apis: Any, wait_for: Any) -> None:
    State = apis.ModelVersionStatus.State  # noqa: N806

    def ask(model: str, **spec: Any) -> Any:
        request = apis.GetModelStatusRequest(model_spec={"name": model, **spec})
        return models_stub.GetModelStatus(request, timeout=20).model_version_status

    def states(*asked: Any, **spec: Any) -> Any:
        return [(each.version, State.Name(each.state), each.status.error_code) for each in ask(*asked, **spec)]

    both = [(2, "AVAILABLE", 0), (1, "AVAILABLE", 0)]
    assert states("linear") == states("any-7") == both
    assert states("linear", version={"value": 1}) == both[1:]
    for label in ("stable", "gone", "x"):  # as TensorFlow Serving, which reads no label here
        assert states("linear", version_label=label) == both
    assert states("elsewhere") == [(3, "AVAILABLE", 0), (1, "AVAILABLE", 0)]
    broken, well = ask("half")
    assert (broken.version, broken.state, broken.status.error_code) == (2, State.END, 2)
    assert "model.pt2" in broken.status.error_message
    assert (well.version, well.state, well.status.error_message) == (1, State.AVAILABLE, "")
    assert list(ask("half", version={"value": 2})) == [broken]


@pytest.mark.parametrize(
    ("spec", "code", "said"),
    [
        ({"name": "linear", "version": {"value": 3}}, "NOT_FOUND", "Could not find version 3 of model linear"),
        ({"name": "nobody"}, "NOT_FOUND", "Could not find any versions of model nobody"),
        ({"name": "ghost"}, "NOT_FOUND", "Could not find any versions of model ghost"),
        ({}, "NOT_FOUND", "Could not find any versions of model "),
        (None, "INVALID_ARGUMENT", "Missing ModelSpec"),
    ],
)
def test_status_that_cannot_be_told(models_stub: Any, apis: Any, spec: Any, code: str, said: str) -> None:
    found, why = refused(models_stub.GetModelStatus, apis.GetModelStatusRequest(model_spec=spec))
    assert found is grpc.StatusCode[code]
    assert said in why


def test_our_own_client_classifies_and_regresses(peer: Any, make: Any) -> None:
    with Client(peer.address) as client:
        rows = [{"x": row} for row in X]
        answer = client.predict("scores", rows, protocol="tfserving_classify")
        np.testing.assert_array_equal(answer.payload["scores"], make.answer(X))
        answer = client.predict("scores", rows, protocol="tfserving_regress")
        np.testing.assert_array_equal(answer.payload["outputs"], make.answer(X).sum(axis=1))
        assert client.predict("linear", {"x": X}, protocol="tfserving", label="stable").version == 1
