"""Real SavedModels on a node and through a gateway, asked by TensorFlow Serving's own client and messages."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from dl_inference_tf_backend.testing import SavedModelMaker
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

TASKS = {
    "half": 21,
    "double": 22,
    "text": 23,
    "counter": 24,
    "several": 25,
    "picky": 26,
    "handled": 27,
    "broken": 28,
    "defaults": 29,
}

HANDLER = '''
import numpy as np

from dl_inference_core.errors import BadRequest
from dl_inference_core.node.handling import Handler


class Words(Handler):
    """Text in; the model three times; text out."""

    def preprocess(self, request):
        if not isinstance(request.payload, str):
            raise BadRequest("expected text")
        return np.array([[len(word) for word in (request.payload.split() + ["", "", ""])[:3]]], np.float32)

    def run_model(self, model, inputs, request):
        for _ in range(3):
            inputs = model({"x": inputs})["y"]
        return inputs

    def postprocess(self, outputs, request):
        return " ".join(str(int(value)) for value in outputs.ravel())
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    maker = SavedModelMaker()
    for version, plus in ((1, 2.0), (3, 3.0)):
        maker.half_plus_two(root / "half" / str(version), plus)
    for kind in ("double", "text", "counter", "several", "picky", "broken", "defaults"):
        (root / kind).mkdir()
        getattr(maker, kind)(root / kind / "1")
    shutil.copytree(root / "double", root / "handled")
    (root / "handled" / "handler.py").write_text(HANDLER)
    for name, task in TASKS.items():
        (root / name / "model.toml").write_text(f"task_id = {task}\n")
    with (root / "half" / "model.toml").open("a") as file:
        file.write("version_labels = {stable = 1, canary = 3, gone = 9}\n")
    return root


@pytest.fixture(scope="module")
def tf_node(serve: Any, folder: Path) -> Any:
    return serve(
        f'[models]\ndirectory = "{folder}"\npoll_interval_ms = 50\n[backends.tensorflow]\nintra_op_threads = 1\n'
    )


@pytest.fixture(scope="module", params=["node", "gateway"])
def asked(request: pytest.FixtureRequest, serve: Any, tf_node: Any, routes: Callable[..., str]) -> Any:
    """The node, called directly, and a gateway in front of it."""
    return tf_node if request.param == "node" else serve(routes(TASKS, tf_node))


@pytest.fixture
def predictions(asked: Any) -> Any:
    return prediction_service_pb2_grpc.PredictionServiceStub(asked.channel)


def predict(name: str, signature: str = "", **inputs: Any) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = name
    request.model_spec.signature_name = signature
    for key, value in inputs.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return request


def example(x: float) -> tf.train.Example:
    return tf.train.Example(
        features=tf.train.Features(feature={"x": tf.train.Feature(float_list=tf.train.FloatList(value=[x]))})
    )


def refused(call: Callable[..., Any], request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        call(request, timeout=20)
    return error.value.code(), error.value.details()


def test_predict_by_version_label_and_newest(predictions: Any) -> None:
    request = predict("half", x=np.float32([[2], [4]]))
    request.output_filter.append("y")
    for choose, version, plus in (
        (lambda spec: None, 3, 3),
        (lambda spec: setattr(spec.version, "value", 1), 1, 2),
        (lambda spec: setattr(spec, "version_label", "stable"), 1, 2),
        (lambda spec: setattr(spec, "version_label", "canary"), 3, 3),
    ):
        choose(request.model_spec)
        answer = predictions.Predict(request, timeout=20)
        spec = answer.model_spec
        assert (spec.name, spec.version.value, spec.signature_name) == ("half", version, "serving_default")
        assert list(answer.outputs["y"].float_val) == [1 + plus, 2 + plus]


def test_predict_by_the_originals_method(asked: Any) -> None:
    method = "/com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService/Predict"
    body = predict("textcnn-21", x=np.float32([[2]])).SerializeToString()
    answer = predict_pb2.PredictResponse.FromString(asked.call(method, body))
    assert list(answer.outputs["y"].float_val) == [4.0]


@pytest.mark.parametrize("context", [False, True])
def test_classify(predictions: Any, context: bool) -> None:
    request = classification_pb2.ClassificationRequest()
    request.model_spec.name = "half"
    request.model_spec.signature_name = "classify"
    if context:
        request.input.example_list_with_context.context.CopyFrom(example(8))
        request.input.example_list_with_context.examples.extend([tf.train.Example(), example(2)])
    else:
        request.input.example_list.examples.extend([example(8), example(2)])
    answer = predictions.Classify(request, timeout=20)
    assert answer.model_spec.version.value == 3
    found = [[(each.label, each.score) for each in row.classes] for row in answer.result.classifications]
    assert found == [[("low", 3.0), ("high", 7.0)], [("low", 6.0), ("high", 4.0)]]


def test_classify_by_scores_or_classes_alone(predictions: Any) -> None:
    for signature, expected in (("scores_only", [("", 6.0), ("", 4.0)]), ("classes_only", [("low", 0), ("high", 0)])):
        request = classification_pb2.ClassificationRequest()
        request.model_spec.name = "half"
        request.model_spec.signature_name = signature
        request.input.example_list.examples.append(example(2))
        (row,) = predictions.Classify(request, timeout=20).result.classifications
        assert [(each.label, each.score) for each in row.classes] == expected


def test_regress_and_several_at_once(predictions: Any) -> None:
    regress = regression_pb2.RegressionRequest()
    regress.model_spec.name = "half"
    regress.model_spec.signature_name = "regress"
    regress.input.example_list.examples.extend([example(8), example(2)])
    answer = predictions.Regress(regress, timeout=20)
    assert [each.value for each in answer.result.regressions] == [7.0, 4.0]
    several = inference_pb2.MultiInferenceRequest(input=regress.input)
    for method in ("classify", "regress"):
        task = several.tasks.add(method_name=f"tensorflow/serving/{method}")
        task.model_spec.name = "half"
        task.model_spec.signature_name = method
    first, second = predictions.MultiInference(several, timeout=20).results
    assert [row.classes[1].score for row in first.classification_result.classifications] == [7.0, 4.0]
    assert [each.value for each in second.regression_result.regressions] == [7.0, 4.0]
    assert [first.model_spec.signature_name, second.model_spec.signature_name] == ["classify", "regress"]


def test_metadata_is_the_saved_models_own(predictions: Any, folder: Path) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "half"
    answer = predictions.GetModelMetadata(request, timeout=20)
    assert (answer.model_spec.name, answer.model_spec.version.value) == ("half", 3)
    found = get_model_metadata_pb2.SignatureDefMap()
    assert answer.metadata["signature_def"].Unpack(found)
    content = saved_model_pb2.SavedModel.FromString((folder / "half/3/saved_model.pb").read_bytes())
    expected = content.meta_graphs[0].signature_def
    assert set(found.signature_def) == set(expected)
    for name, signature in expected.items():
        assert found.signature_def[name] == signature, name


def test_inputs_with_defaults_may_be_left_out_and_metadata_tells_them(predictions: Any) -> None:
    x = np.float32([[1, 2, 3]])
    answer = predictions.Predict(predict("defaults", x=x), timeout=20)
    assert list(answer.outputs["y"].float_val) == [11, 12, 13]
    answer = predictions.Predict(predict("defaults", x=x, shift=np.float32([[1]])), timeout=20)
    assert list(answer.outputs["y"].float_val) == [2, 3, 4]
    answer = predictions.Predict(predict("defaults", "greeting", word=np.array([b"bye"], object)), timeout=20)
    assert list(answer.outputs["text"].string_val) == [b"bye!"]
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "defaults"
    found = get_model_metadata_pb2.SignatureDefMap()
    assert predictions.GetModelMetadata(request, timeout=20).metadata["signature_def"].Unpack(found)
    defaults = {name: dict(signature.defaults) for name, signature in found.signature_def.items()}
    assert {name: list(values) for name, values in defaults.items()} == {
        "serving_default": ["shift"], "scaled": ["factor"], "greeting": ["end"],
    }  # fmt: skip
    assert tf.make_ndarray(defaults["serving_default"]["shift"]).tolist() == [[10]]
    assert tf.make_ndarray(defaults["scaled"]["factor"]).tolist() == 2
    assert tf.make_ndarray(defaults["greeting"]["end"]).tolist() == b"!"


def test_status_of_every_version(asked: Any) -> None:
    models = model_service_pb2_grpc.ModelServiceStub(asked.channel)
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "half"
    state = get_model_status_pb2.ModelVersionStatus.State
    found = models.GetModelStatus(request, timeout=20).model_version_status
    assert [(each.version, each.state, each.status.error_code) for each in found] == [
        (3, state.AVAILABLE, 0),
        (1, state.AVAILABLE, 0),
    ]
    request.model_spec.name = "broken"
    (each,) = models.GetModelStatus(request, timeout=20).model_version_status
    assert (each.version, each.state) == (1, state.END)
    assert each.status.error_code != 0
    assert "cannot be loaded" in each.status.error_message


def test_strings_and_numbers_of_every_kind(predictions: Any) -> None:
    answer = predictions.Predict(predict("text", words=np.array([b"dog", b"\xff\0", b""], object)), timeout=20)
    assert list(answer.outputs["capitals"].string_val) == [b"DOG", b"\xff\0", b""]
    assert tf.make_ndarray(answer.outputs["number"]).tolist() == [1, 2, 2]


def test_a_signature_by_name(predictions: Any) -> None:
    answer = predictions.Predict(predict("several", "add", a=np.float32([1]), b=np.float32([2])), timeout=20)
    assert {name: list(tensor.float_val) for name, tensor in answer.outputs.items()} == {"sum": [3], "difference": [-1]}


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (predict("nobody", x=1.0), "NOT_FOUND", "Servable not found for request: Latest(nobody)"),
        (predict("half", "nosuch", x=np.float32([[1]])), "FAILED_PRECONDITION",
         'Serving signature key "nosuch" not found.'),
        (predict("several", a=1.0), "FAILED_PRECONDITION", 'Serving signature key "serving_default" not found.'),
        (predict("half", z=np.float32([[1]])), "INVALID_ARGUMENT", "input size does not match signature: "),
        (predict("half"), "INVALID_ARGUMENT", "input size does not match signature: "),
        (predict("half", x=np.float64([[1]])), "INVALID_ARGUMENT", "does not take dtype float64"),
        (predict("half", x=np.float32([1])), "INVALID_ARGUMENT", "does not take shape [1]"),
        (predict("picky", x=np.float32([-1])), "INVALID_ARGUMENT", "x is negative"),
        (predict("broken", x=np.float32([[1, 2, 3]])), "UNAVAILABLE", "is not ready"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_tensorflow_servings_words(
    predictions: Any, request_: Any, code: str, words: str
) -> None:
    found, said = refused(predictions.Predict, request_)
    assert found.name == code
    assert words in said


def test_an_unknown_version_label_output_or_method(predictions: Any) -> None:
    request = predict("half", x=np.float32([[1]]))
    request.model_spec.version.value = 7
    assert refused(predictions.Predict, request)[0] is grpc.StatusCode.NOT_FOUND
    assert "Servable not found for request: Specific(half, 7)" in refused(predictions.Predict, request)[1]
    request.model_spec.version_label = "nosuch"
    assert "Unrecognized servable version label: nosuch" in refused(predictions.Predict, request)[1]
    request.model_spec.version_label = "gone"
    assert refused(predictions.Predict, request)[0] is grpc.StatusCode.NOT_FOUND
    request = predict("half", x=np.float32([[1]]))
    request.output_filter.append("nosuch")
    code, said = refused(predictions.Predict, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "output tensor alias not found in signature: " in said
    wrong = classification_pb2.ClassificationRequest()
    wrong.model_spec.name = "half"
    wrong.model_spec.signature_name = "regress"
    wrong.input.example_list.examples.append(example(1))
    code, said = refused(predictions.Classify, wrong)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "Expected classification signature outputs to contain at least one of" in said


def test_a_handler_before_after_and_around_a_saved_model(asked: Any) -> None:
    from dl_inference_core.client import Client

    with Client(asked.address) as client:
        assert client.predict("handled", "to be saved").payload == "16 16 40"


def test_a_version_that_comes_and_goes_while_it_is_asked(
    predictions: Any, folder: Path, wait_for: Callable[..., Any]
) -> None:
    fresh = folder / "double" / str(time.time_ns())
    request = predict("double", x=np.ones((1, 3), np.float32))

    def version() -> int:
        answer = predictions.Predict(request, timeout=20)
        assert list(answer.outputs["y"].float_val) in ([2, 2, 2], [5, 5, 5])
        return int(answer.model_spec.version.value)

    before = version()
    SavedModelMaker().double(fresh, 5.0)
    wait_for("the new version to answer", lambda: version() == int(fresh.name), 20)
    shutil.rmtree(fresh)
    wait_for("the old version to answer", lambda: version() == before, 20)
