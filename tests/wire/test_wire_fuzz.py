"""Whatever the bytes, a decoder answers or says BadRequest."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest
from dl_inference_tfserving import protocols
from dl_inference_tfserving.examples import (
    CLASSIFY,
    MULTI_INFERENCE,
    REGRESS,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dl_inference_core.errors import BadRequest, ModelNotFound, NodeFailed, Unimplemented
from dl_inference_core.tensors import Form, Method, Request, Response
from dl_inference_core.wire import messages, openinference, seldon, tfserving
from dl_inference_core.wire.protocol import PROTOCOLS, SIGNATURES, VERSIONS, well_formed
from dl_inference_core.wire.routing_keys import RoutingKey
from dl_inference_core.wire.tfserving_models import (
    DescribedSignature,
    encode_metadata,
    encode_status,
)

TENSORS = {"x": np.arange(4, dtype=np.float32).reshape(2, 2), "s": np.array([b"ab", b""], object), "i": np.arange(3)}
TAGS = {"taskId": 69.0, "deep": {"a": [1, None, "b"]}}


def seeds() -> Any:
    for form in (Form.TENSORS, Form.TENSORS_RAW):
        named = Request(payload=TENSORS, form=form, model="m", version=1, outputs=("y",), parameters={"a": 1}, id="i")
        yield openinference.encode_request(named)
        yield openinference.encode_response(Response(payload=TENSORS, version=1), named)
    yield tfserving.encode_request(named)
    yield tfserving.encode_response(Response(payload=TENSORS, version=1), named)
    for payload, form in (
        (TENSORS["x"], Form.TENSOR),
        (TENSORS["x"], Form.NDARRAY),
        (TENSORS["s"], Form.NDARRAY),
        (TENSORS["x"], Form.TFTENSOR),
        (b"bytes", Form.BYTES),
        ("text", Form.TEXT),
        ({"a": [1, {"b": None}]}, Form.JSON),
    ):
        yield seldon.encode_request(Request(payload=payload, form=form, tags=TAGS, names=("a",), id="p"))
    yield from tensorflows()


def tensorflows() -> Any:
    """Requests and answers of TensorFlow Serving's other methods."""
    spec = {"name": "m", "version_label": "stable", "signature_name": "s"}
    examples = Request(
        payload=[{"x": [1.5, 2.5], "n": 3, "words": ["a", "b"]}, {}], form=Form.EXAMPLES, model="m", version=1
    )
    answered = Request(payload=np.array([b"", b""], object), form=Form.EXAMPLES, model="m")
    outputs = {"scores": TENSORS["x"], "classes": np.array([[b"a", b""], [b"b", b"c"]], object)}
    answers = [
        CLASSIFY.encode_response(Response(payload=outputs, version=1), answered),
        REGRESS.encode_response(Response(payload={"outputs": TENSORS["x"][:, 0]}, version=1), answered),
    ]
    yield from (*answers, CLASSIFY.encode_request(examples), REGRESS.encode_request(examples))
    methods = [Request(payload=None, form=Form.EXAMPLES, method=method) for method in (Method.CLASSIFY, Method.REGRESS)]
    yield MULTI_INFERENCE.join(methods, answers)
    listed = messages.ClassificationRequest.FromString(CLASSIFY.encode_request(examples)).input.example_list.examples
    context = {"example_list_with_context": {"examples": listed, "context": listed[0]}}
    yield messages.RegressionRequest(model_spec=spec, input=context).SerializeToString()
    tasks = [
        {"model_spec": spec, "method_name": Method.CLASSIFY.value},
        {"model_spec": {"name": "m"}, "method_name": Method.REGRESS.value},
    ]
    yield messages.MultiInferenceRequest(tasks=tasks, input=context).SerializeToString()
    yield messages.GetModelMetadataRequest(model_spec=spec, metadata_field=["signature_def"]).SerializeToString()
    yield messages.GetModelStatusRequest(model_spec=spec).SerializeToString()
    signature = DescribedSignature(
        method="", inputs=[("x", "x:0", TENSORS["x"].dtype, (None, 3))], outputs=[], defaults={"x": TENSORS["x"]}
    )
    yield encode_metadata("m", 1, {"s": signature})
    yield encode_status([(1, "END", 2, "no weights")])


