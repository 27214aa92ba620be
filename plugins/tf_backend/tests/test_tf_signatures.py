"""Signatures of SavedModels: which are served, inputs with defaults, and versions without any signature."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dl_inference_tf_backend.backend import TensorFlowBackend
from dl_inference_tf_backend.testing import SavedModelMaker, rewrite_signatures

from dl_inference_core.config import NamedModel
from dl_inference_core.errors import BadRequest, ModelError
from dl_inference_core.node.backend import Model
from dl_inference_core.node.handling import Handler
from dl_inference_core.node.loading import Loader
from dl_inference_core.node.model import State
from dl_inference_core.node.repository import Repository
from dl_inference_core.node.version import Loaded
from dl_inference_core.tensors import Form, Request, Tensor
from dl_inference_core.testing.memory import answered
from dl_inference_core.wire.protocol import PROTOCOLS

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def load(folder: Path) -> Model:
    options = TensorFlowBackend.Options(intra_op_threads=1)
    return TensorFlowBackend(options).load(folder, TensorFlowBackend.ModelOptions(), "cpu")


def load_with_handler(folder: Path, **defaults: Any) -> Loaded:
    backend = TensorFlowBackend(TensorFlowBackend.Options(intra_op_threads=1))
    loader = Loader(backends={backend.name: backend}, handlers={"default": Handler}, defaults=defaults)
    return loader.load(NamedModel(path=folder), folder)


def request_of(signature: str = "", **inputs: Tensor) -> Request:
    return Request(payload=inputs, form=Form.TENSORS, signature=signature)


# Versions that cannot answer


@pytest.mark.parametrize(
    ("kind", "reason"), [("unsigned", "it was saved without any"), ("ragged", '"ragged" is composite')]
)
def test_a_version_without_a_signature_does_not_replace_one_that_answers(
    saved: Callable[[str], Path], tmp_path: Path, kind: str, reason: str
) -> None:
    shutil.copytree(saved("double"), tmp_path / "m" / "1")
    protocol = PROTOCOLS["tfserving"]
    request = Request(payload={"x": X}, form=Form.TENSORS, model="m")
    body = protocol.codec.encode_request(request)

    async def answered_by(repository: Repository) -> int | None:
        return protocol.codec.decode_response(await answered(repository.models["m"], protocol, body)).version

    async def main() -> None:
        backend = TensorFlowBackend(TensorFlowBackend.Options(intra_op_threads=1))
        repository = Repository(
            tmp_path, backends={backend.name: backend}, handlers={"default": Handler}, poll_interval_s=3600
        )
        await repository.start()
        try:
            assert await answered_by(repository) == 1
            shutil.copytree(saved(kind), tmp_path / "m" / "2")
            await repository.look()
            await repository.look()
            await repository.settle()
            assert await answered_by(repository) == 1
            status = repository.models["m"].versions[2]
            assert status.state is State.FAILED
            assert "no signature that can be served" in status.error
            assert reason in status.error
        finally:
            await repository.close()

    asyncio.run(main())


HANDLER = """
from dl_inference_core.node.handling import Handler

class Own(Handler):
    def {method}(self, *arguments):
        return {{}}
