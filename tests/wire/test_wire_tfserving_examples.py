"""The codecs of Classify, Regress and MultiInference against TensorFlow's own messages and parser of examples."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from dl_inference_tfserving.examples import (
    CLASSIFY,
    MULTI_INFERENCE,
    REGRESS,
    encode_example,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_inference_core.errors import BadRequest, Unimplemented
from dl_inference_core.tensors import Form, Method, Request, Response
from dl_inference_core.wire import messages

METHODS = {"classify": Method.CLASSIFY, "regress": Method.REGRESS}


@pytest.fixture(scope="module")
def tf() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow
    return tensorflow


@pytest.fixture(scope="module")
def apis(tf: Any) -> Any:
    """The official messages, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorflow_serving.apis import classification_pb2, inference_pb2, regression_pb2
    return SimpleNamespace(**{**vars(classification_pb2), **vars(inference_pb2), **vars(regression_pb2)})


def strings(*values: bytes) -> Any:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def example(tf: Any, **features: Any) -> Any:
    made = tf.train.Example()
    for name, values in features.items():
        kind = "bytes_list" if isinstance(values[0], bytes) else "float_list"
        getattr(made.features.feature[name], kind).value.extend(values)
    return made


def asked(count: int = 1, **more: Any) -> Request:
    return Request(payload=strings(*[b""] * count), form=Form.EXAMPLES, model="asked", **more)


# Requests


@pytest.mark.parametrize(("codec", "name"), [(CLASSIFY, "ClassificationRequest"), (REGRESS, "RegressionRequest")])
def test_requests_that_official_clients_build(apis: Any, tf: Any, codec: Any, name: str) -> None:
    examples = [example(tf, x=[1.5]), example(tf, x=[2.5], words=[b"a", b"\xff\0"]), tf.train.Example()]
    message = getattr(apis, name)()
    message.model_spec.name, message.model_spec.signature_name = "m-69", "s"
    message.model_spec.version.value = 3
    message.input.example_list.examples.extend(examples)
    request = codec.decode_request(message.SerializeToString())
    assert (request.model, request.version, request.label, request.signature) == ("m-69", 3, "", "s")
    assert (request.form, request.method) == (Form.EXAMPLES, codec.method)
    assert (request.payload.shape, request.payload.dtype) == ((3,), object)
    assert [tf.train.Example.FromString(body) for body in request.payload] == examples
    message.model_spec.version_label = "stable"
    request = codec.decode_request(message.SerializeToString())
    assert (request.version, request.label) == (None, "stable")


@pytest.mark.parametrize("codec", [CLASSIFY, REGRESS])
def test_a_context_is_in_every_example_and_comes_after_its_own_features(apis: Any, tf: Any, codec: Any) -> None:
    message = apis.ClassificationRequest()
    message.model_spec.name = "m"
    listed = message.input.example_list_with_context
    listed.context.CopyFrom(example(tf, user=[7.0], x=[-1.0]))
    listed.examples.extend([example(tf, x=[1.0]), example(tf, other=[2.0]), tf.train.Example()])
    payload = codec.decode_request(message.SerializeToString()).payload
    merged = [tf.train.Example.FromString(body).features.feature for body in payload]
    assert [features["user"].float_list.value[:] for features in merged] == [[7.0]] * 3
    assert [features["x"].float_list.value[:] for features in merged] == [[1.0], [-1.0], [-1.0]]
    assert [sorted(features) for features in merged] == [["user", "x"], ["other", "user", "x"], ["user", "x"]]
    # As TensorFlow's own parser, which a model has inside, sees them.
    wanted = {name: tf.io.FixedLenFeature([], tf.float32, 0.0) for name in ("user", "x", "other")}
    parsed = tf.io.parse_example(payload, wanted)
    assert {name: values.numpy().tolist() for name, values in parsed.items()} == {
        "user": [7, 7, 7],
        "x": [1, -1, -1],
        "other": [0, 2, 0],
    }


def test_no_context_is_as_good_as_an_empty_one(apis: Any, tf: Any) -> None:
    one = example(tf, x=[1.0])
    message = apis.RegressionRequest()
    message.input.example_list_with_context.examples.append(one)
    assert list(REGRESS.decode_request(message.SerializeToString()).payload) == [one.SerializeToString()]