SEEDS = list(seeds())


@st.composite
def mutated(draw: Any) -> Any:
    body = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body)))
        match draw(st.sampled_from(["set", "insert", "delete", "double"])):
            case "set" if at < len(body):
                body[at] = draw(st.integers(0, 255))
            case "insert":
                body[at:at] = draw(st.binary(max_size=6))
            case "delete":
                del body[at : at + draw(st.integers(1, 9))]
            case "double":
                body[at:at] = body[at : at + draw(st.integers(1, 40))]
    return bytes(body)


BODIES = st.one_of(st.binary(max_size=60), mutated())


@pytest.mark.parametrize("name", PROTOCOLS)
@settings(max_examples=600, deadline=None)
@given(body=BODIES)
def test_decoders_answer_or_say_bad_request(name: str, body: Any) -> None:
    codec = PROTOCOLS[name].codec
    try:
        request = codec.decode_request(body)
    except BadRequest:
        pass
    else:
        if request.model and name != "seldon":
            assert PROTOCOLS[name].read_key(body).model == request.model
        again = codec.decode_request(codec.encode_request(request))
        assert (again.form, again.model, again.id) == (request.form, request.model, request.id)
    with suppress(BadRequest, NodeFailed):  # NodeFailed: Seldon's own status, FAILURE
        codec.decode_response(body)
    with suppress(BadRequest):
        PROTOCOLS[name].read_key(body)
    well_formed(body)


def damaged(random: Random) -> bytes:
    """One of SEEDS to which something has happened, or any bytes."""
    if random.random() < 0.1:
        return random.randbytes(random.randint(0, 60))
    body = bytearray(random.choice(SEEDS))
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(body) + 1)
        new = random.choice((b"", random.randbytes(1), random.randbytes(random.randint(0, 6)), body[:at][-20:]))
        body[at : at + random.choice((0, 1, 1, random.randint(0, 9)))] = new
    return bytes(body)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_a_gateway_reads_of_20000_damaged_requests_is_a_key_or_the_clients_fault(name: str) -> None:
    """P3, 100,000 in all; those that Hypothesis makes are fewer, for what it costs. One of four is decoded whole."""
    protocol, random = PROTOCOLS[name], Random(name)
    for number in range(20_000):
        body = damaged(random)
        with suppress(BadRequest):
            key = protocol.read_key(body).model
            assert isinstance(key, str | int) or (key is None and name == "seldon")
        well_formed(body)
        if number % 4 == 0:
            with suppress(BadRequest):
                protocol.codec.decode_request(body)


@pytest.mark.parametrize(
    ("protocol", "decode"),
    [
        (protocols.MULTI_INFERENCE, MULTI_INFERENCE.decode_requests),
        (SIGNATURES, partial(messages.parse, messages.GetModelMetadataRequest)),
        (VERSIONS, partial(messages.parse, messages.GetModelStatusRequest)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@settings(max_examples=600, deadline=None)
@given(body=BODIES)
def test_other_questions_are_read_or_the_clients_fault(protocol: Any, decode: Any, body: Any) -> None:
    asked = key = None
    with suppress(BadRequest, Unimplemented):
        asked = decode(body)
    with suppress(BadRequest, ModelNotFound):
        key = protocol.read_key(body)
    if isinstance(asked, list) and key is not None:
        assert {request.model for request in asked} == {key.model}
        assert (asked[0].version, asked[0].label) == (key.version, key.label)
    elif asked is not None and key is not None:
        spec = asked.model_spec
        version = spec.version.value if spec.HasField("version") else None
        assert key == RoutingKey(spec.name, version, spec.version_label)
