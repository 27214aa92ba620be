"""Triton's own client against a node, and against a gateway in front of it."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tritonclient.grpc as triton
    import tritonclient.grpc.aio as triton_aio
    from tritonclient.grpc import service_pb2, service_pb2_grpc
    from tritonclient.utils import InferenceServerException

X = np.array([[1, 2, 3], [4, 5, 6.5]], np.float32)
TIS = "/com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService/TisPredict"


@pytest.fixture
def client(peer: Any) -> Iterator[Any]:
    with triton.InferenceServerClient(peer.address) as client:
        yield client


def tensors(kind: Any = triton, **values: tuple[str, Any]) -> list[Any]:
    inputs = []
    for name, (datatype, value) in values.items():
        inputs.append(kind.InferInput(name, value.shape, datatype))
        inputs[-1].set_data_from_numpy(value)
    return inputs


def test_live_ready_and_metadata(client: Any, tasks: dict[str, int]) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    for name, task in tasks.items():
        assert client.is_model_ready(name), name
        assert client.is_model_ready(f"{name}-{task}"), name
    assert client.is_model_ready("linear", "1")
    assert client.get_server_metadata().name == "dl-inference-core"


def test_a_version_that_is_not_there_is_not_ready(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="it has 1, 2"):
        client.is_model_ready("linear", "5")


def test_model_metadata(client: Any) -> None:
    metadata = client.get_model_metadata("linear")
    assert metadata.name == "linear"
    assert metadata.platform == "pytorch_exported"
    assert client.get_model_metadata("echo").platform == "pytorch_eager"
    assert sorted(metadata.versions) == ["1", "2"]
    (x,), (y,) = metadata.inputs, metadata.outputs
    assert (x.name, x.datatype, list(x.shape)) == ("x", "FP32", [-1, 3])
    assert (y.name, y.datatype, list(y.shape)) == ("y", "FP32", [-1, 2])
    branches = client.get_model_metadata("branches")
    assert [tensor.name for tensor in branches.inputs] == ["a", "b"]
    assert [tensor.name for tensor in branches.outputs] == ["sum", "difference"]


def test_metadata_of_an_unknown_model(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="unknown") as caught:
        client.get_model_metadata("unknown")
    assert caught.value.status() == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize(("version", "factor"), [("", 10), ("1", 1), ("2", 10)])
def test_infer(client: Any, make: Any, version: str, factor: int) -> None:
    result = client.infer("linear", tensors(x=("FP32", X)), model_version=version, request_id="an-id")
    np.testing.assert_array_equal(result.as_numpy("y"), make.answer(X, factor))
    answer = result.get_response()
    assert answer.raw_output_contents
    assert (answer.model_name, answer.model_version, answer.id) == ("linear", version or "2", "an-id")


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compressed(client: Any, make: Any, compression: str) -> None:
    result = client.infer("linear", tensors(x=("FP32", X)), compression_algorithm=compression)
    np.testing.assert_array_equal(result.as_numpy("y"), make.answer(X, 10))


@pytest.mark.parametrize("wanted", [["difference"], ["difference", "sum"], []])
def test_requested_outputs(client: Any, wanted: list[str]) -> None:
    a, b = np.full((1, 2), 3, np.float32), np.full((1, 2), 5, np.float32)
    outputs = [triton.InferRequestedOutput(name) for name in wanted]
    result = client.infer("branches", tensors(a=("FP32", a), b=("FP32", b)), outputs=outputs or None)
    expected = {"sum": a + b, "difference": a - b}
    assert [output.name for output in result.get_response().outputs] == (wanted or list(expected))
    for output in result.get_response().outputs:
        np.testing.assert_array_equal(result.as_numpy(output.name), expected[output.name])


def test_an_output_that_is_none(client: Any) -> None:
    with pytest.raises(
        InferenceServerException, match=r"signature: z Outputs expected to be in the set \{y\}"
    ) as caught:
        client.infer("linear", tensors(x=("FP32", X)), outputs=[triton.InferRequestedOutput("z")])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


DTYPES = {
    "bool_": ("BOOL", np.array([[True, False]])),
    "uint8": ("UINT8", np.array([[0, 255]], np.uint8)),
    "int8": ("INT8", np.array([[-128, 127]], np.int8)),
    "int16": ("INT16", np.array([[-(2**15), 2**15 - 1]], np.int16)),
    "int32": ("INT32", np.array([[-(2**31), 2**31 - 1]], np.int32)),
    "int64": ("INT64", np.array([[-(2**63), 2**63 - 1]])),
    "float16": ("FP16", np.array([[0.1, -65504]], np.float16)),
    "bfloat16": ("BF16", np.array([[0.1, 3e38]], ml_dtypes.bfloat16)),
    "float32": ("FP32", np.array([[0.1, np.inf]], np.float32)),
    "float64": ("FP64", np.array([[0.1, np.nan]])),
}


def test_every_dtype(client: Any) -> None:
    result = client.infer("dtypes", tensors(**DTYPES))
    answer = result.get_response()
    assert {output.name: output.datatype for output in answer.outputs} == {
        name: datatype for name, (datatype, _) in DTYPES.items()
    }
    for name, (_, value) in DTYPES.items():
        given = result.as_numpy(name)
        assert given.dtype == value.dtype
        assert given.tobytes() == value.tobytes(), name


def test_strings_and_parameters(client: Any) -> None:
    words = np.array([["one", "zwölf"], ["", "four"]], dtype=object)
    result = client.infer("words", tensors(words=("BYTES", words)), parameters={"top": 3, "mode": "fast", "on": True})
    expected = [[b"ONE", "zwölf".encode().upper()], [b"", b"FOUR"]]
    assert result.as_numpy("capitals").tolist() == expected
    assert result.as_numpy("lengths").tolist() == [[3.0], [6.0], [0.0], [4.0]]
    assert result.as_numpy("parameters")[0] == b"[('mode', 'fast'), ('on', True), ('top', 3)]"


@pytest.mark.parametrize(
    ("name", "datatype", "value", "said"),
    [
        ("z", "FP32", X, r'"x" \(float32, \[\?, 3\]\).*"z"'),
        ("x", "FP64", X.astype(np.float64), r'"x" \(float32, \[\?, 3\]\).*float64'),
        ("x", "BF16", X.astype(ml_dtypes.bfloat16), r'"x" \(float32, \[\?, 3\]\).*bfloat16'),
        ("x", "FP32", X[0], r'"x" \(float32, \[\?, 3\]\).*\[3\]'),
        ("x", "BYTES", np.array([[b"a", b"b", b"c"]], dtype=object), r'"x" \(float32, \[\?, 3\]\)'),
    ],
    ids=["name", "dtype", "bfloat16", "shape", "strings"],
)
def test_what_does_not_fit(client: Any, name: str, datatype: str, value: Any, said: str) -> None:
    with pytest.raises(InferenceServerException, match=said) as caught:
        client.infer("linear", tensors(**{name: (datatype, value)}))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_an_unknown_model(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="nobody") as caught:
        client.infer("nobody", tensors(x=("FP32", X)))
    assert caught.value.status() == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize("version", ["3", "0", "99999999999"])
def test_a_version_that_is_not_there(client: Any, version: str) -> None:
    with pytest.raises(InferenceServerException, match="it has 1, 2") as caught:
        client.infer("linear", tensors(x=("FP32", X)), model_version=version)
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def asking(process: Any, method: str) -> Any:
    """(message): the answer by "ModelInfer", the protocol's own path, or "TisPredict", the access service's."""
    if method == "ModelInfer":
        stub = service_pb2_grpc.GRPCInferenceServiceStub(process.channel).ModelInfer
    else:
        stub = process.channel.unary_unary(
            TIS,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )
    return lambda message: stub(message, timeout=20)


@pytest.fixture(params=["ModelInfer", "TisPredict"])
def infer(request: pytest.FixtureRequest, peer: Any) -> Any:
    """(message): the answer of a node, or of a gateway in front of it, by either method."""
    return asking(peer, request.param)


def message(name: str, **inputs: tuple[str, list[int], str, list[Any]]) -> Any:
    request = service_pb2.ModelInferRequest(model_name=name)
    for key, (datatype, shape, kind, values) in inputs.items():
        tensor = request.inputs.add(name=key, datatype=datatype, shape=shape)
        getattr(tensor.contents, kind).extend(values)
    return request


@pytest.mark.parametrize("name", ["linear", "whatever-7"])
def test_typed_contents_are_answered_by_raw_ones(infer: Any, make: Any, name: str) -> None:
    """As Triton answers; its client reads numbers from nowhere else."""
    answer = infer(message(name, x=("FP32", [2, 3], "fp32_contents", X.ravel().tolist())))
    assert [output.HasField("contents") for output in answer.outputs] == [False]
    assert len(answer.raw_output_contents) == 1
    np.testing.assert_array_equal(triton.InferResult(answer).as_numpy("y"), make.answer(X, 10))


def test_typed_strings_are_answered_by_raw_ones(infer: Any) -> None:
    request = message("words", words=("BYTES", [2], "bytes_contents", [b"a", b"bc"]))
    request.outputs.add(name="capitals")
    answer = infer(request)
    assert answer.raw_output_contents == [b"\x01\x00\x00\x00A\x02\x00\x00\x00BC"]
    assert triton.InferResult(answer).as_numpy("capitals").tolist() == [b"A", b"BC"]


@pytest.fixture(scope="module", params=["node", "gateway"])
def as_requested(request: pytest.FixtureRequest, serve: Any, models: Any, routes: Any) -> Iterator[Any]:
    """A node that answers ModelInfer in the form of the request, and a gateway in front of it."""
    config = f'[models]\nopeninference_outputs = "as_requested"\nnamed.linear = {{ path = "{models / "linear"}" }}'
    node = serve(config)
    if request.param == "node":
        yield node
    else:
        gateway = serve(routes({"linear": 7}, node))
        yield gateway
        gateway.end()
    node.end()


@pytest.mark.parametrize("method", ["ModelInfer", "TisPredict"])
def test_answers_as_requested(as_requested: Any, make: Any, method: str) -> None:
    """TisPredict is answered raw all the same, through a gateway too."""
    infer = asking(as_requested, method)
    typed = message("linear", x=("FP32", [2, 3], "fp32_contents", X.ravel().tolist()))
    raw = message("linear", x=("FP32", [2, 3], "fp32_contents", []))
    raw.raw_input_contents.append(X.tobytes())
    expected = make.answer(X, 10)
    for request in (typed, raw) * 3:
        answer = infer(request)
        (y,) = answer.outputs
        if method == "ModelInfer" and request is typed:
            assert not answer.raw_output_contents
            assert list(y.contents.fp32_contents) == expected.ravel().tolist()
        else:
            assert not y.HasField("contents")
            np.testing.assert_array_equal(triton.InferResult(answer).as_numpy("y"), expected)


def test_a_priority_and_a_timeout_as_tritonclient_sends_them(client: Any, make: Any) -> None:
    for more in ({"priority": 2}, {"timeout": 10_000_000}, {"priority": 1, "timeout": 0}):
        result = client.infer("linear", tensors(x=("FP32", X)), **more)
        np.testing.assert_array_equal(result.as_numpy("y"), make.answer(X, 10))
    with pytest.raises(InferenceServerException, match='"timeout" is int64_param -1; expected') as caught:
        client.infer("linear", tensors(x=("FP32", X)), timeout=-1)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_raw_and_typed_contents_mixed(infer: Any) -> None:
    request = message("linear", x=("FP32", [1, 3], "fp32_contents", [1, 2, 3]))
    request.raw_input_contents.append(X[:1].tobytes())
    with pytest.raises(grpc.RpcError) as caught:
        infer(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "raw" in caught.value.details()


@pytest.mark.parametrize("version", ["one", "1.0", "../1", "/1", "1\0", " 1"])
def test_a_version_that_is_no_number(infer: Any, version: str) -> None:
    request = message("linear", x=("FP32", [1, 3], "fp32_contents", [1, 2, 3]))
    request.model_version = version
    with pytest.raises(grpc.RpcError) as caught:
        infer(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "model_version" in caught.value.details()


def test_the_async_client_with_many_at_once(peer: Any, make: Any) -> None:
    async def run() -> list[Any]:
        async with triton_aio.InferenceServerClient(peer.address) as client:
            assert await client.is_server_live()
            assert await client.is_model_ready("linear")
            batches = [np.full((1 + number % 5, 3), number, np.float32) for number in range(100)]
            results = await asyncio.gather(
                *(client.infer("linear", tensors(triton_aio, x=("FP32", batch))) for batch in batches)
            )
            return list(zip(batches, results, strict=True))

    for batch, result in asyncio.run(run()):
        np.testing.assert_array_equal(result.as_numpy("y"), make.answer(batch, 10))
