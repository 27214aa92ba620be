"""Routing keys, and the top-level walk, against protobuf's own judgement."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
from dl_inference_tfserving import examples
from dl_inference_tfserving.protocols import CLASSIFY, MULTI_INFERENCE, REGRESS
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import BadRequest, ModelNotFound
from dl_inference_core.wire import codecs, messages, openinference, tfserving
from dl_inference_core.wire import seldon as seldon_codec
from dl_inference_core.wire.protocol import (
    OPENINFERENCE_AS_REQUESTED,
    PROTOCOLS,
    QUESTIONS,
    SIGNATURES,
    TIS_PREDICT,
    TRANSFORMS,
    VERSIONS,
    Queueing,
    well_formed,
)
from dl_inference_core.wire.routing_keys import RoutingKey
from tests.methods import METHODS

PADDING = b"\x7a" + b"\xff\xff\x03" + b"p" * 65_535  # field 15, unknown to all: makes a body large enough for the walk
ENVELOPES = [
    (messages.PredictKey, 1),
    (messages.MultiInferenceKey, 1),
    (messages.SeldonKey, 2),
    (messages.ModelInferKey, 1, 2, 4),
]


def seldon(**tags: Any) -> Any:
    message = messages.SeldonMessage()
    for name, tag in tags.items():
        value = message.meta.tags[name]
        if isinstance(tag, str):
            value.string_value = tag
        elif tag is not None:
            value.number_value = tag
    return message.SerializeToString()


def test_methods_name_every_path_that_infers() -> None:
    wpai = "/com.bj58.ailab.dlpredictonline.grpc.WpaiDLPredictOnlineService"
    assert {path: p.name for path, p in METHODS.items()} == {
        f"{wpai}/Predict": "tfserving",
        f"{wpai}/PytorchPredict": "seldon",
        f"{wpai}/CaffePredict": "seldon",
        f"{wpai}/TisPredict": "openinference",
        "/tensorflow.serving.PredictionService/Predict": "tfserving",
        "/tensorflow.serving.PredictionService/Classify": "tfserving_classify",
        "/tensorflow.serving.PredictionService/Regress": "tfserving_regress",
        "/tensorflow.serving.PredictionService/MultiInference": "tfserving_multi_inference",
        "/seldon.protos.Model/Predict": "seldon",
        "/seldon.protos.Seldon/Predict": "seldon",
        "/inference.GRPCInferenceService/ModelInfer": "openinference",
        "/seldon.protos.Generic/TransformInput": "seldon_transform_input",
        "/seldon.protos.Generic/TransformOutput": "seldon_transform_output",
    }
    assert {q.node_method: q.name for q in QUESTIONS} == {
        "/inference.GRPCInferenceService/ModelMetadata": "openinference_metadata",
        "/tensorflow.serving.PredictionService/GetModelMetadata": "tfserving_metadata",
        "/tensorflow.serving.ModelService/GetModelStatus": "tfserving_status",
        "/inference.GRPCInferenceService/ModelReady": "openinference_ready",
    }
    for path in (*METHODS, *(q.node_method for q in QUESTIONS)):
        service, _, method = path[1:].rpartition("/")
        assert method in {m.name for m in messages.pool.FindServiceByName(service).methods}
    assert all(
        METHODS[p.node_method] is p for p in (*PROTOCOLS.values(), CLASSIFY, REGRESS, MULTI_INFERENCE, *TRANSFORMS)
    )
    assert METHODS[TIS_PREDICT].name == "openinference"


def test_each_protocol_finds_its_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs._Chosen, "codecs", codecs.CoreCodecs(PluginOptions()))
    assert {name: p.codec for name, p in PROTOCOLS.items()} == {
        "tfserving": tfserving,
        "seldon": seldon_codec,
        "openinference": openinference,
    }
    assert CLASSIFY.codec is examples.CLASSIFY
    assert REGRESS.codec is examples.REGRESS
    several: Any = MULTI_INFERENCE.codec
    assert several is examples.MULTI_INFERENCE
    assert OPENINFERENCE_AS_REQUESTED.codec is openinference.AS_REQUESTED
    own = (*QUESTIONS, *TRANSFORMS)
    assert not any(p.codec_at for p in own), "these a model answers in its own way"


def fields_at(descriptor: Any, path: tuple[int, ...]) -> list[Any]:
    """The fields on a path of field numbers."""
    found = []
    for number in path:
        found.append(descriptor.fields_by_number[number])
        descriptor = found[-1].message_type
    return found


@pytest.mark.parametrize("protocol", [*METHODS.values(), *QUESTIONS], ids=lambda protocol: protocol.name)
def test_the_fields_of_a_key_stand_where_the_protocol_has_them(protocol: Any) -> None:
    service, _, name = protocol.node_method[1:].rpartition("/")
    message = messages.pool.FindServiceByName(service).methods_by_name[name].input_type
    fields = protocol.key_fields
    if fields is None:
        assert protocol in (MULTI_INFERENCE, *TRANSFORMS), "several models, or a message that must have a payload"
        return
    paths = fields.model, fields.version, fields.label
    names = [".".join(field.name for field in fields_at(message, path)) for path in paths]
    if message.full_name.startswith("tensorflow"):
        assert names == ["model_spec.name", "model_spec.version.value", "model_spec.version_label"]
    elif message.full_name.startswith("inference"):
        assert names in (["name", "version", ""], ["model_name", "model_version", ""])
    else:
        assert names == ["", "", ""]
    tags = fields_at(message, fields.tags)
    assert [field.name for field in tags] == (["meta", "tags"] if protocol.name == "seldon" else [])
    assert fields.task == ("taskId" if tags else "")


@pytest.mark.parametrize("padding", [b"", PADDING])
@pytest.mark.parametrize(
    ("p", "message"),
    [
        (CLASSIFY, messages.ClassificationRequest),
        (REGRESS, messages.RegressionRequest),
        (SIGNATURES, messages.GetModelMetadataRequest),
        (VERSIONS, messages.GetModelStatusRequest),
    ],
)
def test_the_name_stands_in_the_model_spec(p: Any, message: Any, padding: Any) -> None:
    body = message(model_spec={"name": "textcnn-69", "version_label": "stable"}).SerializeToString()
    assert p.read_key(padding + body + padding).model == "textcnn-69"
    with pytest.raises(BadRequest, match=r"^Missing ModelSpec"):
        p.read_key(padding)
    nameless = message(model_spec={"signature_name": "s"}).SerializeToString()
    if p is VERSIONS:
        with pytest.raises(ModelNotFound, match=r"^Could not find any versions of model "):
            p.read_key(padding + nameless)
    else:
        with pytest.raises(BadRequest, match=r"^ModelSpec has no name specified\."):
            p.read_key(padding + nameless)


@pytest.mark.parametrize("padding", [b"", PADDING])
def test_all_tasks_of_a_multi_inference_name_one_model(padding: Any) -> None:
    def body(*names: Any) -> Any:
        tasks = [{"model_spec": {"name": name}, "method_name": "tensorflow/serving/regress"} for name in names]
        return messages.MultiInferenceRequest(tasks=tasks).SerializeToString() + padding

    assert MULTI_INFERENCE.read_key(body("m")) == MULTI_INFERENCE.read_key(body("m", "m", "m")) == RoutingKey("m")
    with pytest.raises(BadRequest, match=r"^All ModelSpecs in a MultiInferenceRequest must access the same model"):
        MULTI_INFERENCE.read_key(body("m", "n"))
    for names in (("m", ""), ("", "m"), ("m", "", "n")):
        with pytest.raises(BadRequest, match=r"^Found ModelSpec with an empty model name\."):
            MULTI_INFERENCE.read_key(body(*names))
    for names in ((), ("",), ("", "")):
        with pytest.raises(BadRequest, match=r"^ModelSpec has no name specified\."):
            MULTI_INFERENCE.read_key(body(*names))


@pytest.mark.parametrize("padding", [b"", PADDING])
def test_a_name_is_the_key(padding: Any) -> None:
    message = messages.PredictRequest()
    message.model_spec.name = "textcnn-69"
    message.inputs["x"].tensor_content = b"\x00" * 600
    assert PROTOCOLS["tfserving"].read_key(padding + message.SerializeToString()).model == "textcnn-69"
    infer = messages.ModelInferRequest(model_name="textcnn-69", raw_input_contents=[b"\x00" * 600])
    assert PROTOCOLS["openinference"].read_key(infer.SerializeToString() + padding).model == "textcnn-69"


@pytest.mark.parametrize("padding", [b"", PADDING])
@pytest.mark.parametrize(
    ("tag", "key"), [(100.0, 100), (0.0, 0), (-7.0, -7), (2.0**53, 2**53), ("69", "69"), ("textcnn", "textcnn")]
)
def test_a_task_id_is_an_int_or_a_string(tag: Any, key: Any, padding: Any) -> None:
    read = PROTOCOLS["seldon"].read_key(padding + seldon(other="x", taskId=tag)).model
    assert read == key
    assert type(read) is type(key)


@pytest.mark.parametrize(
    ("tag", "given"),
    [
        (100.9, "100.9"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (1e300, "1e\\+300"),
        ("", "an empty string"),
        (None, "empty"),
    ],
)
def test_any_other_task_id_is_refused(tag: Any, given: Any) -> None:
    with pytest.raises(BadRequest, match=rf"taskId.* is .*{given}; expected a whole number or a non-empty string"):
        PROTOCOLS["seldon"].read_key(seldon(taskId=tag))


@pytest.mark.parametrize(
    ("kind", "given"),
    [("bool_value", "a bool"), ("null_value", "null"), ("struct_value", "object"), ("list_value", "list")],
)
def test_a_task_id_of_another_kind_is_refused(kind: Any, given: Any) -> None:
    message = messages.SeldonMessage()
    value = message.meta.tags["taskId"]
    if kind.endswith(("struct_value", "list_value")):
        getattr(value, kind).SetInParent()
    else:
        setattr(value, kind, 0)
    with pytest.raises(BadRequest, match=given):
        PROTOCOLS["seldon"].read_key(message.SerializeToString())


@pytest.mark.parametrize("padding", [b"", PADDING])
@pytest.mark.parametrize(
    ("name", "missing"), [("tfserving", "model_spec.name"), ("seldon", ""), ("openinference", "model_name")]
)
def test_a_missing_key_and_malformed_bytes_are_bad_requests(name: Any, missing: Any, padding: Any) -> None:
    """A Seldon message alone may leave its key out: what it goes to is found otherwise."""
    read_key = PROTOCOLS[name].read_key
    if missing:
        with pytest.raises(BadRequest, match=missing):
            read_key(padding)
    else:
        assert read_key(padding).model is None
        assert read_key(padding + seldon(other="x")).model is None
    # The first field of a Seldon message is not read on the way to its key.
    inside = b"\x12\x02\x12\x01" if name == "seldon" else b"\x0a\x01\xff"
    for broken in (b"\x0a\x05ab", b"\xff", b"\x00\x00", b"\x0c", b"\x0e\x00", inside):
        with pytest.raises(BadRequest):
            read_key(padding + broken)


def varints(number: Any) -> Any:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def wire(number: Any, kind: Any, payload: Any) -> Any:
    return varints(number << 3 | kind) + payload


def submessage(number: Any, payload: Any) -> Any:
    return wire(number, 2, varints(len(payload)) + payload)


KEYS = st.one_of(
    st.text(max_size=5).map(lambda text: text.encode()),
    st.binary(max_size=5),
    st.text(max_size=5).map(lambda text: submessage(1, text.encode())),
    st.builds(
        lambda key, value: submessage(2, submessage(1, key) + submessage(2, value)),
        st.sampled_from([b"taskId", b"x", b"\xff"]),
        st.sampled_from([b"\x11" + bytes(8), b"\x1a\x01a", b"\x20\x01", b"\x1a\x01\xff", b"\x32\x00", b"\x11"]),
    ),
)
FIELDS = st.one_of(
    st.builds(submessage, st.integers(1, 3), KEYS),
    st.builds(
        lambda n, v: wire(n, 0, varints(v)), st.sampled_from([1, 2, 7, 15, 16, 2047, 2048]), st.integers(0, 2**64)
    ),
    st.builds(lambda n, v: wire(n, 1, v), st.integers(1, 20), st.binary(min_size=8, max_size=8)),
    st.builds(lambda n, v: wire(n, 5, v), st.integers(1, 20), st.binary(min_size=4, max_size=4)),
    st.builds(lambda n, inner: wire(n, 3, inner + wire(n, 4, b"")), st.integers(1, 4), st.binary(max_size=4)),
    st.builds(wire, st.integers(0, 3), st.integers(0, 7), st.binary(max_size=12)),
    st.sampled_from(
        [b"\x8a\x00\x01a", b"\x0a\x81\x00a", b"\x0a\x81\x80\x80\x80\x00a", b"\x08" + b"\x80" * 9 + b"\x01"]
    ),
    st.sampled_from(
        [b"\x0a" + b"\xff" * 9 + b"\x01", b"\x08" + b"\xff" * 11, b"\x8a\x80\x80\x80\x80\x00\x01a", PADDING]
    ),
    st.binary(max_size=6),
)


def outcome(call: Any, body: Any) -> Any:
    try:
        return call(body)
    except BadRequest as error:
        return type(error)


@settings(max_examples=1500, deadline=None)
@given(st.lists(FIELDS, max_size=8), st.integers(0, 3))
def test_stepping_over_fields_changes_nothing(parts: Any, cut: Any) -> None:
    body = b"".join(parts)
    body = body[: len(body) - cut]
    for envelope, *numbers in ENVELOPES:
        found = messages.fields(body, *numbers)
        if found is not None:
            direct = outcome(lambda b, e=envelope: messages.parse(e, b), body)
            walked = outcome(lambda b, e=envelope: messages.parse(e, b), found)
            if direct is not BadRequest:
                direct.DiscardUnknownFields()
                walked.DiscardUnknownFields()
            assert walked == direct
    if messages.fields(body, 0) is not None:
        assert outcome(lambda b: bool(messages.parse(messages.Nothing, b)), body) is not BadRequest


def test_repeated_keys_follow_protobuf() -> None:
    first, last = messages.PredictRequest(), messages.PredictRequest()
    first.model_spec.name, last.model_spec.name = "first", "last"
    split = messages.PredictRequest()
    split.model_spec.signature_name = "no name in this part"
    body = first.SerializeToString() + PADDING + last.SerializeToString() + split.SerializeToString()
    assert PROTOCOLS["tfserving"].read_key(body).model == "last"
    assert PROTOCOLS["seldon"].read_key(seldon(taskId=1) + PADDING + seldon(x=3) + seldon(taskId=2)).model == 2


def test_many_small_fields_and_endless_varints_are_left_to_protobuf() -> None:
    assert messages.fields(b"\x38\x01" * 1_000_000, 1) is None
    assert messages.fields(b"\x0a" + b"\xff" * 1_000_000, 1) is None
    assert messages.fields(b"\x38" + b"\xff" * 1_000_000, 1) is None
    assert PROTOCOLS["openinference"].read_key(b"\x38\x01" * 100_000 + b"\x0a\x01m").model == "m"
    assert not well_formed(b"\x38" + b"\xff" * 1_000_000)


@pytest.mark.parametrize("padding", [b"", PADDING])
def test_well_formed(padding: Any) -> None:
    answer = messages.PredictResponse()
    answer.outputs["y"].float_val.extend([1.0, 2.0])
    assert well_formed(padding + answer.SerializeToString())
    for broken in (b"\x0a\x05ab", b"\xff", b"\x00\x00", b"\x0c", b"\x0e\x00", b"\x0d\x01"):
        assert not well_formed(padding + broken)
    assert not well_formed(b"")


def asking(padding: bytes = b"", **parameters: dict[str, Any]) -> bytes:
    """A ModelInferRequest with such parameters, each by the name of its kind."""
    message = messages.ModelInferRequest(model_name="m", raw_input_contents=[padding] if padding else [])
    for name, kinds in parameters.items():
        value = message.parameters[name]
        value.SetInParent()
        for kind, content in kinds.items():
            setattr(value, kind, content)
    body: bytes = message.SerializeToString()
    return body


@pytest.mark.parametrize("padding", [b"", b"priority", b"p" * 40_000], ids=["small", "word", "large"])
@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, Queueing()),
        ({"other": {"string_param": "priority"}}, Queueing()),
        ({"priority": {"int64_param": 2}}, Queueing(2)),
        ({"priority": {"uint64_param": 2**64 - 1}}, Queueing(2**64 - 1)),
        ({"priority": {"int64_param": 0}, "timeout": {"int64_param": 0}}, Queueing()),
        ({"timeout": {"int64_param": 1_500_000}, "other": {"bool_param": True}}, Queueing(0, 1.5)),
    ],
)
def test_what_a_request_says_about_its_place_in_the_queue(parameters: Any, expected: Any, padding: bytes) -> None:
    read = PROTOCOLS["openinference"].read_queueing
    assert read is not None
    body = asking(padding, **parameters)
    assert read(body) == read(memoryview(body)) == expected
    assert PROTOCOLS["openinference"].read_key(body).queueing == (parameters != {})


def test_parameters_are_read_where_there_are_many_fields() -> None:
    message = messages.ModelInferRequest.FromString(asking(timeout={"int64_param": 7}))
    for number in range(100):
        message.inputs.add(name=f"x{number}")
    read = PROTOCOLS["openinference"].read_queueing
    assert read is not None
    assert read(message.SerializeToString()) == Queueing(0, 7e-6)


@pytest.mark.parametrize("size", [1, 127, 128, 2020, 2048, 16_384, 3_000_000])
def test_parameters_are_read_wherever_they_stand(size: int) -> None:
    """Libraries write fields in the order of their numbers, but need not."""
    read = PROTOCOLS["openinference"].read_queueing
    assert read is not None
    fields = [asking(), asking(timeout={"int64_param": 7})[3:], asking(b"r" * size)[3:]]
    for order in permutations(fields):
        body = b"".join(order)
        assert read(body) == read(memoryview(body)) == Queueing(0, 7e-6)
        assert PROTOCOLS["openinference"].read_key(body).queueing


@pytest.mark.parametrize("unknown", [b"\x48\x07", b"\x4d1234", b"\xf2\x3f\x01u"], ids=["varint", "four", "number"])
def test_parameters_are_read_beside_fields_that_are_not_known(unknown: bytes) -> None:
    read = PROTOCOLS["openinference"].read_queueing
    assert read is not None
    body = asking(timeout={"int64_param": 7})
    for with_unknown in (unknown + body, body + unknown):
        assert read(with_unknown) == Queueing(0, 7e-6)


@pytest.mark.parametrize("padding", [b"", b"p" * 40_000], ids=["small", "large"])
@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("priority", {"string_param": "high"}, "string_param high; .* 0 or more in int64_param or uint64_param"),
        ("priority", {"int64_param": -1}, "int64_param -1; .* 0 or more"),
        ("priority", {"double_param": 1.0}, "double_param 1.0"),
        ("priority", {}, "no value"),
        ("timeout", {"int64_param": -1}, "int64_param -1; .* 0 or more in int64_param"),
        ("timeout", {"uint64_param": 5}, "uint64_param 5"),
        ("timeout", {"bool_param": True}, "bool_param True"),
    ],
)
def test_a_place_in_the_queue_of_another_kind_is_refused(name: str, given: Any, said: str, padding: bytes) -> None:
    """As Triton's gRPC server refuses it."""
    read = PROTOCOLS["openinference"].read_queueing
    assert read is not None
    with pytest.raises(BadRequest, match=f'parameter "{name}" is {said}'):
        read(asking(padding, **{name: given}))


def test_a_transformation_takes_a_payload() -> None:
    for transform in TRANSFORMS:
        with pytest.raises(BadRequest, match="no payload"):
            transform.read_key(seldon(taskId=1))
        message = messages.SeldonMessage(strData="")
        assert transform.read_key(message.SerializeToString()).model is None
        assert transform.read_key(message.SerializeToString() + seldon(taskId="m")).model == "m"
