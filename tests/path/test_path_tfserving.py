"""TensorFlow Serving's own client against a node, and against a gateway in front of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest

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
    assert '"z"' in message
    assert '"y"' in message


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


def test_a_version_label(predict: Any, request_for: Any) -> None:
    message = request_for("linear", x=X)
    message.model_spec.version_label = "stable"
    code, why = refusal(predict, message)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "stable" in why


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
