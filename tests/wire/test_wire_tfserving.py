"""The TF Serving codec against TensorFlow's own messages and tensor functions."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dl_inference_core.errors import BadRequest
from dl_inference_core.tensors import Form, Request, Response
from dl_inference_core.wire import messages, tfserving

ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "float64": np.array([[np.nan, np.inf, -0.0]]),
    "float16": np.array([0.5, -2.0, 65504.0], np.float16),
    "bfloat16": np.array([[0.5], [-3.0]], ml_dtypes.bfloat16),
    "int8": np.array([-128, 127], np.int8),
    "int16": np.array([-32768, 32767], np.int16),
    "int32": np.array([-(2**31), 2**31 - 1], np.int32),
    "int64": np.array([[-(2**63)], [2**63 - 1]]),
    "uint8": np.arange(256, dtype=np.uint8).reshape(4, 8, 8),
    "uint16": np.array([65535, 0], np.uint16),
    "uint32": np.array([2**32 - 1, 1], np.uint32),
    "uint64": np.array([2**64 - 1, 1], np.uint64),
    "bool": np.array([[True, False], [False, True]]),
    "complex64": np.array([1 + 2j, -0.5j], np.complex64),
    "complex128": np.array([[1 + 2j], [3.5]], np.complex128),
    "string": np.array([[b"a", b""], [b"\xff\x00", "€".encode()]], dtype=object),
    "scalar": np.array(3.5, np.float32),
    "nothing": np.zeros((0, 3), np.int64),
    "strided": np.arange(12, dtype=np.int32).reshape(3, 4)[::2, ::-1],
    "big-endian": np.array([1.5, 2.5], ">f4"),
}


@pytest.fixture(scope="module")
def tf() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def predict_pb2(tf: Any) -> Any:
    from tensorflow_serving.apis import predict_pb2

    return predict_pb2


def same(ours: Any, theirs: Any) -> Any:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype.newbyteorder("=")
    assert ours.tobytes() == theirs.astype(theirs.dtype.newbyteorder("=")).tobytes() or (ours == theirs).all()


def tensor(dtype: Any, shape: Any = (), **fields: Any) -> Any:
    message = messages.PredictRequest()
    x = message.inputs["x"]
    x.dtype = dtype
    for size in shape:
        x.tensor_shape.dim.add(size=size)
    for name, value in fields.items():
        if isinstance(value, bytes | bool):
            setattr(x, name, value)
        else:
            getattr(x, name).extend(value)
    return message.SerializeToString()


def decode(*args: Any, **fields: Any) -> Any:
    payload: Any = tfserving.decode_request(tensor(*args, **fields)).payload
    return payload["x"]


@pytest.mark.parametrize("name", ARRAYS)
def test_requests_that_tensorflow_builds(tf: Any, predict_pb2: Any, name: Any) -> None:
    array = ARRAYS[name]
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "textcnn-69"
    request.model_spec.version.value = 3
    request.model_spec.signature_name = "classify"
    request.output_filter.extend(["b", "a"])
    request.inputs["x"].CopyFrom(tf.make_tensor_proto(array.astype(array.dtype.newbyteorder("="))))
    decoded: Any = tfserving.decode_request(request.SerializeToString())
    same(decoded.payload["x"], array)
    assert (decoded.form, decoded.model, decoded.version) == (Form.TENSORS, "textcnn-69", 3)
    assert (decoded.signature, decoded.outputs) == ("classify", ("b", "a"))


@pytest.mark.parametrize("name", ARRAYS)
def test_requests_that_tensorflow_reads(tf: Any, predict_pb2: Any, name: Any) -> None:
    ours = Request(payload={"x": ARRAYS[name]}, form=Form.TENSORS, model=69, signature="s", outputs=("y",))
    request = predict_pb2.PredictRequest.FromString(tfserving.encode_request(ours))
    same(tf.make_ndarray(request.inputs["x"]), ARRAYS[name])
    assert (request.model_spec.name, request.model_spec.HasField("version")) == ("69", False)
    assert (request.model_spec.signature_name, list(request.output_filter)) == ("s", ["y"])


@pytest.mark.parametrize("name", ARRAYS)
def test_answers_go_out_typed(tf: Any, predict_pb2: Any, name: Any) -> None:
    request = Request(payload={}, form=Form.TENSORS, model="asked", signature="")
    body = tfserving.encode_response(Response(payload={"y": ARRAYS[name]}, model="m", version=2), request)
    answer = predict_pb2.PredictResponse.FromString(body)
    assert answer.outputs["y"].tensor_content == b""
    same(tf.make_ndarray(answer.outputs["y"]), ARRAYS[name])
    spec = answer.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("m", 2, "serving_default")
    decoded: Any = tfserving.decode_response(body)
    same(decoded.payload["y"], ARRAYS[name])
    assert (decoded.model, decoded.version) == ("m", 2)


def test_clients_read_float_val(predict_pb2: Any) -> None:
    body = tfserving.encode_response(
        Response(payload=np.array([1.5, 2.5], np.float32)), Request(payload={}, form=Form.TENSORS, model="m")
    )
    answer = predict_pb2.PredictResponse.FromString(body)
    assert list(answer.outputs["output"].float_val) == [1.5, 2.5]
    assert not answer.model_spec.HasField("version")
    assert answer.model_spec.name == "m"


@pytest.mark.parametrize(
    ("dtype", "fields", "expected"),
    [
        (1, {"float_val": [2.5]}, np.full((2, 2), 2.5, np.float32)),
        (9, {"int64_val": [1, 2]}, np.array([[1, 2], [2, 2]])),
        (7, {"string_val": [b"a"]}, np.full((2, 2), b"a", object)),
        (8, {"scomplex_val": [1, 2, 3, 4]}, np.array([[1 + 2j, 3 + 4j], [3 + 4j, 3 + 4j]], np.complex64)),
        (1, {}, np.zeros((2, 2), np.float32)),
        (7, {}, np.full((2, 2), b"", object)),
        (10, {"tensor_content": b"\x00\x01\x02\x00"}, np.array([[False, True], [True, False]])),
        (7, {"tensor_content": b"\x01\x00\x02\x81\x00ab" + b"cd"}, np.array([[b"a", b""], [b"bc", b"d"]], object)),
    ],
)
def test_short_lists_repeat_their_last_value(dtype: Any, fields: Any, expected: Any) -> None:
    decoded = decode(dtype, (2, 2), **fields)
    assert decoded.dtype == expected.dtype
    assert decoded.tolist() == expected.tolist()


def test_packed_unpacked_split_and_alien_values_are_read_as_protobuf_reads_them() -> None:
    packed, unpacked, alien = b"\x2a\x04\x00\x00\x80\x3f", b"\x2d\x00\x00\x00\x40", b"\x28\x05"
    shape = b"\x12\x04\x12\x02\x08\x04"
    for values in (packed + unpacked + packed + unpacked, alien + packed + unpacked + alien + packed + unpacked):
        proto = messages.TensorProto.FromString(b"\x08\x01" + shape + values)
        assert tfserving.decode_tensor(proto, "x", tfserving.Room()).tolist() == [1, 2, 1, 2]


def test_a_large_tensor_is_not_copied_apart() -> None:
    content = bytes(4 * 1000)
    decoded = decode(1, (10, 100), tensor_content=content)
    assert not decoded.flags.owndata
    assert decoded.tobytes() == content


@pytest.mark.parametrize(
    ("dtype", "shape", "fields", "match"),
    [
        (0, (), {}, 'input "x": dtype DT_INVALID is not served'),
        (20, (), {}, "DT_RESOURCE"),
        (101, (), {"float_val": [1]}, "dtype 101"),
        (1, (-1,), {"float_val": [1]}, "negative size"),
        (1, (2,), {"float_val": [1, 2, 3]}, r"shape \[2\] takes at most 2 values; got 3"),
        (1, (2,), {"tensor_content": b"abc"}, "takes 8 bytes of tensor_content; got 3"),
        (1, (0,), {"float_val": [1]}, "at most 0 values; got 1"),
        (4, (1,), {"int_val": [256]}, "out of the range of uint8, 0 to 255"),
        (19, (1,), {"half_val": [70000]}, "out of the range"),
        (8, (1,), {"scomplex_val": [1]}, "expected pairs"),
        (1, (1,) * 65, {"float_val": [1]}, "not possible"),
        (1, (0, 2**62, 2**62), {}, "holds no values"),
        (1, (10_000_000, 0), {}, "holds no values"),
        (7, (3,), {"tensor_content": b"\x01\x01ab"}, "does not hold 3 strings"),
        (7, (2**62,), {"tensor_content": b"\x01a"}, "does not hold"),
        (7, (1,), {"tensor_content": b"\xff" * 9}, "does not hold"),
    ],
)
def test_what_does_not_fit_is_a_bad_request(dtype: Any, shape: Any, fields: Any, match: Any) -> None:
    with pytest.raises(BadRequest, match=match):
        decode(dtype, shape, **fields)


def test_an_unknown_rank_is_a_bad_request() -> None:
    message = messages.PredictRequest()
    message.inputs["x"].dtype = 1
    message.inputs["x"].tensor_shape.unknown_rank = True
    with pytest.raises(BadRequest, match="rank"):
        tfserving.decode_request(message.SerializeToString())


@pytest.mark.parametrize("fields", [{"float_val": [1]}, {}])
def test_a_small_message_cannot_claim_much_memory(fields: Any) -> None:
    with pytest.raises(BadRequest, match="repeating its last value"):
        decode(1, (10**6, 10**6), **fields)
    with pytest.raises(BadRequest, match="repeating its last value"):
        decode(1, (2**62, 2**62), **fields)


def test_many_small_inputs_cannot_claim_much_memory_together() -> None:
    message = messages.PredictRequest()
    for index in range(5):
        x = message.inputs[f"x{index}"]
        x.dtype = 1
        x.tensor_shape.dim.add(size=5 * 1024 * 1024)
        x.float_val.append(1)
    with pytest.raises(BadRequest, match="repeating its last value"):
        tfserving.decode_request(message.SerializeToString())


def test_version_labels_pass_both_ways(predict_pb2: Any) -> None:
    message = predict_pb2.PredictRequest()
    message.model_spec.version_label = "stable"
    decoded = tfserving.decode_request(message.SerializeToString())
    assert (decoded.label, decoded.version) == ("stable", None)
    again = predict_pb2.PredictRequest.FromString(tfserving.encode_request(decoded))
    assert (again.model_spec.version_label, again.model_spec.HasField("version")) == ("stable", False)


def test_a_version_comes_before_a_label_as_only_one_can_be_sent(predict_pb2: Any) -> None:
    both = Request(payload={}, form=Form.TENSORS, model="m", version=3, label="stable")
    spec = predict_pb2.PredictRequest.FromString(tfserving.encode_request(both)).model_spec
    assert (spec.version.value, spec.WhichOneof("version_choice")) == (3, "version")


def test_dtypes_have_tensorflows_numbers(tf: Any) -> None:
    for array in ARRAYS.values():
        dtype = array.dtype.newbyteorder("=")
        number = tfserving.dtype_number(dtype)
        assert number == (7 if dtype.kind == "O" else tf.as_dtype(dtype).as_datatype_enum)
        assert tfserving.dtype_of(number) == dtype
    assert tfserving.dtype_number(None) == tfserving.dtype_number(np.dtype("M8[D]")) == 0
    assert tfserving.dtype_of(0) is tfserving.dtype_of(20) is tfserving.dtype_of(101) is None


def test_a_version_below_one_is_passed_on() -> None:
    request = Request(payload={}, form=Form.TENSORS, model="m", version=-3)
    assert tfserving.decode_request(tfserving.encode_request(request)).version == -3


def test_what_tensorflow_cannot_hold_is_a_type_error() -> None:
    request = Request(payload={}, form=Form.TENSORS)
    for payload in ({"y": np.array(["2020-01-01"], "M8[D]")}, {"y": [None]}, [[1], [1, 2]], {"label": {"a": 1}}):
        with pytest.raises(TypeError):
            tfserving.encode_response(Response(payload=payload), request)