@pytest.mark.parametrize("codec", [CLASSIFY, REGRESS])
def test_an_empty_input_is_a_bad_request(apis: Any, tf: Any, codec: Any) -> None:
    message = apis.ClassificationRequest()
    message.model_spec.name = "m"
    empty = [message.SerializeToString()]
    message.input.SetInParent()
    empty.append(message.SerializeToString())
    message.input.example_list.SetInParent()
    empty.append(message.SerializeToString())
    message.input.example_list_with_context.context.CopyFrom(example(tf, x=[1.0]))
    empty.append(message.SerializeToString())
    assert len(set(empty)) == 4
    for body in empty:
        with pytest.raises(BadRequest, match=r"Input is empty\."):
            codec.decode_request(body)


@pytest.mark.parametrize(("codec", "name"), [(CLASSIFY, "ClassificationRequest"), (REGRESS, "RegressionRequest")])
@pytest.mark.parametrize("body", [b"\xff", b"\x12\x05ab", b"\x12\x04\x0a\x02\x0a\x05", b"\x0a\x03\x0a\x01\xff"])
def test_malformed_bytes_are_a_bad_request(codec: Any, name: str, body: bytes) -> None:
    with pytest.raises(BadRequest, match=rf"malformed; expected a tensorflow\.serving\.{name}"):
        codec.decode_request(body)


@pytest.mark.parametrize(("codec", "name"), [(CLASSIFY, "ClassificationRequest"), (REGRESS, "RegressionRequest")])
def test_requests_that_official_servers_read(apis: Any, tf: Any, codec: Any, name: str) -> None:
    serialized = example(tf, x=[1.0]).SerializeToString()
    features = {"x": 1.5, "n": [1, 2], "b": True, "words": ["€", b"\xff"], "none": []}
    request = Request(
        payload=[serialized, features], form=Form.EXAMPLES, model=69, signature="s", version=4, label="unsent"
    )
    message = getattr(apis, name).FromString(codec.encode_request(request))
    assert (message.model_spec.name, message.model_spec.signature_name) == ("69", "s")
    assert message.model_spec.version.value == 4
    first, second = message.input.example_list.examples
    assert first.SerializeToString() == serialized
    found = second.features.feature
    assert {key: found[key].WhichOneof("kind") for key in found} == {
        "x": "float_list",
        "n": "int64_list",
        "b": "int64_list",
        "words": "bytes_list",
        "none": None,
    }
    assert found["n"].int64_list.value[:] == [1, 2]
    assert found["b"].int64_list.value[:] == [1]
    assert found["words"].bytes_list.value[:] == ["€".encode(), b"\xff"]
    labelled = codec.encode_request(Request(payload=[{}], form=Form.EXAMPLES, model="m", label="stable"))
    assert getattr(apis, name).FromString(labelled).model_spec.version_label == "stable"


def test_values_of_numpy_are_features_too(tf: Any) -> None:
    made = encode_example(
        {"f": np.array([1.5, 2.5], np.float32), "i": np.arange(3), "b": np.array([True, False]), "s": np.float64(0.5)}
    )
    found = tf.train.Example.FromString(made.SerializeToString()).features.feature
    assert found["f"].float_list.value[:] == [1.5, 2.5]
    assert found["i"].int64_list.value[:] == [0, 1, 2]
    assert found["b"].int64_list.value[:] == [1, 0]
    assert found["s"].float_list.value[:] == [0.5]


