"""A message that would cost too much is refused before it is decoded; honest ones are not."""

from __future__ import annotations

import json
import subprocess
import sys
from random import Random
from typing import Any

import numpy as np
import pytest
from dl_inference_tfserving.examples import CLASSIFY, MULTI_INFERENCE, REGRESS

from bench.amplification import ROOTS, Case, cases
from dl_inference_core.errors import BadRequest
from dl_inference_core.tensors import Form, Request
from dl_inference_core.wire import limits, messages, openinference, seldon, tfserving
from dl_inference_core.wire.arrays import field
from dl_inference_core.wire.protocol import QUESTIONS
from tests.methods import METHODS
from tests.wire.test_wire_fuzz import SEEDS, damaged

MB = 1_000_000
ALL = list({case.field: case for root in ROOTS for case in cases(root)}.values())
"""Each field on one of the paths on which it is reached."""


def by_name(case: Case) -> str:
    return f"{case.root.DESCRIPTOR.name}-{case.name}"


@pytest.mark.parametrize("case", ALL, ids=by_name)
def test_any_field_is_refused_when_absurdly_many(case: Case) -> None:
    body = case.body(7 * MB)
    if case.fixed:
        limits.check(case.root.DESCRIPTOR, body)
        return
    with pytest.raises(
        BadRequest, match=r"too many values: its first [0-9]+ bytes are [0-9]+ fields.* more than [0-9]+"
    ):
        messages.parse(case.root, body)


@pytest.mark.parametrize("case", ALL, ids=by_name)
def test_small_messages_are_decoded_whatever_they_hold(case: Case) -> None:
    messages.parse(case.root, case.body(limits.SMALL - 100))


INPUTS, OUTPUTS = field(5, b"") * 4_500_000, field(6, b"") * 4_500_000
NULLS = field(3, field(3, b"\x0a\x02\x08\x00" * 2_000_000))
TENSOR = field(2, field(1, b"x") + field(2, field(2, b"\x12\x00" * 4_500_000)))
EXAMPLES = field(2, field(1, b"\x0a\x00" * 4_500_000))


