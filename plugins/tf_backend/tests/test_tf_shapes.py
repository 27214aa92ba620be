"""Inputs of other shapes than a signature's, which the command `tfserving` leaves to the graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from dl_inference_tf_backend.backend import TensorFlowBackend
from dl_inference_tf_backend.testing import SavedModelMaker
from dl_inference_tfserving import command as tfserving_command
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from dl_inference_core.cli import main
from dl_inference_core.config import NamedModel
from dl_inference_core.errors import BadRequest
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.loading import Loader
from dl_inference_core.plugins import Kind, Plugins
from dl_inference_core.tensors import Form, Request, Tensor


@pytest.fixture(scope="module", params=["alone", "batched"])
def node(
    request: pytest.FixtureRequest,
    make_saved: SavedModelMaker,
    tmp_path_factory: pytest.TempPathFactory,
    serve_node: Any,
) -> Iterator[Any]:
    """What `dl-inference-core tfserving` serves, without and with --enable_batching."""
    root = tmp_path_factory.mktemp("models")
    make_saved.half_plus_two(root / "half_plus_two" / "1")
    make_saved.dense(root / "dense" / "1")
    configs = [f'config {{ name: "{name}" base_path: "{root / name}" }}' for name in ("half_plus_two", "dense")]
    (root / "models.config").write_text(f"model_config_list {{ {' '.join(configs)} }}")
    arguments = [f"--model_config_file={root / 'models.config'}", "--tensorflow_intra_op_parallelism=1"]
    if request.param == "batched":
        arguments.append("--enable_batching")
    command = tfserving_command.tfserving
    transport = Plugins().get(Kind.TRANSPORTS, "grpcio", "test")
    with main.make_context("dl-inference-core", ["tfserving"]) as parent:
        given = command.make_context("tfserving", arguments, parent=parent).params
    config, _ = tfserving_command.config_of(given, transport)
    with serve_node(config.model_copy(update={"port": 0, "http_port": 0})) as served:
        yield served


@pytest.fixture
def predict(node: Any) -> Iterator[Callable[[str, Any], Any]]:
    """(model, x): the outputs that TensorFlow Serving's client reads."""
    with grpc.insecure_channel(f"127.0.0.1:{node.grpc_port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        def predict(model: str, x: Any) -> Any:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = model
            request.inputs["x"].CopyFrom(tf.make_tensor_proto(x))
            return tf.make_ndarray(stub.Predict(request, timeout=30).outputs["y"])

        yield predict


def test_tensorflow_servings_own_example_is_answered(node: Any, predict: Callable[[str, Any], Any]) -> None:
    answer = {"predictions": [2.5, 3.0, 4.5]}
    assert node.ask("half_plus_two:predict", {"instances": [1.0, 2.0, 5.0]}) == (200, answer)
    assert node.ask("half_plus_two:predict", {"instances": [[1.0], [5.0]]}) == (200, {"predictions": [[2.5], [4.5]]})
    for shape in ((), (3,), (2, 3), (1, 1, 2)):
        x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        answered = predict("half_plus_two", x)
        assert answered.shape == shape
        np.testing.assert_array_equal(answered, x / 2 + 2)


def test_what_the_graph_refuses_is_an_invalid_argument_in_its_words(
    node: Any, predict: Callable[[str, Any], Any]
) -> None:
    for x, words in (
        (np.ones((1, 4), np.float32), "Matrix size-incompatible"),
        (np.float32([1, 2]), "ndims"),  # "ndims must be >= 2" or, by oneDNN, "different ndims"
    ):
        with pytest.raises(grpc.RpcError) as error:
            predict("dense", x)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in error.value.details()
    status, answer = node.ask("dense:predict", {"instances": [[1, 2, 3, 4]]})
    assert (status, "Matrix size-incompatible" in answer["error"]) == (400, True)


def test_dtypes_are_checked_all_the_same(predict: Callable[[str, Any], Any]) -> None:
    with pytest.raises(grpc.RpcError) as error:
        predict("half_plus_two", np.ones((1, 1)))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "does not take dtype float64" in error.value.details()


def test_requests_of_all_shapes_at_once_get_their_own_answers(predict: Callable[[str, Any], Any]) -> None:
    """Each layout comes often enough that the node knows it by its template."""

    def ask(number: int) -> None:
        shape = [(1, 1), (3,), (2, 1), (1, 3), ()][number % 5]
        x = np.full(shape, number, np.float32)
        np.testing.assert_array_equal(predict("half_plus_two", x), x / 2 + 2)
        if number % 7 == 0:
            with pytest.raises(grpc.RpcError):
                predict("dense", np.ones((1, 4), np.float32))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(200)))


def load(folder: Path, **defaults: Any) -> Any:
    backend = TensorFlowBackend(TensorFlowBackend.Options(intra_op_threads=1))
    loader = Loader(backends={backend.name: backend}, handlers={"default": Handler}, defaults=defaults)
    return loader.load(NamedModel(path=folder), folder)


def test_they_are_run_alone_and_neither_padded_nor_split(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(saved("half_plus_two"), folder)
    (folder / "model.toml").write_text(
        "check_shapes = false\n[batching]\nmax_rows = 4\nallowed_rows = [2, 4]\n", encoding="utf-8"
    )
    loaded = load(folder)
    (instance,), batching = loaded.instances, loaded.batching
    xs = [np.full(shape, n, np.float32) for n, shape in enumerate([(1, 1), (6,), (1, 1), (6,), (1, 2), (5, 1)])]
    requests = [Request(payload={"x": x}, form=Form.TENSORS) for x in xs]
    parts = [batching.part(n, request, instance.handler.preprocess(request)) for n, request in enumerate(requests)]
    calls: list[tuple[int, ...]] = []

    def model(inputs: Any) -> Any:
        calls.append(inputs["x"].shape)
        return instance.handler.run_batch(instance.model, inputs, requests[:1])

    answers: dict[int, Tensor] = {}
    for batch in batching.batches(parts):
        for part, outputs in zip(batch, batching.run(batch, model), strict=True):
            answers[part.queued] = outputs["y"]
    assert calls == [(2, 1), (4, 1), (2, 1), (6,), (6,), (1, 2)]  # that of 5 rows is split and padded, as ever
    for number, x in enumerate(xs):
        np.testing.assert_array_equal(answers[number], x / 2 + 2)
    loaded.model.close()


def test_an_operation_that_is_not_implemented_for_a_shape_is_the_clients_fault(saved: Callable[[str], Path]) -> None:
    loaded = load(saved("defaults"), check_shapes=False)
    (instance,) = loaded.instances
    x = np.ones((2, 1) * 6, np.float32)
    shift = np.ones((1, 2) * 6, np.float32)
    inputs = instance.handler.preprocess(Request(payload={"x": x, "shift": shift}, form=Form.TENSORS))
    with pytest.raises(BadRequest, match="not supported yet"):
        instance.model(inputs)
    loaded.model.close()