def test_floats_are_rounded_to_float32_and_a_feature_without_values_has_no_kind(tf: Any) -> None:
    made = encode_example({"f": [1e39, -1e39, 16777217.0], "none": []})
    found = tf.train.Example.FromString(made.SerializeToString()).features.feature
    assert found["f"].float_list.value[:] == [math.inf, -math.inf, 16777216.0]
    assert found["none"].WhichOneof("kind") is None


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ({"x": np.ones(1)}, "take a sequence of examples"),
        (b"serialized", "take a sequence of examples"),
        ("text", "take a sequence of examples"),
        (None, "take a sequence of examples"),
        (5, "not iterable"),
        (np.ones(3), "an example is a mapping or serialized, no float64"),
        ([[1, 2]], "an example is a mapping or serialized, no list"),
        ([{"x": [1, "a"]}], "Unexpected element type in feature: x; it mixes strings and integers"),
        ([{"x": [1, 2.5]}], "Unexpected element type in feature: x; it mixes floats and integers"),
        ([{"x": None}], "Feature: x has element with unexpected JSON type: Null"),
        ([{"x": [[1]]}], "Feature: x has element with unexpected JSON type: Array"),
        ([{"x": {"a": 1}}], "Feature: x has element with unexpected JSON type: Object"),
        ([{"x": 2**70}], "Feature: x has uint64_t element. Only int64_t is supported"),
    ],
)
@pytest.mark.parametrize("codec", [CLASSIFY, REGRESS])
def test_what_is_no_example_is_a_type_error(codec: Any, payload: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        codec.encode_request(Request(payload=payload, form=Form.EXAMPLES, model="m"))


# Classify's answers

CLASSES = np.array([[b"cat", "Löwe".encode()], [b"", b"\xff"]], object)
SCORES = np.array([[0.25, 0.75], [1.0, 0.0]], np.float32)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ({"classes": CLASSES, "scores": SCORES}, [[("cat", 0.25), ("Löwe", 0.75)], [("", 1.0), ("\ufffd", 0.0)]]),
        ({"scores": SCORES}, [[("", 0.25), ("", 0.75)], [("", 1.0), ("", 0.0)]]),
        ({"classes": CLASSES}, [[("cat", 0.0), ("Löwe", 0.0)], [("", 0.0), ("\ufffd", 0.0)]]),
        ({"scores": SCORES.astype(np.float64)}, [[("", 0.25), ("", 0.75)], [("", 1.0), ("", 0.0)]]),
        ({"scores": SCORES.astype(ml_dtypes.bfloat16)}, [[("", 0.25), ("", 0.75)], [("", 1.0), ("", 0.0)]]),
        ({"scores": np.array([[1, 2], [3, 4]])}, [[("", 1.0), ("", 2.0)], [("", 3.0), ("", 4.0)]]),
        ({"scores": SCORES, "more": np.ones(7)}, [[("", 0.25), ("", 0.75)], [("", 1.0), ("", 0.0)]]),
        ({"scores": np.zeros((2, 0), np.float32)}, [[], []]),
    ],
)
def test_classes_and_scores_go_out(apis: Any, outputs: Any, expected: Any) -> None:
    body = CLASSIFY.encode_response(Response(payload=outputs, model="m", version=2), asked(2))
    answer = apis.ClassificationResponse.FromString(body)
    rows = [[(each.label, each.score) for each in row.classes] for row in answer.result.classifications]
    assert rows == expected
    spec = answer.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("m", 2, "serving_default")


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ({}, "expected the outputs classes, scores or both; got none"),
        ({"y": SCORES, "label": CLASSES}, "expected the outputs classes, scores or both; got y, label"),
        (SCORES, "expected the outputs classes, scores or both; got output"),
        ({"scores": SCORES[0]}, r"of one shape, \[examples, classes\]; got \[2\]"),
        ({"classes": CLASSES, "scores": SCORES[:, :1]}, r"of one shape.*got \[2, 2\] and \[2, 1\]"),
        ({"classes": CLASSES[0], "scores": SCORES}, r"of one shape.*got \[2\] and \[2, 2\]"),
        ({"classes": SCORES}, "expected classes of strings; got float32"),
        ({"scores": CLASSES}, "expected scores of floats; got object"),
        ({"scores": SCORES.astype(np.complex64)}, "expected scores of floats; got complex64"),
        ({"scores": SCORES[:1]}, "expected an answer for each of the 2 examples; got 1"),
        ({"classes": CLASSES[:0]}, "expected an answer for each of the 2 examples; got 0"),
        ({"scores": [[1, 2], [3]]}, "nested lists differ in length"),
    ],
)
def test_what_classify_cannot_hold_is_a_type_error(outputs: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        CLASSIFY.encode_response(Response(payload=outputs), asked(2))


def test_rows_of_different_lengths_in_an_answer_are_a_bad_request(apis: Any) -> None:
    answer = apis.ClassificationResponse()
    answer.result.classifications.add().classes.add(label="a")
    answer.result.classifications.add()
    with pytest.raises(BadRequest, match="different numbers of classes"):
        CLASSIFY.decode_response(answer.SerializeToString())


# Regress's answers


@pytest.mark.parametrize(
    "values",
    [
        np.array([1.5, -2.5], np.float32),
        np.array([[1.5], [-2.5]], np.float32),
        np.array([1.5, -2.5]),
        np.array([[1.5], [-2.5]], np.float16),
    ],
)
def test_values_go_out(apis: Any, values: Any) -> None:
    body = REGRESS.encode_response(Response(payload={"outputs": values, "more": SCORES}), asked(2, signature="r"))
    answer = apis.RegressionResponse.FromString(body)
    assert [each.value for each in answer.result.regressions] == [1.5, -2.5]
    spec = answer.model_spec
    assert (spec.name, spec.HasField("version"), spec.signature_name) == ("asked", False, "r")


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ({}, "expected the output outputs; got none"),
        ({"y": np.ones(2)}, "expected the output outputs; got y"),
        ({"outputs": SCORES}, r"expected floats of shape \[examples\] or \[examples, 1\]; got float32 \[2, 2\]"),
        ({"outputs": np.float32(1)}, r"got float32 \[\]"),
        ({"outputs": np.ones((2, 1, 1))}, r"got float64 \[2, 1, 1\]"),
        ({"outputs": np.array([1, 2])}, r"got int64 \[2\]"),
        ({"outputs": CLASSES[0]}, r"got object \[2\]"),
        ({"outputs": np.ones(3)}, "expected an answer for each of the 2 examples; got 3"),
    ],
)
def test_what_regress_cannot_hold_is_a_type_error(outputs: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        REGRESS.encode_response(Response(payload=outputs), asked(2))


# Round trips

FLOATS = st.floats(width=32, allow_nan=False)
NAMES = st.text(st.characters(codec="utf-8"), max_size=6)
FEATURES = st.dictionaries(
    NAMES,
    st.one_of(
        st.lists(FLOATS, max_size=4),
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
        st.lists(st.binary(max_size=6), min_size=1, max_size=4),
    ),
    max_size=4,
)


def _values(feature: Any) -> list[Any]:
    kind = feature.WhichOneof("kind")
    return [] if kind is None else list(getattr(feature, kind).value)


@pytest.mark.parametrize("codec", [CLASSIFY, REGRESS])
@settings(max_examples=150, deadline=None)
@given(
    examples=st.lists(FEATURES, min_size=1, max_size=5),
    model=st.one_of(NAMES, st.integers(0, 2**63 - 1)),
    version=st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
    label=NAMES,
    signature=NAMES,
)
def test_what_clients_send_is_what_nodes_read(
    codec: Any, examples: Any, model: Any, version: Any, label: Any, signature: Any
) -> None:
    sent = Request(payload=examples, form=Form.EXAMPLES, model=model, version=version, label=label, signature=signature)
    read = codec.decode_request(codec.encode_request(sent))
    assert (read.model, read.version, read.signature) == (str(model), version, signature)
    assert read.label == (label if version is None else "")
    found = [messages.Example.FromString(body).features.feature for body in read.payload]
    assert [{name: _values(f[name]) for name in f} for f in found] == examples
    again = codec.decode_request(codec.encode_request(Request(payload=read.payload, form=read.form, model="m")))
    assert [messages.Example.FromString(body) for body in again.payload] == [
        messages.Example.FromString(body) for body in read.payload
    ]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_classes_and_scores_come_back(data: Any) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 4))
    labels = data.draw(st.lists(NAMES, min_size=rows * columns, max_size=rows * columns))
    scores = data.draw(st.lists(FLOATS, min_size=rows * columns, max_size=rows * columns))
    outputs = {
        "classes": strings(*(label.encode() for label in labels)).reshape(rows, columns),
        "scores": np.array(scores, np.float32).reshape(rows, columns),
    }
    body = CLASSIFY.encode_response(Response(payload=outputs, model="m", version=7), asked(rows))
    read: Any = CLASSIFY.decode_response(body)
    assert (read.model, read.version, list(read.payload)) == ("m", 7, ["classes", "scores"])
    for name, array in outputs.items():
        assert (read.payload[name].shape, read.payload[name].dtype) == (array.shape, array.dtype)
        assert read.payload[name].tolist() == array.tolist()