@pytest.mark.parametrize(
    ("decode", "body", "named"),
    [
        (openinference.decode_request, INPUTS, "inference.ModelInferRequest.inputs"),
        (openinference.decode_request, OUTPUTS, "inference.ModelInferRequest.outputs"),
        (seldon.decode_request, NULLS, "google.protobuf."),
        (tfserving.decode_request, TENSOR, "tensorflow.TensorShapeProto.dim"),
        (CLASSIFY.decode_request, EXAMPLES, "tensorflow.serving.ExampleList.examples"),
        (REGRESS.decode_request, EXAMPLES, "tensorflow.serving.ExampleList.examples"),
        (MULTI_INFERENCE.decode_requests, EXAMPLES, "tensorflow.serving.ExampleList.examples"),
    ],
    ids=["inputs", "outputs", "nulls", "dims", "classify", "regress", "multi-inference"],
)
def test_codecs_refuse_and_name_the_field(decode: Any, body: bytes, named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        decode(body)


@pytest.mark.parametrize("protocol", [*METHODS.values(), *QUESTIONS], ids=lambda protocol: protocol.node_method)
def test_keys_are_not_read_out_of_absurd_messages(protocol: Any) -> None:
    absurd = [b"\xfa\x3f\x00" * 3_000_000, b"\x0a\x00" * 4_500_000]
    if protocol.name.startswith("seldon"):
        absurd.append(field(2, field(2, b"") * 4_000_000))
    for body in absurd:
        with pytest.raises(BadRequest, match="too many values"):
            protocol.read_key(body)


NUMBERS = np.arange(2_400_000, dtype=np.float32)
STRINGS = np.array([b"label %d" % number for number in range(60_000)], object)


@pytest.mark.parametrize("form", [Form.TENSORS, Form.TENSORS_RAW])
@pytest.mark.parametrize(
    "array", [NUMBERS, NUMBERS[:1_200_000].astype(np.int64) % 100, STRINGS], ids=["floats", "integers", "strings"]
)
@pytest.mark.parametrize("codec", [openinference, tfserving])
def test_honest_tensors_pass(codec: Any, array: Any, form: Form) -> None:
    body = codec.encode_request(Request(payload={"x": array}, form=form, model="m"))
    assert np.array_equal(codec.decode_request(body).payload["x"], array)


def test_honest_typed_lists_pass() -> None:
    request = messages.PredictRequest()
    request.inputs["x"].dtype = 9
    request.inputs["x"].tensor_shape.dim.add(size=1_000_000)
    request.inputs["x"].int64_val.extend(range(1_000_000))
    decoded = tfserving.decode_request(request.SerializeToString()).payload["x"]  # type: ignore[index]
    assert np.array_equal(decoded, np.arange(1_000_000))


@pytest.mark.parametrize("shape", [(800_000,), (800, 1000), (400_000, 1), (100, 20, 20, 3)])
def test_an_honest_ndarray_of_numbers_has_any_size(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    names = tuple(f"column {index}" for index in range(100))
    body = seldon.encode_request(Request(payload=array, form=Form.NDARRAY, names=names, tags={"a": 1.0}, id="p"))
    request = seldon.decode_request(body)
    assert np.array_equal(request.payload, array)  # type: ignore[arg-type]
    assert (request.form, request.names, request.tags, request.id) == (Form.NDARRAY, names, {"a": 1.0}, "p")


@pytest.mark.parametrize(
    "rows",
    [[["a", "b c"]] * 15_000, [[True, False]] * 12_000, [[1.0, 2.0], ["a", "b"]] * 8_000, [[1.0] * 4] * 15_000],
    ids=["strings", "bools", "mixed", "numbers"],
)
def test_honest_ndarrays_and_json_pass(rows: Any) -> None:
    body = seldon.encode_request(Request(payload=rows, form=Form.NDARRAY))
    assert len(seldon.decode_request(body).payload) == len(rows)  # type: ignore[arg-type]
    body = seldon.encode_request(Request(payload={"rows": rows}, form=Form.JSON))
    assert seldon.decode_request(body).payload == {"rows": rows}


def test_an_ndarray_that_is_replaced_by_another_payload_is_not_read() -> None:
    numbers = seldon.encode_request(Request(payload=np.ones(1000), form=Form.NDARRAY))
    assert seldon.decode_request(numbers + field(5, b"text")).payload == "text"
    assert np.array_equal(seldon.decode_request(numbers + numbers).payload, np.ones(2000))  # type: ignore[arg-type]


def test_honest_examples_pass() -> None:
    example = {f"feature {index}": index / 3 for index in range(20)} | {"id": 3, "text": "a few words"}
    body = CLASSIFY.encode_request(Request(payload=[example] * 1500, form=Form.EXAMPLES, model="m"))
    assert len(body) > 500_000
    assert len(CLASSIFY.decode_request(body).payload) == 1500  # type: ignore[arg-type]


def test_a_context_is_not_repeated_beyond_measure() -> None:
    context = messages.Example()
    context.features.feature["x"].bytes_list.value.append(b"x" * MB)
    message = messages.ClassificationRequest()
    given = message.input.example_list_with_context
    given.context.CopyFrom(context)
    for _ in range(1000):
        given.examples.add()
    with pytest.raises(BadRequest, match="for 1000 examples would take"):
        CLASSIFY.decode_request(message.SerializeToString())


@pytest.mark.parametrize("decode", [openinference.decode_request, tfserving.decode_request, seldon.decode_request])
def test_a_shape_of_very_many_sizes_is_refused_before_they_are_multiplied(decode: Any) -> None:
    sizes = [2**62] * 5000
    bodies = {
        openinference.decode_request: messages.ModelInferRequest(
            model_name="m", inputs=[{"name": "x", "datatype": "FP32", "shape": sizes}]
        ),
        tfserving.decode_request: messages.PredictRequest(
            inputs={"x": {"dtype": 1, "tensor_shape": {"dim": [{"size": size} for size in sizes]}}}
        ),
        seldon.decode_request: messages.SeldonMessage(data={"tensor": {"shape": [2**30] * 5000}}),
    }
    with pytest.raises(BadRequest, match="5000 dimensions"):
        decode(bodies[decode].SerializeToString())


def test_the_count_takes_what_protobuf_takes() -> None:
    random = Random(7)
    for number in range(3000):
        body = random.choice(SEEDS) if number % 10 == 0 else damaged(random)
        for root in ROOTS[:6]:
            try:
                root.FromString(body)
            except messages.DecodeError:
                continue
            limits.check(root.DESCRIPTOR, body)


def test_overlong_varints_and_groups_are_counted() -> None:
    descriptor = messages.ModelInferRequest.DESCRIPTOR
    overlong = b"\xaa\x80\x00\x80\x00" * 500_000
    grouped = b"\x7b" + b"\x2a\x00" * 1_000_000 + b"\x7c"
    for body in (overlong, grouped):
        messages.ModelInferRequest.FromString(body[:5] if body is overlong else body)
        with pytest.raises(BadRequest, match="too many"):
            limits.check(descriptor, body)


MEASURE = """
import json
from bench.amplification import ROOTS, cases, decoded_bytes, passes
seen = set()
for root in ROOTS:
    for case in cases(root):
        if case.field in seen:
            continue
        seen.add(case.field)
        for size in (20_000, 120_000, 600_000):
            body = case.body(size)
            if not case.fixed and passes(case, body):
                print(json.dumps([root.DESCRIPTOR.full_name, case.field, len(body), decoded_bytes(case, body)]))
"""


def test_decoded_messages_stay_within_their_factor() -> None:
    told = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in told.splitlines()]
    assert len(found) > 100
    roots = {root.DESCRIPTOR.full_name: root.DESCRIPTOR for root in ROOTS}
    beyond = []
    for root, name, size, decoded in found:
        most = limits.most_for(roots[root], size)
        if name.endswith("(packed)"):
            most = 24 * size + MB
        elif not name.endswith("?") and messages.pool.FindFieldByName(name.split(" ")[0]).message_type is None:
            most *= 1.5  # an array of numbers or strings that has just doubled
        if decoded > most + 0.3 * MB:  # which the kernel counts in pages
            beyond.append((name, size, decoded, most))
    assert beyond == []


def test_every_method_has_its_request_among_the_roots() -> None:
    taken = {
        method.input_type.full_name
        for name in ("inference.GRPCInferenceService", "tensorflow.serving.PredictionService", "seldon.protos.Seldon")
        for method in messages.pool.FindServiceByName(name).methods
        if method.input_type.fields
    }
    known = {root.DESCRIPTOR.full_name for root in ROOTS}
    # Of these, the two have nothing but strings.
    assert taken - known == {"inference.ModelReadyRequest", "inference.ModelMetadataRequest"}
