"""What is read and written by a template is what the codec reads and writes, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dl_inference_core.errors import BadRequest, InferenceError
from dl_inference_core.tensors import Form, Request, Response
from dl_inference_core.wire import messages
from dl_inference_core.wire.protocol import OPENINFERENCE_AS_REQUESTED, PROTOCOLS
from dl_inference_core.wire.templates import Templates

CODECS: dict[str, Any] = {
    **{name: protocol.codec for name, protocol in PROTOCOLS.items()},
    "as requested": OPENINFERENCE_AS_REQUESTED.codec,
}
FORMS = [
    ("openinference", Form.TENSORS_RAW),
    ("openinference", Form.TENSORS),
    ("as requested", Form.TENSORS_RAW),
    ("as requested", Form.TENSORS),
    ("tfserving", Form.TENSORS),
    ("seldon", Form.TENSOR),
    ("seldon", Form.TFTENSOR),
    ("seldon", Form.NDARRAY),
]
DTYPES = ["float32", "float64", "float16", "int64", "int32", "uint8", "int8", "bool"]
SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)


def tensors(draw: Any, name: str, form: Form) -> Any:
    """The payload of a request in that form, and one of the same shapes."""
    if name == "seldon":
        shape = draw(SHAPES.filter(bool))
        dtype = draw(st.sampled_from(DTYPES)) if form is Form.TFTENSOR else "float64"
        return [draw(arrays.arrays(dtype, shape)) for _ in range(2)]
    described = draw(st.dictionaries(st.text(max_size=3), st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=3))
    if form is Form.TENSORS and name != "tfserving":  # Open Inference has float16 as raw contents only
        described = {key: value for key, value in described.items() if value[0] != "float16"}
    return [{key: draw(arrays.arrays(dtype, shape)) for key, (dtype, shape) in described.items()} for _ in range(2)]


def meaning(decode: Any, body: bytes) -> Any:
    """What `decode` makes of `body`, to be compared with another."""
    try:
        decoded = decode(body)
    except InferenceError as error:
        return type(error), str(error)
    named = decoded.payload if isinstance(decoded.payload, Mapping) else {None: decoded.payload}
    values = {
        name: (value.dtype, value.shape, value.tolist() if value.dtype.kind == "O" else value.tobytes())
        if isinstance(value, np.ndarray)
        else value
        for name, value in named.items()
    }
    return values, replace(decoded, payload=None)


def read_by(templates: Templates) -> Callable[[bytes], Request]:
    """What decodes requests as `templates` do."""
    return lambda body: templates.decode_request(body)[0]


def knows(templates: Templates, body: bytes) -> bool:
    """Whether `body` is read by a template."""
    return templates.decode_request(body)[1] is not None


@pytest.mark.parametrize(("name", "form"), FORMS)
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_request_means_the_same(name: str, form: Form, data: st.DataObject) -> None:
    codec = CODECS[name]
    templates = Templates(codec, "m", 1)
    first, second = (
        codec.encode_request(Request(payload=payload, form=form, model="m", id="7", outputs=("y",)))
        for payload in tensors(data.draw, name, form)
    )
    for body in (first, first, second, second):
        assert meaning(read_by(templates), body) == meaning(codec.decode_request, body)
    damaged = bytearray(second)
    if damaged:
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    assert meaning(read_by(templates), bytes(damaged)) == meaning(codec.decode_request, bytes(damaged))


@pytest.mark.parametrize(("name", "form"), FORMS)
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_an_answer_is_written_the_same(name: str, form: Form, data: st.DataObject) -> None:
    codec = CODECS[name]
    templates = Templates(codec, "m", 1)
    shape = (1, 2)
    asked: Any = np.ones(shape) if name == "seldon" else {"x": np.array([[1.25, -3.5]], np.float32)}
    body = codec.encode_request(Request(payload=asked, form=form, model="m", id="7", tags={"a": "b"}))
    templates.decode_request(body)
    request, template = templates.decode_request(body)
    for payload in (*tensors(data.draw, name, form), np.zeros(3, np.float32), {"y": np.array([np.nan, -0.0])}):
        expected = codec.encode_response(
            Response(payload=payload, model="m", version=1, tags=request.tags, id=request.id), request
        )
        for _ in range(2):
            answer = templates.encode_response(payload, request, template)
            assert len(answer) == len(expected)
            assert meaning(codec.decode_response, answer) == meaning(codec.decode_response, expected)


@pytest.mark.parametrize(
    ("name", "form", "dtype"),
    [
        ("openinference", Form.TENSORS_RAW, "float32"),
        ("openinference", Form.TENSORS_RAW, "int64"),
        ("openinference", Form.TENSORS, "float32"),
        ("openinference", Form.TENSORS, "float64"),
        ("as requested", Form.TENSORS_RAW, "float32"),
        ("as requested", Form.TENSORS, "float32"),
        ("tfserving", Form.TENSORS, "float32"),
        ("tfserving", Form.TENSORS, "int64"),
        ("seldon", Form.TENSOR, "float64"),
        ("seldon", Form.TFTENSOR, "float32"),
    ],
)
def test_what_clients_send_is_known(name: str, form: Form, dtype: str) -> None:
    """Requests and their answers, of float32, by templates of which both tensors are part."""
    codec = CODECS[name]
    templates = Templates(codec, "m", 1)
    numbers = np.arange(6, dtype=dtype).reshape(2, 3) + 300
    payload: Any = numbers if name == "seldon" else {"x": numbers, "longer": numbers[:, :2] + 7}
    body, other = (
        codec.encode_request(Request(payload=values, form=form, model="m"))
        for values in (payload, numbers * 2 if name == "seldon" else {key: value * 2 for key, value in payload.items()})
    )
    assert not knows(templates, body)
    assert knows(templates, body)
    request, template = templates.decode_request(other)
    assert template is templates.decode_request(body)[1] is not None
    assert not knows(templates, codec.encode_request(Request(payload=payload, form=form, model="another")))
    outputs = {"y": np.ones((2, 1), np.float32)}
    templates.encode_response(outputs, request, template)
    assert list(template.answers.values()) != [None]


def test_numbers_as_varints_are_not_known() -> None:
    """A byte is its own varint up to 127."""
    codec = PROTOCOLS["openinference"].codec
    templates = Templates(codec, "m", 1)
    small = codec.encode_request(Request(payload={"x": np.array([[5, 9, 77]], np.uint8)}, form=Form.TENSORS, model="m"))
    templates.decode_request(small)
    assert not knows(templates, small)


@pytest.mark.parametrize("name", ["openinference", "tfserving"])
@pytest.mark.parametrize("number", [5, 200])
def test_a_number_of_one_byte_is_not_taken_for_its_varint(name: str, number: int) -> None:
    """200 is a varint of two bytes, the first of which is 200."""
    codec = CODECS[name]
    templates = Templates(codec, "m", 1)
    body = codec.encode_request(Request(payload={"x": np.array([number], np.uint8)}, form=Form.TENSORS, model="m"))
    if name == "tfserving":  # typed, as clients may
        message = messages.PredictRequest.FromString(body)
        message.inputs["x"].ClearField("tensor_content")
        message.inputs["x"].int_val.append(number)
        body = message.SerializeToString()
    templates.decode_request(body)
    for byte in range(256):
        changed = body.replace(bytes([number]), bytes([byte]))
        assert meaning(read_by(templates), changed) == meaning(codec.decode_request, changed)


def test_what_is_used_is_kept() -> None:
    """More names of one length than there are places."""
    codec = PROTOCOLS["openinference"].codec
    templates = Templates(codec, "m", 1)
    payload = {"x": np.arange(4, dtype=np.float32)}
    bodies = [
        codec.encode_request(Request(payload=payload, form=Form.TENSORS_RAW, model="m", outputs=(f"{number:02}",)))
        for number in range(12)
    ]
    for _ in range(20):
        for body in bodies:
            templates.decode_request(body)
    assert sum(knows(templates, body) for body in bodies) == 8


@pytest.mark.parametrize("form", [Form.TENSOR, Form.NDARRAY])
def test_an_integer_that_the_protocol_cannot_hold_is_refused_in_a_known_answer_too(form: Form) -> None:
    codec = PROTOCOLS["seldon"].codec
    templates = Templates(codec, "m", 1)
    body = codec.encode_request(Request(payload=np.arange(3.0), form=form, model="m"))
    for _ in range(3):
        answer: Any = codec.decode_response(templates.encode_response(np.array([7]), *templates.decode_request(body)))
        assert answer.payload.tolist() == [7.0]
    for _ in range(3):
        with pytest.raises(BadRequest, match="the integer 9007199254740993"):
            templates.encode_response(np.array([2**53 + 1]), *templates.decode_request(body))


@pytest.mark.parametrize("change", [{"id": "8"}, {"tags": {"a": "c"}}, {"model": "another"}])
def test_what_a_handler_has_written_in_a_request_is_in_its_answer_alone(change: Any) -> None:
    codec = PROTOCOLS["seldon"].codec
    templates = Templates(codec, "m", 1)
    body = codec.encode_request(Request(payload=np.arange(3.0), form=Form.TENSOR, model="m", id="7", tags={"a": "b"}))
    templates.decode_request(body)
    answer = np.array([1.5, 2.5])
    plain = templates.encode_response(answer, *templates.decode_request(body))
    for _ in range(3):
        request, template = templates.decode_request(body)
        changed = replace(request, **change)
        expected = Response(payload=answer, model="m", version=1, tags=changed.tags, id=changed.id)
        assert templates.encode_response(answer, changed, template) == codec.encode_response(expected, changed)
        assert templates.encode_response(answer, *templates.decode_request(body)) == plain


def test_equal_numbers_in_two_tensors_are_told_apart_later() -> None:
    codec = PROTOCOLS["openinference"].codec
    templates = Templates(codec, "m", 1)
    zeros = np.zeros((1, 4), np.float32)

    def body(second: Any) -> bytes:
        return codec.encode_request(Request(payload={"a": zeros, "b": second}, form=Form.TENSORS_RAW, model="m"))

    templates.decode_request(body(zeros))
    assert not knows(templates, body(zeros))
    templates.decode_request(body(zeros + 1))
    request, template = templates.decode_request(body(zeros))
    assert template is not None
    assert request.payload["b"].tolist() == [[0, 0, 0, 0]]


def test_requests_that_are_never_the_same_are_soon_learnt_no_more() -> None:
    codec = PROTOCOLS["openinference"].codec
    asked = 0

    class Counting:
        def decode_request(self, body: bytes) -> Request:
            nonlocal asked
            asked += 1
            return codec.decode_request(body)

        def __getattr__(self, name: str) -> Any:
            return getattr(codec, name)

    templates = Templates(Counting(), "m", 1)
    numbers = np.arange(4, dtype=np.float32)
    for number in range(4000):
        payload = {"x": numbers + number}
        templates.decode_request(
            codec.encode_request(Request(payload=payload, form=Form.TENSORS_RAW, model="m", outputs=(str(number),)))
        )
    assert 4000 < asked < 4000 + 80


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("openinference", Form.TENSORS_RAW),
        ("openinference", Form.TENSORS),
        ("as requested", Form.TENSORS),
        ("seldon", Form.TENSOR),
        ("seldon", Form.TFTENSOR),
    ],
)
def test_ids_that_are_never_the_same_are_known_and_come_back(name: str, form: Form) -> None:
    codec = CODECS[name]
    templates = Templates(codec, "m", 1)
    outputs = {"y": np.array([[0.5, 7.25]])}
    for number in range(20):
        numbers = np.array([[1.25, -3.5]]) * (number + 1)
        payload: Any = numbers if name == "seldon" else {"x": numbers}
        body = codec.encode_request(Request(payload=payload, form=form, model="m", id=f"request-{number:08}"))
        assert knows(templates, body) is (number > 0)
        request, template = templates.decode_request(body)
        assert meaning(read_by(templates), body) == meaning(codec.decode_request, body)
        response = Response(payload=outputs, model="m", version=1, tags=request.tags, id=f"request-{number:08}")
        answer = templates.encode_response(outputs, request, template)
        assert meaning(codec.decode_response, answer) == meaning(
            codec.decode_response, codec.encode_response(response, request)
        )
    assert template is not None
    assert list(template.answers.values()) != [None]


@pytest.mark.parametrize("id_", ["x", "m", "7", "~~~", "000", "żółw", "\x00", "a" * 126, "a" * 300])
@pytest.mark.parametrize(("name", "form"), [("openinference", Form.TENSORS_RAW), ("seldon", Form.TENSOR)])
def test_an_id_may_stand_elsewhere_too(name: str, form: Form, id_: str) -> None:
    """As the name of the model or of an input, as a length, or as the id that is tried."""
    codec = CODECS[name]
    templates = Templates(codec, "m", 1)
    payload: Any = np.array([1.25, -3.5]) if name == "seldon" else {"x": np.array([1.25, -3.5])}
    for other in (id_, id_, *(letter * len(id_) for letter in "a~0é"), id_):
        body = codec.encode_request(Request(payload=payload, form=form, model="m", id=other))
        assert meaning(read_by(templates), body) == meaning(codec.decode_request, body)
        request, template = templates.decode_request(body)
        expected = Response(payload=payload, model="m", version=1, id=other)
        for _ in range(2):
            assert meaning(codec.decode_response, templates.encode_response(payload, request, template)) == meaning(
                codec.decode_response, codec.encode_response(expected, request)
            )


@pytest.mark.parametrize("id_", [b"\xff\xfe\xfd", b"\xc3\xa9a", b"\x00\x01\x02"])
def test_an_id_that_is_not_text_is_refused_of_a_known_request_too(id_: bytes) -> None:
    codec = PROTOCOLS["openinference"].codec
    templates = Templates(codec, "m", 1)
    payload = {"x": np.array([1.25, -3.5])}
    body = codec.encode_request(Request(payload=payload, form=Form.TENSORS_RAW, model="m", id="abc"))
    for changed in (body, body, body.replace(b"abc", id_)):
        assert meaning(read_by(templates), changed) == meaning(codec.decode_request, changed)


def test_who_writes_in_a_requests_tags_writes_in_no_other() -> None:
    codec = PROTOCOLS["seldon"].codec
    templates = Templates(codec, "m", 1)
    body = codec.encode_request(Request(payload=np.arange(3.0), form=Form.TENSOR, model="m", tags={"user": "a"}))
    for _ in range(3):
        request, _ = templates.decode_request(body)
        assert request.tags["user"] == "a"
        request.tags["user"] = "b"  # type: ignore[index]


def test_there_are_only_so_many_templates() -> None:
    codec = PROTOCOLS["openinference"].codec
    templates = Templates(codec, "m", 1)
    for count in range(1, 700):
        payload = {"x": np.arange(count, dtype=np.float32)}
        body = codec.encode_request(Request(payload=payload, form=Form.TENSORS_RAW, model="m"))
        for _ in range(40):  # which pays for the next
            templates.decode_request(body)
        assert knows(templates, body)
    assert sum(map(len, templates._by_size.values())) <= 256
