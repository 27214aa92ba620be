"""Warm-up requests as TensorFlow's own tools record them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dl_inference_tfserving.recorded import FILE, recorded_requests

from dl_inference_core.config import NamedModel
from dl_inference_core.errors import ModelError
from dl_inference_core.node.loading import Loader, in_words
from dl_inference_core.testing import FakeBackend

HANDLER = """
from dl_inference_core.node.handling import Handler


class Asked(Handler):
    def preprocess(self, request):
        if request.method.name != "PREDICT":
            return {"x": request.payload}
        return super().preprocess(request)

    def run_model(self, model, inputs, request):
        return model(inputs)
"""


def write(folder: Path, *logs: Any) -> Path:
    """The records as `tf.io.TFRecordWriter` writes them."""
    import tensorflow as tf

    file = folder / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for log in logs:
            writer.write(log.SerializeToString())
    return file


def predict(x: Any) -> Any:
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.model_spec.name = "m"
    log.predict_log.request.inputs["x"].CopyFrom(tf.make_tensor_proto(x))
    return log


def load(folder: Path) -> Any:
    backend = FakeBackend()
    Loader(backends={"fake": backend}, handlers={}, recorded=[recorded_requests]).load(NamedModel(path=folder), folder)
    return backend.models[0]


def test_recorded_requests_are_answered_before_the_model_is_ready(tmp_path: Path) -> None:
    from tensorflow_serving.apis import prediction_log_pb2

    FakeBackend.write(tmp_path, inputs={"x": ["float32", [None]]})
    (tmp_path / "handler.py").write_text(HANDLER)
    examples = []
    for kind in ("classify_log", "regress_log"):
        log = prediction_log_pb2.PredictionLog()
        getattr(log, kind).request.input.example_list.examples.add().features.feature["f"].float_list.value.append(1)
        examples.append(log)
    several = prediction_log_pb2.PredictionLog()
    request = several.multi_inference_log.request
    request.input.CopyFrom(examples[0].classify_log.request.input)
    for method in ("classify", "regress"):
        request.tasks.add(method_name=f"tensorflow/serving/{method}").model_spec.signature_name = method
    write(tmp_path, predict(np.float32([1, 2])), *examples, several)
    calls = load(tmp_path).calls
    assert len(calls) == 5
    np.testing.assert_array_equal(calls[0]["x"], np.float32([1, 2]))
    assert [call["x"].tolist() for call in calls[1:]] == 4 * [
        [examples[0].classify_log.request.input.example_list.examples[0].SerializeToString()]
    ]


def test_a_model_without_recorded_requests_is_not_called(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path)
    assert load(tmp_path).calls == []


def test_a_request_that_does_not_fit_fails_the_model(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path, inputs={"x": ["float32", [None]]})
    file = write(tmp_path, predict(np.float32([1])), predict(np.int64([1])))
    with pytest.raises(ModelError, match="warm-up request 2") as error:
        load(tmp_path)
    assert str(file) in str(error.value)
    assert "does not take dtype int64" in in_words(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"short", "ends within a record's head"),
        (struct.pack("<QI", 2**62, 0) + b"x", "ends within a record of"),
        (struct.pack("<QI", 3, 0) + b"\xff\xff\xff" + bytes(4), "malformed"),
        (struct.pack("<QI", 0, 0) + bytes(4), "no Predict, Classify"),
    ],
)
def test_a_damaged_file_fails_the_model(tmp_path: Path, content: bytes, words: str) -> None:
    FakeBackend.write(tmp_path)
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ModelError) as error:
        load(tmp_path)
    assert words in in_words(error.value)


def test_too_many_records_fail_the_model(tmp_path: Path) -> None:
    FakeBackend.write(tmp_path)
    write(tmp_path, *([predict(np.float32([1]))] * 1001))
    with pytest.raises(ModelError, match="over 1000 records"):
        load(tmp_path)
