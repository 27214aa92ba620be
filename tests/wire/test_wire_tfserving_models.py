"""What a model says of itself, read by TensorFlow's own classes."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dl_inference_core.errors import BadRequest
from dl_inference_core.wire.protocol import SIGNATURES, VERSIONS
from dl_inference_core.wire.routing_keys import RoutingKey
from dl_inference_core.wire.tfserving_models import (
    DescribedSignature,
    check_metadata_request,
    encode_metadata,
    encode_signatures,
    encode_status,
)


@pytest.fixture(scope="module")
def apis() -> Any:
    """The official messages, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow
        from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2
    return SimpleNamespace(tf=tensorflow, **{**vars(get_model_metadata_pb2), **vars(get_model_status_pb2)})


def test_a_question_about_signatures(apis: Any) -> None:
    message = apis.GetModelMetadataRequest(metadata_field=["signature_def", "signature_def"])
    message.model_spec.name = "m"
    message.model_spec.version.value = 3
    check_metadata_request(message.SerializeToString())
    assert SIGNATURES.read_key(message.SerializeToString()) == RoutingKey("m", 3)
    message.model_spec.version_label = "stable"
    assert SIGNATURES.read_key(message.SerializeToString()) == RoutingKey("m", None, "stable")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([], "^GetModelMetadataRequest must specify at least one metadata_field"),
        (["asset"], "^Metadata field asset is not supported"),
        (["signature_def", ""], "^Metadata field  is not supported"),
        (["x" * 1000], "^Metadata field x{100} is not supported"),
    ],
)
def test_a_question_about_anything_else_is_a_bad_request(apis: Any, fields: list[str], said: str) -> None:
    message = apis.GetModelMetadataRequest(metadata_field=fields)
    message.model_spec.name = "m"
    with pytest.raises(BadRequest, match=said):
        check_metadata_request(message.SerializeToString())


def test_a_question_about_versions(apis: Any) -> None:
    message = apis.GetModelStatusRequest()
    message.model_spec.name = "m"
    assert VERSIONS.read_key(message.SerializeToString()) == RoutingKey("m")
    message.model_spec.version.value = -1
    assert VERSIONS.read_key(message.SerializeToString()) == RoutingKey("m", -1)
    message.model_spec.version_label = "stable"
    assert VERSIONS.read_key(message.SerializeToString()) == RoutingKey("m", None, "stable")


@pytest.mark.parametrize("read", [check_metadata_request, VERSIONS.read_key])
def test_malformed_questions_are_bad_requests(read: Any) -> None:
    with pytest.raises(BadRequest, match=r"malformed; expected a tensorflow\.serving\.GetModel"):
        read(b"\x0a\x05a")


STRING, FLOAT = np.dtype(object), np.dtype(np.float32)
DEFAULTS = {
    "flag": np.array(True),
    "words": np.array([[b"a"], [b""]], object),
    "x": np.array([[0.5, 1, 2]], np.float32),
}
DESCRIBED = {
    "serving_default": DescribedSignature(
        method="tensorflow/serving/predict",
        inputs=[("x", "serving_default_x:0", FLOAT, (None, 3)), ("flag", "", np.dtype(np.bool_), ())],
        outputs=[("y", "StatefulPartitionedCall:0", np.dtype(np.int64), None)],
        defaults=DEFAULTS,
    ),
    "classify": DescribedSignature(
        method="tensorflow/serving/classify",
        inputs=[("inputs", "", STRING, (None,))],
        outputs=[("scores", "", None, None)],
        defaults={},
    ),
    "nothing": DescribedSignature(method="my/own", inputs=[], outputs=[], defaults={}),
}


def test_tensorflow_reads_the_signatures(apis: Any) -> None:
    answer = apis.GetModelMetadataResponse.FromString(encode_metadata("m", 7, DESCRIBED))
    assert (answer.model_spec.name, answer.model_spec.version.value, list(answer.metadata)) == (
        "m",
        7,
        ["signature_def"],
    )
    assert answer.metadata["signature_def"].type_url == "type.googleapis.com/tensorflow.serving.SignatureDefMap"
    found = apis.SignatureDefMap()
    assert answer.metadata["signature_def"].Unpack(found)
    assert {name: signature.method_name for name, signature in found.signature_def.items()} == {
        name: signature.method for name, signature in DESCRIBED.items()
    }
    tf = apis.tf
    default = found.signature_def["serving_default"]
    x, flag, y = default.inputs["x"], default.inputs["flag"], default.outputs["y"]
    assert (x.name, tf.as_dtype(x.dtype), tf.TensorShape(x.tensor_shape).as_list()) == (
        "serving_default_x:0",
        tf.float32,
        [None, 3],
    )
    assert (flag.name, tf.as_dtype(flag.dtype), tf.TensorShape(flag.tensor_shape).as_list()) == ("flag", tf.bool, [])
    assert (y.name, tf.as_dtype(y.dtype)) == ("StatefulPartitionedCall:0", tf.int64)
    assert tf.TensorShape(y.tensor_shape).rank is None
    assert set(default.defaults) == set(DEFAULTS)
    for name, value in DEFAULTS.items():
        found_value = tf.make_ndarray(default.defaults[name])
        assert (found_value.dtype, found_value.shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(found_value, value)
    assert not found.signature_def["classify"].defaults
    classify = found.signature_def["classify"]
    assert tf.as_dtype(classify.inputs["inputs"].dtype) == tf.string
    assert classify.outputs["scores"].dtype == 0
    assert not found.signature_def["nothing"].inputs
    assert apis.SignatureDefMap.FromString(encode_signatures(DESCRIBED).SerializeToString()) == found


def test_official_clients_read_the_state_of_versions(apis: Any) -> None:
    body = encode_status([(3, "LOADING", 0, ""), (2, "AVAILABLE", 0, ""), (1, "END", 2, "no weights: naïve")])
    status = apis.GetModelStatusResponse.FromString(body).model_version_status
    State = apis.ModelVersionStatus.State  # noqa: N806
    assert [(each.version, State.Name(each.state)) for each in status] == [
        (3, "LOADING"),
        (2, "AVAILABLE"),
        (1, "END"),
    ]
    assert [(each.status.error_code, each.status.error_message) for each in status] == [
        (0, ""),
        (0, ""),
        (2, "no weights: naïve"),
    ]


@pytest.mark.parametrize("state", ["START", "LOADING", "AVAILABLE", "UNLOADING", "END"])
def test_every_state_has_the_official_number(apis: Any, state: str) -> None:
    (status,) = apis.GetModelStatusResponse.FromString(encode_status([(1, state, 0, "")])).model_version_status
    assert status.state == apis.ModelVersionStatus.State.Value(state)