@settings(max_examples=150, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=9))
def test_values_come_back(values: Any) -> None:
    array = np.array(values, np.float32)
    body = REGRESS.encode_response(Response(payload={"outputs": array}), asked(len(values)))
    read: Any = REGRESS.decode_response(body)
    assert (read.model, read.version) == ("asked", None)
    assert read.payload["outputs"].tobytes() == array.tobytes()


def test_an_answer_without_any_result_is_empty() -> None:
    assert CLASSIFY.decode_response(b"").payload["scores"].shape == (0, 0)
    assert REGRESS.decode_response(b"").payload["outputs"].shape == (0,)


# MultiInference


def several(apis: Any, tf: Any, *tasks: tuple[str, str], model: str = "m") -> Any:
    message = apis.MultiInferenceRequest()
    message.input.example_list.examples.append(example(tf, x=[1.0]))
    for signature, method in tasks:
        task = message.tasks.add(method_name=f"tensorflow/serving/{method}")
        task.model_spec.name, task.model_spec.signature_name = model, signature
    return message


def test_a_request_for_each_task_of_the_same_examples(apis: Any, tf: Any) -> None:
    message = several(apis, tf, ("c", "classify"), ("", "regress"), ("r", "regress"))
    message.tasks[0].model_spec.version_label = "stable"
    first, second, third = MULTI_INFERENCE.decode_requests(message.SerializeToString())
    assert [request.signature for request in (first, second, third)] == ["c", "", "r"]
    assert [request.method for request in (first, second, third)] == [Method.CLASSIFY, Method.REGRESS, Method.REGRESS]
    assert (first.label, second.label, first.model, first.form) == ("stable", "", "m", Form.EXAMPLES)
    assert first.payload is second.payload is third.payload
    assert list(third.payload) == [example(tf, x=[1.0]).SerializeToString()]


