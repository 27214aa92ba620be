"""The Open Inference codec against tritonclient."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dl_inference_core.errors import BadRequest
from dl_inference_core.tensors import Form, Request, Response
from dl_inference_core.wire import messages, openinference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tritonclient.grpc as triton
    from tritonclient.grpc import service_pb2

ARRAYS = {
    "FP32": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "FP64": np.array([[np.nan, np.inf, -0.0]]),
    "FP16": np.array([0.5, -2.0, 65504.0], np.float16),
    "BF16": np.array([[0.5], [-3.0]], ml_dtypes.bfloat16),
    "INT8": np.array([-128, 127], np.int8),
    "INT16": np.array([-32768, 32767], np.int16),
    "INT32": np.array([-(2**31), 2**31 - 1], np.int32),
    "INT64": np.array([[-(2**63)], [2**63 - 1]]),
    "UINT8": np.arange(256, dtype=np.uint8).reshape(4, 8, 8),
    "UINT16": np.array([65535, 0], np.uint16),
    "UINT32": np.array([2**32 - 1, 1], np.uint32),
    "UINT64": np.array([2**64 - 1, 1], np.uint64),
    "BOOL": np.array([[True, False], [False, True]]),
    "BYTES": np.array([[b"a", b""], [b"\xff\x00", "€".encode()]], dtype=object),
}
TYPED = [name for name in ARRAYS if name not in ("FP16", "BF16")]


def same(ours: Any, theirs: Any) -> Any:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert ours.tolist() == theirs.tolist() or ours.tobytes() == theirs.tobytes()


def triton_request(array: Any, datatype: Any, outputs: Any = ("y",), **more: Any) -> Any:
    """What tritonclient sends: its own builder, raw contents."""
    from tritonclient.grpc._utils import _get_inference_request

    tensor = triton.InferInput("x", array.shape, datatype)
    tensor.set_data_from_numpy(array)
    return _get_inference_request(
        model_name="textcnn-69",
        inputs=[tensor],
        model_version=more.get("version", ""),
        request_id="abc",
        outputs=[triton.InferRequestedOutput(name) for name in outputs],
        sequence_id=0,
        sequence_start=False,
        sequence_end=False,
        priority=0,
        timeout=None,
        parameters=more.get("parameters"),
    )


@pytest.mark.parametrize("datatype", ARRAYS)
def test_requests_that_tritonclient_builds(datatype: Any) -> None:
    message = triton_request(ARRAYS[datatype], datatype, version="3", parameters={"a": 1, "b": "c", "d": True})
    decoded: Any = openinference.decode_request(message.SerializeToString())
    same(decoded.payload["x"], ARRAYS[datatype])
    assert (decoded.form, decoded.model, decoded.version) == (Form.TENSORS_RAW, "textcnn-69", 3)
    assert (decoded.id, decoded.outputs, decoded.parameters) == ("abc", ("y",), {"a": 1, "b": "c", "d": True})


@pytest.mark.parametrize("as_requested", [False, True])
@pytest.mark.parametrize("form", [Form.TENSORS, Form.TENSORS_RAW])
@pytest.mark.parametrize("datatype", ARRAYS)
def test_answers_that_tritonclient_reads(datatype: Any, form: Any, as_requested: bool) -> None:
    """Raw, whatever the form of the request; `AS_REQUESTED` alone answers a typed request typed."""
    codec: Any = openinference.AS_REQUESTED if as_requested else openinference
    request = Request(payload={"x": ARRAYS["FP32"]}, form=form, model="asked", id="abc")
    body = codec.encode_response(
        Response(payload={"y": ARRAYS[datatype], "z": ARRAYS["FP32"]}, model="m", version=2), request
    )
    message = service_pb2.ModelInferResponse.FromString(body)
    raw = not as_requested or form is Form.TENSORS_RAW or datatype not in TYPED
    assert len(message.raw_output_contents) == (2 if raw else 0)
    assert [output.HasField("contents") for output in message.outputs] == [not raw, not raw]
    assert (message.model_name, message.model_version, message.id) == ("m", "2", "abc")
    if raw:
        theirs = triton.InferResult(message).as_numpy("y")
        ours = ARRAYS[datatype]
        same(ours.astype(theirs.dtype) if datatype == "BF16" else ours, theirs)
    decoded: Any = openinference.decode_response(body)
    same(decoded.payload["y"], ARRAYS[datatype])
    assert (decoded.model, decoded.version, decoded.id) == ("m", 2, "abc")


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_requests(datatype: Any) -> None:
    ours = Request(payload={"x": ARRAYS[datatype]}, form=Form.TENSORS, model=69, outputs=("y",), id="i")
    body = openinference.encode_request(ours)
    message = service_pb2.ModelInferRequest.FromString(body)
    assert not message.raw_input_contents
    assert (message.model_name, message.inputs[0].datatype) == ("69", datatype)
    decoded: Any = openinference.decode_request(message.SerializeToString())
    same(decoded.payload["x"], ARRAYS[datatype])
    assert (decoded.form, decoded.outputs, decoded.id, decoded.version) == (Form.TENSORS, ("y",), "i", None)


@pytest.mark.parametrize("datatype", ARRAYS)
def test_raw_requests_are_what_tritonclient_would_send(datatype: Any) -> None:
    theirs = triton_request(ARRAYS[datatype], datatype)
    ours = Request(payload={"x": ARRAYS[datatype]}, form=Form.TENSORS_RAW, model="textcnn-69", outputs=("y",), id="abc")
    message = service_pb2.ModelInferRequest.FromString(openinference.encode_request(ours))
    assert message.raw_input_contents == theirs.raw_input_contents
    assert message.inputs == theirs.inputs


def test_parameters_keep_their_types() -> None:
    parameters = {"a": True, "b": -(2**63), "c": 2**64 - 1, "d": 0.5, "e": "x"}
    request = Request(payload={}, form=Form.TENSORS, model="m", parameters=parameters, version=-1)
    decoded: Any = openinference.decode_request(openinference.encode_request(request))
    assert decoded.parameters == parameters
    assert [type(decoded.parameters[name]) for name in parameters] == [bool, int, int, float, str]
    assert decoded.version == -1
    assert decoded.form is Form.TENSORS_RAW
    with pytest.raises(TypeError, match="64 bits"):
        openinference.encode_request(Request(payload={}, form=Form.TENSORS, parameters={"a": 2**64}))


def test_large_tensors_are_read_in_place() -> None:
    array = np.arange(1000, dtype=np.float32)
    for form in (Form.TENSORS, Form.TENSORS_RAW):
        body = openinference.encode_request(Request(payload={"x": array}, form=form))
        x: Any = openinference.decode_request(body).payload
        decoded = x["x"]
        assert not decoded.flags.owndata
        same(decoded, array)


def request(datatype: Any = "FP32", shape: Any = (2,), raws: Any = (), **contents: Any) -> Any:
    message = messages.ModelInferRequest(model_name="m", raw_input_contents=raws)
    x = message.inputs.add(name="x", datatype=datatype, shape=shape)
    for name, values in contents.items():
        getattr(x.contents, name).extend(values)
    return message


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (request(fp32_contents=[1]), r'input "x": FP32 of shape \[2\] takes 2 values in fp32_contents; got 1'),
        (request(fp32_contents=[1, 2, 3]), "takes 2 values"),
        (request(), "got 0"),
        (request(shape=(-1,), fp32_contents=[1]), "negative size"),
        (request(shape=(10**12,), fp32_contents=[1]), "takes 1000000000000 values"),
        (request(shape=(10**12,), raws=[b""]), "raw bytes; got 0"),
        (request(shape=(1,) * 65, fp32_contents=[1]), "not possible"),
        (request(shape=(0, 2**62, 2**62)), "holds no values"),
        (request(shape=(10_000_000, 0)), "holds no values; expected at most 1024 rows"),
        (request(int_contents=[1, 2]), "FP32 stands in fp32_contents; got values in int_contents"),
        (request("INT8", int_contents=[1, 300]), "out of the range of int8"),
        (request("UINT16", uint_contents=[1, 70000]), "out of the range of uint16"),
        (request("FP16", fp32_contents=[1, 2]), "FP16 exists only as raw"),
        (request("BF16", fp32_contents=[1, 2]), "BF16 exists only as raw"),
        (request("FP8", fp32_contents=[1, 2]), 'unknown datatype "FP8"; expected one of BOOL, '),
        (request(raws=[bytes(8)], fp32_contents=[1, 2]), "typed contents beside raw"),
        (request(raws=[bytes(7)]), "takes 8 raw bytes; got 7"),
        (request(raws=[bytes(8), bytes(8)]), r'2 raw contents for 1 inputs \("x"\)'),
        (request("BYTES", raws=[b"\x01\x00\x00\x00a"]), "takes 2 strings; got 1"),
        (request("BYTES", raws=[b"\x05\x00\x00\x00a"]), "runs past the end"),
        (request("BYTES", shape=(1,), raws=[b"\x01\x00\x00\x00abc"]), "2 bytes are left over"),
        (messages.ModelInferRequest(model_version="newest"), 'model_version is "newest"; expected a whole number'),
        (messages.ModelInferRequest(model_version="9" * 9999), "expected a whole number"),
        (messages.ModelInferRequest(model_version="1_0"), "expected a whole number"),
        (messages.ModelInferRequest(raw_input_contents=[b""]), r"1 raw contents for 0 inputs \(none\)"),
    ],
)
def test_what_does_not_fit_is_a_bad_request(message: Any, match: Any) -> None:
    with pytest.raises(BadRequest, match=match):
        openinference.decode_request(message.SerializeToString())


def test_shared_memory_classification_and_twins_are_refused() -> None:
    message = request(fp32_contents=[1, 2])
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    with pytest.raises(BadRequest, match='input "x": the parameter "shared_memory_region" is not served'):
        openinference.decode_request(message.SerializeToString())
    classes = triton_request(ARRAYS["FP32"], "FP32")
    classes.outputs[0].parameters["classification"].int64_param = 3
    with pytest.raises(BadRequest, match='output "y": the parameter "classification" is not served'):
        openinference.decode_request(classes.SerializeToString())
    twins = request(fp32_contents=[1, 2])
    twins.inputs.append(twins.inputs[0])
    with pytest.raises(BadRequest, match='input "x" is there twice'):
        openinference.decode_request(twins.SerializeToString())


def test_what_the_protocol_cannot_hold_is_a_type_error() -> None:
    ours = Request(payload={}, form=Form.TENSORS)
    for payload in ({"y": np.array([1j])}, {"y": [None]}, {"label": {"a": 1}}):
        with pytest.raises(TypeError):
            openinference.encode_response(Response(payload=payload), ours)