"""
PROCESSOR = "def {method}(*arguments, **kwargs):\n    return 0\n"


@pytest.mark.parametrize(
    ("file", "source", "method", "loads"),
    [
        ("handler.py", HANDLER, "run_model", True),
        ("handler.py", HANDLER, "run_batch", True),
        ("handler.py", HANDLER, "preprocess", False),
        ("processor.py", PROCESSOR, "run_model", True),
        ("processor.py", PROCESSOR, "postprocess", False),
    ],
)
def test_a_model_without_signatures_needs_a_handler_that_runs_it_by_other_means(
    saved: Callable[[str], Path], tmp_path: Path, file: str, source: str, method: str, loads: bool
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(saved("unsigned"), folder)
    (folder / file).write_text(source.format(method=method))
    if loads:
        load_with_handler(folder).model.close()
    else:
        with pytest.raises(ModelError, match="no signature that can be served"):
            load_with_handler(folder)


def test_one_signature_that_cannot_be_served_costs_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = SavedModelMaker().defaults(tmp_path / "m")

    def change(signatures: Any) -> None:
        signatures["scaled"].outputs["y"].name = "nowhere:0"
        signatures["greeting"].inputs["word"].coo_sparse.values_tensor_name = "a:0"

    rewrite_signatures(folder, change)
    with caplog.at_level(logging.WARNING):
        loaded = load_with_handler(folder)
    assert list(loaded.model.signatures) == ["serving_default"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert any('"scaled" is not served: Tensor nowhere:0' in warning for warning in warnings)
    assert any('"greeting" is not served: "word" is sparse' in warning for warning in warnings)
    assert all(str(folder) in warning for warning in warnings)
    loaded.model.close()


def _no_tensor(signature: Any) -> None:
    signature.inputs["x"].ClearField("name")


def _no_such_output(signature: Any) -> None:
    signature.outputs["y"].name = signature.outputs["y"].name.replace(":0", ":7")


def _another_dtype(signature: Any) -> None:
    signature.inputs["x"].dtype = 3


def _resource(signature: Any) -> None:
    signature.outputs["y"].dtype = 20


def _twice(signature: Any) -> None:
    signature.inputs["again"].CopyFrom(signature.inputs["x"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_no_tensor, '"x" names no tensor'),
        (_no_such_output, "does not have output 7"),
        (_another_dtype, r'"x" \(int32, \[\?, 3\]\) has the dtype float32 in the graph'),
        (_resource, '"y" is a DT_RESOURCE'),
        (_twice, "fed more than once"),
    ],
)
def test_why_a_signature_is_not_served(tmp_path: Path, change: Callable[[Any], None], reason: str) -> None:
    folder = SavedModelMaker().double(tmp_path / "m")
    rewrite_signatures(folder, lambda signatures: change(signatures["serving_default"]))
    with pytest.raises(ModelError, match=reason):
        load_with_handler(folder)


def test_an_output_that_is_a_reference_to_a_variable_has_the_variables_dtype(tmp_path: Path) -> None:
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        weights = v1.get_variable("weights", initializer=[1.0, 2.0], use_resource=False)
        x = v1.placeholder(tf.float32, [None, 2], name="x")
        session.run(v1.global_variables_initializer())
        signature = v1.saved_model.signature_def_utils.predict_signature_def(
            {"x": x}, {"weights": weights._ref(), "y": x * weights}
        )
        builder = v1.saved_model.Builder(str(tmp_path / "m"))
        builder.add_meta_graph_and_variables(session, ["serve"], signature_def_map={"serving_default": signature})
        builder.save()
    model = load(tmp_path / "m")
    assert [str(spec) for spec in model.signature.outputs] == ['"weights" (float32, [2])', '"y" (float32, [?, 2])']
    np.testing.assert_array_equal(model({"x": np.ones((1, 2), np.float32)})["weights"], [1, 2])
    model.close()


# What a signature leaves open


def test_a_tensor_without_a_shape_has_an_unknown_rank(tmp_path: Path) -> None:
    folder = SavedModelMaker().double(tmp_path / "m")

    def change(signatures: Any) -> None:
        for tensors in (signatures["serving_default"].inputs, signatures["serving_default"].outputs):
            for info in tensors.values():
                info.ClearField("tensor_shape")

    model = load(rewrite_signatures(folder, change))
    assert [spec.shape for spec in (*model.signature.inputs, *model.signature.outputs)] == [None, None]
    for x in (X, X[0], np.float32(3)):
        np.testing.assert_array_equal(model(model.signature.bind({"x": np.asarray(x)}))["y"], 2 * x)
    model.close()


def test_an_empty_shape_is_a_scalar(saved: Callable[[str], Path]) -> None:
    model = load(saved("counter"))
    assert model.signature.inputs[0].shape == ()
    model.close()


# Inputs with defaults


def test_inputs_with_defaults_may_be_left_out(saved: Callable[[str], Path]) -> None:
    model = load(saved("defaults"))
    shifted, scaled = model.signature, model.signatures["scaled"]
    np.testing.assert_array_equal(model(shifted.bind({"x": X}))["y"], X + 10)
    shift = np.array([[1], [2]], np.float32)
    np.testing.assert_array_equal(model(shifted.bind({"x": X, "shift": shift}))["y"], X + shift)
    np.testing.assert_array_equal(model(scaled.bind({"x": X}), "scaled")["y"], 2 * X)
    np.testing.assert_array_equal(model(scaled.bind({"x": X, "factor": np.array(5, np.float32)}), "scaled")["y"], 5 * X)
    greeting = model.signatures["greeting"]
    words = np.array([b"hello", b"bye"], object)
    assert model(greeting.bind_one(words, cast=True), "greeting")["text"].tolist() == [b"hello!", b"bye!"]
    asked = greeting.bind({"word": words, "end": np.array(b"?", object)})
    assert model(asked, "greeting")["text"].tolist() == [b"hello?", b"bye?"]
    with pytest.raises(BadRequest, match=r'"shift" \(float32, \[\?, 1\], optional\), "x"'):
        shifted.bind({"shift": shift})
    model.close()


def test_the_model_itself_knows_its_defaults(saved: Callable[[str], Path]) -> None:
    model = load(saved("defaults"))
    np.testing.assert_array_equal(model({"x": X})["y"], X + 10)
    np.testing.assert_array_equal(model.native(X)["y"].numpy(), X + 10)
    np.testing.assert_array_equal(model.native(X, shift=np.float32([[1]]))["y"].numpy(), X + 1)
    (default,) = [spec.default for spec in model.signature.inputs if spec.default is not None]
    with pytest.raises(ValueError, match="read-only"):
        default[:] = 0
    with pytest.raises(KeyError, match="x"):
        model({"shift": np.float32([[1]])})
    model.close()


def test_a_default_that_the_input_cannot_take_is_told(tmp_path: Path) -> None:
    folder = SavedModelMaker().defaults(tmp_path / "m")

    def change(signatures: Any) -> None:
        signatures["scaled"].defaults["factor"].dtype = 2
        signatures["serving_default"].defaults["nothing"].dtype = 1  # of no input: TensorFlow Serving ignores it too

    model = load(rewrite_signatures(folder, change))
    assert model.unserved == {"scaled": 'the default of the input "factor" (float32, []) has the dtype float64'}
    assert set(model.signatures) == {"serving_default", "greeting"}
    model.close()


def test_requests_with_and_without_a_default_share_batches_by_rows(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(saved("defaults"), tmp_path / "m")
    loaded = load_with_handler(tmp_path / "m")
    (instance,), batching = loaded.instances, loaded.batching
    assert batching is not None
    asked = [
        request_of(x=X[:1]),
        request_of(x=X[1:], shift=np.float32([[1]])),
        request_of(x=X),  # two rows, for which the default has one: alone, TensorFlow repeats it
        request_of(x=X, shift=np.float32([[1], [2]])),
        request_of("scaled", x=X),
        request_of("scaled", x=X, factor=np.array(5, np.float32)),
    ]
    parts = [batching.part(n, each, instance.handler.preprocess(each)) for n, each in enumerate(asked)]
    batches = list(batching.batches(parts))
    assert [[part.queued for part in batch] for batch in batches] == [[0, 1, 3], [2], [4], [5]]
    outputs: dict[int, Mapping[str, Tensor]] = {}
    for batch in batches:
        requests = [part.request for part in batch]

        def run(inputs: Any, requests: list[Request] = requests) -> Any:
            return instance.handler.run_batch(instance.model, inputs, requests)

        for part, output in zip(batch, batching.run(batch, run), strict=True):
            outputs[part.queued] = output
    expected = [X[:1] + 10, X[1:] + 1, X + 10, X + np.float32([[1], [2]]), 2 * X, 5 * X]
    for number, value in enumerate(expected):
        np.testing.assert_array_equal(outputs[number]["y"], value)
    loaded.model.close()