@pytest.mark.parametrize(
    ("tasks", "error", "said"),
    [
        ([], BadRequest, "there are no tasks"),
        ([("s", "classify"), ("s", "classify")], BadRequest, "^Duplicate evaluation of signature: s$"),
        ([("s", "classify"), ("s", "regress")], BadRequest, "^Duplicate evaluation of signature: s$"),
        ([("", "regress"), ("", "regress")], BadRequest, "^Duplicate evaluation of signature: serving_default$"),
        ([("", "regress"), ("serving_default", "classify")], BadRequest, "of signature: serving_default$"),
        ([("s", "predict")], Unimplemented, "^Unsupported signature method_name: tensorflow/serving/predict$"),
        ([("s", "regress"), ("t", "guess")], Unimplemented, "method_name: tensorflow/serving/guess$"),
        ([("s", "")], Unimplemented, "method_name: tensorflow/serving/$"),
    ],
)
def test_tasks_that_cannot_be_evaluated(apis: Any, tf: Any, tasks: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        MULTI_INFERENCE.decode_requests(several(apis, tf, *tasks).SerializeToString())


def test_tasks_without_examples_and_malformed_ones(apis: Any, tf: Any) -> None:
    message = several(apis, tf, ("s", "regress"))
    message.ClearField("input")
    with pytest.raises(BadRequest, match=r"Input is empty\."):
        MULTI_INFERENCE.decode_requests(message.SerializeToString())
    with pytest.raises(BadRequest, match=r"expected a tensorflow\.serving\.MultiInferenceRequest"):
        MULTI_INFERENCE.decode_requests(b"\x0a\x05a")


def test_the_answers_of_all_tasks_are_one(apis: Any, tf: Any) -> None:
    message = several(apis, tf, ("c", "classify"), ("r", "regress"))
    requests = MULTI_INFERENCE.decode_requests(message.SerializeToString())
    answers = [
        CLASSIFY.encode_response(Response(payload={"scores": SCORES[:1]}, model="m", version=3), requests[0]),
        REGRESS.encode_response(Response(payload={"outputs": np.ones(1)}, model="m", version=3), requests[1]),
    ]
    whole = apis.MultiInferenceResponse.FromString(MULTI_INFERENCE.join(requests, answers))
    first, second = whole.results
    assert [(r.model_spec.name, r.model_spec.version.value) for r in (first, second)] == [("m", 3)] * 2
    assert [r.model_spec.signature_name for r in (first, second)] == ["c", "r"]
    assert [c.score for c in first.classification_result.classifications[0].classes] == [0.25, 0.75]
    assert second.WhichOneof("result") == "regression_result"
    assert second.regression_result.regressions[0].value == 1.0
